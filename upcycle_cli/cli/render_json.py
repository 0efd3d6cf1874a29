"""The JSON objects that commands print with --json; docs/reference/schema.json describes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from upcycle_cli.cli.options import with_flags

if TYPE_CHECKING:
    from upcycle_cli.api import Conversion
    from upcycle_cli.checkpoint.header import TensorEntry
    from upcycle_cli.inspection.summary import Inspection
    from upcycle_cli.models.engines import Engine
    from upcycle_cli.models.overview import Families, TargetFacts
    from upcycle_cli.plan.budget import SizedRecipe
    from upcycle_cli.plan.output import OutputTensor
    from upcycle_cli.plan.plan import Plan
    from upcycle_cli.publish.push import Push


def inspection_json(
    inspection: Inspection, fits: Sequence[SizedRecipe], command: str, *, tensors: bool
) -> dict[str, Any]:
    """Return an inspection; a planned conversion is under `plan`.

    `fits` are the recipes that fit a budget, and `command` converts with the suggested one.
    """
    recipe = (inspection.record or {}).get("recipe")
    name = recipe.get("name") if isinstance(recipe, dict) else None
    plan = inspection.plan
    value = {
        "status": "inspected",
        **_pick(inspection, "kind model_type targets num_experts top_k routing expert_layout"),
        **_pick(inspection, "moe_layers total_parameters active_parameters dense_parameters"),
        "becomes": {target.name: _target_json(target) for target in inspection.becomes},
        "recipe": name if isinstance(name, str) else None,
        "bytes": inspection.checkpoint.nbytes,
        "shards": len(inspection.checkpoint.shards),
        "engines": _engines_json(inspection.engines),
        "trainers": {
            trainer.name: _pick(trainer, "support cause version settings precision")
            for trainer in inspection.trainers
        },
        "claims": inspection.record,
        "weights": None if inspection.weights is None else asdict(inspection.weights),
        "load": None if inspection.load is None else asdict(inspection.load),
        "plan": plan and plan_json(plan, inspection.warnings),
    }
    if tensors:
        value["tensors"] = tensors_json(inspection)
    return value | (_fits_json(fits, command) if fits else {})


def tensors_json(inspection: Inspection) -> list[dict[str, Any]]:
    """Return every tensor in file order: of the plan if there is one, else of the checkpoint."""
    if inspection.plan is None:
        entries = inspection.checkpoint.tensors.values()
        return [_tensor_json(entry, entry.shard) for entry in entries]
    from upcycle_cli.plan.expressions import describe

    return [
        _tensor_json(tensor, shard.name)
        | {"role": "_".join(tensor.parts) or tensor.role, "made_from": describe(tensor.expr)}
        for shard in inspection.plan.shards
        for tensor in shard.tensors
    ]


def plan_json(plan: Plan, warnings: Iterable[str]) -> dict[str, Any]:
    """Return a plan, with the warnings that concern it."""
    return {
        "model_type": plan.target.outer_type,
        "source_type": plan.source.config["model_type"],
        "source": plan.source.name,
        "source_revision": plan.source.revision,
        **(_growth_json(plan) if plan.growing else _upcycling_json(plan)),
        **_pick(plan, "expert_layout total_parameters active_parameters promise"),
        "moe_layers": plan.layers,
        "bytes": plan.nbytes,
        "shards": len(plan.shards),
        "engines": _engines_json(plan.engines),
        "warnings": [*map(with_flags, warnings)],
        "plan_sha256": plan.digest,
    }


def conversion_json(conversion: Conversion) -> dict[str, Any]:
    """Return what a conversion, and the push after it, did."""
    done = "already done" if conversion.already_done else "converted"
    return {
        "status": done if conversion.published else "verification failed",
        "output": str(conversion.output),
        **plan_json(conversion.plan, conversion.warnings),
        "seconds": round(conversion.seconds, 3),
        **_pick(conversion, "shared_bytes reused_bytes"),
        "verification": None if conversion.report is None else conversion.report.to_json(),
        "push": None if conversion.pushed is None else push_json(conversion.pushed),
    }


def push_json(push: Push) -> dict[str, Any]:
    """Return what a push did."""
    return {
        "status": "pushed" if push.changed else "already there",
        **_pick(
            push, "repo url commit pull_request files card_kept left_out removed replaced reminders"
        ),
        "bytes": push.nbytes,
    }


def _fits_json(fits: Sequence[SizedRecipe], command: str) -> dict[str, Any]:
    from upcycle_cli.plan.budget import suggestion

    found = suggestion(fits)
    sizes = "total_parameters active_parameters flops_per_token flops_ratio weight_bytes"
    return {
        "suggestion": found
        and {"recipe": found[0].recipe.name, "reason": found[1], "command": command},
        "fits": [
            {"recipe": fit.recipe.name, "warnings": [*fit.warnings.values()]}
            | _pick(fit, f"target {sizes} training_bytes trains")
            for fit in fits
        ],
    }


def overview_json(found: Families) -> dict[str, Any]:
    """Return the supported model types and targets."""
    targets = {target.name: _target_json(target) for target in found.targets}
    return {"status": "listed", **_pick(found, "dense wrappers refused"), "targets": targets}


def _pick(source: object, names: str) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names.split()}


def _upcycling_json(plan: Plan) -> dict[str, Any]:
    return {
        "experts_from": plan.how.get("experts_from"),
        "recipe": plan.recipe.name,
        **_pick(plan.recipe, "routing scaling router_init router_logit_std virtual_groups"),
        **_pick(plan.recipe, "neuron_order noise reinit seed num_experts shared_experts top_k"),
        **_pick(plan, "dense_parameters flops_per_token flops_ratio lossless"),
        "factors": asdict(plan.factors),
        "calibration": plan.how["calibration"],
        "dropped": dict(plan.dropped),
    }


def _growth_json(plan: Plan) -> dict[str, Any]:
    return {
        **plan.how,
        **_pick(plan, "num_experts top_k"),
        "source_parameters": plan.dense_parameters,
        "lossless": plan.rounded_to is None,
    }


def _tensor_json(tensor: TensorEntry | OutputTensor, file: str) -> dict[str, Any]:
    return {**_pick(tensor, "name dtype shape"), "file": file}


def _target_json(target: TargetFacts) -> dict[str, Any]:
    names = "routings layers scaled_by attention engines trainers balanced shared_experts refusal"
    others = _engines_json(target.other_engines), _engines_json(target.other_trainers)
    found = {"other_engines": others[0], "other_trainers": others[1], "advice": target.advice}
    return _pick(target, names) | found


def _engines_json(found: Iterable[Engine]) -> dict[str, dict[str, Any]]:
    return {engine.name: _pick(engine, "support cause version") for engine in found}
