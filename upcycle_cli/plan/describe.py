"""Expressions as formulas, for people."""

from __future__ import annotations

from dataclasses import fields

from upcycle_cli.plan import expressions as ex


def describe(expr: ex.Expr) -> str:
    """Return an expression in the notation of a formula, the operation's name before its values."""
    match expr:
        case ex.Source(name):
            return name
        case ex.Slice(of, dim, start, stop):
            return f"{describe(of)}[{':, ' * dim}{start}:{stop}]"
        case ex.Scale(of, factor):
            return f"{describe(of)} × {factor:.6g}"
        case ex.Concat(parts) | ex.Stack(parts) | ex.Mean(parts) if len(parts) > 2:
            inside = f"{describe(parts[0])}, … {len(parts)} in all"
        case _:
            inside = ", ".join(_in_words(getattr(expr, field.name)) for field in fields(expr))
    return f"{type(expr).__name__.lower()}({inside})"


def _in_words(value: object) -> str:
    match value:
        case ex.Permutation():
            return value.stream
        case tuple() if value and isinstance(value[0], ex.Expr):
            return ", ".join(map(describe, value))
        case bytes():
            return f"{len(value)} bytes"
        case _:
            return describe(value) if isinstance(value, ex.Expr) else str(value)
