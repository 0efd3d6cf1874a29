"""Tensors that a checkpoint does not store as they are: what each is made of, and its arithmetic.

Everything is computed in float32 and rounded once, so no value depends on the order of the work or
on the machine, and any rows and columns can be computed alone.

Legend: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeAlias

from upcycle_cli.checkpoint.header import LARGEST, NUMPY_DTYPES, TORCH_DTYPES, rounded, to_float32
from upcycle_cli.core.errors import UpcycleError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Index: TypeAlias = slice | NDArray[np.intp]
    Floats: TypeAlias = NDArray[np.float32]

Read: TypeAlias = Callable[[str], memoryview]
"""Gives the stored bytes of a tensor by name."""

FP8_DTYPES = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
"""The FP8 dtypes of weights, with their names in ml_dtypes."""


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the source checkpoint, unchanged."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Dequantize:
    """Each value times the scale of its block; without a scale, only rounded to the dtype.

    `block` has the rows and columns of a block. Three dimensions are a stack of matrices.
    """

    of: Source
    scale: Source | None
    block: tuple[int, int]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return self.of.shape


@dataclass(frozen=True, slots=True)
class LowRank:
    """A matrix plus `factor` times the product of an adapter's b (O, R) and a (R, I).

    With `fan_in_fan_out` the matrix is (I, O). A dequantised matrix is not rounded first.
    """

    of: Source | Dequantize
    a: Source
    b: Source
    factor: float
    fan_in_fan_out: bool
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return self.of.shape


Made: TypeAlias = Dequantize | LowRank


def inputs(made: Source | Made) -> dict[str, Source | Made]:
    """Return the tensors from which a tensor is computed directly, by field; none if stored."""
    held = {field.name: getattr(made, field.name) for field in fields(made)}
    return {key: value for key, value in held.items() if isinstance(value, Source | Made)}


def stored_parts(tensor: Source | Made) -> Iterator[Source]:
    """Yield the stored tensors that a tensor is computed from, or the stored tensor itself."""
    if isinstance(tensor, Source):
        yield tensor
    for each in inputs(tensor).values():
        yield from stored_parts(each)


def renamed(tensor: Source | Made, rename: Callable[[str], str]) -> Source | Made:
    """Return a tensor whose stored tensors have other names."""
    if isinstance(tensor, Source):
        return replace(tensor, name=rename(tensor.name))
    changes: dict[str, Any] = {key: renamed(it, rename) for key, it in inputs(tensor).items()}
    return replace(tensor, **changes)


def part(
    made: Made, read: Read, rows: Index = slice(None), columns: Index = slice(None)
) -> NDArray[Any]:
    """Return some rows and columns of a tensor as a matrix of `NUMPY_DTYPES`.

    The matrices of a stack follow one another, and a vector is a single column. Raises UpcycleError
    for a value that is not finite.
    """
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        wide = _float32(made, read, rows, columns)
        values = rounded(wide, made.dtype)
        most = LARGEST[made.dtype]
        is_safe = not wide.size or -most <= wide.min() <= wide.max() <= most
    if not (is_safe or np.isfinite(to_float32(values, made.dtype)).all()):
        names = ", ".join(each.name for each in stored_parts(made))
        raise UpcycleError(
            f"a value is not finite in {TORCH_DTYPES[made.dtype]}: it is computed from {names}.",
            "Use a wider `dtype`; if that does not help, the checkpoint is damaged.",
        )
    return values


def _float32(tensor: Source | Made, read: Read, rows: Index, columns: Index) -> Floats:
    import numpy as np

    match tensor:
        case Source():
            return _widened(_matrix(tensor, read)[rows][:, columns], tensor.dtype)
        case Dequantize(of, scale, (block_rows, block_columns)):
            wide = _float32(of, read, rows, columns)
            if scale is None:
                return wide
            height, width = of.shape[-2:]
            number, row = np.divmod(np.arange(math.prod(of.shape[:-1]))[rows], height)
            place = number * -(-height // block_rows) + row // block_rows
            scales = _widened(_matrix(scale, read), scale.dtype)
            column = np.arange(width)[columns] // block_columns
            for block, run in groupby(range(len(place)), place.__getitem__):
                first, *others = run
                factors = scales[block] if scales.shape[1] == 1 else scales[block, column]
                wide[first : first + 1 + len(others)] *= factors
            return wide
        case LowRank(of, a, b, factor, turned):
            places = (columns, rows) if turned else (rows, columns)
            b_OR = _float32(b, read, places[0], slice(None))
            added_OI = product(b_OR, _float32(a, read, slice(None), places[1]))
            added_OI *= np.float32(factor)
            wide = _float32(of, read, rows, columns)
            return wide + (added_OI.T if turned else added_OI)


def product(b_OR: Floats, a_RI: Floats) -> Floats:
    """Return the matrix product with each value rounded once from the exact sum.

    Products of float32 values are exact in float64. Where the error bound of the sum in float64
    leaves two values to round to, the sum is made exactly.
    """
    import numpy as np

    b, a = b_OR.astype(np.float64), a_RI.astype(np.float64)
    sums = b @ a
    bound = np.linalg.norm(b, axis=1)[:, None] * np.linalg.norm(a, axis=0)
    # A sum of fewer than 2^53 units is exact, which those of 16-bit values are, and often ties.
    inexact = bound >= _units(b, 1)[:, None] * (_units(a, 0) * 2.0**52)
    bound *= inexact * ((len(a) + 2) * 2.0**-53)
    low, high = (sums - bound).astype(np.float32), (sums + bound).astype(np.float32)
    found: Floats = sums.astype(np.float32)
    for o, i in zip(*np.nonzero((low != high) & np.isfinite(sums)), strict=True):
        found[o, i] = _exact_sum((b[o] * a[:, i]).tolist())
    found += 0  # the sign of a zero could depend on the order
    return found


def _units(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Return powers of two that all float32 values along an axis are multiples of."""
    import numpy as np

    fractions, exponents = np.frexp(values)
    digits = np.ldexp(fractions, 24).astype(np.int64)
    units = np.ldexp((digits & -digits).astype(np.float64), exponents - 24)
    found: NDArray[np.float64] = np.where(digits == 0, np.inf, units).min(axis)
    return found


def _exact_sum(values: list[float]) -> float:
    # Rounded to odd, so that rounding it to float32 is rounding the exact sum.
    total = math.fsum(values)
    rest = math.fsum([*values, -total])
    is_even = not int(math.ldexp(math.frexp(total)[0], 53)) & 1
    return math.nextafter(total, math.copysign(math.inf, rest)) if rest and is_even else total


def _matrix(source: Source, read: Read) -> NDArray[Any]:
    import numpy as np

    columns = source.shape[-1] if len(source.shape) > 1 else 1
    rows = math.prod(source.shape) // max(1, columns)
    return np.ndarray((rows, columns), NUMPY_DTYPES.get(source.dtype, "u1"), read(source.name))


def _widened(values: NDArray[Any], dtype: str) -> Floats:
    if dtype in NUMPY_DTYPES:
        return to_float32(values, dtype)
    # Scales that are powers of two are also stored as U8: the bytes of their exponents.
    found: Floats = _table(FP8_DTYPES.get(dtype, "float8_e8m0fnu"))[values]
    return found


@cache
def _table(name: str) -> Floats:
    import ml_dtypes
    import numpy as np

    every = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, name))
    found: Floats = every.astype(np.float32)
    return found
