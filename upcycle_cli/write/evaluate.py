"""Evaluates the expressions of a plan, with numpy alone, a few rows at a time where possible.

torch takes longer to import than a small model takes to convert, so nothing here uses it; the tests
compare every 16-bit value with its arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, assert_never

import numpy as np

from upcycle_cli.checkpoint import header
from upcycle_cli.checkpoint.header import NUMPY_DTYPES, OverflowInCastError, rounded, to_float32
from upcycle_cli.checkpoint.made import Read, part
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.plan import expressions as ex
from upcycle_cli.plan.expressions import describe
from upcycle_cli.write.random_draws import drawn_on, permutation, standard_normal

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from upcycle_cli.checkpoint.made import Index, Made

    _Selection: TypeAlias = tuple[Made, NDArray[np.intp], NDArray[np.intp]]
    """Rows and columns of a computed tensor."""

_TOGETHER_ITEMS = 1 << 18
"""Values of the rows that columns are gathered from at once."""
_TRANSPOSED_ITEMS = 1 << 22
TILE = 256
"""Rows and columns that are transposed at once."""
_PIECE_ITEMS = 1 << 16
_SMALLEST = {"F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133}  # above zero


def evaluate(
    expr: ex.Expr, read: Read, vanished: Callable[[int], None] = lambda _: None
) -> memoryview:
    """Return the bytes of an expression's value; `read` gives a dense tensor's bytes by name.

    `vanished` receives how many nonzero values became zero, too small for the output dtype. The
    result may alias the bytes of `read`. Raises OverflowInCastError when a finite value does not
    fit the output dtype, UpcycleError when a router cannot be drawn.
    """
    return _bytes(np.ascontiguousarray(_Evaluator(read, vanished).value(expr)))


def evaluate_together(
    exprs: Sequence[ex.Expr], read: Read, vanished: Callable[[int], None] = lambda _: None
) -> Iterator[tuple[int, memoryview]]:
    """Yield pieces of each expression's bytes in order, with its index in `exprs`.

    Several expressions gather columns of the same rows (see `file_layout.bundles`), which are read,
    cast and scaled once for all, a few at a time. A transposed matrix is made a few rows at a time
    unless random draws need all of it; anything else is made whole.
    """
    first, evaluator = exprs[0], _Evaluator(read, vanished)
    if isinstance(first, ex.Transpose) and not any(
        isinstance(leaf, ex.AddNoise | ex.Reinit) for leaf in ex.leaves(first.of)
    ):
        count, width = ex.type_of(first.of).shape
        step = max(1, _TRANSPOSED_ITEMS // (max(1, count) * TILE)) * TILE
        for start in range(0, width, step):
            columns = _columns(first.of, start, min(start + step, width))
            yield 0, _bytes(evaluator.value(ex.Transpose(columns)))
    elif len(exprs) == 1 and (chosen := _selection(first)) is not None:
        made, places, across = chosen
        step = max(1, _TRANSPOSED_ITEMS // max(1, len(across)))
        for start in range(0, len(places), step):
            some = made, places[start : start + step], across
            yield 0, _bytes(evaluator.selected(some).all(made.dtype))
    elif len(exprs) == 1:
        yield 0, evaluate(first, read, vanished)
    else:
        gathers = [_gather_of(expr) for expr in exprs]
        offset, width = gathers[0].offset, gathers[0].order.size
        values = evaluator.rows(ex.Slice(gathers[0].of, 1, offset, offset + width))
        orders = [permutation(each.order)[each.start : each.stop] for each in gathers]
        step = max(1, max(_TOGETHER_ITEMS, values.items) // max(1, width))
        for start in range(0, values.shape[0], step):
            rows = evaluator.applied(first, values.make(slice(start, start + step)))
            for number, each in enumerate(orders):
                # numpy's check of the indices costs more than gathering.
                yield number, _bytes(rows.take(each, axis=1, mode="wrap"))


def _columns(expr: ex.Expr, start: int, stop: int) -> ex.Expr:
    """Return an expression for some columns of another, which computes only these."""
    match expr:
        case ex.Slice(of, 1, first):
            return ex.Slice(of, 1, first + start, first + stop)
        case ex.Gather(_, 1, _, first):
            return replace(expr, start=first + start, stop=first + stop)
        case ex.Slice(of) | ex.Gather(of) | ex.Cast(of) | ex.Scale(of):
            return replace(expr, of=_columns(of, start, stop))
        case ex.Concat(parts):
            return ex.Concat(tuple(_columns(part, start, stop) for part in parts))
        case _:
            return ex.Slice(expr, 1, start, stop)


def _selection(expr: ex.Expr) -> _Selection | None:
    """Return the part of a computed tensor that an expression takes; None for other expressions."""
    chosen: Index
    match expr:
        case ex.Dequantize() | ex.LowRank():
            *rows, columns = expr.shape if len(expr.shape) > 1 else (*expr.shape, 1)
            return expr, np.arange(math.prod(rows)), np.arange(columns)
        case ex.Select(of, index) if len(ex.type_of(of).shape) == 3:
            dim, height = 0, ex.type_of(expr).shape[0]
            chosen = slice(index * height, (index + 1) * height)
        case ex.Slice(of, dim, start, stop):
            chosen = slice(start, stop)
        case ex.Gather(of, dim, order, start, stop, offset):
            chosen = permutation(order)[start:stop] + offset
        case _:
            return None
    if len(ex.type_of(expr).shape) > 2 or (whole := _selection(of)) is None:
        return None
    made, places, others = whole
    return (made, places, others[chosen]) if dim else (made, places[chosen], others)


def _gather_of(expr: ex.Expr) -> ex.Gather:
    while isinstance(expr, ex.Cast | ex.Scale):
        expr = expr.of
    assert isinstance(expr, ex.Gather)
    return expr


def _bytes(values: NDArray[Any]) -> memoryview:
    return memoryview(values.reshape(-1).view("u1"))  # type: ignore[arg-type]  # numpy 1's stubs


@dataclass(frozen=True)
class _Evaluator:
    """Computes the values of expressions; the fields are the parameters of `evaluate`."""

    read: Read
    vanished: Callable[[int], None]

    def value(self, expr: ex.Expr) -> NDArray[Any]:  # noqa: C901, PLR0911, PLR0912 - a case per kind
        if (chosen := _selection(expr)) is not None:
            made = ex.type_of(expr)
            return self.selected(chosen).all(made.dtype).reshape(made.shape)
        match expr:
            case ex.Source(name, dtype, shape):
                return np.ndarray(shape, NUMPY_DTYPES[dtype], self.read(name))
            case ex.Mean(parts, dtype):
                rows_of = [(self.rows(each), each.dtype) for each in parts]
                mean = converted(averaged(rows_of), "F32", dtype, 1.0, self.vanished)
                return mean.reshape(parts[0].shape)
            case ex.Slice(of, dim, start, stop):
                return self.value(of)[(slice(None),) * dim + (slice(start, stop),)]
            case ex.Select(of, index):
                return self.value(of)[index, ...]
            case ex.Gather():
                return self.rows(expr).all(ex.type_of(expr).dtype)
            case ex.Cast(of) | ex.Scale(of):
                return self._converted(expr, self.rows(of))
            case ex.Concat(parts):
                return np.concatenate([self.value(part) for part in parts])
            case ex.Stack(parts):
                return np.stack([self.value(part) for part in parts])
            case ex.Transpose(of):
                matrices = (self.value(leaf) for leaf in ex.leaves(of))
                made = ex.type_of(expr)
                return transposed(matrices, made.dtype, made.shape)
            case ex.Repeat(of, times):
                return self.value(of).repeat(times, axis=0)
            case ex.RotaryRows(of, size, rotary, interleave):
                values, rows = self.value(of), np.r_[0:rotary:2, 1:rotary:2, rotary:size]
                heads = values.reshape(-1, size, *values.shape[1:])
                order = rows.argsort() if interleave else rows
                return heads[:, order].reshape(values.shape)
            case ex.Normal():
                return self._routers(expr)
            case ex.Constant(stream, dtype, shape, _, data):
                if data is None:
                    raise ValueError(f"{stream} has no values yet")
                return np.ndarray(shape, NUMPY_DTYPES[dtype], data)
            case ex.RandomLike(of=of):
                dtype = ex.type_of(of).dtype
                values = to_float32(self.value(of), dtype).astype(np.float64).reshape(-1)
                return _normal(expr, _norm(values) / math.sqrt(max(1, values.size)), dtype)
            case ex.AddNoise(of=of) | ex.Reinit(of=of):
                return drawn_on(expr, self.value(of))
            case ex.Full(dtype, shape, value):
                return np.broadcast_to(rounded(np.full(1, value, np.float32), dtype), shape)
            case ex.Dequantize() | ex.LowRank():
                raise AssertionError("`_selection` returns all of it")
            case _:
                assert_never(expr)

    def selected(self, chosen: _Selection) -> Rows:
        """Return the rows of a part of a computed tensor, none of which are in memory."""
        made, places, columns = chosen

        def make(rows: slice) -> NDArray[Any]:
            return part(made, self.read, _as_slice(places[rows]), _as_slice(columns))

        # Each piece of a product casts all of one factor to float64.
        items = _PIECE_ITEMS << 4 * isinstance(made, ex.LowRank)
        return Rows((len(places), len(columns)), make, items)

    def applied(self, expr: ex.Expr, rows: NDArray[Any]) -> NDArray[Any]:
        """Apply the casts and scales of an expression to rows that are not gathered yet."""
        if not isinstance(expr, ex.Cast | ex.Scale):
            return rows
        values = self.applied(expr.of, rows)
        return self._converted(expr, Rows(values.shape, values.__getitem__))

    def _converted(self, expr: ex.Cast | ex.Scale, rows: Rows) -> NDArray[Any]:
        before, after = ex.type_of(expr.of).dtype, ex.type_of(expr).dtype
        factor = expr.factor if isinstance(expr, ex.Scale) else 1.0
        return converted(rows, before, after, factor, self.vanished)

    def rows(self, expr: ex.Expr) -> Rows:
        """Return an expression's rows; those of computed tensors and gathers are made later."""
        if len(ex.type_of(expr).shape) == 2 and (chosen := _selection(expr)) is not None:
            return self.selected(chosen)
        if not isinstance(expr, ex.Gather):
            values = np.atleast_1d(self.value(expr))
            return Rows(values.shape, values.__getitem__)
        indices = permutation(expr.order)[expr.start : expr.stop]
        indices = indices + expr.offset if expr.offset else indices
        values = self.value(expr.of)

        def make(rows: slice) -> NDArray[Any]:
            # numpy's check of the indices costs more than gathering; a permutation's are right.
            if expr.dim:
                return values[rows].take(indices, axis=1, mode="wrap")
            return values.take(indices[rows], axis=0, mode="wrap")

        shape = (*values.shape[: expr.dim], len(indices), *values.shape[expr.dim + 1 :])
        return Rows(shape, make)

    def _routers(self, expr: ex.Normal) -> NDArray[Any]:
        norm = math.sqrt(expr.shape[-1])
        if expr.norm is not None:
            stored_H = self.value(expr.norm)
            norm = _norm(to_float32(stored_H, expr.norm.dtype).astype(np.float64) + expr.offset)
            if not (math.isfinite(norm) and norm > 0):
                raise UpcycleError(
                    f"{describe(expr.norm)} is zero or not finite, so the router cannot be scaled."
                )
        rows = _normal(expr, expr.logit_std / norm, expr.dtype)
        check_rows(to_float32(rows, expr.dtype), expr.dtype, expr.logit_std, expr.stream)
        return rows


