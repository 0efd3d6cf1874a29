"""`inspect`: describes a checkpoint, or what a conversion would make of it.

It reads headers only, unless weights or expert load are requested.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.header import TORCH_DTYPES
from upcycle_cli.checkpoint.storage import RECORD_NAME
from upcycle_cli.core.callbacks import Progress
from upcycle_cli.core.display import Result, Row
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.text import counted, listed, parameter_text, size_text
from upcycle_cli.hub.remote_checkpoint import open_source
from upcycle_cli.models.engines import Engine, Trainer, engines, support_lines, trainers, traits_of
from upcycle_cli.models.layers import format_layers
from upcycle_cli.models.lookup import dense_family, is_target, targets_of
from upcycle_cli.models.moe_experts import find_experts
from upcycle_cli.recipe.recipe import ExpertLayout, Growth, Recipe, to_recipe

if TYPE_CHECKING:
    from upcycle_cli.inspection.expert_load import ExpertLoad
    from upcycle_cli.inspection.experts import WeightFacts
    from upcycle_cli.inspection.weight_drift import LayerDrift
    from upcycle_cli.models.overview import TargetFacts
    from upcycle_cli.plan.inputs import Inputs
    from upcycle_cli.plan.output import Options
    from upcycle_cli.plan.plan import Plan
    from upcycle_cli.plan.texts import CalibrationText


@dataclass(frozen=True, kw_only=True, repr=False)
class Inspection(Result):
    """The result of `inspect`; it has a plan if a recipe was given, or a growth for an MoE."""

    checkpoint: Checkpoint
    kind: str
    """dense or moe"""
    model_type: str
    targets: tuple[str, ...] = ()
    becomes: tuple[TargetFacts, ...] = ()
    """The targets of a dense model, with their properties."""
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
    plan: Plan | None = None
    weights: WeightFacts | None = None
    load: ExpertLoad | None = None
    """Which experts the tokens of a text choose, if requested."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to know about the plan before converting."""
        if self.plan is None:
            return ()
        from upcycle_cli.plan.facts import warnings

        return tuple(warnings(self.plan))

    def tables(self) -> Iterator[Iterable[Row]]:
        """Yield what a recipe would make of the checkpoint, or what the checkpoint is."""
        if self.plan is not None:
            from upcycle_cli.plan.facts import plan_rows

            yield plan_rows(self.plan)
        if self.plan is None or self.weights is not None or self.load is not None:
            yield inspection_rows(self)


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
    if isinstance(recipe, Growth) or is_target(checkpoint.config):
        plan = None
        if isinstance(recipe, Recipe):
            dense_family(checkpoint.config)  # raises: an MoE cannot be upcycled
        elif recipe is not None:
            from upcycle_cli.plan.expand import build_growth

            plan = build_growth(recipe, checkpoint, options)  # raises: only an MoE can be grown
        sources = [open_source(each).download() for each in listed(dense or ())]
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
    traits = traits_of(
        target,
        checkpoint.config,
        experts.routing,
        fused=experts.layout is ExpertLayout.FUSED,
        layers=experts.layers,
        shared=experts.shares,
    )
    idle = experts.num_parameters // num_experts * (num_experts - experts.top_k)
    facts = found = None
    # From the record, since the expansion cannot be seen in the MoE.
    parameters = (experts.record or {}).get("parameters")
    recorded = parameters.get("dense") if isinstance(parameters, dict) else None
    if weights:
        if len(sources) == 1 and isinstance((experts.record or {}).get("experts_from"), dict):
            words = f"{checkpoint.path} has experts of several models ({RECORD_NAME}), and only"
            hint = "Name all of them with `experts_from`."
            raise UpcycleError(f"{words} {sources[0].path} is given.", hint)
        from upcycle_cli.inspection.experts import examine_weights

        dtypes = {torch_name: name for name, torch_name in TORCH_DTYPES.items()}
        dtype = dtypes.get(str((experts.record or {}).get("dtype")))
        facts = examine_weights(experts, [each.computed_in(dtype) for each in sources])
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
        engines=engines(target.title, traits),
        trainers=trainers(target, traits, num_experts=num_experts),
        record=experts.record,
        weights=facts,
        load=found,
    )


def inspection_rows(inspection: Inspection) -> Iterator[Row]:
    """Yield the rows that describe a checkpoint."""
    checkpoint = inspection.checkpoint
    yield "model", [f"{inspection.model_type} ({inspection.kind})"]
    if inspection.kind == "moe":
        yield "made from", [_record_text(inspection.record)]
    if inspection.weights is not None:
        merged = "experts_from" in (inspection.record or ())
        yield from _weight_rows(inspection.weights, inspection.num_experts, merged=merged)
    if inspection.load is not None:
        yield from _load_rows(inspection.load)
    if inspection.num_experts is not None:
        experts = f"{inspection.num_experts} per layer, {inspection.top_k} active"
        stored = f"{inspection.routing}, stored {inspection.expert_layout}"
        yield "experts", [f"{experts}, {stored}"]
        layers, num_layers = inspection.moe_layers or (), inspection.num_layers
        if len(layers) != num_layers:
            yield "MoE layers", [f"{len(layers)} of {num_layers}: {format_layers(layers)}"]
    dense, parameters = inspection.dense_parameters, parameter_text(inspection.total_parameters)
    if inspection.kind == "moe":
        origin = "" if dense is None else f" (dense {parameter_text(dense)})"
        parameters += f", {parameter_text(inspection.active_parameters)} active{origin}"
    yield "parameters", [parameters]
    shards = counted(len(checkpoint.shards), "shard")
    dtype = checkpoint.dequantized_to
    note = "" if dtype is None else f", FP8 computed in {dtype}"
    yield "size", [f"{size_text(checkpoint.nbytes)} in {shards}{note}"]
    if checkpoint.adapter_text:
        yield "adapter", [checkpoint.adapter_text]
    if inspection.kind == "moe":
        yield "engines", support_lines(inspection.engines)
        if inspection.trainers:
            yield "trainers", support_lines(inspection.trainers)
    else:
        from upcycle_cli.models.overview import target_rows

        able = [target for target in inspection.becomes if target.refusal is None]
        names = ", ".join(target.name for target in able).replace(",", " (default),", 1)
        yield "can become", [names or "nothing yet"]
        yield from target_rows(able[:1] or inspection.becomes)


