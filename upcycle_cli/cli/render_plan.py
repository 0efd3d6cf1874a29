"""Plans and what became of them as rich tables or as JSON; no logic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from upcycle_cli.cli.render import (
    engines_json,
    picked,
    push_json,
)
from upcycle_cli.cli.terminal import rows_table
from upcycle_cli.inspection.describe import software_lines
from upcycle_cli.plan.facts import facts
from upcycle_cli.plan.plan import Plan
from upcycle_cli.plan.warnings import warnings

if TYPE_CHECKING:
    from rich.table import Table

    from upcycle_cli.api import Conversion
    from upcycle_cli.publish.push import Push


def plan_table(plan: Plan) -> Table:
    """Return the summary of a plan, one property a row."""
    rows = [(key, [text]) for key, text in facts(plan).items()]
    return rows_table([*rows, ("engines", software_lines(plan.engines))])


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
