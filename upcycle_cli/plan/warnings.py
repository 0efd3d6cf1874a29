"""What a person should hear about a plan: warnings, and why a recipe promises nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping

from upcycle_cli.checkpoint.header import ITEM_BYTES, TORCH_DTYPES
from upcycle_cli.core.text import any_of
from upcycle_cli.models.engines import Support
from upcycle_cli.models.families import targets_of
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.plan.expressions import Expr, source_names, type_of
from upcycle_cli.plan.merge import Rest
from upcycle_cli.plan.output import Role
from upcycle_cli.plan.plan import Plan
from upcycle_cli.recipe.recipe import (
    SHIPPED,
    TIE_LOGIT_STD,
    NeuronOrder,
    Promise,
    RouterInit,
    Routing,
    ScaleSplit,
)

_FP16_SMALLEST_NORMAL = 2.0**-14
_LEAST_NOISE = {"BF16": 1e-3, "F16": 1e-4}
"""Of a matrix' standard deviation: a quarter of what rounding a weight of that size can cost."""
_NOTABLE_SHARE = 1e-3
"""Of a tensor. A few of its weights always are smaller than the rest by so much that it is nothing
when they vanish."""


def warnings(plan: Plan) -> Iterator[str]:
    """Yield what the user should know before converting, most important first."""
    if plan.expansion is None:
        yield from _upcycling_warnings(plan)
    elif plan.promise is Promise.NONE:
        yield f"this promises no equality with the source: {no_promise(plan)}."
    else:
        yield (
            "copies of an expert are chosen together and get equal gradients, so training leaves "
            "them equal until something tells them apart: noise on their rows or weights, or a "
            "top-k that takes some of them only."
        )
    yield from _engine_warnings(plan)
    yield from plan.card_metadata.notes


def _upcycling_warnings(plan: Plan) -> Iterator[str]:
    recipe, std = plan.recipe, plan.recipe.router_logit_std or 1.0
    if plan.promise is Promise.NONE:
        yield f"{recipe.name} promises no equality with the dense model here: {no_promise(plan)}."
    yield from training_notes(plan)
    tie_matters = plan.promise is Promise.APPROXIMATE and recipe.group_size > 1
    if tie_matters and std < TIE_LOGIT_STD and recipe.expansion > 1:
        yield (
            f"at --router-logit-std {std:g} the softmax rounds different groups to the same "
            f"value, which splits them; {TIE_LOGIT_STD:g} is safer."
        )
    yield from _storage_warnings(plan)
    if len({*plan.family.dense.windows}) > 1:
        yield (
            "some layers have a window and some have none: transformers 4 gives every layer of "
            f"{plan.family.target.model_type} the same, and computes something else."
        )
    if plan.source.config.get("auto_map"):
        yield (
            "the code that the model carries (auto_map) is left out: transformers has "
            f"{plan.family.dense.model_type} itself."
        )


WRONG_WORDS = {
    Support.UNTIED_OR_WRONG: (
        "loads {target} with a head that shares the embedding but computes something else; "
        "--untie-embeddings writes the head."
    ),
    Support.BALANCED_OR_WRONG: (
        "leaves out the factor on gates of {target}, and computes something else; upcycled with "
        "--scale-split balanced the experts hold it."
    ),
    Support.PER_EXPERT_OR_WRONG: (
        "loads {target} with experts in one tensor but computes something else; --expert-layout "
        "per-expert writes them one by one."
    ),
    Support.WRONG: "loads {target} with {routing} but computes something else.",
    Support.WRONG_ON_CPU: (
        "loads {target} with {routing} but computes something else on a CPU, as it does with any "
        "{target}; it was run on no other device."
    ),
    Support.CHANGES: "gives back {target} with other tensors than it was given.",
}
"""How it is said that an engine goes wrong without a word; its name comes before."""


def _engine_warnings(plan: Plan) -> Iterator[str]:
    """Yield which engines make something else of a model in silence."""
    for engine in plan.engines:
        if engine.support in WRONG_WORDS:
            words = WRONG_WORDS[engine.support]
            yield f"{engine.name} {words.format(target=plan.target.title, routing=plan.routing)}"


