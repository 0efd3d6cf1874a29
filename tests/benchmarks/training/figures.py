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

from training.arms import DENSE, DENSE_LONGER, SHARED, SIZES
from training.claims import (
    CHOICES,
    ENOUGH,
    PAPER,
    Comparison,
    Runs,
    Spread,
    difference,
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

_SIZES = (DENSE, *SIZES)
_CURVES = (DENSE, DENSE_LONGER, *SIZES)
_NOT_SHARED = {shared: size for size, shared in SHARED.items()}
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
        _lines(axes, runs, _CURVES, lambda point: point["tokens"] / 1e6, "loss")
    with _figure(folder / "flops.svg", "TFLOP of training", "held-out loss, nats") as axes:
        _lines(axes, runs, _CURVES, lambda point: point["flops"] / 1e12, "loss")
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
        by_label = {
            label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        if by_label:
            figure.legend(
                by_label.values(), by_label, loc="outside upper left", ncols=3, fontsize=8
            )
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
    """Draw each difference of losses with its 95 % interval, those of one question together."""
    asked = [c for claim in PAPER for c in claim.comparisons if c.measure == "loss"]
    questions: dict[str, list[tuple[str, Spread]]] = {}
    for each in (*asked, *CHOICES):
        spread = difference(runs, each)
        if spread is not None:
            questions.setdefault(_question(each), []).append((_size(each.first), spread))
    label = "how much lower the first ends, nats (95 % interval over seeds)"
    with _figure(path, label, "", (8.6, 1.2 + 0.34 * len(questions))) as axes:
        for place, found in enumerate(reversed(questions.values())):
            for number, (size, spread) in enumerate(found):
                enough = len(spread.values) >= ENOUGH
                color, marker, _ = _LINES[_SIZES.index(size)]
                axes.errorbar(
                    spread.mean,
                    place + 0.18 * ((len(found) - 1) / 2 - number),
                    xerr=spread.margin if enough else 0.0,
                    color=color,
                    marker=marker,
                    mfc=color if enough else "white",  # a hint is hollow
                    markersize=3,
                    linewidth=0.9,
                    capsize=1.5,
                    label=size,
                )
        # Experts that are not scaled lose a hundred times as much as most choices differ by.
        axes.set_xscale("symlog", linthresh=0.02)
        axes.axvline(0, color="#222222", linewidth=0.8)
        axes.set_yticks(range(len(questions)), reversed(questions), fontsize=7)
        axes.set_ylim(-0.6, len(questions) - 0.4)


def _question(asked: Comparison) -> str:
    """Return the two arms' names, without their size where they have one in common."""
    arms = (asked.first, asked.second)
    sizes = {_size(arm) for arm in arms}
    return "  |  ".join(_way(arm, sizes) for arm in arms)


def _size(arm: str) -> str:
    """Return the size that an arm belongs to: E4G4T8 of one with a shared expert, too."""
    recipe = arm.partition(", ")[0]
    return _NOT_SHARED.get(recipe, recipe)


def _way(arm: str, sizes: set[str]) -> str:
    recipe, _, way = arm.partition(", ")
    if recipe == DENSE or len(sizes - {DENSE}) > 1:
        return arm
    return way or "by default"
