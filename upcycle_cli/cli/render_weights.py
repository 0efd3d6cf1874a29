"""What experts say of themselves, and which a text chooses, as rows of a table; no logic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from upcycle_cli.core.text import counted
from upcycle_cli.inspection.experts import WeightFacts
from upcycle_cli.models.layers import listed

if TYPE_CHECKING:
    from upcycle_cli.inspection.expert_load import Load
    from upcycle_cli.inspection.weight_drift import LayerDrift

_MOST_LAYERS = 8
"""That are named one by one; --json and --report have all."""


def weight_rows(
    weights: WeightFacts, num_experts: int | None
) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield what was found in the experts: a property and the lines that say it."""
    distinct = counted(weights.distinct_experts, "different expert")
    per_group = f"{weights.granularity} per group by their router rows"
    yield "weights", [f"{distinct} of {num_experts}, {per_group}"]
    whole = "yes, in every layer" if weights.whole_groups else "no:"
    if weights.whole_groups and weights.reordered_groups:
        whole += f"; {weights.reordered_groups:,} have their neurons in another order"
    yield "whole groups", [whole, *weights.differing]
    if weights.shared_width:
        made = "it does something" if weights.shared_works else "it does nothing yet"
        if weights.shared_neurons:
            made = f"{weights.shared_neurons:,} neurons of the dense MLP"
        yield "shared expert", [f"{weights.shared_width:,} wide: {made}"]
    if weights.factors is not None:
        measured = ", ".join(f"{name} × {value:.6g}" for name, value in weights.factors.items())
        yield "scale factors", [f"{measured} (measured against the dense model)"]
    if weights.movement is not None:
        if len(weights.sources) > 1:
            of = Counter(model for each in weights.movement for model in each.models)
            lines = [
                f"{counted(of[i], 'group')} of {name}" for i, name in enumerate(weights.sources)
            ]
            yield "most like", lines
        yield from _movement_rows(weights.movement)


def _movement_rows(layers: Sequence[LayerDrift]) -> Iterator[tuple[str, Sequence[str]]]:
    """Say in a few words how far experts have come, and where most."""
    moved = [(distance, each.layer, e) for each in layers for e, distance in enumerate(each.moved)]
    most, layer, expert = max(moved)
    mean = sum(distance for distance, _, _ in moved) / len(moved)
    unlike = sum(each.unlike for each in layers) / len(layers)
    apart = sum(each.apart for each in layers) / len(layers)
    if most:
        yield (
            "moved",
            [f"{mean:.2%} on average, {most:.2%} (layer {layer}, expert {expert}) at most"],
        )
        yield "moved apart", [f"{apart:.2%} from the mean of the copies of a shard"]
    else:
        yield "moved", ["not at all"]
    if unlike:
        yield "new neurons", [f"{unlike:.2%}, like none of the dense model's; left out above"]
    split, num_groups = sum(each.split_groups for each in layers), sum(e.num_groups for e in layers)
    where = f", in layers {listed([e.layer for e in layers if e.split_groups])}" if split else ""
    yield "split groups", [f"{split:,} of {num_groups:,}{where}"]


def load_rows(found: Load) -> Iterator[tuple[str, Sequence[str]]]:
    """Say which experts a text chooses, and how evenly."""
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
    idle = [(each.layer, listed(each.idle)) for each in layers if each.idle]
    number, every = sum(len(each.idle) for each in layers), sum(len(e.load) for e in layers)
    lines = [f"layer {layer}: {experts}" for layer, experts in idle[:_MOST_LAYERS]]
    if len(idle) > _MOST_LAYERS:
        lines.append(f"and in {counted(len(idle) - _MOST_LAYERS, 'more layer')}")
    yield "never chosen", [f"{number:,} of {counted(every, 'expert')}", *lines]
