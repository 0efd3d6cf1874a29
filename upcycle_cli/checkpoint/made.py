"""Tensors that a checkpoint does not store as they are: what each is made of, and its arithmetic.

Everything is computed in float32 and rounded once, so nothing depends on the order of the work or
on the machine. Each value depends on its place only: any rows and columns can be computed alone.

Legend: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from upcycle_cli.checkpoint.header import (
    LARGEST,
    NUMPY_DTYPES,
    TORCH_DTYPES,
    rounded,
    to_float32,
)
from upcycle_cli.core.errors import UpcycleError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Index: TypeAlias = slice | NDArray[np.intp]

Read: TypeAlias = Callable[[str], memoryview]
"""Gives the stored bytes of a tensor by name."""

FP8_DTYPES = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
"""The FP8 dtypes of safetensors, and their names in ml_dtypes and torch."""
_ML_DTYPES = {**FP8_DTYPES, "F8_E8M0": "float8_e8m0fnu", "U8": "float8_e8m0fnu"}
"""8-bit dtypes; scales that are powers of two are also stored as the bytes of their exponents."""


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

    @property
    def parts(self) -> tuple[Source, ...]:
        """The tensors that it is computed from."""
        return (self.of,) if self.scale is None else (self.of, self.scale)


@dataclass(frozen=True, slots=True)
class LowRank:
    """A matrix plus `factor` times the product of an adapter's b (O, R) and a (R, I).

    With `fan_in_fan_out` the matrix is stored as (I, O). A dequantised one is not rounded before.
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

    @property
    def parts(self) -> tuple[Source | Dequantize, ...]:
        """The tensors that it is computed from."""
        return self.of, self.a, self.b


Made: TypeAlias = Dequantize | LowRank
_Tensor = TypeVar("_Tensor", bound="Source | Made")


def stored_parts(tensor: Source | Made) -> Iterator[Source]:
    """Yield the stored tensors that a tensor is computed from, or the stored tensor itself."""
    for each in (tensor,) if isinstance(tensor, Source) else tensor.parts:
        yield from (each,) if isinstance(each, Source) else each.parts


def renamed(tensor: _Tensor, rename: Callable[[str], str]) -> _Tensor:
    """Return a tensor whose stored tensors have other names."""
    held = {field.name: getattr(tensor, field.name) for field in fields(tensor)}
    inner = {key: each for key, each in held.items() if isinstance(each, Source | Made)}
    changes: dict[str, Any] = {key: renamed(each, rename) for key, each in inner.items()}
    return replace(tensor, **(changes or {"name": rename(held["name"])}))


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
        if wide.size and not -most <= wide.min() <= wide.max() <= most:
            _check_finite(made, wide, values)
    return values


def _check_finite(made: Made, wide: NDArray[np.float32], values: NDArray[Any]) -> None:
    import numpy as np

    name = next(stored_parts(made)).name
    if not np.isfinite(wide).all():
        parts = ", ".join(each.name for each in stored_parts(made))
        raise UpcycleError(
            f"{name}: a value is not finite once it is computed from {parts}.",
            "The checkpoint is damaged: download or copy it again.",
        )
    if not np.isfinite(to_float32(values, made.dtype)).all():
        raise UpcycleError(
            f"{name}: a finite value becomes infinite in {TORCH_DTYPES[made.dtype]}.",
            "Use `dtype` bfloat16 or float32.",
        )


def _float32(tensor: Source | Made, read: Read, rows: Index, columns: Index) -> NDArray[np.float32]:
    import numpy as np

    match tensor:
        case Source(dtype=dtype):
            return _widened(_matrix(tensor, read)[rows][:, columns], dtype)
        case Dequantize(of, scale, (block_rows, block_columns)):
            wide = _float32(of, read, rows, columns)
            if scale is None:
                return wide
            height, width = _sizes(of.shape)
            number, row = np.divmod(np.arange(math.prod(of.shape[:-1]))[rows], height)
            place = number * -(-height // block_rows) + row // block_rows
            scales = _widened(_matrix(scale, read), scale.dtype)
            if scales.shape[1] == 1:
                wide *= scales[place]
                return wide
            column = np.arange(width)[columns] // block_columns
            begins = np.flatnonzero(np.diff(place, prepend=-1))
            for begin, end in zip(begins, [*begins[1:], len(place)], strict=True):
                wide[begin:end] *= scales[place[begin], column]
            return wide
        case LowRank(of, a, b, factor, turned):
            outputs, inputs = (columns, rows) if turned else (rows, columns)
            a_RI = _float32(a, read, slice(None), inputs)
            b_OR = _float32(b, read, outputs, slice(None))
            added_OI = product(b_OR, a_RI)
            added_OI *= np.float32(factor)
            wide = _float32(of, read, rows, columns)
            return wide + (added_OI.T if turned else added_OI)


def product(b_OR: NDArray[np.float32], a_RI: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the matrix product with each value rounded once from the exact sum.

    Products of float32 values are exact in float64. Where the error bound of the sum in float64
    leaves two values to round to, the sum is made exactly.
    """
    import numpy as np

    b, a = b_OR.astype(np.float64), a_RI.astype(np.float64)
    sums = b @ a
    lengths = np.linalg.norm(b, axis=1)[:, None] * np.linalg.norm(a, axis=0)
    bound = lengths * ((a.shape[0] + 2) * 2.0**-53)
    low, high = (sums - bound).astype(np.float32), (sums + bound).astype(np.float32)
    found: NDArray[np.float32] = sums.astype(np.float32)
    doubtful = (low != high) & np.isfinite(sums)
    for o, i in zip(*np.nonzero(doubtful), strict=True):
        found[o, i] = _exact_sum((b[o] * a[:, i]).tolist())
    found += 0  # the sign of a zero could depend on the order
    return found


def _exact_sum(values: list[float]) -> float:
    """Return a sum whose rounding to float32 is that of the exact sum: rounded to odd."""
    total = math.fsum(values)
    rest = math.fsum([*values, -total])
    is_even = not int(math.ldexp(math.frexp(total)[0], 53)) & 1
    return math.nextafter(total, math.copysign(math.inf, rest)) if rest and is_even else total


def _matrix(source: Source, read: Read) -> NDArray[Any]:
    import numpy as np

    shape = math.prod(source.shape[:-1]), _sizes(source.shape)[1]
    if len(source.shape) == 1:
        shape = shape[::-1]
    return np.ndarray(shape, NUMPY_DTYPES.get(source.dtype, "u1"), read(source.name))


def _sizes(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns of a matrix, or of each matrix of a stack."""
    return (shape[-2] if len(shape) > 1 else 1), (shape[-1] if shape else 1)


def _widened(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    if dtype in NUMPY_DTYPES:
        return to_float32(values, dtype)
    found: NDArray[np.float32] = _table(_ML_DTYPES[dtype])[values]
    return found


@cache
def _table(name: str) -> NDArray[np.float32]:
    """Return the values of an 8-bit dtype."""
    import ml_dtypes
    import numpy as np

    every = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, name))
    found: NDArray[np.float32] = every.astype(np.float32)
    return found
