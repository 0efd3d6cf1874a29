"""Plots as SVG images in the page. In dark mode the page's style sheet inverts them."""

from __future__ import annotations

import io
import math
import warnings
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_STYLES = (("C0", "o", "-"), ("C1", "s", "--"), ("C2", "^", ":"))
"""Colour, marker and line of each series, so that they differ without colour too."""
_SETTINGS: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "upcycle",  # the same figure is the same text
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "axes.axisbelow": True,
    "grid.color": "#cccccc",
    "legend.frameon": False,
}


def _draw(paint: Callable[[Any], None], *, height: float = 2.9, width: float = 5.4) -> str:
    """Return the data URI of a figure; `paint` draws into its axes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd values, or too little room for a label
        mpl.rcdefaults()  # ignore a matplotlibrc in the current directory
        mpl.rcParams.update(_SETTINGS)
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure.add_subplot())
        svg = io.BytesIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{b64encode(svg.getvalue()).decode()}"


def draw_lines(layers: Sequence[int], series: Mapping[str, Sequence[float]], *, unit: str) -> str:
    """Plot one value per layer for each series, on a logarithmic axis if magnitudes differ."""

    def paint(axes: Any) -> None:  # noqa: ANN401 - matplotlib's
        clipped = {name: [*map(_plottable, values)] for name, values in series.items()}
        for (color, marker, line), (name, values) in zip(_STYLES, clipped.items(), strict=False):
            style = {"color": color, "linestyle": line, "marker": marker, "label": name}
            axes.plot(layers, values, **style, markevery=max(1, len(layers) // 40))
        positive = [v for values in clipped.values() for v in values if v > 0]
        if positive and max(positive) > 100 * min(positive):
            axes.set_yscale("symlog", linthresh=10.0 ** math.floor(math.log10(min(positive))))
        axes.set_ylim(bottom=0)
        axes.grid()
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("layer")
        axes.set_ylabel(unit)
        if len(series) > 1:
            axes.figure.legend(loc="outside upper left", ncols=len(series))

    return _draw(paint)


def draw_heat_map(layers: Sequence[int], rows: Sequence[Sequence[float]]) -> str:
    """Plot the load of each layer and expert, 1 for an even load."""
    from matplotlib.colors import TwoSlopeNorm

    height = max(2.2, min(5.5, 1.4 + 0.07 * len(rows)))

    def paint(axes: Any) -> None:  # noqa: ANN401 - matplotlib's
        most = max(2.0, *(v for row in rows for v in row))
        norm = TwoSlopeNorm(vmin=0, vcenter=1, vmax=most)
        # "none" stores a pixel per cell, which the browser enlarges.
        options = {"aspect": "auto", "interpolation": "none", "cmap": "RdBu_r", "norm": norm}
        bar = axes.figure.colorbar(axes.imshow(rows, **options), ax=axes, pad=0.02)
        bar.set_label("tokens, 1 = an even load")
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        steps = range(0, len(layers), max(1, len(layers) // 8))
        axes.set_yticks(list(steps), [str(layers[step]) for step in steps])

    return _draw(paint, height=height, width=6.4)


def _plottable(value: float) -> float:
    """Return a value that matplotlib can plot, nan for an infinite one."""
    return max(-1e60, min(value, 1e60)) if math.isfinite(value) else math.nan