def training_notes(plan: Plan) -> Iterator[str]:
    """Yield what whoever trains the model should know about its router."""
    recipe, std = plan.recipe, plan.recipe.router_logit_std or 1.0
    # Without virtual groups the gates of the chosen differ, unless one alone is chosen.
    grouped = recipe.virtual_groups or recipe.group_size == 1
    size = "G - K" if recipe.shared_experts else "G"
    sums_to_1 = recipe.routing is not Routing.SOFTMAX_TOPK
    if grouped and sums_to_1 and recipe.top_k == recipe.group_size:
        between = " between groups" if recipe.group_size > 1 else ""
        able = Routing.SOFTMAX_TOPK in plan.family.target.routings
        other = ", with softmax-topk from the start" if able else ""
        tied = (
            " Tie virtual groups (upcycle_cli.training.tie_virtual_groups), with which models "
            "trained better, at a tiny scale."
            if recipe.trains_tied and not plan.family.target.ships_code
            else ""
        )
        yield (
            f"top-k equals {size}, so the gates of a token's one group sum to 1 and the "
            f"language-model loss gives the router no gradient{between}: only balancing trains it. "
            f"With a top-k of {2 * recipe.group_size} or more it gets one as copies move apart"
            f"{other}.{tied}"
            if recipe.expansion > 1
            else "with one group there is nothing to route between."
        )
    if recipe.neuron_order is not NeuronOrder.SLICED and recipe.group_size == 1:
        routed = "routed " if recipe.shared_experts else ""
        yield (
            f"with {size} = 1 every expert has all {routed}neurons of the dense MLP: their order "
            "changes what is stored, and neither what experts compute nor how they train."
        )
    if recipe.splits_soon and not plan.family.target.ships_code:
        yield (
            "the first steps of training split virtual groups, and the dense model's function is "
            "lost, unless upcycle_cli.training.tie_virtual_groups(model) was called before."
        )
    target = plan.family.target
    frozen = [row.name for row in target.extra_tensors if row.frozen]
    if frozen:
        yield (
            f"freeze {' and '.join(frozen)} in training (requires_grad_(False)): a usual step is "
            "so large a part of it that a few lead far from the dense model."
        )
    if target.inside is not None and not target.has_balancing_loss:
        yield (
            f"transformers' {target.outer_type} adds no load-balancing loss in training, whatever "
            "is inside; --target upcycled ships code that does."
        )
    if plan.promise is Promise.APPROXIMATE:
        yield (
            f"softmax-topk equals the dense model only up to the router's logits (std {std:g}). "
            "topk-softmax with a top-k of 2G or more is exact, and trained better where both were "
            "measured, at a tiny scale; with granularity, so did --router-logit-std 1, at the "
            "price of equality."
        )


