"""Figures as SVG that is part of a page: its fonts, its colours in light and dark, and no script.

matplotlib draws in colours that stand for those of the page; what it draws is taken apart as XML
and gets ids of its own, since a page has several figures.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree as ET

_INK, _GRID, _FIRST, _SECOND, _THIRD = "#010101", "#020202", "#030303", "#040404", "#050505"
_PAPER = "#010102"
_COLORS: Mapping[str, str] = {
    _INK: "currentColor",
    _PAPER: "var(--paper)",
    _GRID: "var(--line)",
    _FIRST: "var(--first)",
    _SECOND: "var(--second)",
    _THIRD: "var(--third)",
}
_STROKES = ((_FIRST, "o", "-"), (_SECOND, "s", "--"), (_THIRD, "^", ":"))
"""Colour, marker and line of the series, which can be told apart without the colour."""

_STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "upcycle",  # the same figure is the same text
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "lines.markersize": 3.5,
    "lines.linewidth": 1.2,
}
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_SMALLEST, _LARGEST = 1e-60, 1e60
"""Beyond these a plot has no room: what is smaller is drawn as 0."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a plot; nan where there is no value."""

    name: str
    values: Sequence[float]


def draw_lines(
    key: str,
    layers: Sequence[int],
    series: Sequence[Series],
    *,
    unit: str,
    log: bool = False,
    span: tuple[float, float] | None = None,
) -> str:
    """Draw series over layers; in a logarithmic plot zeros lie, hollow, on a line of their own.

    `key` tells this figure from the others of a page, `span` is what the axis shows at least.
    """
    with _drawing(key) as (axes, done):
        floor = _floor(series) if log else None
        for (color, marker, line), each in zip(_STROKES, series, strict=False):
            finite = [_drawable(v) for v in each.values]
            shown = finite if floor is None else [floor if v <= 0 else v for v in finite]
            style = {"color": color, "linestyle": line, "label": each.name}
            axes.plot(layers, shown, **style, marker=marker, markevery=_every(len(layers)))
            if floor is not None:
                zeros = [layer for layer, v in zip(layers, finite, strict=True) if v <= 0]
                hollow = {"color": color, "linestyle": "", "markerfacecolor": _PAPER}
                axes.plot(zeros, [floor] * len(zeros), **hollow, marker=marker, markersize=6)
        if floor is not None:
            has_zero = any(v <= 0 for each in series for v in each.values)
            axes.set_yscale("log")
            axes.set_ylim(bottom=floor / 2 if has_zero else floor * 5)
            _name_powers(axes, floor, zero=has_zero)
        if span is not None:
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, span[0]), max(high, span[1]))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("layer")
        axes.set_ylabel(unit)
        if len(series) > 1:
            axes.figure.legend(loc="outside upper left", ncols=len(series))
    return done()


def draw_histogram(key: str, values: Sequence[float], *, unit: str, counted: str) -> str:
    """Draw how often values occur, by powers of ten; those of zero or less have a bar of theirs."""
    positive = [math.log10(v) for v in values if 0 < v < math.inf]
    zeros = sum(v <= 0 for v in values)
    with _drawing(key) as (axes, done):
        low = math.floor(min(positive, default=0.0) * 4) / 4
        high = math.ceil(max(positive, default=1.0) * 4) / 4
        count = max(1, min(60, round((high - low) * 4)))
        edges = [low + (high - low) * i / count for i in range(count + 1)]
        if positive:
            axes.hist(positive, bins=edges, color=_FIRST, edgecolor=_INK, linewidth=0.4)
        if zeros:
            width = (high - low) / count
            axes.bar(low - 2 * width, zeros, width=width, color=_SECOND, hatch="//", edgecolor=_INK)
            axes.text(low - 2 * width, zeros, "0", ha="center", va="bottom")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.xaxis.set_major_formatter(lambda power, _: f"1e{power:g}")
        axes.set_xlabel(unit)
        axes.set_ylabel(counted)
    return done()


