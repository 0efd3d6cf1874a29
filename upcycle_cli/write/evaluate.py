"""Evaluates the expressions of a plan, with numpy alone.

Nothing here needs torch, whose import takes longer than converting a small model; the tests compare
every 16-bit value with its arithmetic. Only code that computes imports this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, assert_never

import numpy as np

from upcycle_cli.checkpoint.arrays import NUMPY_DTYPES, rounded, to_float32
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.plan.describe import describe
from upcycle_cli.plan.expressions import (
    AddNoise,
    Cast,
    Concat,
    Constant,
    Expr,
    Full,
    Gather,
    Halves,
    Mean,
    Normal,
    RandomLike,
    Reinit,
    Repeat,
    Scale,
    Select,
    Slice,
    Source,
    Stack,
    Transpose,
    contiguous_source,
    leaves,
    type_of,
)
from upcycle_cli.write.drawing import drawn_on
from upcycle_cli.write.gather import WORD_BYTES, Gathered, Packed, transposed
from upcycle_cli.write.rng import permutation, standard_normal
from upcycle_cli.write.rounding import OverflowInCastError, Rows, converted
from upcycle_cli.write.transpose import pieces

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from upcycle_cli.write.running_stats import Moments

__all__ = ["OverflowInCastError", "check_rows", "evaluate", "evaluate_together"]

Read: TypeAlias = Callable[[str], memoryview]
"""Gives the bytes of a dense tensor by name."""
_TOGETHER_ITEMS = 1 << 18
"""Of the rows that columns are gathered from at once."""


def evaluate(
    expr: Expr,
    read: Read,
    vanished: Callable[[int], None] = lambda _: None,
    drawn: Callable[[str, Moments], None] = lambda *_: None,
) -> memoryview:
    """Return the bytes of an expression's value; `read` gives a dense tensor's bytes by name.

    `vanished` receives how many nonzero values became zero, too small for the output dtype.
    `drawn` receives the statistics that the noise or the new neurons of a stream followed.

    The result may alias what `read` returned. Raises OverflowInCastError when a finite value does
    not fit the output dtype, UpcycleError when a router cannot be drawn.
    """
    stretch = contiguous_source(expr)
    if stretch is not None:
        name, begin, end = stretch
        return read(name)[begin:end]

    def made(expr: Expr) -> NDArray[Any]:
        if isinstance(expr, Transpose):
            return transposed(map(made, leaves(expr.of)), type_of(expr).shape)
        if not isinstance(expr, AddNoise | Reinit):
            return _value(expr, read, vanished)
        value, moments = drawn_on(expr, _value(expr.of, read, vanished))
        drawn(expr.stream, moments)
        return value

    return _bytes(np.ascontiguousarray(made(expr)))


def evaluate_together(
    exprs: Sequence[Expr], read: Read, vanished: Callable[[int], None]
) -> Iterator[tuple[int, memoryview]]:
    """Yield each expression's bytes, a few rows at a time, with its index in `exprs`.

    Either all expressions gather columns of the same rows (see `expressions.gather_input`), which
    are read, cast and scaled once for all, or the only one is a Transpose that needs no draws.
    """
    if isinstance(exprs[0], Transpose):
        for piece in pieces(exprs[0]):
            yield 0, _bytes(_value(Transpose(piece), read, vanished))
        return
    gathers = [_gather_of(expr) for expr in exprs]
    offset, width = gathers[0].offset, gathers[0].order.size
    values = _value(gathers[0].of, read, vanished)[:, offset : offset + width]
    columns = [permutation(each.order)[each.start : each.stop] for each in gathers]
    step = max(1, _TOGETHER_ITEMS // (WORD_BYTES * max(1, width))) * WORD_BYTES
    for start in range(0, len(values), step):
        rows = Packed.of(_applied(exprs[0], values[start : start + step], vanished))
        for number, each in enumerate(columns):
            yield number, _bytes(rows.take(each))


def _gather_of(expr: Expr) -> Gather:
    while isinstance(expr, Cast | Scale):
        expr = expr.of
    assert isinstance(expr, Gather)
    return expr


def _applied(expr: Expr, rows: NDArray[Any], vanished: Callable[[int], None]) -> NDArray[Any]:
    """Apply the casts and scales of an expression to rows that are not gathered yet."""
    if not isinstance(expr, Cast | Scale):
        return rows
    values, held = _applied(expr.of, rows, vanished), type_of(expr.of).dtype
    factor = expr.factor if isinstance(expr, Scale) else 1.0
    return converted(values, held, type_of(expr).dtype, factor, vanished)


def _bytes(values: NDArray[Any]) -> memoryview:
    return memoryview(values.reshape(-1).view("u1"))  # type: ignore[arg-type]  # numpy 1's stubs


def _value(  # noqa: C901, PLR0911, PLR0912 - one case per kind
    expr: Expr, read: Read, vanished: Callable[[int], None]
) -> NDArray[Any]:
    match expr:
        case Source(name, dtype, shape):
            return np.ndarray(shape, NUMPY_DTYPES[dtype], read(name))
        case Mean(parts, dtype):
            rows = [(np.atleast_1d(_value(each, read, vanished)), each.dtype) for each in parts]
            mean = converted(_Averaged(rows), "F32", dtype, 1.0, vanished)
            return mean.reshape(parts[0].shape)
        case Slice(of, dim, start, stop):
            return _value(of, read, vanished)[(slice(None),) * dim + (slice(start, stop),)]
        case Select(of, index):
            return _value(of, read, vanished)[index, ...]
        case Gather(of):
            return _gathered(expr, read, vanished).all()
        case Cast(of, dtype):
            values, held = _rows(of, read, vanished), type_of(of).dtype
            return converted(values, held, dtype, 1.0, vanished)
        case Scale(of, factor):
            values, dtype = _rows(of, read, vanished), type_of(of).dtype
            return converted(values, dtype, dtype, factor, vanished)
        case Concat(parts):
            return np.concatenate([_value(part, read, vanished) for part in parts])
        case Stack(parts):
            return np.stack([_value(part, read, vanished) for part in parts])
        case Transpose(of):
            matrices = (_value(leaf, read, vanished) for leaf in leaves(of))
            return transposed(matrices, type_of(expr).shape)
        case Repeat(of, times):
            return _value(of, read, vanished).repeat(times, axis=0)
        case Halves(of, size, rotary):
            values = _value(of, read, vanished)
            heads = values.reshape(-1, size, *values.shape[1:])
            even, odd, rest = heads[:, 0:rotary:2], heads[:, 1:rotary:2], heads[:, rotary:]
            return np.concatenate([even, odd, rest], axis=1).reshape(values.shape)
        case Normal():
            return _draw(expr, read)
        case Constant(stream, dtype, shape, _, data):
            if data is None:
                raise ValueError(f"{stream} has no values yet")
            return np.ndarray(shape, NUMPY_DTYPES[dtype], data)
        case RandomLike(of=of):
            dtype = type_of(of).dtype
            values = to_float32(_value(of, read, vanished), dtype).astype(np.float64).reshape(-1)
            return _normal(expr, _norm(values) / math.sqrt(max(1, values.size)), dtype)
        case AddNoise(of=of) | Reinit(of=of):
            return drawn_on(expr, _value(of, read, vanished))[0]
        case Full(dtype, shape, value):
            return np.broadcast_to(rounded(np.full(1, value, np.float32), dtype), shape)
        case _:
            assert_never(expr)


def _rows(expr: Expr, read: Read, vanished: Callable[[int], None]) -> Rows:
    """Return an expression's rows; those of a Gather are never all in memory."""
    if isinstance(expr, Gather):
        return _gathered(expr, read, vanished)
    return np.atleast_1d(_value(expr, read, vanished))


