"""Evaluates the expressions of `expr`, with numpy alone.

Nothing here needs torch, whose import takes longer than converting a small model; the tests hold
every 16-bit value against its arithmetic. Only what computes imports this, for numpy's sake.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, assert_never

import numpy as np

from upcycle_cli.checkpoint.arrays import NUMPY_DTYPES, to_float32
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
    Zeros,
    contiguous_source,
    leaves,
    type_of,
)
from upcycle_cli.write.gather import PIECE_ITEMS, WORD_BYTES, Packed, Taken, turned
from upcycle_cli.write.rng import permutation, standard_normal
from upcycle_cli.write.transpose import pieces

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from upcycle_cli.write.running_stats import Moments

Read: TypeAlias = Callable[[str], memoryview]
"""Gives the bytes of a dense tensor by name."""
_MANTISSA_BITS = {"F16": 10, "BF16": 7}
_SMALLEST_EXPONENT = {"F32": -149, "F16": -24, "BF16": -133}
"""Of the smallest value above zero, as a power of two."""
_INFINITE = {"F32": 0xFF << 24, "F16": 0x1F << 11, "BF16": 0xFF << 8}
"""The bits of infinity, without the sign and shifted to the left by one."""
_TOGETHER_ITEMS = 1 << 18
"""Of the rows that columns are gathered from at once."""


class OverflowInCastError(ArithmeticError):
    """A finite value became infinite in the output dtype."""


def evaluate(
    expr: Expr,
    read: Read,
    vanished: Callable[[int], None] = lambda _: None,
    drawn: Callable[[str, Moments], None] = lambda *_: None,
) -> memoryview:
    """Return the bytes of an expression's value; `read` gives a dense tensor's bytes by name.

    `vanished` hears how many values became zero that were not: too small for the output dtype.
    `drawn` hears what the draws of a stream went by, where they are upon another value.

    The result may alias what `read` returned. Raises OverflowInCastError when a finite value does
    not fit the output dtype, UpcycleError when a router cannot be drawn.
    """
    stretch = contiguous_source(expr)
    if stretch is not None:
        name, begin, end = stretch
        return read(name)[begin:end]

    def made(expr: Expr) -> NDArray[Any]:
        if isinstance(expr, Transpose):
            return turned(map(made, leaves(expr.of)), type_of(expr).shape)
        if not isinstance(expr, AddNoise | Reinit):
            return _value(expr, read, vanished)
        value, moments = _draw_upon(expr, read, vanished)
        drawn(expr.stream, moments)
        return value

    return _bytes(np.ascontiguousarray(made(expr)))


def evaluate_together(
    exprs: Sequence[Expr], read: Read, vanished: Callable[[int], None]
) -> Iterator[tuple[int, memoryview]]:
    """Yield the bytes of a few rows of each expression, by its place in `exprs`, and so on.

    All gather columns of the same rows, which are read, cast and scaled once for all: see
    `expr.gather_input`. Or there is but one, which is turned: see `turning.in_pieces`. `read`,
    `vanished` and errors are as those of `evaluate`.
    """
    if isinstance(exprs[0], Transpose):
        for piece in pieces(exprs[0]):
            yield 0, _bytes(_value(Transpose(piece), read, vanished))
        return
    takes = [_take_of(expr) for expr in exprs]
    offset, width = takes[0].offset, takes[0].order.size
    values = _value(takes[0].of, read, vanished)[:, offset : offset + width]
    columns = [permutation(take.order)[take.start : take.stop] for take in takes]
    step = max(1, _TOGETHER_ITEMS // (WORD_BYTES * max(1, width))) * WORD_BYTES
    for start in range(0, len(values), step):
        rows = Packed.of(_applied(exprs[0], values[start : start + step], vanished))
        for number, each in enumerate(columns):
            yield number, _bytes(rows.take(each))


def _take_of(expr: Expr) -> Gather:
    while isinstance(expr, Cast | Scale):
        expr = expr.of
    assert isinstance(expr, Gather)
    return expr


def _applied(expr: Expr, rows: NDArray[Any], vanished: Callable[[int], None]) -> NDArray[Any]:
    """Return what an expression makes of rows before its Take, which takes what it is given."""
    if not isinstance(expr, Cast | Scale):
        return rows
    values, held = _applied(expr.of, rows, vanished), type_of(expr.of).dtype
    factor = expr.factor if isinstance(expr, Scale) else 1.0
    return _converted(values, held, type_of(expr).dtype, factor, vanished)


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
            mean = _converted(_Averaged(rows), "F32", dtype, 1.0, vanished)
            return mean.reshape(parts[0].shape)
        case Slice(of, dim, start, stop):
            return _value(of, read, vanished)[(slice(None),) * dim + (slice(start, stop),)]
        case Select(of, index):
            return _value(of, read, vanished)[index, ...]
        case Gather(of):
            return _taken(expr, read, vanished).all()
        case Cast(of, dtype):
            values, held = _rows(of, read, vanished), type_of(of).dtype
            return _converted(values, held, dtype, 1.0, vanished)
        case Scale(of, factor):
            values, dtype = _rows(of, read, vanished), type_of(of).dtype
            return _converted(values, dtype, dtype, factor, vanished)
        case Concat(parts):
            return np.concatenate([_value(part, read, vanished) for part in parts])
        case Stack(parts):
            return np.stack([_value(part, read, vanished) for part in parts])
        case Transpose(of):
            matrices = (_value(leaf, read, vanished) for leaf in leaves(of))
            return turned(matrices, type_of(expr).shape)
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
                raise ValueError(f"{stream} is to be given, and was not")
            return np.ndarray(shape, NUMPY_DTYPES[dtype], data)
        case RandomLike(of=of):
            dtype = type_of(of).dtype
            values = to_float32(_value(of, read, vanished), dtype).astype(np.float64).reshape(-1)
            return _normal(expr, _length(values) / math.sqrt(max(1, values.size)), dtype)
        case AddNoise() | Reinit():
            return _draw_upon(expr, read, vanished)[0]
        case Zeros(dtype, shape):
            return np.zeros(shape, NUMPY_DTYPES[dtype])
        case Full(dtype, shape, value):
            return np.broadcast_to(rounded(np.full(1, value, np.float32), dtype), shape)
        case _:
            assert_never(expr)


def _draw_upon(
    expr: AddNoise | Reinit, read: Read, vanished: Callable[[int], None]
) -> tuple[NDArray[Any], Moments]:
    from upcycle_cli.write.drawing import drawn_on

    return drawn_on(expr, _value(expr.of, read, vanished))


def _rows(expr: Expr, read: Read, vanished: Callable[[int], None]) -> NDArray[Any] | Taken:
    """Return what gives an expression's rows: of a Take a piece at a time, never all of it."""
    if isinstance(expr, Gather):
        return _taken(expr, read, vanished)
    return np.atleast_1d(_value(expr, read, vanished))


