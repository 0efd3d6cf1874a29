"""Plans and what became of them as rich tables or as JSON; no logic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from upcycle_cli.cli.render import (
    engines_json,
    picked,
    push_json,
)
from upcycle_cli.cli.terminal import rows_table
from upcycle_cli.core.text import counted, parameter_text, size_text
from upcycle_cli.inspection.describe import software_lines
from upcycle_cli.models.layers import format_layers
from upcycle_cli.plan.plan import Plan
from upcycle_cli.plan.warnings import (
    ORDER_TEXTS,
    experts_text,
    factors_text,
    merged_text,
    no_promise,
    router_text,
    warnings,
)
from upcycle_cli.recipe.recipe import NeuronOrder, Promise

if TYPE_CHECKING:
    from rich.table import Table

    from upcycle_cli.api import Conversion
    from upcycle_cli.publish.push import Push


def plan_table(plan: Plan) -> Table:
    """Return the summary of a plan, one property a row."""
    return rows_table(_growth_rows(plan) if plan.expansion else _upcycling_rows(plan))


def _upcycling_rows(plan: Plan) -> Iterator[tuple[str, Sequence[str]]]:
    recipe, dense = plan.recipe, plan.family.dense
    yield "model", [f"{dense.family.title} → {plan.family.target.title}"]
    yield "recipe", [f"{recipe.name}, {recipe.routing}, seed {recipe.seed}"]
    yield "experts", [experts_text(plan)]
    if plan.merge is not None:
        groups, rest = merged_text(plan)
        yield "experts from", [groups]
        yield "all else", [f"attention, norms, embeddings: {rest}"]
    if len(plan.family.layers) < dense.num_layers:
        yield "MoE layers", [f"{format_layers(plan.family.layers)} of {dense.num_layers}"]
    yield "parameters", [f"{_parameters(plan)} (dense {parameter_text(plan.dense_parameters)})"]
    flops = f"{parameter_text(plan.flops_per_token, 'G')} ({plan.flops_ratio:.2f} × dense)"
    yield "FLOPs per token", [f"{flops}, attention scores left out"]
    yield "size", [_size(plan)]
    lossless = "rounded" if plan.rounded_to else "lossless"
    yield "scale factors", [f"{factors_text(plan, '×')} ({lossless})"]
    groups = f"{counted(recipe.expansion, 'virtual group')} of {recipe.group_size}"
    rows = groups if recipe.virtual_groups else "a row of its own per expert"
    if recipe.neuron_order is not NeuronOrder.SLICED:
        yield "neurons", [ORDER_TEXTS[recipe.neuron_order]]
    yield "router", [f"{router_text(plan)}, {rows}"]
    yield "promise", [_promise(plan, "dense model")]
    if plan.dropped:
        reasons = "; ".join(sorted({*plan.dropped.values()}))
        yield "left out", [f"{counted(len(plan.dropped), 'tensor')}: {reasons}"]
    yield "engines", software_lines(plan.engines)


def _growth_rows(plan: Plan) -> Iterator[tuple[str, Sequence[str]]]:
    assert plan.expansion is not None
    before, k = plan.expansion.experts, plan.expansion.growth.expand
    yield "model", [f"{plan.target.title}, each expert {k} times"]
    experts = f"{before.num_experts} → {plan.num_experts} per layer"
    active = f"{before.top_k} → {plan.top_k} active, {plan.routing}"
    yield "experts", [f"{experts}, {active}, each {before.expert_size} wide"]
    if len(plan.layers) < before.num_layers:
        yield "MoE layers", [f"{format_layers(plan.layers)} of {before.num_layers}"]
    yield "parameters", [f"{_parameters(plan)} (source {parameter_text(plan.dense_parameters)})"]
    yield "size", [_size(plan)]
    yield "promise", [_promise(plan, "source")]
    yield "engines", software_lines(plan.engines)


def _parameters(plan: Plan) -> str:
    return (
        f"{parameter_text(plan.total_parameters)}, {parameter_text(plan.active_parameters)} active"
    )


def _size(plan: Plan) -> str:
    return f"{size_text(plan.nbytes)} in {counted(len(plan.shards), 'shard')}"


def _promise(plan: Plan, origin: str) -> str:
    match plan.promise:
        case Promise.EXACT:
            rounding = f", rounded to {plan.rounded_to}" if plan.rounded_to else ""
            return f"exact: the function of the {origin}{rounding}"
        case Promise.APPROXIMATE:
            std = plan.recipe.router_logit_std
            return f"approximate: equal up to the router logits (std {std:g})"
        case Promise.NONE:
            return f"none: {no_promise(plan)}"


def plan_json(plan: Plan, told: Iterable[str] = ()) -> dict[str, Any]:
    """Return a plan as a JSON object; `told` is what there is to warn of besides the plan."""
    return {
        "model_type": plan.target.outer_type,
        "source_type": plan.source.config["model_type"],
        "source": plan.source.name,
        "source_revision": plan.source.revision,
        **(_growth_json(plan) if plan.expansion else _upcycling_json(plan)),
        **picked(plan, "expert_layout", "total_parameters", "active_parameters", "promise"),
        "moe_layers": list(plan.layers),
        "bytes": plan.nbytes,
        "shards": len(plan.shards),
        "engines": engines_json(plan.engines),
        "warnings": [*warnings(plan), *told],
        "plan_sha256": plan.digest,
    }


def _upcycling_json(plan: Plan) -> dict[str, Any]:
    return {
        "experts_from": plan.merge_record,
        "recipe": plan.recipe.name,
        **picked(plan.recipe, "routing", "scaling", "router_init", "router_logit_std"),
        **picked(plan.recipe, "virtual_groups", "neuron_order", "noise", "reinit", "seed"),
        **picked(plan.recipe, "num_experts", "shared_experts", "top_k"),
        **picked(plan, "dense_parameters", "flops_per_token", "flops_ratio", "lossless"),
        "factors": asdict(plan.factors),
        "calibration": plan.calibration_record,
        "dropped": dict(plan.dropped),
    }


def _growth_json(plan: Plan) -> dict[str, Any]:
    return {
        **plan.how,
        **picked(plan, "num_experts", "top_k"),
        "source_parameters": plan.dense_parameters,
        "lossless": plan.rounded_to is None,
    }


def conversion_json(conversion: Conversion, push: Push | None) -> dict[str, Any]:
    """Return what a conversion, and the push after it, did as a JSON object."""
    status = "converted" if conversion.published else "verification failed"
    return {
        "status": "already done" if conversion.already_done and conversion.published else status,
        "output": str(conversion.output),
        **plan_json(conversion.plan, conversion.warnings),
        "seconds": round(conversion.seconds, 3),
        **picked(conversion, "shared_bytes", "reused_bytes"),
        "verification": None if conversion.report is None else conversion.report.to_json(),
        "push": None if push is None else push_json(push),
    }