def _gathered(expr: Gather, read: Read, vanished: Callable[[int], None]) -> Gathered:
    indices = permutation(expr.order)[expr.start : expr.stop]
    indices = indices + expr.offset if expr.offset else indices
    return Gathered(_value(expr.of, read, vanished), expr.dim, indices)


@dataclass(frozen=True)
class _Averaged:
    """The rows of a Mean in float32, computed as they are asked for."""

    parts: Sequence[tuple[NDArray[Any], str]]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0][0].shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> NDArray[np.float32]:
        first, *others = (to_float32(values[rows], dtype) for values, dtype in self.parts)
        total = first.copy()
        for each in others:
            total += each
        total /= np.float32(len(self.parts))
        return total


def _draw(expr: Normal, read: Read) -> NDArray[Any]:
    norm = math.sqrt(expr.shape[-1])
    if expr.norm is not None:
        stored_H = _value(expr.norm, read, lambda _: None)
        norm = _norm(to_float32(stored_H, expr.norm.dtype).astype(np.float64) + expr.offset)
        if not (math.isfinite(norm) and norm > 0):
            raise UpcycleError(
                f"{describe(expr.norm)} is zero or not finite, so no router can be scaled to it."
            )
    drawn = _normal(expr, expr.logit_std / norm, expr.dtype)
    check_rows(to_float32(drawn, expr.dtype), expr.dtype, expr.logit_std, expr.stream)
    return drawn


def check_rows(rows: NDArray[np.float32], dtype: str, logit_std: float, stream: str) -> None:
    """Raise UpcycleError for router rows that became zero or infinite in their dtype."""
    if not np.isfinite(rows).all() or not rows.any(axis=1).all():
        raise UpcycleError(
            f"router logits of standard deviation {logit_std:g} need weights that "
            f"{dtype.lower()} cannot hold ({stream}).",
            "Choose another --router-logit-std, or another --dtype.",
        )


def _norm(values: NDArray[np.float64]) -> float:
    # fsum is exactly rounded, so that the order of summation does not matter.
    return math.sqrt(math.fsum((values * values).tolist()))


def _normal(expr: Normal | RandomLike, std: float, dtype: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        return rounded(standard_normal(expr.seed, expr.stream, expr.shape) * std, dtype)
