"""The figures of docs/training.md, as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

from training.arms import DENSE, DENSE_LONGER
from training.claims import (
    CHOICES,
    ENOUGH,
    PAPER,
    Comparison,
    Runs,
    Spread,
    difference,
    verdict,
)

_STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "upcycle",  # the same figure is the same text
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
}
_LINES = (
    ("#222222", "o", "-"),
    ("#0072b2", "s", "-"),
    ("#d55e00", "^", "-"),
    ("#009e73", "D", "-"),
    ("#cc79a7", "v", "--"),
    ("#8a6d00", "x", "--"),
)
"""Okabe and Ito's colours, which can be told apart by whoever sees few, and markers."""

_DECIDED = {"yes": "#0072b2", "no": "#d55e00"}
_SIZES = (DENSE, DENSE_LONGER, "E8G1T2", "E4G4T8", "E8G8T8", "E8G8T16")
_BALANCE = (
    "E8G1T2",
    "E8G1T2, no aux loss",
    "E8G1T2, aux loss pooled",
    "E8G1T2, balanced",
    "E8G1T2, centroids",
    "E8G1T2, softmax-topk τ=0.001",
)
_APART = (
    "E8G1T2",
    "E8G1T2, softmax-topk τ=0.001",
    "E8G1T2, softmax-topk τ=1",
    "E4G4T8",
    "E8G8T16",
)


def draw(runs: Runs, folder: Path) -> None:
    """Write every figure to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with _figure(folder / "tokens.svg", "million tokens", "held-out loss, nats") as axes:
        _lines(axes, runs, _SIZES, lambda point: point["tokens"] / 1e6, "loss")
    with _figure(folder / "flops.svg", "TFLOP of training", "held-out loss, nats") as axes:
        _lines(axes, runs, _SIZES, lambda point: point["flops"] / 1e12, "loss")
    with _figure(folder / "load.svg", "million tokens", "CV of experts' load") as axes:
        _lines(axes, runs, _BALANCE, lambda point: point["tokens"] / 1e6, "load_cv")
    with _figure(folder / "apart.svg", "million tokens", "cosine distance of groups") as axes:
        _lines(axes, runs, _APART, lambda point: point["tokens"] / 1e6, "apart")
    _intervals(runs, folder / "differences.svg")


@contextmanager
def _figure(
    path: Path, across: str, up: str, size: tuple[float, float] = (7.2, 4.0)
) -> Iterator[Any]:
    with mpl.rc_context(dict(_STYLE)):
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        yield axes
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside upper left", ncols=3, fontsize=8)
        figure.savefig(path, format="svg", metadata={"Date": None})
        plt.close(figure)


def _lines(
    axes: Any,  # noqa: ANN401 - matplotlib has no types
    runs: Runs,
    arms: Sequence[str],
    across: Callable[[Mapping[str, Any]], float],
    measure: str,
) -> None:
    for (color, marker, line), arm in zip(_LINES, arms, strict=False):
        curves = [run["curve"] for run in runs.get(arm, {}).values()]
        if not curves:
            continue
        points = [Spread(tuple(p[measure] for p in column)) for column in zip(*curves, strict=True)]
        axes.errorbar(
            [across(point) for point in curves[0]],
            [point.mean for point in points],
            [0.0 if math.isnan(point.standard_error) else point.standard_error for point in points],
            color=color,
            marker=marker,
            linestyle=line,
            capsize=2,
            label=arm,
        )


def _intervals(runs: Runs, path: Path) -> None:
    """Draw each difference of losses with its 95 % interval."""
    asked = [c for claim in PAPER for c in claim.comparisons if c.measure == "loss"]
    found = [(each, difference(runs, each)) for each in (*asked, *CHOICES)]
    drawn: list[tuple[Comparison, Spread]] = [(c, s) for c, s in found if s is not None]
    height = 0.8 + 0.24 * len(drawn)
    label = "how much lower the first ends, nats (95 % interval over seeds)"
    with _figure(path, label, "", (8.6, height)) as axes:
        for place, (_, spread) in enumerate(reversed(drawn)):
            color = _DECIDED.get(verdict(spread), "#777777")
            enough = len(spread.values) >= ENOUGH
            margin = spread.margin if enough else 0.0
            face = color if enough else "white"  # a hint is hollow
            axes.errorbar(
                spread.mean, place, xerr=margin, color=color, marker="o", mfc=face, capsize=2
            )
        # Experts that are not scaled lose a hundred times as much as most choices differ by.
        axes.set_xscale("symlog", linthresh=0.02)
        axes.axvline(0, color="#222222", linewidth=0.8)
        names = [f"{each.first}  |  {each.second}" for each, _ in reversed(drawn)]
        axes.set_yticks(range(len(drawn)), names, fontsize=7)
