"""Expressions as formulas, for people."""

from __future__ import annotations

from typing import assert_never

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
)


def describe(expr: Expr) -> str:  # noqa: C901, PLR0911, PLR0912 - one case per kind
    """Return an expression in the notation of a formula."""
    match expr:
        case Source(name):
            return name
        case Slice(of, dim, start, stop):
            return f"{describe(of)}[{':, ' * dim}{start}:{stop}]"
        case Select(of, index):
            return f"{describe(of)}[{index}]"
        case Gather(of, dim, order, start, stop, offset):
            places = f"{describe(of)}[{':, ' * dim}{order.stream}[{start}:{stop}]"
            return f"{places} + {offset}]" if offset else f"{places}]"
        case Cast(of, dtype):
            return f"{dtype.lower()}({describe(of)})"
        case Scale(of, factor):
            return f"{describe(of)} × {factor:.6g}"
        case Concat(parts) | Stack(parts) | Mean(parts):
            listed = ", ".join(map(describe, parts))
            if len(parts) > 2:
                listed = f"{describe(parts[0])}, … {len(parts)} in all"
            return f"{type(expr).__name__.lower()}({listed})"
        case Transpose(of):
            return f"transpose({describe(of)})"
        case Repeat(of, times):
            return f"{describe(of)}, each row × {times}"
        case Halves(of, size, rotary):
            return f"{describe(of)}, the even rows first of {rotary} in each {size}"
        case Normal(stream=stream, logit_std=std, norm=norm):
            scale = "√H" if norm is None else f"‖{describe(norm)}‖"
            return f"normal({stream}, std {std:g} / {scale})"
        case Constant(stream=stream, origin=origin):
            return f"constant({stream}, {origin[:12]})"
        case RandomLike(stream=stream, of=of):
            return f"normal({stream}, rms of {describe(of)})"
        case AddNoise(of, std, _, stream):
            return f"{describe(of)} + normal({stream}, {std:g} of its std)"
        case Reinit(of, dim, order, count):
            places = f"{count} of {order.size} {('rows', 'columns')[dim]}"
            return f"{describe(of)}, {places} initialised again"
        case Zeros():
            return "zeros"
        case Full(value=value):
            return f"{value:g} everywhere"
        case _:
            assert_never(expr)