def _storage_warnings(plan: Plan) -> Iterator[str]:
    std = plan.recipe.router_logit_std or 1.0
    scale = plan.factors.output(plan.family.dense.mlp_kind)
    if plan.expert_dtype == "F16" and scale > 1:
        yield (
            f"in float16 an expert's output, {scale:g} times its part of the "
            "dense MLP's before the gate, can exceed 65504 and become NaN. Use bfloat16 where the "
            "hardware has it, and --verify, which measures it."
        )
    if 0 < plan.recipe.noise < _LEAST_NOISE.get(plan.expert_dtype, 0.0):
        yield (
            f"noise of {plan.recipe.noise:g} is less than {TORCH_DTYPES[plan.expert_dtype]} can "
            "tell of most weights, and rounds most of it away; use more, or --dtype float32."
        )
    itemsize, size = ITEM_BYTES[plan.expert_dtype], plan.expert_size
    if itemsize == 2 and size * itemsize % 16:
        yield (
            f"experts {size} wide have rows of {size * itemsize} bytes; the grouped matrix "
            "product of transformers and others needs multiples of 16. Use another granularity."
        )
    router_dtype = next(tensor.dtype for tensor in plan.tensors if tensor.role is Role.ROUTER)
    row_std = std / math.sqrt(plan.family.dense.hidden_size)
    if router_dtype == "F16" and row_std < _FP16_SMALLEST_NORMAL:
        yield (
            f"router weights of about {row_std:.0e} lose precision in float16; "
            "use bfloat16 or a larger --router-logit-std."
        )
    shared = plan.family.target.shared
    if router_dtype == "F16" and plan.recipe.shared_experts and shared and shared.router:
        yield (
            "float16 has nothing as small as the row of the shared expert's gate, which becomes 0: "
            "exact, but llama.cpp divides by its logit. Use bfloat16 for that."
        )
    rounded = plan.rounded_parts
    if plan.promise is Promise.EXACT and rounded and plan.expert_dtype != "F32":
        yield (
            f"{' and '.join(rounded)} of the experts are multiplied by "
            f"{plan.factors.of(rounded[-1]):g}, no power of two, for c = {plan.factors.c:g}: "
            f"{TORCH_DTYPES[plan.expert_dtype]} rounds them, and the outputs differ by that. "
            f"--dtype float32 keeps them as they are{_in_config(plan)}."
        )


def _in_config(plan: Plan) -> str:
    """Say what else keeps c out of the experts: a config that holds it, where there is one."""
    if plan.recipe.scale_split is ScaleSplit.CONFIG:
        return ""
    if plan.family.target.keys.scale is not None:
        return ", --scale-split config has c in the config"
    shared = plan.recipe.shared_experts
    rows = [NATIVE[name] for name in targets_of(plan.family.dense.family) if name in NATIVE]
    able = [row.model_type for row in rows if row.keys.scale and (row.shared or not shared)]
    if plan.family.dense.family.classes and not shared:
        able.append(SHIPPED)
    return f", and the config of {any_of(able)} holds c itself (--target)" if able else ""


def experts_text(plan: Plan) -> str:
    """Say how many experts there are, how wide, and which of them every token meets."""
    recipe, size = plan.recipe, plan.expert_size
    text = f"{recipe.num_experts} per layer, {recipe.top_k} active, each {size} wide"
    if recipe.shared_experts:
        text += f", beside a shared one {recipe.shared_experts * size} wide"
    return text


def router_text(plan: Plan) -> str:
    """Say where the routers' rows are from, and how large their logits are."""
    recipe, text, found = plan.recipe, plan.inputs.text, plan.calibration
    if recipe.router_init is RouterInit.FILE:
        words = "rows of a file"
    else:
        kind = "rows from prompts" if recipe.router_init is RouterInit.PROMPTS else None
        words = f"{kind or f'{recipe.router_init} rows'}, logit std {recipe.router_logit_std:g}"
    if text is None:
        return words
    words += f", calibrated on {text.name}"
    if found is not None:
        layers = [layer.statistics for layer in found.layers.values()]
        cv = sum(layer.load_cv for layer in layers) / len(layers)
        idle = sum(layer.idle for layer in layers)
        words += f" ({found.tokens} tokens: load varies by {cv:.2f}, {idle} never chosen)"
    return words


def factors_text(plan: Plan, times: str = "") -> str:
    """Say what each matrix is multiplied by, and the gates by the config, if they are."""
    factors, times = plan.factors, f"{times} " if times else ""
    matrices = plan.family.dense.mlp_kind.matrices
    parts = [f"{matrix} {times}{getattr(factors, matrix):g}" for matrix in matrices]
    if factors.config != 1.0:
        parts.append(f"gates {times}{factors.config:g} ({plan.family.target.keys.scale})")
    shared = plan.family.target.shared
    if plan.recipe.shared_experts and shared and shared.down_factor != 1.0:
        parts.append(f"down of the shared expert {times}{shared.down_factor:g}")
    return ", ".join(parts)