def _record_text(record: Mapping[str, Any] | None) -> str:
    """Describe the conversion that upcycle.json states; its values can be anything."""
    if record is None:
        return "not recorded (normal after training)"
    try:
        recipe, source = record.get("recipe", {}), record["source"]["name"]
        if isinstance(record.get("growth"), dict):
            return f"grown: each expert {record['growth']['expand']} times, from {source}"
        made = f"{recipe['name']}, {recipe['scaling']} scaling, {recipe['router_init']} rows"
        return f"{made}, seed {recipe['seed']}, from {source}"
    except (AttributeError, KeyError, TypeError):
        return "unknown: upcycle.json is of another version"


def _weight_rows(weights: WeightFacts, num_experts: int | None, *, merged: bool) -> Iterator[Row]:
    if not merged and len(weights.sources) < 2:  # experts of different models are not copies
        yield "copies", [_copies_text(weights, num_experts)]
    if weights.movement is None:
        rows = f"the same in each group of {weights.granularity} experts"
        yield "router rows", [rows if weights.granularity > 1 else "all different"]
    if weights.shared_width:
        width, neurons = weights.shared_width, weights.shared_neurons
        made = f": {neurons:,} neurons of the dense MLP" if neurons else ""
        yield "shared expert", [f"{width:,} wide{made}"]
    if weights.factors is not None:
        measured = ", ".join(f"{name} × {value:.6g}" for name, value in weights.factors.items())
        yield "scale factors", [f"{measured} (measured against the dense model)"]
    if weights.movement is not None:
        if len(weights.sources) > 1:
            of = Counter(model for each in weights.movement for model in each.models)
            alike = [f"{counted(of[i], 'group')} of {n}" for i, n in enumerate(weights.sources)]
            yield "most like", alike
        yield from _drift_rows(weights.movement)


def _copies_text(weights: WeightFacts, num_experts: int | None) -> str:
    """Describe how many experts still equal their copies in other groups."""
    distinct, total = weights.distinct_experts, weights.num_experts
    if weights.diverged:
        if weights.movement is None and weights.granularity == 1 and distinct == num_experts:
            return f"all {num_experts} experts of a layer differ; `dense` tells which were copies"
        return f"{weights.diverged:,} of {total:,} experts have diverged from their copies"
    return f"all experts equal their copies: {counted(distinct, 'different expert')} per layer"


def _drift_rows(layers: Sequence[LayerDrift]) -> Iterator[Row]:
    moved = [(distance, each.layer, e) for each in layers for e, distance in enumerate(each.moved)]
    most, layer, expert = max(moved)
    mean = sum(distance for distance, _, _ in moved) / len(moved)
    unlike = sum(each.unlike for each in layers) / len(layers)
    apart = sum(each.apart for each in layers) / len(layers)
    if most:
        farthest = f"{most:.2%} at most (layer {layer}, expert {expert})"
        yield "moved", [f"{mean:.2%} from the dense weights on average, {farthest}"]
        yield "moved apart", [f"{apart:.2%} from the mean of an expert and its copies"]
    else:
        yield "moved", ["not at all: the dense weights, times the scale factors"]
    if unlike:
        words = "of the neurons match none of the dense model; the rows above leave them out"
        yield "new neurons", [f"{unlike:.2%} {words}"]
    split, total = sum(e.split_groups for e in layers), sum(e.num_groups for e in layers)
    where = format_layers([each.layer for each in layers if each.split_groups])
    words = f"{split:,} of {total:,} have unequal router rows, in layers {where}"
    yield "split groups", [words if split else f"none of {total:,}"]


def _load_rows(found: ExpertLoad) -> Iterator[Row]:
    layers = found.layers
    worst = max(layers, key=lambda each: each.load_cv)
    mean = sum(each.load_cv for each in layers) / len(layers)
    varies = f"varies by {mean:.2f} on average, at most {worst.load_cv:.2f} (layer {worst.layer})"
    yield "expert load", [f"{varies} ({found.tokens:,} tokens of {found.text})"]
    idle, every = sum(len(each.idle) for each in layers), sum(len(e.load) for e in layers)
    where = format_layers([each.layer for each in layers if each.idle])
    yield "never chosen", [f"{idle:,} of {every:,} experts" + f", in layers {where}" * bool(idle)]
