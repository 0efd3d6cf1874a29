"""Turned matrices, a few rows at a time.

These are columns of what is turned, which are read, cast and scaled by themselves: a large matrix
is never held, neither as it was nor as it is to be.
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
"""Rows and columns that are turned at once: they stay in a processor's cache."""
_PIECE_ITEMS = 1 << 22


def draws(expr: Expr) -> Iterator[str]:
    """Yield the streams of what an expression draws upon other values, one for each such leaf."""
    match expr:
        case AddNoise(stream=stream) | Reinit(stream=stream):
            yield stream
        case Transpose(of):
            for leaf in leaves(of):
                yield from draws(leaf)


def in_pieces(expr: Expr) -> bool:
    """Whether an expression is made a few rows at a time; what draws needs all of its values."""
    return isinstance(expr, Transpose) and not any(True for _ in draws(expr))


def pieces(expr: Transpose) -> Iterator[Expr]:
    """Yield expressions whose values, turned one after the other, are the rows of a turned one."""
    count, columns = type_of(expr.of).shape
    step = max(1, _PIECE_ITEMS // (max(1, count) * TILE)) * TILE
    for start in range(0, columns, step):
        yield _columns(expr.of, start, min(start + step, columns))


def _columns(expr: Expr, start: int, stop: int) -> Expr:
    """Return an expression for some columns of another, by which only these are computed."""
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