def draw_heat_map(key: str, layers: Sequence[int], rows: Sequence[Sequence[float]]) -> str:
    """Draw a value per layer and expert, relative to an even load."""
    height = max(2.2, min(5.5, 1.4 + 0.07 * len(rows)))
    with _drawing(key, height=height, width=6.4) as (axes, done):
        most = max((v for row in rows for v in row), default=1.0)
        # As many pixels as cells: the page enlarges them.
        image = axes.imshow(
            rows, aspect="auto", interpolation="none", cmap="viridis", vmin=0, vmax=max(most, 1.0)
        )
        axes.grid(visible=False)
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        steps = range(0, len(layers), max(1, len(layers) // 8))
        axes.set_yticks(list(steps), [str(layers[step]) for step in steps])
        bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
        bar.set_label("tokens, 1 = an even load")
    return done()


def draw_bars(key: str, values: Mapping[str, float], *, unit: str) -> str:
    """Draw a bar for each name, with its value in words of the axis."""
    with _drawing(key, height=0.7 + 0.4 * len(values)) as (axes, done):
        names = list(values)[::-1]
        axes.barh(names, [values[name] for name in names], color=_FIRST, height=0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xlim(left=0)
        axes.set_xlabel(unit)
    return done()


def _every(count: int) -> int:
    return max(1, count // 40)


def _drawable(value: float) -> float:
    """Return a value within what can be drawn, nan for none."""
    if not math.isfinite(value):
        return math.nan
    return math.copysign(min(abs(value), _LARGEST), value) if abs(value) >= _SMALLEST else 0.0


def _floor(series: Sequence[Series]) -> float | None:
    """Return where zeros lie in a logarithmic plot: below everything else."""
    positive = [v for each in series for v in map(_drawable, each.values) if v > 0]
    if not positive:
        return None
    return float(10.0 ** (math.floor(math.log10(min(positive))) - 1))


def _name_powers(axes: Any, floor: float, *, zero: bool) -> None:  # noqa: ANN401 - matplotlib's
    top, first = math.log10(axes.get_ylim()[1]), round(math.log10(floor)) + 1
    powers = range(first, math.floor(top) + 1, max(1, round((top - first) / 6)))
    ticks = {floor: "0"} if zero else {}
    ticks |= {10.0**power: f"1e{power}" for power in powers}
    axes.set_yticks([*ticks], [*ticks.values()])
    axes.minorticks_off()


@contextmanager
def _drawing(
    key: str, *, height: float = 2.9, width: float = 5.4
) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Yield axes to draw on, and what returns the drawing once all is drawn."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    drawn = io.BytesIO()
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that nobody thought of, and no room for words
        mpl.rcdefaults()  # not those of a matplotlibrc, which lies where the command runs
        mpl.rcParams.update(_STYLE)
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        yield axes, lambda: _embedded(drawn.getvalue(), key)
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})


def _embedded(svg: bytes, key: str) -> str:
    """Return a drawing as part of a page, whose text alternative is said around it."""
    ET.register_namespace("", _SVG.strip("{}"))
    root = ET.fromstring(svg)  # noqa: S314 - our own
    for parent in list(root.iter()):
        for child in list(parent):
            # A style would be the whole page's; metadata would be markup of other kinds.
            if child.tag in {f"{_SVG}metadata", f"{_SVG}style"}:
                parent.remove(child)
    used = set(re.findall(r"#([\w-]+)", svg.decode()))
    for element in root.iter():
        _adapt(element, key, used)
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    root.set("class", "plot")
    root.set("aria-hidden", "true")
    root.set("focusable", "false")
    text = ET.tostring(root, encoding="unicode", short_empty_elements=False)
    # In a page its namespace is a matter of course.
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)


def _adapt(element: ET.Element, key: str, used: set[str]) -> None:
    own = element.attrib.pop("id", None)
    if own in used:
        element.set("id", f"{key}-{own}")
    target = element.attrib.pop(_HREF, None)
    if target is not None:
        element.set("href", f"#{key}-{target[1:]}" if target.startswith("#") else target)
    for name, value in element.attrib.items():
        changed = re.sub(r"url\(#", f"url(#{key}-", value)
        if name in {"style", "fill", "stroke"}:
            changed = re.sub(r"#0[1-5]0[1-5]0[1-5]", lambda m: _COLORS.get(m[0], m[0]), changed)
            changed = re.sub(r"font: ([\d.]+px) [^;]*", r"font-size: \1", changed)
        element.set(name, changed)
