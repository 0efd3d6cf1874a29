"""Transposed matrices, a few rows at a time.

A few rows of a transpose are a few columns of the matrix, which are read, cast and scaled alone: no
large matrix is ever in memory, neither before nor after.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from upcycle_cli.plan.expressions import (
    AddNoise,
    Cast,
    Concat,
    Expr,
    Gather,
    Reinit,
    Scale,
    Slice,
    Transpose,
    leaves,
    type_of,
)

TILE = 256
"""Rows and columns that are transposed at once: they stay in the processor's cache."""
_PIECE_ITEMS = 1 << 22


def draws(expr: Expr) -> Iterator[str]:
    """Yield the streams of the noise or the new neurons in an expression."""
    match expr:
        case AddNoise(stream=stream) | Reinit(stream=stream):
            yield stream
        case Transpose(of):
            for leaf in leaves(of):
                yield from draws(leaf)


def in_pieces(expr: Expr) -> bool:
    """Whether an expression is made a few rows at a time; noise needs the whole matrix."""
    return isinstance(expr, Transpose) and not any(True for _ in draws(expr))


def pieces(expr: Transpose) -> Iterator[Expr]:
    """Yield expressions whose transposes are the rows of a transpose, a few at a time."""
    count, columns = type_of(expr.of).shape
    step = max(1, _PIECE_ITEMS // (max(1, count) * TILE)) * TILE
    for start in range(0, columns, step):
        yield _columns(expr.of, start, min(start + step, columns))


def _columns(expr: Expr, start: int, stop: int) -> Expr:
    """Return an expression for some columns of another, which computes only these."""
    match expr:
        case Slice(of, 1, first):
            return Slice(of, 1, first + start, first + stop)
        case Gather(_, 1, _, first):
            return replace(expr, start=first + start, stop=first + stop)
        case Slice(of) | Gather(of) | Cast(of) | Scale(of):
            return replace(expr, of=_columns(of, start, stop))
        case Concat(parts):
            return Concat(tuple(_columns(part, start, stop) for part in parts))
        case _:
            return Slice(expr, 1, start, stop)