def _taken(expr: Gather, read: Read, vanished: Callable[[int], None]) -> Taken:
    indices = permutation(expr.order)[expr.start : expr.stop]
    indices = indices + expr.offset if expr.offset else indices
    return Taken(_value(expr.of, read, vanished), expr.dim, indices)


@dataclass(frozen=True)
class _Averaged:
    """Rows of a Mean in float32, computed as they are asked for."""

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


def _converted(
    rows: NDArray[Any] | Taken | _Averaged,
    before: str,
    after: str,
    factor: float,
    vanished: Callable[[int], None],
) -> NDArray[Any]:
    """Return the values times a factor in another dtype, or in the same."""
    out = np.empty(rows.shape, NUMPY_DTYPES[after])
    if not out.size:
        return out
    step = max(1, PIECE_ITEMS * len(rows) // out.size)
    lost, direct = 0, before == after and after in _MANTISSA_BITS
    for start in range(0, len(rows), step):
        piece = place = out[start : start + step]
        if direct and isinstance(rows, Taken):
            rows.into(place, start)
        else:
            piece = rows[start : start + step]
        if before != after or not _shift_exponents(piece, after, factor, place):
            lost += _multiply(piece, before, after, factor, place)
    if lost:
        vanished(lost)
    return out


def _shift_exponents(piece: NDArray[Any], dtype: str, factor: float, out: NDArray[Any]) -> bool:
    """Multiply by a power of two through the bits of the exponents, several times as fast.

    Returns False where a value is subnormal or not finite, or would be.
    """
    mantissa, exponent = math.frexp(factor)
    if dtype not in _MANTISSA_BITS or mantissa != 0.5:
        return False
    steps, bits = exponent - 1, _MANTISSA_BITS[dtype]
    one, most = 1 << bits, (1 << (15 - bits)) - 1
    words, target = piece.view("<u2"), out.view("<u2")
    smallest, largest = _magnitudes(words)
    zeros = (words & 0x7FFF) == 0 if smallest == 0 else None
    if zeros is not None:
        # A zero becomes the largest of all.
        smallest = int(((words & 0x7FFF) - np.uint16(1)).min()) + 1
    if smallest < one * max(1, 1 - steps) or largest >= one * (most - max(0, steps)):
        return False
    kept = None if zeros is None else words[zeros]
    np.add(words, np.uint16((steps << bits) & 0xFFFF), out=target)
    if zeros is not None:
        target[zeros] = kept
    return True


def _magnitudes(words: NDArray[Any]) -> tuple[int, int]:
    """Return the smallest and the largest of 16-bit floats without their signs, as integers.

    Four reductions and nothing that takes memory: read with a sign and without one, the values of
    either sign are at an end each.
    """
    signed = words.view("<i2")
    least, most = int(words.min()), int(words.max())
    most_negative, most_positive = int(signed.min()), int(signed.max())
    found = [least, most_positive] if most_positive >= 0 else []
    found += [most_negative + 0x8000, most - 0x8000] if most_negative < 0 else []
    return min(found), max(found)


def _multiply(
    piece: NDArray[Any], before: str, after: str, factor: float, out: NDArray[Any]
) -> int:
    """Multiply and round; return how many values that were not zero are zero now."""
    wide = to_float32(piece, before)
    with np.errstate(over="ignore", invalid="ignore"):
        # A product would change the bits of a nan, and of nothing else.
        product = wide if factor == 1.0 else wide * np.float32(factor)
        out[...] = rounded(product, after)
    magnitudes = out.view(f"<u{out.itemsize}") << 1  # without the sign, which zeros have too
    infinite = magnitudes == _INFINITE[after]
    if infinite.any() and (infinite & np.isfinite(wide)).any():
        raise OverflowInCastError
    can_vanish = factor < 1.0 or _SMALLEST_EXPONENT[after] > _SMALLEST_EXPONENT[before]
    if not can_vanish or magnitudes.all():
        return 0
    return int(np.count_nonzero(wide) - np.count_nonzero(magnitudes))


def _draw(expr: Normal, read: Read) -> NDArray[Any]:
    norm = math.sqrt(expr.shape[-1])
    if expr.norm is not None:
        stored_H = _value(expr.norm, read, lambda _: None)
        norm = _length(to_float32(stored_H, expr.norm.dtype).astype(np.float64) + expr.offset)
        if not (math.isfinite(norm) and norm > 0):
            raise UpcycleError(
                f"{describe(expr.norm)} is zero or not finite, so no router can be scaled to it."
            )
    drawn = _normal(expr, expr.logit_std / norm, expr.dtype)
    check_rows(to_float32(drawn, expr.dtype), expr.dtype, expr.logit_std, expr.stream)
    return drawn


def check_rows(rows: NDArray[np.float32], dtype: str, logit_std: float, stream: str) -> None:
    """Raise UpcycleError for router rows of which their dtype has left nothing, or no number."""
    if not np.isfinite(rows).all() or not rows.any(axis=1).all():
        raise UpcycleError(
            f"router logits of standard deviation {logit_std:g} need weights that "
            f"{dtype.lower()} cannot hold ({stream}).",
            "Choose another --router-logit-std, or another --dtype.",
        )


def _length(values: NDArray[np.float64]) -> float:
    # fsum is exactly rounded, so that it does not depend on the order of summation.
    return math.sqrt(math.fsum((values * values).tolist()))


def _normal(expr: Normal | RandomLike, std: float, dtype: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        return rounded(standard_normal(expr.seed, expr.stream, expr.shape) * std, dtype)


def rounded(values: NDArray[np.floating[Any]], dtype: str) -> NDArray[Any]:
    """Round as torch does, a tie to the even neighbour; what is too large becomes infinite."""
    if dtype != "BF16":
        return values.astype(NUMPY_DTYPES[dtype], copy=False)
    values = values.astype("<f4", copy=False)
    bits = values.view("<u4")
    upper: NDArray[Any] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    invalid = np.isnan(values)
    if invalid.any():
        upper[invalid] = 0x7FC0  # the sum carried into the sign
    return upper
