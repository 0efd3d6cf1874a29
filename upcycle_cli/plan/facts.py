"""What the user should know of a plan: its facts, for the table and the model card, and warnings.

A warning says what happens and what to do about it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

from upcycle_cli.checkpoint.checkpoint import ADAPTER_PREFIX, tensor_of
from upcycle_cli.checkpoint.header import ITEM_BYTES, TORCH_DTYPES
from upcycle_cli.core.display import Row
from upcycle_cli.core.text import counted, parameter_text, size_text
from upcycle_cli.models.engines import SILENTLY_WRONG, support_lines
from upcycle_cli.models.layers import format_layers
from upcycle_cli.plan.expressions import Expr, held, source_names, type_of
from upcycle_cli.plan.merge import NonExpertWeights
from upcycle_cli.plan.plan import Growing, Plan
from upcycle_cli.recipe.recipe import TIE_LOGIT_STD, NeuronOrder, Promise, RouterInit, Routing

_LEAST_NOISE = {"BF16": 1e-3, "F16": 1e-4}
"""A quarter of a weight's rounding error, relative to the matrix's standard deviation."""
_NOTABLE_SHARE = 1e-3
"""In every tensor a smaller share of the weights is so tiny that losing it does not matter."""

_ORDERS: Mapping[str, str] = {
    NeuronOrder.SHUFFLED: "shuffled in each virtual group but the first, exact",
    NeuronOrder.CLUSTERED: "clustered by common activity, alike in each virtual group, exact",
    NeuronOrder.FILE: "permuted by the given file, exact",
}


def facts(plan: Plan) -> dict[str, str]:
    """Return the properties of a plan in words, in the order to show them."""
    grown = plan.growing
    found = dict(_experts_of_growth(plan, grown) if grown else _experts_of_recipe(plan))
    if len(plan.layers) < plan.num_layers:
        layers = format_layers(plan.layers)
        rest = "; sparse MLPs stay dense" * (not grown and "sparse" in plan.family.dense.kinds)
        found["MoE layers"] = f"{len(plan.layers)} of {plan.num_layers}: {layers}{rest}"
    total, active = parameter_text(plan.total_parameters), parameter_text(plan.active_parameters)
    before = f"{'source' if grown else 'dense'} {parameter_text(plan.dense_parameters)}"
    found["parameters"] = f"{total}, {active} active ({before})"
    if not grown:
        flops = f"{parameter_text(plan.flops_per_token, 'G')} ({plan.flops_ratio:.2f} × dense)"
        found["FLOPs per token"] = f"{flops}, attention scores left out"
    found["size"] = f"{size_text(plan.nbytes)} in {counted(len(plan.shards), 'shard')}"
    if plan.source.adapter_text:
        found["adapter"] = plan.source.adapter_text
    if fp8 := [model for model in plan.sources if model.dequantized_to is not None]:
        of = "" if len(fp8) == len(plan.sources) else f" of {', '.join(m.name for m in fp8)}"
        words = f"computed in {fp8[0].dequantized_to}; the output is not quantised"
        found["source weights"] = f"FP8{of}, {words}"
    if not grown:
        found |= _weights_of_recipe(plan)
    found["promise"] = _promise(plan)
    if plan.dropped:
        reasons = "; ".join(sorted({*plan.dropped.values()}))
        found["left out"] = f"{counted(len(plan.dropped), 'tensor')}: {reasons}"
    return found


def plan_rows(plan: Plan) -> list[Row]:
    """Return the table of a plan: its facts, and the engines that run the output."""
    rows: list[Row] = [(key, [text]) for key, text in facts(plan).items()]
    return [*rows, ("engines", support_lines(plan.engines))]


def _experts_of_growth(plan: Plan, growing: Growing) -> Iterator[tuple[str, str]]:
    yield "model", f"{plan.target.title}, each expert duplicated {growing.expand} times"
    experts = f"{growing.source_num_experts} → {plan.num_experts} per layer"
    active = f"{growing.source_top_k} → {plan.top_k} active, {plan.routing}"
    yield "experts", f"{experts}, {active}, each {plan.expert_size} wide"


def _experts_of_recipe(plan: Plan) -> Iterator[tuple[str, str]]:
    recipe, merge = plan.recipe, plan.merge
    yield "model", f"{plan.family.dense.family.title} → {plan.target.title}"
    yield "recipe", f"{recipe.name}, {recipe.routing}, seed {recipe.seed}"
    text = f"{plan.num_experts} per layer, {plan.top_k} active, each {plan.expert_size} wide"
    if recipe.shared_experts:
        text += f", beside a shared one {recipe.shared_experts * plan.expert_size} wide"
    yield "experts", text
    if merge is not None:
        groups = merge.of_groups(recipe.expansion)
        found = (
            f"of {source.name}: {', '.join(str(g) for g, model in enumerate(groups) if model == n)}"
            for n, source in enumerate(plan.sources)
            if n in groups
        )
        yield "experts from", f"groups {'; '.join(found)}"
        mean = merge.rest is NonExpertWeights.MEAN
        others = f"the mean of all {len(plan.sources)} models'" if mean else f"{plan.source.name}'s"
        yield "other weights", f"attention, norms, embeddings: {others}"


def _weights_of_recipe(plan: Plan) -> Iterator[tuple[str, str]]:
    recipe, factors, shared = plan.recipe, plan.factors, plan.target.shared
    parts = [f"{name} × {factors.of(name):g}" for name in plan.family.dense.mlp_kind.matrices]
    if factors.config != 1.0:
        parts.append(f"gates × {factors.config:g} ({plan.target.keys.scale})")
    if recipe.shared_experts and shared and shared.down_factor != 1.0:
        parts.append(f"down of the shared expert × {shared.down_factor:g}")
    yield "scale factors", f"{', '.join(parts)} ({'rounded' if plan.rounded_to else 'lossless'})"
    if recipe.neuron_order in _ORDERS:
        yield "neurons", _ORDERS[recipe.neuron_order]
    if recipe.perturbed:
        yield "perturbation", recipe.perturbation
    yield "router", _router(plan)


def _router(plan: Plan) -> str:
    recipe, text, found = plan.recipe, plan.inputs.text, plan.calibration
    words = "rows of a file"
    if recipe.router_init is RouterInit.PROMPTS:
        words = f"rows from prompts, logit std {recipe.router_logit_std:g}"
    elif recipe.router_init is not RouterInit.FILE:
        words = f"{recipe.router_init} rows, logit std {recipe.router_logit_std:g}"
    if text is not None:
        words += f", calibrated on {text.name}"
    if found is not None:
        layers = [layer.statistics for layer in found.layers.values()]
        cv = sum(layer.load_cv for layer in layers) / len(layers)
        idle = sum(layer.idle for layer in layers)
        words += f" ({found.tokens} tokens: expert load varies by {cv:.2f}, {idle} never chosen)"
    if not recipe.virtual_groups:
        return f"{words}, one row per expert"
    return f"{words}, {counted(recipe.expansion, 'virtual group')} of {recipe.group_size}"


def _promise(plan: Plan) -> str:
    match plan.promise:
        case Promise.EXACT:
            origin = "source" if plan.growing else "dense model"
            rounding = f", rounded to {plan.rounded_to}" if plan.rounded_to else ""
            return f"exact: the function of the {origin}{rounding}"
        case Promise.APPROXIMATE:
            std = plan.recipe.router_logit_std
            return f"approximate: equal up to the router logits (std {std:g})"
        case Promise.NONE:
            return f"none: {plan.why_no_promise}"


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
        yield from _unused_adapters(plan) if plan.merge else ()
        yield from training_warnings(plan)
        yield from _storage_warnings(plan)
        if len({*plan.family.dense.windows}) > 1:
            words = "only some layers have a sliding window, but transformers 4 treats all layers"
            kind = f"of {plan.target.model_type} alike"
            yield f"{words} {kind} and computes something else. Use transformers 5."
        if plan.source.config.get("auto_map"):
            words = "the model's own code (auto_map) is left out, since transformers itself has"
            yield f"{words} {plan.family.dense.model_type}."
    yield from _wrong_software(plan)
    yield from plan.card_metadata.notes
    if left_out := plan.source.storage.left_out():
        words = "links out of the source are not copied. Put the files themselves there"
        yield f"{', '.join(left_out)}: {words}, if they belong there."


def _unused_adapters(plan: Plan) -> Iterator[str]:
    used = {name for tensor in plan.tensors for name in source_names(tensor.expr)}
    for number, model in enumerate(plan.sources[1:], 1):
        held = () if model.adapter is None else model.adapter.stored
        left = [name for name in held if tensor_of(number, ADAPTER_PREFIX + name) not in used]
        if left:
            words = f"{model.name} gives experts only, so {counted(len(left), 'tensor')} of its"
            yield f"{words} adapter are left out, such as {left[0]}. `rest` mean uses all."


def _wrong_software(plan: Plan) -> Iterator[str]:
    """Yield which software computes something else, with a target of the model that it runs."""
    wrong = [e for e in (*plan.engines, *plan.trainers) if e.support in SILENTLY_WRONG]
    if not wrong:
        return
    from upcycle_cli.models.overview import becomes, instead

    found = () if plan.growing else becomes(plan.source.config, plan.source.tensors)
    others = [facts for facts in found if facts.name != plan.family.choice]
    for each in wrong:
        where = plan.target.title if each.cause else f"{plan.target.title} and {plan.routing}"
        yield f"{each.name} with {where}: {each.words}.{instead(each, others)}"


def training_warnings(plan: Plan) -> Iterator[str]:
    """Yield what to know about the router before training the model."""
    recipe, target = plan.recipe, plan.target
    # Without virtual groups the gates of the chosen experts differ, unless only one is chosen.
    grouped = recipe.virtual_groups or recipe.group_size == 1
    if grouped and recipe.routing is not Routing.SOFTMAX_TOPK and recipe.top_k == recipe.group_size:
        yield _no_gradient(plan)
    if recipe.trains_tied and recipe.routing is Routing.SOFTMAX_TOPK and not target.ships_code:
        words = "the first steps of training split virtual groups, which loses the dense model's"
        yield f"{words} function. Call upcycle_cli.tie_virtual_groups(model) before training."
    frozen = [row.name for row in target.extra_tensors if row.frozen]
    if frozen:
        words = f"freeze {' and '.join(frozen)} in training (requires_grad_(False)): its values are"
        yield f"{words} so small that a few optimizer steps would change the model completely."
    if not target.has_balancing_loss:
        words = f"transformers has no loss that balances the experts of {target.outer_type}"
        if target.in_memory.correction_bias is not None:
            words += ", and no tested trainer updates the correction bias"
        shipped = plan.family.dense.family.can_ship_code
        yield f"{words}.{' `target` upcycled has one.' * shipped}"
    if plan.promise is Promise.APPROXIMATE:
        yield (
            "softmax-topk equals the dense model only up to the router's logits (std "
            f"{recipe.router_logit_std:g}). topk-softmax with a top-k of at least 2G is exact, and "
            "trained better in our study of a tiny model."
        )
        std = recipe.router_logit_std or 1.0
        if recipe.group_size > 1 and recipe.expansion > 1 and std < TIE_LOGIT_STD:
            words = f"at `router_logit_std` {std:g} the softmax rounds different groups to the same"
            yield f"{words} value, which splits them. Use {TIE_LOGIT_STD:g} or more."


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
        remedy += ". Otherwise tie virtual groups (upcycle_cli.tie_virtual_groups)"
    return (
        f"top-k equals {size}, so the gates of a token's one group sum to 1, and the "
        f"language-model loss gives the router no gradient{between}. {remedy}."
    )


def _storage_warnings(plan: Plan) -> Iterator[str]:
    recipe, dtype, size = plan.recipe, plan.expert_dtype, plan.expert_size
    scale = plan.factors.output(plan.family.dense.mlp_kind)
    if dtype == "F16" and scale > 1:
        words = f"scaling makes the outputs of experts {scale:g} times larger, and float16"
        yield f"{words} overflows above 65504. Use bfloat16, or check with `verify=True`."
    if 0 < recipe.noise < _LEAST_NOISE.get(dtype, 0.0):
        words = f"{TORCH_DTYPES[dtype]} rounds most of a noise of {recipe.noise:g} away"
        yield f"{words}. Use more noise, or `dtype` float32."
    if ITEM_BYTES[dtype] == 2 and size * 2 % 16:
        words = f"rows of experts {size} wide have {size * 2} bytes, but the grouped matrix product"
        yield f"{words} of transformers needs multiples of 16. Use another granularity."
    if plan.promise is Promise.EXACT and plan.rounded_parts and dtype != "F32":
        part = plan.rounded_parts[-1]
        yield (
            f"the factor {plan.factors.of(part):g} on the experts' {part} is not a power of two, "
            f"so {TORCH_DTYPES[dtype]} rounds the weights, and outputs differ slightly. Use "
            "`dtype` float32, or `scale_split` config if the target has it."
        )


def vanished_weights(counts: Mapping[Expr, int]) -> str | None:
    """Warn if many weights became zero in the output's dtype; `counts` has their number."""
    shares: defaultdict[tuple[str, str], float] = defaultdict(float)
    for expr, count in counts.items():
        for tensor in held(expr):
            key = next(source_names(tensor)), TORCH_DTYPES[type_of(expr).dtype]
            shares[key] += count / math.prod(tensor.shape)
    name, dtype = max(shares, key=lambda key: shares[key], default=("", ""))
    if shares[name, dtype] < _NOTABLE_SHARE:
        return None
    wider = "float32" if dtype == "bfloat16" else "bfloat16 or float32"
    return (
        f"{100 * shares[name, dtype]:.3g} % of {name} is too small for {dtype} and becomes zero. "
        f"Use `dtype` {wider}."
    )
