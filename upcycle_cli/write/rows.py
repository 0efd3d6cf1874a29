"""Gather, cast, scale and transpose matrices a few rows at a time, so that they stay in cache.

Casts report values that the output dtype cannot hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from upcycle_cli.checkpoint.arrays import NUMPY_DTYPES, rounded, to_float32
from upcycle_cli.checkpoint.header import LARGEST

if TYPE_CHECKING:
    from numpy.typing import NDArray

TILE = 256
"""Rows and columns that are transposed at once."""
_PIECE_ITEMS = 1 << 16
_SMALLEST = {"F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133}  # above zero


class OverflowInCastError(ArithmeticError):
    """A finite value became infinite in the output dtype."""


class Rows(NamedTuple):
    """A tensor that makes its rows on request."""

    shape: tuple[int, ...]
    make: Callable[[slice], NDArray[Any]]

    def all(self, dtype: str) -> NDArray[Any]:
        """Make all rows, a few at a time, so that their sources stay in the processor's cache."""
        out = np.empty(self.shape, NUMPY_DTYPES[dtype])
        step = max(1, _PIECE_ITEMS * len(out) // max(1, out.size))
        for start in range(0, len(out), step):
            out[start : start + step] = self.make(slice(start, start + step))
        return out


def converted(
    rows: Rows, before: str, after: str, factor: float, vanished: Callable[[int], None]
) -> NDArray[Any]:
    """Return the values times a factor in another dtype, or in the same one.

    `vanished` receives how many nonzero values became zero. Raises OverflowInCastError.
    """
    out = np.empty(rows.shape, NUMPY_DTYPES[after])
    if not out.size:
        return out
    step, lost = max(1, _PIECE_ITEMS * len(out) // out.size), 0
    for start in range(0, len(out), step):
        values, piece = rows.make(slice(start, start + step)), out[start : start + step]
        wide = to_float32(values, before)
        with np.errstate(over="ignore", invalid="ignore"):
            product = wide if factor == 1.0 else wide * np.float32(factor)
            piece[...] = rounded(product, after)
        if not -LARGEST[after] <= product.min() <= product.max() <= LARGEST[after]:
            made = to_float32(piece, after)
            if (np.isinf(made) & np.isfinite(wide)).any():
                raise OverflowInCastError
        if factor < 1.0 or _SMALLEST[after] > _SMALLEST[before]:
            magnitudes = piece.view(f"<u{piece.itemsize}") << 1  # without the sign of zeros
            lost += int(np.count_nonzero(wide) - np.count_nonzero(magnitudes))
    if lost:
        vanished(lost)
    return out


def gathered(values: NDArray[Any], dim: int, indices: NDArray[np.intp]) -> Rows:
    """Return the rows of a Gather."""

    def make(rows: slice) -> NDArray[Any]:
        # numpy's check of the indices costs more than gathering; a permutation's are right.
        if dim:
            return values[rows].take(indices, axis=1, mode="wrap")
        return values.take(indices[rows], axis=0, mode="wrap")

    return Rows((*values.shape[:dim], len(indices), *values.shape[dim + 1 :]), make)


def averaged(parts: Sequence[tuple[NDArray[Any], str]]) -> Rows:
    """Return the rows of the mean in float32 of arrays, each with its dtype."""

    def make(rows: slice) -> NDArray[np.float32]:
        first, *others = (to_float32(values[rows], dtype) for values, dtype in parts)
        total = first.copy()
        for each in others:
            total += each
        total /= np.float32(len(parts))
        return total

    return Rows(parts[0][0].shape, make)


def transposed(parts: Iterable[NDArray[Any]], dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the transpose, of this shape, of matrices stacked by rows."""
    out, start = np.empty(shape, NUMPY_DTYPES[dtype]), 0
    for part in parts:
        place = out[:, start : start + len(part)]
        start += len(part)
        for row in range(0, len(part), TILE):
            for column in range(0, len(out), TILE):
                tile = part[row : row + TILE, column : column + TILE]
                place[column : column + TILE, row : row + TILE] = tile.T
    return out