def merged_text(plan: Plan) -> tuple[str, str]:
    """Say which virtual groups are of which model, and whose all else is; of several models."""
    assert plan.merge is not None
    groups = plan.merge.of_groups(plan.recipe.expansion)
    words = [
        f"of {source.name}: {', '.join(str(g) for g, of in enumerate(groups) if of == number)}"
        for number, source in enumerate(plan.sources)
        if number in groups
    ]
    mean = plan.merge.rest is Rest.MEAN
    return (
        f"groups {'; '.join(words)}",
        f"the mean of all {len(plan.sources)} models'" if mean else f"{plan.source.name}'s",
    )


ORDER_TEXTS = {
    NeuronOrder.SLICED: "as the dense MLP has them, the same in each virtual group",
    NeuronOrder.SHUFFLED: "in an order of its own in each virtual group but the first, all exact",
    NeuronOrder.CLUSTERED: "those together that are active together, the same in each virtual "
    "group, exact",
    NeuronOrder.FILE: "in the orders of a file, all exact",
}
"""Which neurons the experts of a group get, in words."""


def perturbed_text(plan: Plan) -> str:
    """Say what every expert draws for itself."""
    recipe = plan.recipe
    if recipe.noise:
        return f"noise of {recipe.noise:g} × the standard deviation of each matrix"
    count = recipe.reinit_count(plan.expert_size)
    return f"{count} of {plan.expert_size} neurons drawn anew in each"


def no_promise(plan: Plan) -> str:  # noqa: PLR0911 - a reason each
    """Say in words why a plan promises nothing."""
    if plan.expansion is not None:
        expand, source = plan.expansion.growth.expand, plan.expansion.experts.top_k
        return f"top-k {plan.top_k} is not {expand} times the source's {source}"
    recipe, factors, kind = plan.recipe, plan.factors, plan.family.dense.mlp_kind
    if plan.merge is not None:
        return "its experts are those of several models"
    if recipe.perturbed:
        return f"the experts differ from the dense MLP, {perturbed_text(plan)}"
    if not recipe.picks_whole_groups:
        size = "G - K" if recipe.shared_experts else "G"
        return f"top-k {recipe.top_k} is not a multiple of {size} = {recipe.group_size}"
    if not recipe.virtual_groups and recipe.group_size > 1:
        return "without virtual groups a token does not get every shard of the dense MLP"
    if factors.gate != 1.0:
        return f"the gate is scaled (× {factors.gate:.4g}), and a gated MLP is not linear in it"
    if kind.degree == 0 and factors.up != 1.0:
        return f"up is scaled (× {factors.up:.4g}), and the activation is not linear"
    std = recipe.router_logit_std
    uneven = recipe.routing is Routing.SOFTMAX_TOPK and recipe.top_k < recipe.num_experts
    if uneven and std is None:
        return "softmax-topk weighs by the router's logits, and those of given rows can be any"
    if uneven and std is not None and std > recipe.largest_approximate_std:
        return f"with router logits of standard deviation {std:g} the gates are far from equal"
    scale = factors.output(kind) * factors.config
    return f"the experts are scaled by {scale:.4g} in all, not by what the routing needs"


def vanished_weights(plan: Plan, counts: Mapping[Expr, int]) -> str | None:
    """Say that many weights became zero in the output's dtype; `counts` has how many, by part."""
    lost: Counter[tuple[str, str]] = Counter()
    for expr, count in counts.items():
        for name in source_names(expr):
            lost[name, TORCH_DTYPES[type_of(expr).dtype]] += count
    shares = {
        key: share
        for key, count in lost.items()
        if (share := count / plan.entry(key[0]).num_elements) >= _NOTABLE_SHARE
    }
    if not shares:
        return None
    name, dtype = max(shares, key=lambda key: shares[key])
    others = len(shares) - 1
    more = f" (and part of {others} other tensor{'s' * (others > 1)})" if others else ""
    wider = "float32" if dtype == "bfloat16" else "bfloat16 or float32"
    return (
        f"{100 * shares[name, dtype]:.3g} % of {name}{more} becomes zero in {dtype}, which has "
        f"nothing as small: use --dtype {wider}."
    )
