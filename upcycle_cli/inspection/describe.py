"""The result of `inspect`, and its rows: properties with the lines that describe them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.core.display import Result, Row
from upcycle_cli.core.text import counted, parameter_text, size_text
from upcycle_cli.models.engines import Engine, Trainer, support_lines
from upcycle_cli.models.layers import format_layers

if TYPE_CHECKING:
    from upcycle_cli.inspection.expert_load import ExpertLoad
    from upcycle_cli.inspection.experts import WeightFacts
    from upcycle_cli.inspection.weight_drift import LayerDrift
    from upcycle_cli.models.overview import TargetFacts
    from upcycle_cli.plan.plan import Plan


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
        from upcycle_cli.plan.warnings import warnings

        return tuple(warnings(self.plan))

    def tables(self) -> Iterator[Iterable[Row]]:
        """Yield what a recipe would make of the checkpoint, or what the checkpoint is."""
        if self.plan is not None:
            from upcycle_cli.plan.facts import plan_rows

            yield plan_rows(self.plan)
        if self.plan is None or self.weights is not None or self.load is not None:
            yield inspection_rows(self)


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
    yield "size", [f"{size_text(checkpoint.nbytes)} in {shards}"]
    if inspection.kind == "moe":
        yield "engines", support_lines(inspection.engines)
        if inspection.trainers:
            yield "trainers", support_lines(inspection.trainers)
    else:
        yield from _target_rows(inspection.becomes)


def _target_rows(targets: Sequence[TargetFacts]) -> Iterator[Row]:
    """Yield the targets of a dense model, and the properties of the default one."""
    from upcycle_cli.models.overview import target_rows

    able = [target for target in targets if target.refusal is None]
    names = ", ".join(target.name for target in able)
    yield "can become", [f"{names}; the first is the default" if able else "nothing yet"]
    yield from target_rows(able[:1] or targets)


def _record_text(record: Mapping[str, Any] | None) -> str:
    """Describe the conversion that upcycle.json states; its values can be anything."""
    if record is None:
        return "unknown: there is no upcycle.json"
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
        made = "it contributes to the output" if weights.shared_works else "its output is zero"
        if weights.shared_neurons:
            made = f"{weights.shared_neurons:,} neurons of the dense MLP"
        yield "shared expert", [f"{weights.shared_width:,} wide: {made}"]
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
    words = f"all experts equal their copies: {counted(distinct, 'different expert')} per layer"
    if weights.reordered_groups:
        words += f"; {weights.reordered_groups:,} groups have their neurons in another order"
    return words


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
    yield "load", [f"{varies} ({found.tokens:,} tokens of {found.text})"]
    idle, every = sum(each.idle_experts for each in layers), sum(len(e.load) for e in layers)
    where = format_layers([each.layer for each in layers if each.idle])
    yield "never chosen", [f"{idle:,} of {every:,} experts" + f", in layers {where}" * bool(idle)]
