"""The plan of growing an MoE as rows of a table or as JSON; no logic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from upcycle_cli.advice import no_growth_promise, warnings
from upcycle_cli.families.layers import listed
from upcycle_cli.growth import GrowthPlan
from upcycle_cli.planned import Planned
from upcycle_cli.printable import counted
from upcycle_cli.recipe import Promise
from upcycle_cli.render import count, engine_lines, engines_json, picked, size_text


def growth_rows(plan: Planned) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield what is known of a growth: a property and the lines that say it."""
    assert isinstance(plan, GrowthPlan)
    before, k = plan.experts, plan.growth.expand
    yield "model", [f"{plan.target.title}, each expert {k} times"]
    experts = f"{before.num_experts} → {plan.num_experts} per layer"
    active = f"{before.top_k} → {plan.top_k} active, {plan.routing}"
    yield "experts", [f"{experts}, {active}, each {before.expert_size} wide"]
    if len(plan.layers) < before.num_layers:
        yield "MoE layers", [f"{listed(plan.layers)} of {before.num_layers}"]
    total, active = count(plan.total_parameters), count(plan.active_parameters)
    yield "parameters", [f"{total}, {active} active (source {count(plan.dense_parameters)})"]
    yield "size", [f"{size_text(plan.nbytes)} in {counted(len(plan.shards), 'shard')}"]
    yield "promise", [_promise(plan)]
    yield "engines", engine_lines(plan.engines)


def growth_json(plan: Planned, told: Iterable[str]) -> dict[str, Any]:
    """Return the plan of a growth as a JSON object; `told` is as for `render.plan_json`."""
    assert isinstance(plan, GrowthPlan)
    return {
        "model_type": plan.target.outer_type,
        "source_type": plan.source.config["model_type"],
        "source": plan.source.name,
        "source_revision": plan.source.revision,
        **plan.how,
        **picked(plan, "num_experts", "top_k", "expert_layout"),
        "moe_layers": list(plan.layers),
        **picked(plan, "total_parameters", "active_parameters"),
        "source_parameters": plan.dense_parameters,
        "bytes": plan.nbytes,
        "shards": len(plan.shards),
        "lossless": plan.rounded_to is None,
        "promise": plan.promise,
        "engines": engines_json(plan.engines),
        "warnings": [*warnings(plan), *told],
        "plan_sha256": plan.digest,
    }


def _promise(plan: GrowthPlan) -> str:
    if plan.promise is Promise.NONE:
        return f"none: {no_growth_promise(plan)}"
    rounding = f", rounded to {plan.rounded_to}" if plan.rounded_to else ""
    return f"exact: the function of the source{rounding}"
