"""Gathers rows and columns of a matrix in another order, a few at a time, and turns matrices.

Legend: R rows, I columns, L values of a row to a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from upcycle_cli.write.transpose import TILE

if TYPE_CHECKING:
    from numpy.typing import NDArray

PIECE_ITEMS = 1 << 16
"""Few enough that what is computed from them on the way stays in a processor's cache."""
WORD_BYTES = 8


@dataclass(frozen=True)
class Packed:
    """Rows of which as many as fill a word lie side by side: one move takes a column of all.

    That is faster than taking each value by itself, the packing included where columns are taken
    more than once.
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
class Taken:
    """Rows of a Take, gathered as they are asked for."""

    values: NDArray[Any]
    dim: int
    indices: NDArray[np.intp]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of all that is gathered."""
        shape = self.values.shape
        return (*shape[: self.dim], len(self.indices), *shape[self.dim + 1 :])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        if self.dim:
            return self.values[rows].take(self.indices, axis=1)
        return self.values.take(self.indices[rows], axis=0)

    def into(self, out: NDArray[Any], start: int) -> None:
        """Gather as many rows as `out` has, from `start` on."""
        rows = slice(start, start + len(out))
        # What numpy checks of indices costs more than gather_input; a permutation's are right.
        if self.dim:
            self.values[rows].take(self.indices, axis=1, out=out, mode="wrap")
        else:
            self.values.take(self.indices[rows], axis=0, out=out, mode="wrap")

    def all(self) -> NDArray[Any]:
        """Gather all of it."""
        out = np.empty(self.shape, self.values.dtype)
        # Few rows at a time: what is gathered from columns then comes from a processor's cache.
        step = max(1, PIECE_ITEMS * len(self.values) // max(1, self.values.size))
        for start in range(0, len(out), step):
            self.into(out[start : start + step], start)
        return out


def turned(parts: Iterable[NDArray[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
    """Return matrices, one below the other, turned; `shape` is that of the result."""
    out, start = None, 0
    for part in parts:
        if out is None:
            out = np.empty(shape, part.dtype)
        stop = start + len(part)
        _turn(part, out[:, start:stop])
        start = stop
    assert out is not None
    return out


def _turn(values: NDArray[Any], out: NDArray[Any]) -> None:
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
