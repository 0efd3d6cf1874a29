"""Which neurons are which: told by their weights, whatever order they come in.

A neuron is hashed by the bits of its weights, as many of them as are given: the sum of each times
an odd number of 64 bits, modulo 2^64. That finds a match, and tells neurons apart, at the speed of
memory; whether what was matched is the same is for whoever asks to compare, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Hashes: TypeAlias = NDArray[np.uint64]
    Indices: TypeAlias = NDArray[np.intp]

_BLOCK_ITEMS = 1 << 18
_BLOCK_ROWS = 1024
_SIMILAR = 0.5
"""The cosine above which two sketches are of one neuron; noise of the weights' size leaves 0.7."""
_MOSTLY = 0.9


def neuron_hashes(matrix: NDArray[Any], cut: int, part: str) -> Hashes:
    """Return a hash for each of a matrix' neurons, which its dimension `cut` counts.

    `matrix` is of integers, the bits of weights, and may be a vector; `part` says of what, so that
    the hashes of several parts of the same neurons can be added up.
    """
    columns = matrix.reshape(len(matrix), -1)
    rows = columns if cut == 0 else columns.T
    total = np.zeros(len(rows), np.uint64)
    factors = _factors(part, rows.shape[1])
    step = max(1, _BLOCK_ITEMS // max(1, len(columns.T)))
    for start in range(0, len(columns), step):
        block = columns[start : start + step].astype(np.uint64)
        if cut == 0:
            total[start : start + step] = block @ factors
        else:
            total += factors[start : start + step] @ block
    return total


def match(
    held: Hashes, wanted: Hashes, finer: Callable[[Indices, Indices], tuple[Hashes, Hashes]]
) -> Indices | None:
    """Return by held neuron the wanted one that it is, each of them once; None when there is none.

    `finer` is asked to tell those apart that have equal hashes: for neurons on either side it
    returns hashes of more of their weights.
    """
    by_held, by_wanted = np.argsort(held, kind="stable"), np.argsort(wanted, kind="stable")
    ordered = held[by_held]
    if not np.array_equal(ordered, wanted[by_wanted]):
        return None
    repeats = ordered[1:] == ordered[:-1]
    tied = np.append(repeats, False) | np.append(False, repeats)
    if tied.any():
        some_held, some_wanted = by_held[tied], by_wanted[tied]
        finer_held, finer_wanted = finer(some_held, some_wanted)
        by_held[tied] = some_held[np.lexsort((finer_held, ordered[tied]))]
        by_wanted[tied] = some_wanted[np.lexsort((finer_wanted, ordered[tied]))]
    order = np.empty(len(held), np.intp)
    order[by_held] = by_wanted
    return order


def match_some(held: Hashes, wanted: Hashes) -> Indices | None:
    """Return by held neuron one of the wanted that has its hash, each once at most; None for none.

    Of neurons with equal hashes any is as good as another.
    """
    by_held, by_wanted = np.argsort(held, kind="stable"), np.argsort(wanted, kind="stable")
    ours, theirs = held[by_held], wanted[by_wanted]
    nth = np.arange(len(ours)) - np.searchsorted(ours, ours)
    found = np.searchsorted(theirs, ours) + nth
    if found.max(initial=0) >= len(theirs) or not np.array_equal(theirs[found], ours):
        return None
    order = np.empty(len(held), np.intp)
    order[by_held] = by_wanted[found]
    return order


def nearest(held: NDArray[np.float32], wanted: NDArray[np.float32]) -> Indices | None:
    """Return by held neuron the wanted one whose direction is the nearest; (I, K) entries of each.

    None where most are nearest in place, or no order is to be seen: then the same neuron would be
    the nearest of several.
    """
    ours, theirs = (
        rows / (np.linalg.norm(rows, axis=1)[:, None] + 1e-30) for rows in (held, wanted)
    )
    if np.median((ours * theirs).sum(1)) > _SIMILAR:
        return None
    found = np.empty(len(ours), np.intp)
    for start in range(0, len(ours), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        found[rows] = (ours[rows] @ theirs.T).argmax(1)
    taken, first = np.unique(found, return_index=True)
    if len(taken) < _MOSTLY * len(found):
        return None
    # The others, which are like one that is found already, are as good as one another.
    rest = np.ones(len(found), bool)
    rest[first] = False
    found[rest] = np.setdiff1d(np.arange(len(found)), taken)
    return found


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


@lru_cache(maxsize=32)
def _factors(part: str, count: int) -> Hashes:
    seed = np.frombuffer(part.encode(), np.uint8).astype(np.uint32)
    drawn = np.random.RandomState(seed).bytes(8 * count)
    return np.frombuffer(drawn, "<u8") | np.uint64(1)
