"""The figures of docs/evidence/training.md, as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

from training.arms import DENSE, DENSE_LONGER, SHARED, SIZES
from training.claims import CHOICES, ENOUGH, PAPER, Runs, Spread, difference, spread_of

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
"""Okabe and Ito's colours, which people who are colour-blind can tell apart, and markers."""
_CURVES = (DENSE, DENSE_LONGER, *SIZES)
_NOT_SHARED = {shared: size for size, shared in SHARED.items()}
_BALANCE = ("", ", no aux loss", ", aux loss pooled", ", balanced", ", centroids")
_APART = ("", ", softmax-topk τ=0.001", ", softmax-topk τ=1")
_OVER_TOKENS = ("million tokens", "tokens", 1e6)
_OVER_FLOPS = ("TFLOP of training", "flops", 1e12)
_FIGURES = {
    "tokens": (_OVER_TOKENS, "held-out loss, nats", "loss", _CURVES),
    "flops": (_OVER_FLOPS, "held-out loss, nats", "loss", _CURVES),
    "load": (
        _OVER_TOKENS,
        "CV of experts' load",
        "load_cv",
        (*(f"E8G1T2{way}" for way in _BALANCE), "E8G1T2, softmax-topk τ=0.001"),
    ),
    "apart": (
        _OVER_TOKENS,
        "cosine distance of groups",
        "apart",
        (*(f"E8G1T2{way}" for way in _APART), "E4G4T8", "E8G8T16"),
    ),
}
"""What lies across, what lies up, its measure, and the arms."""


def draw(runs: Runs, folder: Path) -> None:
    """Write every figure to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, ((across, key, unit), up, measure, arms) in _FIGURES.items():
        with _figure(folder / f"{name}.svg", across, up, (7.2, 4.0)) as axes:
            for (color, marker, line), arm in zip(_LINES, arms, strict=False):
                if arm not in runs:
                    continue
                curve = next(iter(runs[arm].values()))["curve"]
                points = [spread_of(runs, arm, measure, when) for when in range(len(curve))]
                axes.errorbar(
                    [point[key] / unit for point in curve],
                    [point.mean for point in points],
                    [0.0 if math.isnan(p.standard_error) else p.standard_error for p in points],
                    color=color,
                    marker=marker,
                    linestyle=line,
                    capsize=2,
                    label=arm,
                )
    _draw_intervals(runs, folder / "differences.svg")


@contextmanager
def _figure(path: Path, across: str, up: str, size: tuple[float, float]) -> Iterator[Any]:
    with mpl.rc_context(dict(_STYLE)):
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        yield axes
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        handles, labels = axes.get_legend_handles_labels()
        by_label = dict(zip(labels, handles, strict=True))
        figure.legend(by_label.values(), by_label, loc="outside upper left", ncols=3, fontsize=8)
        figure.savefig(path, format="svg", metadata={"Date": None})
        plt.close(figure)


def _draw_intervals(runs: Runs, path: Path) -> None:
    """Draw each difference of losses with its 95 % interval, those of one question together."""
    asked = [each for comparisons in PAPER.values() for each in comparisons]
    questions: dict[str, list[tuple[str, Spread]]] = {}
    for each in (*(each for each in asked if each.measure == "loss"), *CHOICES):
        spread = difference(runs, each)
        if spread is not None:
            question = _question((each.first, each.second))
            questions.setdefault(question, []).append((_size(each.first), spread))
    label = "how much lower the first ends, nats (95 % interval over seeds)"
    with _figure(path, label, "", (8.6, 1.2 + 0.34 * len(questions))) as axes:
        for place, found in enumerate(reversed(questions.values())):
            for number, (size, spread) in enumerate(found):
                enough = len(spread.values) >= ENOUGH
                color, marker, _ = _LINES[(DENSE, *SIZES).index(size)]
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


def _question(arms: Sequence[str]) -> str:
    """Return the two arms' names, without their size where they have one in common."""
    if len({_size(arm) for arm in arms} - {DENSE}) > 1:
        return "  |  ".join(arms)
    named = (arm if _size(arm) == DENSE else arm.partition(", ")[2] for arm in arms)
    return "  |  ".join(name or "by default" for name in named)


def _size(arm: str) -> str:
    """Return the size that an arm belongs to: E4G4T8 of one with a shared expert, too."""
    recipe = arm.partition(", ")[0]
    return _NOT_SHARED.get(recipe, recipe)
