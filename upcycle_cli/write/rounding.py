"""Casts and scales values, a few rows at a time, and reports what the output dtype cannot hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from ml_dtypes import bfloat16, finfo

from upcycle_cli.checkpoint.arrays import NUMPY_DTYPES, rounded, to_float32

if TYPE_CHECKING:
    from numpy.typing import NDArray

PIECE_ITEMS = 1 << 16
"""Few enough that everything computed from them stays in the processor's cache."""
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
    step, lost = max(1, PIECE_ITEMS * len(rows) // out.size), 0
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
