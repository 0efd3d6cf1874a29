"""Describes a plan in rows, for the table and the model card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from upcycle_cli.core.display import Row
from upcycle_cli.core.text import counted, parameter_text, size_text
from upcycle_cli.models.engines import support_lines
from upcycle_cli.models.layers import format_layers
from upcycle_cli.plan.merge import Merge, NonExpertWeights
from upcycle_cli.plan.plan import Growing, Plan
from upcycle_cli.recipe.recipe import NeuronOrder, Promise, RouterInit

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
        found["MoE layers"] = f"{len(plan.layers)} of {plan.num_layers}: {layers}"
    total, active = parameter_text(plan.total_parameters), parameter_text(plan.active_parameters)
    before = f"{'source' if grown else 'dense'} {parameter_text(plan.dense_parameters)}"
    found["parameters"] = f"{total}, {active} active ({before})"
    if not grown:
        flops = f"{parameter_text(plan.flops_per_token, 'G')} ({plan.flops_ratio:.2f} × dense)"
        found["FLOPs per token"] = f"{flops}, attention scores left out"
    found["size"] = f"{size_text(plan.nbytes)} in {counted(len(plan.shards), 'shard')}"
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
        yield "experts from", _groups(plan, merge)
        mean = merge.rest is NonExpertWeights.MEAN
        others = f"the mean of all {len(plan.sources)} models'" if mean else f"{plan.source.name}'s"
        yield "other weights", f"attention, norms, embeddings: {others}"


def _groups(plan: Plan, merge: Merge) -> str:
    """Return which virtual groups come from which model."""
    groups = merge.of_groups(plan.recipe.expansion)
    return "groups " + "; ".join(
        f"of {source.name}: {', '.join(str(g) for g, model in enumerate(groups) if model == n)}"
        for n, source in enumerate(plan.sources)
        if n in groups
    )


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
        words += f" ({found.tokens} tokens: load varies by {cv:.2f}, {idle} never chosen)"
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
