"""An inspection in words: a property and the lines that describe it, for the table and the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from upcycle_cli.core.errors import shown
from upcycle_cli.core.text import counted, parameter_text, size_text
from upcycle_cli.models.engines import Engine, support_lines
from upcycle_cli.models.layers import format_layers

if TYPE_CHECKING:
    from upcycle_cli.inspection.expert_load import ExpertLoad
    from upcycle_cli.inspection.experts import WeightFacts
    from upcycle_cli.inspection.summary import Inspection
    from upcycle_cli.inspection.weight_drift import LayerDrift
    from upcycle_cli.models.trainers import Trainer

Row = tuple[str, Sequence[str]]

_MAX_VALUE_LENGTH = 100
"""Longer values from a record are cut."""
_MAX_LAYERS = 8
"""More layers with idle experts are counted, not named; --json and --report have all."""


def inspection_rows(inspection: Inspection) -> Iterator[Row]:
    """Yield the rows that describe a checkpoint."""
    checkpoint = inspection.checkpoint
    yield "model", [f"{inspection.model_type} ({inspection.kind})"]
    if inspection.num_experts is not None:
        experts = f"{inspection.num_experts} per layer, {inspection.top_k} active"
        stored = f"{inspection.routing}, stored {inspection.expert_layout}"
        yield "experts", [f"{experts}, {stored}"]
        layers, num_layers = inspection.moe_layers or (), inspection.num_layers
        if len(layers) != num_layers:
            yield "MoE layers", [f"{format_layers(layers)} of {num_layers}"]
    dense, parameters = inspection.dense_parameters, parameter_text(inspection.total_parameters)
    if inspection.kind == "moe":
        origin = "" if dense is None else f" (dense {parameter_text(dense)})"
        parameters += f", {parameter_text(inspection.active_parameters)} active{origin}"
    yield "parameters", [parameters]
    shards = counted(len(checkpoint.shards), "shard")
    yield "size", [f"{size_text(checkpoint.nbytes)} in {shards}"]
    if inspection.becomes:
        able = [target.name for target in inspection.becomes if target.refusal is None]
        yield "can become", [", ".join(able) or "nothing"]
        if refused := [target.refusal for target in inspection.becomes if target.refusal]:
            yield "but not", refused
    if inspection.kind == "moe":
        yield "upcycle.json", [record_text(inspection.record)]
        yield "engines", software_lines(inspection.engines)
        if inspection.trainers:
            yield "trainers", software_lines(inspection.trainers)
    if inspection.weights is not None:
        yield from _weight_rows(inspection.weights, inspection.num_experts)
    if inspection.load is not None:
        yield from _load_rows(inspection.load)


def software_lines(found: Iterable[Engine | Trainer]) -> list[str]:
    """Return the names of engines or trainers, a line for each kind of support."""
    return support_lines((each.name, each.support) for each in found)


def record_text(record: Mapping[str, Any] | None) -> str:
    """Return what upcycle.json says about the conversion; its values can be anything."""
    if record is None:
        return "missing: nothing says how this MoE was made"
    recipe, source = record.get("recipe"), record.get("source")
    growth = record.get("growth")
    if isinstance(growth, dict) and isinstance(source, dict):
        expand, name = (_value_text(value) for value in (growth.get("expand"), source.get("name")))
        return f"grown: each expert {expand} times, from {name}"
    if not isinstance(recipe, dict) or not isinstance(source, dict):
        return "not in a format that this version reads"
    keys = ("name", "expansion", "granularity", "scaling", "seed")
    name, expansion, granularity, scaling, seed = (_value_text(recipe.get(key)) for key in keys)
    # An earlier version drew all rows.
    rows = _value_text(recipe.get("router_init", "normal"))
    groups = f"{expansion} group{'' if expansion == '1' else 's'} of {granularity}"
    if recipe.get("shared_experts"):
        groups += f" shards, {_value_text(recipe['shared_experts'])} of them shared"
    made = f"{name} ({groups}), {scaling} scaling, {rows} rows, seed {seed}"
    return f"{made}, from {_value_text(source.get('name'))}"


def _value_text(value: object) -> str:
    text = value if isinstance(value, str) else shown(value)
    return text if len(text) <= _MAX_VALUE_LENGTH else f"{text[:_MAX_VALUE_LENGTH]}…"


def _weight_rows(weights: WeightFacts, num_experts: int | None) -> Iterator[Row]:
    distinct = counted(weights.distinct_experts, "different expert")
    per_group = f"{weights.granularity} per group by their router rows"
    yield "weights", [f"{distinct} of {num_experts}, {per_group}"]
    whole = "yes, in every layer" if weights.whole_groups else "no:"
    if weights.whole_groups and weights.reordered_groups:
        whole += f"; {weights.reordered_groups:,} have their neurons in another order"
    yield "whole groups", [whole, *weights.differing]
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
            yield (
                "most like",
                [f"{counted(of[i], 'group')} of {name}" for i, name in enumerate(weights.sources)],
            )
        yield from _drift_rows(weights.movement)


def _drift_rows(layers: Sequence[LayerDrift]) -> Iterator[Row]:
    moved = [(distance, each.layer, e) for each in layers for e, distance in enumerate(each.moved)]
    most, layer, expert = max(moved)
    mean = sum(distance for distance, _, _ in moved) / len(moved)
    unlike = sum(each.unlike for each in layers) / len(layers)
    apart = sum(each.apart for each in layers) / len(layers)
    if most:
        yield (
            "moved",
            [f"{mean:.2%} on average, {most:.2%} at most (layer {layer}, expert {expert})"],
        )
        yield "moved apart", [f"{apart:.2%} from the mean of the copies of a shard"]
    else:
        yield "moved", ["not at all"]
    if unlike:
        yield (
            "new neurons",
            [f"{unlike:.2%} match no neuron of the dense model; not counted above"],
        )
    split, num_groups = sum(each.split_groups for each in layers), sum(e.num_groups for e in layers)
    where = (
        f", in layers {format_layers([e.layer for e in layers if e.split_groups])}" if split else ""
    )
    yield "split groups", [f"{split:,} of {num_groups:,}{where}"]


def _load_rows(found: ExpertLoad) -> Iterator[Row]:
    layers = found.layers
    worst = max(layers, key=lambda each: each.load_cv)
    mean = sum(each.load_cv for each in layers) / len(layers)
    yield (
        "load",
        [
            f"varies by {mean:.2f} on average, {worst.load_cv:.2f} in layer {worst.layer} "
            f"({found.tokens:,} tokens of {found.text})"
        ],
    )
    idle = [(each.layer, format_layers(each.idle)) for each in layers if each.idle]
    number, every = sum(len(each.idle) for each in layers), sum(len(e.load) for e in layers)
    lines = [f"layer {layer}: {experts}" for layer, experts in idle[:_MAX_LAYERS]]
    if len(idle) > _MAX_LAYERS:
        lines.append(f"and in {counted(len(idle) - _MAX_LAYERS, 'more layer')}")
    yield "never chosen", [f"{number:,} of {counted(every, 'expert')}", *lines]
