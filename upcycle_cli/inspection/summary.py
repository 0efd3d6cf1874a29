"""`inspect`: what a checkpoint is, or what converting it would give.

Reads headers only, unless asked for the weights; then it says which experts are identical, which
are whole groups, and, against the dense model, what they were multiplied by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from upcycle_cli.checkpoint.storage import RECORD_NAME, read_json
from upcycle_cli.core.callbacks import Watch
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.hub.remote_checkpoint import (
    download_model,
    locate_model,
    open_source,
    split_revision,
)
from upcycle_cli.models.engines import Engine, engines
from upcycle_cli.models.families import dense_family, is_target, targets_of
from upcycle_cli.models.moe_config import has_plain_attention
from upcycle_cli.models.trainers import Trainer, trainers
from upcycle_cli.models.wrappers import text_config_of
from upcycle_cli.recipe.recipe import ExpertLayout, Recipe

if TYPE_CHECKING:
    from upcycle_cli.inspection.expert_load import Load
    from upcycle_cli.inspection.experts import WeightFacts
    from upcycle_cli.models.overview import TargetFacts
    from upcycle_cli.plan.base import Planned
    from upcycle_cli.plan.budget import Budget, Fit, Wanted
    from upcycle_cli.plan.expand import Growth
    from upcycle_cli.plan.router_inputs import RouterInputs
    from upcycle_cli.plan.tensors import Options
    from upcycle_cli.plan.texts import CalibrationText


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect` found; `plan` is there when a recipe was given, or a growth for an MoE."""

    checkpoint: Checkpoint
    kind: str
    """dense or moe"""
    model_type: str
    targets: tuple[str, ...] = ()
    becomes: tuple[TargetFacts, ...] = ()
    """What is known of each target of a dense model."""
    num_experts: int | None = None
    top_k: int | None = None
    routing: str | None = None
    expert_layout: str | None = None
    moe_layers: tuple[int, ...] | None = None
    num_layers: int | None = None
    total_parameters: int
    active_parameters: int
    dense_parameters: int | None
    engines: tuple[Engine, ...] = ()
    trainers: tuple[Trainer, ...] = ()
    record: Mapping[str, Any] | None = None
    plan: Planned | None = None
    weights: WeightFacts | None = None
    load: Load | None = None
    """Which experts a text chooses, where it was asked for."""


def inspect(
    path: Path | str,
    recipe: Recipe | Growth | None = None,
    *,
    revision: str | None = None,
    target: str = "auto",
    options: Options | None = None,
    inputs: RouterInputs | None = None,
    weights: bool = False,
    dense: Path | str | Sequence[Path | str] | None = None,
    load: Path | str | None = None,
    watch: Watch | None = None,
) -> Inspection:
    """Describe a checkpoint; with a recipe or a growth, describe what it would become.

    `inputs` is what routers are to be made from, beside the recipe; no model is run for it.
    `dense` is what an MoE was made of, one model or several, which weights are measured against.
    `load` is a text, a file or `builtin`, that an MoE is run on to see which experts it chooses.
    `path` is a directory, or a repo on the Hub at `revision`, of which only headers are read unless
    `weights` or a `load` are asked for.

    Raises UpcycleError when there is no readable checkpoint of the kind that was asked about.
    """
    text = None
    if load is not None:
        from upcycle_cli.plan.texts import calibration_text

        text = calibration_text(load, "the text")
    checkpoint = open_source(path, revision)
    if weights or text is not None:
        checkpoint = checkpoint.download()
    grows = recipe is not None and not isinstance(recipe, Recipe)
    if grows or is_target(checkpoint.config):
        plan = None
        if isinstance(recipe, Recipe):
            dense_family(checkpoint.config)  # raises: an MoE cannot be upcycled
        elif recipe is not None:
            from upcycle_cli.plan.expand import build_growth

            plan = build_growth(recipe, checkpoint, options)  # raises: only an MoE can be grown
        several = [dense] if isinstance(dense, Path | str) else dense or ()
        places = [locate_model(*split_revision(str(place))) for place in several]
        sources = [open_checkpoint(download_model(place)) for place in places]
        found = _inspect_moe(checkpoint, weights, sources, text, watch or Watch())
        return replace(found, plan=plan)
    family = dense_family(checkpoint.config)
    if weights:
        raise UpcycleError(
            f"{path} is a dense model: there are no experts to look at.", "Leave out --weights."
        )
    if text is not None:
        raise UpcycleError(
            f"{path} is a dense model: there are no experts to choose.", "Leave out --load."
        )
    from upcycle_cli.models.overview import becomes

    made = None
    if isinstance(recipe, Recipe):
        from upcycle_cli.plan.upcycle import build_plan

        made = build_plan(recipe, checkpoint, target=target, options=options, inputs=inputs)
    total = checkpoint.num_parameters if made is None else made.dense_parameters
    return Inspection(
        checkpoint=checkpoint,
        kind="dense",
        model_type=family.title,
        targets=targets_of(family),
        becomes=becomes(checkpoint.config, checkpoint.tensors),
        total_parameters=total,
        active_parameters=total,
        dense_parameters=total,
        plan=made,
    )


