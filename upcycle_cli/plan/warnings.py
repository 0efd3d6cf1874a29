"""Warnings: what the user should know before converting, and before training the result.

A warning says what happens and what to do about it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from upcycle_cli.checkpoint.header import ITEM_BYTES, TORCH_DTYPES
from upcycle_cli.models.engines import Support
from upcycle_cli.plan.expressions import Expr, source_names, type_of
from upcycle_cli.plan.plan import Plan
from upcycle_cli.recipe.recipe import TIE_LOGIT_STD, Promise, Routing

_LEAST_NOISE = {"BF16": 1e-3, "F16": 1e-4}
"""A quarter of a weight's rounding error, relative to the matrix's standard deviation."""
_NOTABLE_SHARE = 1e-3
"""In every tensor a smaller share of the weights is so tiny that losing it does not matter."""

SILENTLY_WRONG = {
    *(Support.UNTIED_OR_WRONG, Support.BALANCED_OR_WRONG, Support.PER_EXPERT_OR_WRONG),
    *(Support.WRONG, Support.WRONG_ON_CPU, Support.CHANGES),
}
"""What an engine does without an error."""


def warnings(plan: Plan) -> Iterator[str]:
    """Yield what the user should know before converting, most important first."""
    if plan.promise is Promise.NONE:
        made, source = ("this", "source") if plan.growing else (plan.recipe.name, "dense model")
        yield f"{made} promises no equality with the {source}: {plan.why_no_promise}."
    elif plan.growing:
        yield (
            "training keeps the copies of an expert equal, since they get equal gradients. Add "
            "noise to their router rows or weights, or use a top-k that chooses only some of them."
        )
    if plan.growing is None:
        yield from training_warnings(plan)
        yield from _storage_warnings(plan)
        yield from _source_warnings(plan)
    for engine in plan.engines:
        if engine.support in SILENTLY_WRONG:
            yield f"{engine.name} with {plan.target.title} and {plan.routing}: {engine.support}."
    yield from plan.card_metadata.notes


def training_warnings(plan: Plan) -> Iterator[str]:
    """Yield what to know about the router before training the model."""
    recipe, target = plan.recipe, plan.target
    # Without virtual groups the gates of the chosen experts differ, unless only one is chosen.
    grouped = recipe.virtual_groups or recipe.group_size == 1
    if grouped and recipe.routing is not Routing.SOFTMAX_TOPK and recipe.top_k == recipe.group_size:
        yield _no_gradient(plan)
    if recipe.trains_tied and recipe.routing is Routing.SOFTMAX_TOPK and not target.ships_code:
        yield (
            "the first steps of training split virtual groups, which loses the dense model's "
            "function. Call upcycle_cli.training.tie_virtual_groups(model) before training."
        )
    frozen = [row.name for row in target.extra_tensors if row.frozen]
    if frozen:
        yield (
            f"freeze {' and '.join(frozen)} in training (requires_grad_(False)): its values are so "
            "small that a few optimizer steps would change the model completely."
        )
    if target.inside is not None and not target.has_balancing_loss:
        yield (
            f"transformers' {target.outer_type} adds no load-balancing loss in training. The code "
            "that `target` upcycled ships does."
        )
    if plan.promise is Promise.APPROXIMATE:
        yield (
            "softmax-topk equals the dense model only up to the router's logits (std "
            f"{recipe.router_logit_std:g}). topk-softmax with a top-k of at least 2G is exact, and "
            "trained better in our study of a tiny model."
        )
        std = recipe.router_logit_std or 1.0
        if recipe.group_size > 1 and recipe.expansion > 1 and std < TIE_LOGIT_STD:
            yield (
                f"at `router_logit_std` {std:g} the softmax rounds different groups to the same "
                f"value, which splits them. Use {TIE_LOGIT_STD:g} or more."
            )


def _no_gradient(plan: Plan) -> str:
    recipe, target = plan.recipe, plan.target
    if recipe.expansion == 1:
        return "with one group there is nothing to route between."
    size = "G - K" if recipe.shared_experts else "G"
    between = " between groups" if recipe.group_size > 1 else ""
    remedy = f"Use a top-k of {2 * recipe.group_size} or more"
    if Routing.SOFTMAX_TOPK in target.routings:
        remedy += ", or softmax-topk"
    if recipe.trains_tied and not target.ships_code:
        remedy += ". Otherwise tie virtual groups (upcycle_cli.training.tie_virtual_groups)"
    return (
        f"top-k equals {size}, so the gates of a token's one group sum to 1, and the "
        f"language-model loss gives the router no gradient{between}. {remedy}."
    )


def _storage_warnings(plan: Plan) -> Iterator[str]:
    recipe, dtype, size = plan.recipe, plan.expert_dtype, plan.expert_size
    scale = plan.factors.output(plan.family.dense.mlp_kind)
    if dtype == "F16" and scale > 1:
        yield (
            f"scaling makes the outputs of experts {scale:g} times larger, and float16 overflows "
            "above 65504. Use bfloat16, or check with `verify=True`."
        )
    if 0 < recipe.noise < _LEAST_NOISE.get(dtype, 0.0):
        words = f"{TORCH_DTYPES[dtype]} rounds most of a noise of {recipe.noise:g} away"
        yield f"{words}. Use more noise, or `dtype` float32."
    if ITEM_BYTES[dtype] == 2 and size * 2 % 16:
        yield (
            f"rows of experts {size} wide have {size * 2} bytes, but the grouped matrix product of "
            "transformers needs multiples of 16. Use another granularity."
        )
    if plan.promise is Promise.EXACT and plan.rounded_parts and dtype != "F32":
        part = plan.rounded_parts[-1]
        yield (
            f"the factor {plan.factors.of(part):g} on the experts' {part} is not a power of two, "
            f"so {TORCH_DTYPES[dtype]} rounds the weights, and outputs differ slightly. Use "
            "`dtype` float32, or `scale_split` config if the target has it."
        )


def _source_warnings(plan: Plan) -> Iterator[str]:
    if len({*plan.family.dense.windows}) > 1:
        yield (
            "only some layers have a sliding window, but transformers 4 treats all layers of "
            f"{plan.target.model_type} alike and computes something else. Use transformers 5."
        )
    if plan.source.config.get("auto_map"):
        yield (
            "the model's own code (auto_map) is left out, since transformers itself has "
            f"{plan.family.dense.model_type}."
        )


def vanished_weights(plan: Plan, counts: Mapping[Expr, int]) -> str | None:
    """Warn if many weights became zero in the output's dtype; `counts` has their number."""
    lost: Counter[tuple[str, str]] = Counter()
    for expr, count in counts.items():
        for name in source_names(expr):
            lost[name, TORCH_DTYPES[type_of(expr).dtype]] += count
    shares = {key: count / plan.entry(key[0]).num_elements for key, count in lost.items()}
    name, dtype = max(shares, key=lambda key: shares[key], default=("", ""))
    if shares.get((name, dtype), 0.0) < _NOTABLE_SHARE:
        return None
    wider = "float32" if dtype == "bfloat16" else "bfloat16 or float32"
    return (
        f"{100 * shares[name, dtype]:.3g} % of {name} is too small for {dtype} and becomes zero. "
        f"Use `dtype` {wider}."
    )
