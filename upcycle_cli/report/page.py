"""What a page is made of, and how it becomes HTML: one file that needs no other and runs nothing.

Whatever is put in is somebody else's until it is escaped, and that happens in one place: here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from upcycle_cli.core.secrets import blotted
from upcycle_cli.core.text import printable_lines

_SIGNS = {"passed": "✓", "failed": "✗", "measured": "≈", "skipped": "–"}
_LONGEST = 2000
"""Longer texts of a file are cut, where they are not what is reported on."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows that begin with what they are about; `folded` is said while they are folded away."""

    caption: str
    rows: Sequence[Sequence[str]]
    columns: Sequence[str] = ()
    folded: str = ""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing, what it is, and what it shows in words."""

    svg: str
    """Ours, as `figures.py` makes it: it is put into the page as it is."""
    title: str
    description: str
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Check:
    """A check and how it ended."""

    name: str
    status: str
    detail: str
    failures: Sequence[str] = ()
    metrics: Table | None = None


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token of a text; `level` says how strongly it is marked, from 0."""

    text: str
    title: str
    level: int


@dataclass(frozen=True, kw_only=True)
class MarkedText:
    """A text with tokens that are marked."""

    title: str
    words: str
    tokens: Sequence[Token]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page, under a heading of its own."""

    key: str
    title: str
    words: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    checks: Sequence[Check] = ()
    legend: Sequence[tuple[int, str]] = ()
    texts: Sequence[MarkedText] = ()


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole page; `status` is that of a verification."""

    title: str
    kind: str
    heading: str
    verdict: str
    sections: Sequence[Section]
    footer: str
    status: str = ""


def render(page: Page) -> str:
    """Return a page as HTML, in which every text is shown and none is obeyed."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def visible(value: object) -> object:
        # Jinja escapes what comes out of this, unless it is markup.
        if isinstance(value, Markup) or not isinstance(value, str):
            return value
        return _shown(value)

    folder = files("upcycle_cli") / "report"
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["svg"] = Markup
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    css = Markup((folder / "page.css").read_text(encoding="utf-8"))  # noqa: S704 - our own
    return template.render(page=page, css=css, signs=_SIGNS)


def number(value: object) -> str:
    """Return a value as a table shows it."""
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}" if math.isfinite(value) else "not finite"
        case None:
            return "–"
        case _:
            text = str(value)
            return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def scientific(value: float | None) -> str:
    """Return a measured value, of which the power of ten matters."""
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.3g}"


def spread(values: Iterable[float], layers: Sequence[int]) -> str:
    """Say in words where the values of all layers lie."""
    found = {layer: v for layer, v in zip(layers, values, strict=True) if math.isfinite(v)}
    if not found:
        return "no finite value"
    low, high = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
    if f"{found[low]:.3g}" == f"{found[high]:.3g}":
        return f"{found[low]:.3g} in every layer"
    return f"{found[low]:.3g} (layer {low}) to {found[high]:.3g} (layer {high})"


def properties(caption: str, values: Mapping[str, object]) -> Table:
    """Return a table of two columns."""
    rows = [(name, number(value)) for name, value in values.items()]
    return Table(caption=caption, rows=rows)


def _shown(text: str) -> str:
    """Return a text whose characters can all be seen, without secrets and somebody's home."""
    home = str(Path.home()) if _has_home() else ""
    if len(home) > 1:
        text = re.sub(rf"(?<![\w./-]){re.escape(home)}(?![\w.-])", "~", text)
    return printable_lines(blotted(text))


def _has_home() -> bool:
    try:
        Path.home()
    except RuntimeError:
        return False
    return True
