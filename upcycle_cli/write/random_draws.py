"""Random draws for routers, noise on experts, and reinitialized neurons.

Each draw is a pure function of a seed and the name of a stream. Sums are computed in one fixed
order, so every processor rounds them the same way. Draws are made piece by piece.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from upcycle_cli.checkpoint.header import OverflowInCastError, rounded, to_float32
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.plan.expressions import AddNoise, Permutation, Reinit, type_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Index: TypeAlias = slice | NDArray[np.intp] | tuple[slice, NDArray[np.intp]]

_PIECE_ITEMS = 1 << 16
"""Few enough that everything computed from them stays in the processor's cache."""


def drawn_on(expr: AddNoise | Reinit, values: NDArray[Any]) -> NDArray[Any]:
    """Return the `values` that an expression changes, with its draws.

    Raises OverflowInCastError for a value that does not fit the dtype, UpcycleError for NaN.
    """
    dtype = type_of(expr).dtype
    # An array that aliases a source file must not be written to.
    out = values if values.flags.owndata else values.copy()
    target = out.reshape(-1) if isinstance(expr, AddNoise) else out
    pieces = [*_pieces(expr, target)]
    mean, std = _mean_and_std(to_float32(target[piece], dtype) for piece in pieces)
    if not math.isfinite(std):
        raise UpcycleError(f"{expr.stream}: a weight of the dense model is NaN or infinite.")
    source = generator(expr.seed, expr.stream)
    for piece in pieces:
        held = target[piece]
        drawn = source.standard_normal(held.shape) * std
        if isinstance(expr, AddNoise):
            drawn *= expr.std
            drawn += to_float32(held, dtype)
        else:
            drawn += mean
        with np.errstate(over="ignore"):
            made = rounded(drawn, dtype)
        if not np.isfinite(to_float32(made, dtype)).all():
            raise OverflowInCastError
        target[piece] = made
    return out


def _pieces(expr: AddNoise | Reinit, target: NDArray[Any]) -> Iterator[Index]:
    """Yield the places of the draws in order: a few values, or a few rows of neurons."""
    if isinstance(expr, AddNoise):
        for start in range(0, len(target), _PIECE_ITEMS):
            yield slice(start, start + _PIECE_ITEMS)
        return
    neurons = np.sort(permutation(expr.order)[: expr.count])
    if expr.dim == 0:
        step = max(1, _PIECE_ITEMS // max(1, math.prod(target.shape[1:])))
        for start in range(0, len(neurons), step):
            yield neurons[start : start + step]
        return
    step = max(1, _PIECE_ITEMS // max(1, len(neurons)))
    for start in range(0, len(target), step):
        yield slice(start, start + step), neurons


def _mean_and_std(pieces: Iterable[NDArray[np.float32]]) -> tuple[float, float]:
    """Return the mean and standard deviation of pieces of values, none larger than the first."""
    count, sums, squares = 0, np.zeros(0), np.zeros(0)
    for piece in pieces:
        flat = piece.reshape(-1).astype(np.float64)
        if not count:
            sums, squares = np.zeros(len(flat)), np.zeros(len(flat))
        sums[: len(flat)] += flat
        squares[: len(flat)] += flat * flat
        count += len(flat)
    if not np.isfinite(squares).all():
        return math.nan, math.nan
    # fsum is exactly rounded, so that the order of summation does not matter.
    mean, square = (math.fsum(each.tolist()) / max(1, count) for each in (sums, squares))
    return mean, math.sqrt(max(0.0, square - mean**2))


def standard_normal(seed: int, stream: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Draw normal values; float64 draws are the same on every CPU, float32 ones are not."""
    return generator(seed, stream).standard_normal(shape)


def generator(seed: int, stream: str) -> np.random.RandomState:
    """Return the generator of a stream."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    # The only generator that numpy promises never to change.
    return np.random.RandomState(np.frombuffer(digest, "<u4"))


def permutation(order: Permutation) -> NDArray[np.intp]:
    """Return the indices of a permutation."""
    if order.seed is not None:
        return _drawn_permutation(order)
    if order.indices is None:
        raise ValueError(f"{order.stream} has no indices yet")
    # Not cached: permutations that a calibration found can be equal and have other indices.
    return np.frombuffer(order.indices, "<u4").astype(np.intp)


@lru_cache(maxsize=64)
def _drawn_permutation(order: Permutation) -> NDArray[np.intp]:
    assert order.seed is not None
    drawn = generator(order.seed, order.stream).random_sample(order.size)
    return np.argsort(drawn, kind="stable")
