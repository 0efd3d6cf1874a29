"""A group whose neurons are in no order that is the same for all of its parts, in words.

Legend: G shards, I dense intermediate size; a neuron is a row of gate and up, a column of down, and
an entry of the biases that go with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from upcycle_cli.old_verification.bits import difference, same, unequal
from upcycle_cli.old_verification.neurons import Neurons, most_likely

if TYPE_CHECKING:
    from upcycle_cli.inspection.neuron_matching import Indices
    from upcycle_cli.old_verification.gathered import Gathered

_MOST = 0.5
"""The share of neurons that says what a group was meant to be."""


def order_failures(neurons: Neurons, part: str, layer: int, group: int) -> list[str] | None:
    """Say what is wrong with a part of a group that has neurons in an order of its own.

    Nothing where that order explains it all. None where there is no such order, or the part has
    nothing of single neurons: it is to be held to the slices of the dense MLP.
    """
    if part not in neurons.cuts:
        return None
    failures: list[str] = []
    order = neurons.order(layer, group)
    if order is None:
        seems = neurons.by_parts(layer, group)
        likely = most_likely(seems) if len(seems) == len(neurons.cuts) else np.array([-1])
        in_place = np.mean(likely == neurons.facts.shared_width + np.arange(len(likely)))
        if in_place > _MOST or np.mean(likely >= 0) <= _MOST:
            return None
        if (layer, group) not in neurons.told:  # of the first of its parts that differs
            neurons.told.add((layer, group))
            failures += _misplaced(neurons, layer, group, likely)
        order, found = _completed(likely, neurons.routed(layer)), seems[part]
    else:
        neurons.uneven.add(layer)
        found = order
    gathered = neurons.gathered(part, layer, group, order)
    if not gathered.all_hold():
        failures += _differences(neurons, gathered, (part, layer, group), found)
    return failures


def _misplaced(neurons: Neurons, layer: int, group: int, likely: Indices) -> Iterator[str]:
    """Say which neurons a group has twice, or shares with all groups, and which it lacks for it."""
    routed, held = neurons.routed(layer), likely[likely >= 0]
    size, first = neurons.facts.expert_size, group * neurons.facts.group_size
    twice = np.flatnonzero(np.bincount(held) > 1)
    shared = np.setdiff1d(held, routed)
    for odd, words in ((twice, " twice"), (shared, ", which the shared expert has")):
        if not len(odd):
            continue
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        places = np.flatnonzero(likely == odd[0])[:2]
        where = " and ".join(f"in expert {first + at // size} at {at % size}" for at in places)
        yield (
            f"layer {layer}: virtual group {group} has neuron {odd[0]}{more} of the dense MLP"
            f"{words}, {where}; it lacks neuron {np.setdiff1d(routed, likely)[0]}"
        )


def _completed(likely: Indices, routed: Indices) -> Indices:
    """Return an order in which places of no known neuron have those that are nowhere."""
    order, unknown = likely.copy(), np.flatnonzero(likely < 0)
    nowhere = np.setdiff1d(routed, likely)
    order[unknown] = nowhere[: len(unknown)]
    return order


def _differences(
    neurons: Neurons, gathered: Gathered, where: tuple[str, int, int], found: Indices
) -> Iterator[str]:
    """Say of each expert of a group in which a part is not what the order makes it."""
    (part, layer, group), facts, order = where, neurons.facts, gathered.order
    for shard, held in enumerate(gathered.held):
        wanted = gathered.wanted(shard)
        if same(held, wanted):
            continue
        label = facts.locate(part, layer, group * facts.group_size + shard).label
        differs = unequal(held, wanted).movedim(gathered.cut, 0).flatten(1).any(1).numpy()
        start = shard * facts.expert_size
        others = [
            place
            for place in np.flatnonzero(differs).tolist()
            if found[start + place] not in {-1, order[start + place]}
        ]
        if others:
            at = start + others[0]
            more = f", and so on in {len(others)} places" if len(others) > 1 else ""
            yield (
                f"{label} has neuron {found[at]} of the dense MLP at {others[0]}, where the rest "
                f"of the expert has neuron {order[at]}{more}"
            )
        else:
            yield f"{label} {difference(held, wanted)}"