def fits(found: Inspection, budget: Budget, wanted: Wanted | None = None) -> tuple[Fit, ...]:
    """Return the recipes for an inspected model within a budget; UpcycleError when none is."""
    if found.kind == "moe":
        dense_family(found.checkpoint.config)  # raises: an MoE cannot be upcycled
    from upcycle_cli.plan.budget import fitting

    return fitting(found.checkpoint, budget, wanted)


def _inspect_moe(
    checkpoint: Checkpoint,
    weights: bool,  # noqa: FBT001 - as everything else here
    sources: Sequence[Checkpoint],
    text: CalibrationText | None,
    watch: Watch,
) -> Inspection:
    from upcycle_cli.inspection.experts import examine
    from upcycle_cli.plan.moe_experts import find_experts

    experts = find_experts(checkpoint)
    num_experts, target = experts.num_experts, experts.target
    config = text_config_of(checkpoint.config)
    tied = bool(config.get("tie_word_embeddings", False))
    fused = experts.layout is ExpertLayout.FUSED
    total = checkpoint.num_parameters
    idle = experts.num_parameters // num_experts * (num_experts - experts.top_k)
    record = facts = None
    if checkpoint.storage.has(RECORD_NAME):
        record = read_json(checkpoint.storage.local(RECORD_NAME))
    # What the conversion wrote down, since an MoE alone does not tell its expansion.
    parameters = (record or {}).get("parameters")
    recorded = parameters.get("dense") if isinstance(parameters, dict) else None
    if weights:
        _check_all_named(checkpoint, record or {}, sources)
        facts = examine(experts, sources)
    found = None
    if text is not None:
        from upcycle_cli.inspection.expert_load import measure_expert_load

        found = measure_expert_load(experts, text, sources[0] if sources else None, watch)
    return Inspection(
        checkpoint=checkpoint,
        kind="moe",
        model_type=target.outer_type,
        num_experts=num_experts,
        top_k=experts.top_k,
        routing=experts.routing,
        expert_layout=experts.layout,
        moe_layers=experts.layers,
        num_layers=experts.num_layers,
        total_parameters=total,
        active_parameters=total - idle,
        dense_parameters=recorded if type(recorded) is int else None,
        engines=engines(
            target.title,
            experts.routing,
            tied=tied,
            fused=fused,
            plain_attention=has_plain_attention(config, rotary_share=target.rotary_share(config)),
            every_layer=experts.every_layer,
            scaled=config.get(target.keys.scale or "", 1.0) != 1.0,
            shared=experts.shares,
        ),
        trainers=trainers(target, experts.routing, tied=tied, fused=fused, num_experts=num_experts),
        record=record,
        weights=facts,
        load=found,
    )


def _check_all_named(
    moe: Checkpoint, record: Mapping[str, Any], sources: Sequence[Checkpoint]
) -> None:
    """Raise UpcycleError where one dense model is given for an MoE that says it is of several."""
    merged = record.get("experts_from")
    if len(sources) == 1 and isinstance(merged, dict):
        raise UpcycleError(
            f"{moe.path} has experts of several models, says its {RECORD_NAME}, and only "
            f"{sources[0].path} is given.",
            "Name the others with --experts-from, once for each.",
        )
