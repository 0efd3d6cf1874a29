"""Gathers, casts, scales and transposes matrices a few rows at a time, so that they stay in cache.

Casts report what the output dtype cannot hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from ml_dtypes import bfloat16, finfo

from upcycle_cli.checkpoint.arrays import NUMPY_DTYPES, rounded, to_float32

if TYPE_CHECKING:
    from numpy.typing import NDArray

TILE = 256
"""Rows and columns that are transposed at once."""
_PIECE_ITEMS = 1 << 16
_WORD_BYTES = 8
_MANTISSA_BITS = {"F16": 10, "BF16": 7}
_DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": bfloat16}


class OverflowInCastError(ArithmeticError):
    """A finite value became infinite in the output dtype."""


class Rows(Protocol):
    """A tensor whose rows are made when they are asked for; an array is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all rows together."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> NDArray[Any]: ...


def converted(
    rows: Rows, before: str, after: str, factor: float, vanished: Callable[[int], None]
) -> NDArray[Any]:
    """Return the values times a factor in another dtype, or in the same one.

    `vanished` receives how many nonzero values became zero. Raises OverflowInCastError.
    """
    out = np.empty(rows.shape, NUMPY_DTYPES[after])
    if not out.size:
        return out
    step, lost = max(1, _PIECE_ITEMS * len(rows) // out.size), 0
    for start in range(0, len(rows), step):
        values, piece = rows[start : start + step], out[start : start + step]
        if before == after and _shift_exponents(values, after, factor, piece):
            continue
        wide = to_float32(values, before)
        with np.errstate(over="ignore", invalid="ignore"):
            product = wide if factor == 1.0 else wide * np.float32(factor)
            piece[...] = rounded(product, after)
        if not -_largest(after) <= product.min() <= product.max() <= _largest(after):
            made = to_float32(piece, after)
            if (np.isinf(made) & np.isfinite(wide)).any():
                raise OverflowInCastError
        if factor < 1.0 or _smallest(after) > _smallest(before):
            magnitudes = piece.view(f"<u{piece.itemsize}") << 1  # without the sign of zeros
            lost += int(np.count_nonzero(wide) - np.count_nonzero(magnitudes))
    if lost:
        vanished(lost)
    return out


def _shift_exponents(values: NDArray[Any], dtype: str, factor: float, out: NDArray[Any]) -> bool:
    """Multiply 16-bit floats by a power of two through their exponents, 3 times as fast.

    Returns False if that is not possible: zeros and subnormal or infinite values have no exponent.
    """
    mantissa, exponent = math.frexp(factor)
    if dtype not in _MANTISSA_BITS or mantissa != 0.5:
        return False
    normal = 1 << _MANTISSA_BITS[dtype]  # the bits of the smallest normal value
    words, shift = values.view("<u2"), (exponent - 1) * normal
    magnitudes = words & 0x7FFF
    least, most = int(magnitudes.min()), int(magnitudes.max())
    if min(least, least + shift) < normal or max(most, most + shift) >= 0x8000 - normal:
        return False
    np.add(words, np.uint16(shift & 0xFFFF), out=out.view("<u2"))
    return True


@lru_cache
def _largest(dtype: str) -> float:
    return float(finfo(_DTYPES[dtype]).max)  # type: ignore[no-untyped-call]


@lru_cache
def _smallest(dtype: str) -> float:
    """Return the smallest value above zero."""
    return float(finfo(_DTYPES[dtype]).smallest_subnormal)  # type: ignore[no-untyped-call]


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
        step = max(1, _PIECE_ITEMS * len(self.values) // max(1, self.values.size))
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
    lanes = _WORD_BYTES // values.itemsize
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