def check_rows(rows: NDArray[np.float32], dtype: str, logit_std: float, stream: str) -> None:
    """Raise UpcycleError for router rows that became zero or infinite in their dtype."""
    if not np.isfinite(rows).all() or not rows.any(axis=1).all():
        raise UpcycleError(
            f"router logits of standard deviation {logit_std:g} need weights that "
            f"{dtype.lower()} cannot hold ({stream}).",
            "Choose another `router_logit_std`, or another `dtype`.",
        )


def _norm(values: NDArray[np.float64]) -> float:
    # fsum is exactly rounded, so that the order of summation does not matter.
    return math.sqrt(math.fsum((values * values).tolist()))


def _normal(expr: ex.Normal | ex.RandomLike, std: float, dtype: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        return rounded(standard_normal(expr.seed, expr.stream, expr.shape) * std, dtype)


def _as_slice(places: NDArray[np.intp]) -> Index:
    # A slice reads without a copy.
    whole = slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0)
    return whole if np.array_equal(places, np.arange(whole.start or 0, whole.stop)) else places


# Rows, a few at a time so that they stay in cache ----------------------------------------------


class Rows(NamedTuple):
    """A tensor that makes its rows on request."""

    shape: tuple[int, ...]
    make: Callable[[slice], NDArray[Any]]
    items: int = _PIECE_ITEMS
    """How many values to make at once."""

    def all(self, dtype: str) -> NDArray[Any]:
        """Make all rows, a few at a time, so that their sources stay in the processor's cache."""
        out = np.empty(self.shape, NUMPY_DTYPES[dtype])
        step = max(1, self.items * len(out) // max(1, out.size))
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
    step, lost = max(1, rows.items * len(out) // out.size), 0
    for start in range(0, len(out), step):
        values, piece = rows.make(slice(start, start + step)), out[start : start + step]
        wide = to_float32(values, before)
        with np.errstate(over="ignore", invalid="ignore"):
            product = wide if factor == 1.0 else wide * np.float32(factor)
            piece[...] = rounded(product, after)
        most = header.LARGEST[after]
        if not -most <= product.min() <= product.max() <= most:
            made = to_float32(piece, after)
            if (np.isinf(made) & np.isfinite(wide)).any():
                raise OverflowInCastError
        if factor < 1.0 or _SMALLEST[after] > _SMALLEST[before]:
            magnitudes = piece.view(f"<u{piece.itemsize}") << 1  # without the sign of zeros
            lost += int(np.count_nonzero(wide) - np.count_nonzero(magnitudes))
    if lost:
        vanished(lost)
    return out


def averaged(parts: Sequence[tuple[Rows, str]]) -> Rows:
    """Return the rows of the mean in float32 of tensors, each with its dtype."""

    def make(rows: slice) -> NDArray[np.float32]:
        first, *others = (to_float32(values.make(rows), dtype) for values, dtype in parts)
        total = first.copy()
        for each in others:
            total += each
        total /= np.float32(len(parts))
        return total

    return Rows(parts[0][0].shape, make, max(values.items for values, _ in parts))


def transposed(parts: Iterable[NDArray[Any]], dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the transpose, of this shape, of matrices stacked by rows."""
    out, start = np.empty(shape, NUMPY_DTYPES[dtype]), 0
    for each in parts:
        place = out[:, start : start + len(each)]
        start += len(each)
        for row in range(0, len(each), TILE):
            for column in range(0, len(out), TILE):
                tile = each[row : row + TILE, column : column + TILE]
                place[column : column + TILE, row : row + TILE] = tile.T
    return out
