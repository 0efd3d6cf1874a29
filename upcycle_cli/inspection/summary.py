"""`inspect`: describes a checkpoint, or what a conversion would make of it.

It reads headers only, unless weights or expert load are requested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from upcycle_cli.checkpoint.storage import RECORD_NAME, read_json
from upcycle_cli.core.callbacks import Progress
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.text import listed
from upcycle_cli.hub.remote_checkpoint import (
    download_model,
    locate_model,
    open_source,
    split_revision,
)
from upcycle_cli.inspection.describe import Inspection
from upcycle_cli.models.engines import engines_of, trainers
from upcycle_cli.models.lookup import dense_family, is_target, targets_of
from upcycle_cli.models.moe_experts import find_experts
from upcycle_cli.models.wrappers import text_config_of
from upcycle_cli.recipe.recipe import ExpertLayout, Recipe, to_recipe

if TYPE_CHECKING:
    from upcycle_cli.plan.inputs import Inputs
    from upcycle_cli.plan.output import Options
    from upcycle_cli.plan.texts import CalibrationText
    from upcycle_cli.recipe.recipe import Growth


def inspect(
    path: Path | str,
    recipe: Recipe | Growth | str | None = None,
    *,
    revision: str | None = None,
    target: str = "auto",
    options: Options | None = None,
    inputs: Inputs | None = None,
    weights: bool = False,
    dense: Path | str | Sequence[Path | str] | None = None,
    load: Path | str | None = None,
    watch: Progress | None = None,
) -> Inspection:
    """Describe a checkpoint, or what a recipe would make of it: `inspect("dense", "E8G1T2")`.

    `path` is a directory, or a repo on the Hub at `revision`; only headers are read. `recipe`,
    `target` and `options` are those of `convert`; `inputs` are its open files.

    For an MoE, `weights` reads the experts and compares them with one another and with `dense`, the
    model or models that it was made from. `load` is a text file or "builtin": it runs the MoE on
    this text and counts which experts the tokens choose. `watch` receives the progress.

    Raises UpcycleError if the checkpoint cannot be read, or if an argument does not fit its kind.
    """
    if dense and not weights and load is None:
        raise UpcycleError("`dense` needs `weights` or `load`.")
    text = None
    if load is not None:
        from upcycle_cli.plan.texts import calibration_text

        text = calibration_text(load, "the text")
    recipe = None if recipe is None else to_recipe(recipe)
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
        storages = [locate_model(*split_revision(str(each))) for each in listed(dense or ())]
        sources = [open_checkpoint(download_model(storage)) for storage in storages]
        found = _inspect_moe(checkpoint, weights, sources, text, watch or Progress())
        return replace(found, plan=plan)
    family = dense_family(checkpoint.config)
    if weights or text is not None:
        hint = f"Leave out `{'weights' if weights else 'load'}`."
        raise UpcycleError(f"{path} is a dense model without experts.", hint)
    from upcycle_cli.models.overview import becomes

    plan = None
    if isinstance(recipe, Recipe):
        from upcycle_cli.plan.upcycle import build_plan

        plan = build_plan(recipe, checkpoint, target=target, options=options, inputs=inputs)
    total = checkpoint.num_parameters if plan is None else plan.dense_parameters
    return Inspection(
        checkpoint=checkpoint,
        kind="dense",
        model_type=family.title,
        targets=targets_of(family),
        becomes=becomes(checkpoint.config, checkpoint.tensors),
        total_parameters=total,
        active_parameters=total,
        dense_parameters=total,
        plan=plan,
    )


def _inspect_moe(
    checkpoint: Checkpoint,
    weights: bool,  # noqa: FBT001 - as in `inspect`
    sources: Sequence[Checkpoint],
    text: CalibrationText | None,
    watch: Progress,
) -> Inspection:
    experts = find_experts(checkpoint)
    num_experts, target = experts.num_experts, experts.target
    tied = bool(text_config_of(checkpoint.config).get("tie_word_embeddings", False))
    fused = experts.layout is ExpertLayout.FUSED
    idle = experts.num_parameters // num_experts * (num_experts - experts.top_k)
    record = facts = found = None
    if checkpoint.storage.has(RECORD_NAME):
        record = read_json(checkpoint.storage.local(RECORD_NAME))
    # From the record, since the expansion cannot be seen in the MoE.
    parameters = (record or {}).get("parameters")
    recorded = parameters.get("dense") if isinstance(parameters, dict) else None
    if weights:
        if len(sources) == 1 and isinstance((record or {}).get("experts_from"), dict):
            raise UpcycleError(
                f"{checkpoint.path} has experts of several models by its {RECORD_NAME}, and only "
                f"{sources[0].path} is given.",
                "Name all of them with `experts_from`.",
            )
        from upcycle_cli.inspection.experts import examine_weights

        facts = examine_weights(experts, sources)
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
        total_parameters=checkpoint.num_parameters,
        active_parameters=checkpoint.num_parameters - idle,
        dense_parameters=recorded if type(recorded) is int else None,
        engines=engines_of(
            target,
            checkpoint.config,
            experts.routing,
            fused=fused,
            layers=experts.layers,
            shared=experts.shares,
        ),
        trainers=trainers(target, experts.routing, tied=tied, fused=fused, num_experts=num_experts),
        record=record,
        weights=facts,
        load=found,
    )
