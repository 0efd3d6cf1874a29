"""Gathers rows and columns of a matrix in another order, a few at a time, and transposes matrices.

Legend: R rows, I columns, L values of a row to a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from upcycle_cli.write.rounding import PIECE_ITEMS
from upcycle_cli.write.transpose import TILE

if TYPE_CHECKING:
    from numpy.typing import NDArray

WORD_BYTES = 8


@dataclass(frozen=True)
class Packed:
    """Rows, as many side by side as fill a word: one move takes a column of all of them.

    That is faster than moving single values, packing included, if columns are taken repeatedly.
    """

    rows: NDArray[Any]
    words: NDArray[np.uint64] | None
    """(R / L, I) for R rows, L to a word; None where R is no multiple of L."""

    @classmethod
    def of(cls, rows: NDArray[Any]) -> Self:
        """Pack rows."""
        lanes = WORD_BYTES // rows.itemsize
        if len(rows) % lanes:
            return cls(rows, None)
        held = np.empty((len(rows) // lanes, rows.shape[1], lanes), rows.dtype)
        for lane in range(lanes):
            held[..., lane] = rows[lane::lanes]
        return cls(rows, held.view("<u8")[..., 0])

    def take(self, columns: NDArray[np.intp]) -> NDArray[Any]:
        """Return these columns of the rows."""
        if self.words is None:
            return self.rows.take(columns, axis=1)
        lanes, taken = WORD_BYTES // self.rows.itemsize, self.words.take(columns, axis=1)
        held = taken.view(self.rows.dtype).reshape(*taken.shape, lanes)
        out = np.empty((len(self.rows), len(columns)), self.rows.dtype)
        for lane in range(lanes):
            out[lane::lanes] = held[..., lane]
        return out


@dataclass(frozen=True)
class Gathered:
    """The rows of a Gather, gathered as they are asked for."""

    values: NDArray[Any]
    dim: int
    indices: NDArray[np.intp]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all rows together."""
        shape = self.values.shape
        return (*shape[: self.dim], len(self.indices), *shape[self.dim + 1 :])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        # numpy's check of the indices costs more than gathering; a permutation's are right.
        if self.dim:
            return self.values[rows].take(self.indices, axis=1, mode="wrap")
        return self.values.take(self.indices[rows], axis=0, mode="wrap")

    def all(self) -> NDArray[Any]:
        """Gather all rows."""
        out = np.empty(self.shape, self.values.dtype)
        # A few rows at a time, whose columns then come from the processor's cache.
        step = max(1, PIECE_ITEMS * len(self.values) // max(1, self.values.size))
        for start in range(0, len(out), step):
            out[start : start + step] = self[start : start + step]
        return out


def transposed(parts: Iterable[NDArray[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the transpose, of this shape, of matrices that lie one below the other."""
    out, start = None, 0
    for part in parts:
        if out is None:
            out = np.empty(shape, part.dtype)
        stop = start + len(part)
        _transpose(part, out[:, start:stop])
        start = stop
    assert out is not None
    return out


def _transpose(values: NDArray[Any], out: NDArray[Any]) -> None:
    lanes = WORD_BYTES // values.itemsize
    for row in range(0, len(values), TILE):
        rows = values[row : row + TILE]
        for column in range(0, rows.shape[1], TILE):
            tile = rows[:, column : column + TILE]
            place = out[column : column + TILE, row : row + TILE]
            if tile.shape[1] % lanes or tile.strides[1] != tile.itemsize:
                place[...] = tile.T
                continue
            # Values of neighbouring columns move as one word, and part where they are close by.
            words = np.ascontiguousarray(tile.view("<u8").T)
            held = words.view(tile.dtype).reshape(*words.shape, lanes)
            for lane in range(lanes):
                place[lane::lanes] = held[..., lane]
