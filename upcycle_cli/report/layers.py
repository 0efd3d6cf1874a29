"""What was measured layer by layer: errors, routers, and the load of the experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from upcycle_cli.core.text import counted
from upcycle_cli.report.figures import Series, draw_heat_map, draw_lines
from upcycle_cli.report.page import Figure, Section, Table, scientific, spread
from upcycle_cli.verification.result import LayerMeasure

if TYPE_CHECKING:
    from upcycle_cli.inspection.expert_load import LayerLoad


def errors_section(layers: Sequence[LayerMeasure]) -> Section | None:
    """Return the errors by layer, None where nothing was measured."""
    if not layers:
        return None
    numbers = [layer.layer for layer in layers]
    fields = {
        "added, rms": "added_rms",
        "added, largest": "added_max",
        "hidden state": "hidden_rms",
        "gain": "gain",
    }
    added, most, hidden, gain = _series(layers, fields)
    series = [added, most, hidden]
    zeros = any(value == 0 for each in series for value in each.values)
    errors = Figure(
        svg=draw_lines("error", numbers, series, unit="relative error", log=True),
        title="Error by layer",
        description=f"{_told(series, numbers)}{' Hollow marks lie at exactly 0.' if zeros else ''}",
    )
    gains = Figure(
        svg=draw_lines("gain", numbers, [gain], unit="gain", span=(0.9, 1.1)),
        title="Gain by layer",
        description="How much of the dense MLP's output the experts' is; 1 is the same function. "
        f"It differs from 1 by {spread([abs(v - 1) for v in gain.values], numbers)}.",
    )
    table = Table(
        caption="Errors by layer",
        columns=("layer", "added, rms", "added, largest", "hidden state, rms", "gain"),
        rows=[
            (
                str(x.layer),
                *map(scientific, (x.added_rms, x.added_max, x.hidden_rms)),
                f"{x.gain:.9g}",
            )
            for x in layers
        ],
        folded="Errors as numbers",
    )
    words = (
        "Errors are relative to the root mean square of what the dense model has in their place. "
        "What a layer's experts add is measured on the dense model's own input; the hidden state "
        "carries what all layers before it have added."
    )
    return Section(
        key="errors",
        title="Error by layer",
        words=[words],
        figures=[errors, gains],
        tables=[table],
    )


def _series(layers: Sequence[LayerMeasure], fields: Mapping[str, str]) -> list[Series]:
    return [
        Series(name=name, values=[getattr(layer, field) for layer in layers])
        for name, field in fields.items()
    ]


def _told(series: Sequence[Series], layers: Sequence[int]) -> str:
    told = "; ".join(f"{each.name}: {spread(each.values, layers)}" for each in series)
    return f"{told[0].upper()}{told[1:]}."


def routing_section(layers: Sequence[LayerMeasure]) -> Section | None:
    """Return what the routers chose, None where nothing was measured."""
    if not layers:
        return None
    numbers = [layer.layer for layer in layers]
    fields = {
        "margin between the best two groups": "router_margin",
        "entropy, nats": "router_entropy",
        "whole groups": "whole_share",
    }
    margin, entropy, whole = _series(layers, fields)
    routers = Figure(
        svg=draw_lines("router", numbers, [margin, entropy], unit="mean over tokens", span=(0, 1)),
        title="Router margin and entropy by layer",
        description=f"{_told((margin, entropy), numbers)} Where the margin is small, rounding can "
        "turn the choice.",
    )
    groups = Figure(
        svg=draw_lines("whole", numbers, [whole], unit="share of tokens", span=(0, 1.02)),
        title="Whole groups by layer",
        description="The share of tokens whose experts are whole virtual groups, which together "
        f"are the dense MLP: {spread(whole.values, numbers)}.",
    )
    table = Table(
        caption="Routing by layer",
        columns=("layer", "margin", "entropy", "whole groups", "load, std / mean", "idle experts"),
        rows=[
            (
                str(x.layer),
                *(f"{v:.4g}" for v in (x.router_margin, x.router_entropy)),
                f"{x.whole_share:.4%}",
                f"{x.load_cv:.3g}",
                str(x.idle_experts),
            )
            for x in layers
        ],
        folded="Routing as numbers",
    )
    return Section(key="routing", title="Routing", figures=[routers, groups], tables=[table])


def load_section(layers: Sequence[LayerMeasure | LayerLoad]) -> Section | None:
    """Return how many tokens chose each expert, None where nothing was measured."""
    layers = [layer for layer in layers if layer.load]
    if not layers:
        return None
    numbers = [layer.layer for layer in layers]
    experts = max(len(layer.load) for layer in layers)
    rows = [_relative(layer.load, experts) for layer in layers]
    idle = sum(layer.idle_experts for layer in layers)
    most, layer, expert = max(
        (v, n, e) for n, row in zip(numbers, rows, strict=True) for e, v in enumerate(row)
    )
    figure = Figure(
        svg=draw_heat_map("load", numbers, rows),
        title="Expert load",
        description=f"{counted(len(layers), 'layer')} of {counted(experts, 'expert')}; the largest "
        f"load is {most:.3g} times an even one (layer {layer}, expert {expert}), and "
        f"{counted(idle, 'expert')} of {experts * len(layers):,} were chosen by no token.",
        wide=True,
    )
    table = Table(
        caption="How many tokens chose each expert",
        columns=("layer", *(str(expert) for expert in range(experts))),
        rows=[(str(layer.layer), *map(str, layer.load)) for layer in layers],
        folded="Loads as numbers",
    )
    words = "How many of the tokens chose each expert, relative to what an even load would be."
    return Section(key="load", title="Expert load", words=[words], figures=[figure], tables=[table])


def _relative(load: Sequence[int], experts: int) -> list[float]:
    even = sum(load) / len(load) or 1.0
    return [*(tokens / even for tokens in load), *([0.0] * (experts - len(load)))]
