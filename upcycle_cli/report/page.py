"""The elements of a page, the template that turns them into HTML, and the check of its place.

Text can come from any checkpoint, so all of it is escaped here.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.safe_files import is_in
from upcycle_cli.core.text import blotted, printable_lines

if TYPE_CHECKING:
    from upcycle_cli.verification.result import CheckResult

_SIGNS = {"passed": "✓", "failed": "✗", "measured": "≈", "skipped": "–"}
_MAX_LENGTH = 2000
"""Longer values in a table are cut."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows that begin with a header cell; a `folded` table starts closed."""

    caption: str
    rows: Sequence[Sequence[str]]
    columns: Sequence[str] = ()
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page with its own heading."""

    key: str
    title: str
    words: Sequence[str] = ()
    plot: str = ""
    """A plot as a data URI."""
    tables: Sequence[Table] = ()
    checks: Sequence[CheckResult] = ()
    legend: Sequence[str] = ()
    texts: Sequence[tuple[str, bool, Sequence[tuple[str, str, int]]]] = ()
    """Texts: a summary, whether a token is marked, and the tokens, each with a tooltip and the
    level of its mark."""


def render(sections: Iterable[Section | None], *, findings: Sequence[str] = (), **page: str) -> str:
    """Return a page as HTML, with `findings` in the banner."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_visible, trim_blocks=True
    )
    environment.filters["value_text"] = value_text
    folder = files(__package__)
    template = environment.from_string((folder / "page.html").read_text("utf-8"))
    css = Markup((folder / "page.css").read_text("utf-8"))  # noqa: S704 - our own
    shown = [section for section in sections if section is not None]
    top = {"findings": findings, "css": css, "signs": _SIGNS}
    return template.render({"status": "", **page, **top, "sections": shown})


def properties(values: Mapping[str, object], caption: str) -> Table:
    """Return a table of names and values."""
    rows = [(name, value_text(value)) for name, value in values.items()]
    return Table(caption=caption, rows=rows)


def value_text(value: object) -> str:
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
            return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}…"


def spread(values: Iterable[float], layers: Sequence[int]) -> str:
    """Return the smallest and the largest value with their layers, in words."""
    found = {layer: v for layer, v in zip(layers, values, strict=True) if math.isfinite(v)}
    if not found:
        return "no finite value"
    low, high = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
    if f"{found[low]:.3g}" == f"{found[high]:.3g}":
        return f"{found[low]:.3g} in every layer"
    return f"{found[low]:.3g} (layer {low}) to {found[high]:.3g} (layer {high})"


def _visible(value: object) -> object:
    """Return a text without secrets, with ~ for the home directory and visible characters only."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    home = os.environ.get("HOME", "")
    if len(home) > 1:
        value = re.sub(rf"(?<![\w./-]){re.escape(home)}(?![\w.-])", "~", value)
    return printable_lines(blotted(value))


def check_report_file(path: Path, dense: Path | None) -> None:
    """Raise UpcycleError if no report can be written there, or if the place is inside `dense`."""
    # Without a home directory matplotlib warns about its font cache.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        for name in ("matplotlib.backends.backend_svg", "jinja2"):
            importlib.import_module(name)
    except ImportError as error:
        words = f"a report needs matplotlib and jinja2, and one cannot be imported: {error}."
        hint = "Install jinja2 and matplotlib in upcycle's environment."
        raise UpcycleError(words, hint) from error
    # The suffix also prevents that a mistyped name replaces weights.
    if path.suffix.lower() not in (".html", ".htm"):
        raise UpcycleError(f"{path} does not end in .html.", "Choose a name that does.")
    if dense is not None and is_in(path.parent, dense):
        words = f"{path} is in {dense}, and the dense model is never modified."
        raise UpcycleError(words, "Write the report somewhere else.")
    try:
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UpcycleError(f"cannot write {path}: {error.strerror}.") from error
