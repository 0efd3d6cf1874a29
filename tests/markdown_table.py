"""Markdown tables."""

from __future__ import annotations


def header(*names: object) -> str:
    """Return the first two lines of a table."""
    return f"{row(*names)}\n|{'---|' * len(names)}"


def row(*cells: object) -> str:
    """Return another line of it."""
    return f"| {' | '.join(map(str, cells))} |"
