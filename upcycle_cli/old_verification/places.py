"""Where the experts of an MoE lie in its files."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from upcycle_cli.checkpoint.header import ITEM_BYTES, TensorEntry
from upcycle_cli.models.mlp import Location
from upcycle_cli.old_verification.facts import Facts


@dataclass(frozen=True)
class Experts:
    """Where the experts lie, for one layer as for all: asking `Facts` for each takes its time."""

    facts: Facts
    places: tuple[tuple[str, int, Location], ...]
    """Part, expert, and the place with the name of its tensor within the layer."""

    @classmethod
    def of(cls, facts: Facts) -> Experts:
        """Ask for the first layer."""
        first, start = facts.layers[0], len(facts.target.prefix(facts.layers[0]))
        found = []
        for expert in facts.experts:
            for part in facts.parts:
                place = facts.locate(part, first, expert)
                found.append((part, expert, replace(place, tensor=place.tensor[start:])))
        return cls(facts, tuple(found))

    def names(self, layer: int) -> dict[str, str]:
        """Return the tensors of a layer's experts, each with a part that it holds."""
        prefix = self.facts.target.prefix(layer)
        return {prefix + place.tensor: part for part, _, place in self.places}


class Spot(NamedTuple):
    """Where a tensor of the MoE, or what it holds of an expert, lies in its file, in bytes."""

    shard: str
    start: int
    nbytes: int


def spot_of(entry: TensorEntry, place: Location, *, whole: bool = False) -> Spot | None:
    """Return where a place lies, None when its bytes are not in one piece.

    With `whole` that of all that is beside it, the matrix of an expert.
    """
    shape, start = entry.shape, 0
    if place.row is not None:
        shape = shape[1:]
        start = place.row * math.prod(shape)
    if (
        not whole
        and place.split_dim is not None
        and place.stop - place.start != shape[place.split_dim]
    ):
        if place.split_dim:
            return None
        shape = (place.stop - place.start, *shape[1:])
        start += place.start * math.prod(shape[1:])
    item = ITEM_BYTES[entry.dtype]
    return Spot(entry.shard, entry.offset + start * item, math.prod(shape) * item)
