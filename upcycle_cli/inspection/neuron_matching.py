"""Match trained neurons with the dense model's by the directions of their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Indices: TypeAlias = NDArray[np.intp]

_BLOCK_ROWS = 1024
_SIMILAR = 0.5
"""The cosine above which two sketches are of one neuron; noise of the weights' size leaves 0.7."""
_MOSTLY = 0.9


@dataclass(frozen=True)
class Matches:
    """Which dense neuron is which neuron of a group."""

    order: Indices | None
    """For each dense neuron its place in the group, any free place for one without a match; None
    when all matches are in their own place."""
    matched: NDArray[np.bool_]
    """Which dense neurons have a match."""
    similarity: float
    """The sum of the cosines."""


def match_neurons(dense: NDArray[np.float32], group: NDArray[np.float32]) -> Matches:
    """Match neurons by the direction of (I, K) sketches, trained or with noise as they may be."""
    ours, theirs = (
        rows / (np.linalg.norm(rows, axis=1)[:, None] + 1e-30) for rows in (dense, group)
    )
    cosines = (ours * theirs).sum(1)
    in_place = cosines > _SIMILAR
    unmoved = Matches(None, in_place, float(cosines.sum()))
    if in_place.all():
        return unmoved
    order, best = np.empty(len(ours), np.intp), np.empty(len(ours), np.float32)
    for start in range(0, len(ours), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        block = ours[rows] @ theirs.T
        order[rows], best[rows] = block.argmax(1), block.max(1)
    similar = np.flatnonzero(best > _SIMILAR)
    places, first = np.unique(order[similar], return_index=True)
    if in_place.sum() >= _MOSTLY * len(places):
        return unmoved
    similar = similar[first]
    matched = np.zeros(len(order), np.bool_)
    matched[similar] = True
    order[~matched] = np.setdiff1d(np.arange(len(order)), places)
    return Matches(order, matched, float(best[similar].sum()))
