"""The sections that show a recipe, values by layer, values by token, and expert load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

from upcycle_cli.checkpoint.storage import RECORD_NAME
from upcycle_cli.core.text import counted, printable
from upcycle_cli.report.figures import draw_heat_map, draw_lines
from upcycle_cli.report.page import Figure, Section, Table, properties, spread

if TYPE_CHECKING:
    from upcycle_cli.inspection.expert_load import LayerLoad
    from upcycle_cli.inspection.weight_drift import LayerDrift
    from upcycle_cli.verification.result import Continuation, LayerMeasure, TextMeasure

_LEVELS = (1e-8, 1e-4, 1e-2, 1e-1)
"""The KL from which a token is marked, and marked more strongly."""
_MAX_TOKENS = 16_384
_AS_NUMBERS = "The same as numbers"


def recipe_section(record: Mapping[str, Any]) -> Section:
    """Return the recipe and the factors by upcycle.json, whose values can be anything."""
    values: dict[str, object] = {}
    for key, prefix in (("recipe", ""), ("growth", ""), ("factors", "factor ")):
        part = record.get(key)
        if isinstance(part, dict):
            values |= {f"{prefix}{name.replace('_', ' ')}": value for name, value in part.items()}
    title = "Recipe and factors"
    if not values:
        words = f"There is no {RECORD_NAME} that says how this MoE was made."
        return Section(key="recipe", title=title, words=[words])
    values["promise"] = record.get("promise")
    caption = f"The recipe, from {RECORD_NAME}"
    return Section(key="recipe", title=title, tables=[properties(values, caption)])


def _by_layer(
    key: str,
    title: str,
    layers: Sequence[LayerMeasure | LayerDrift],
    columns: Mapping[str, Sequence[float]],
    figures: Sequence[Figure],
    words: Sequence[str] = (),
) -> Section:
    """Return a section with values by layer, as figures and as one table."""
    values = zip(*columns.values(), strict=True)
    rows = [
        (str(each.layer), *(f"{v:.6g}" for v in row))
        for each, row in zip(layers, values, strict=True)
    ]
    table = Table(
        caption=f"{title}, by layer", columns=("layer", *columns), rows=rows, folded=_AS_NUMBERS
    )
    return Section(key=key, title=title, words=words, figures=figures, tables=[table])


def _plot(
    title: str,
    layers: Sequence[LayerMeasure | LayerDrift],
    series: Mapping[str, Sequence[float]],
    note: str = "",
    **drawn: Any,  # noqa: ANN401 - as draw_lines has them
) -> Figure:
    """Return a figure of values by layer, with their ranges in words."""
    numbers = [each.layer for each in layers]
    ranges = "; ".join(f"{name}: {spread(values, numbers)}" for name, values in series.items())
    words = f"{ranges[0].upper()}{ranges[1:]}. {note}"
    return Figure(image=draw_lines(numbers, series, **drawn), title=title, description=words)


def errors_section(layers: Sequence[LayerMeasure]) -> Section | None:
    """Return the errors by layer, None without any."""
    if not layers:
        return None
    title = "Error by layer"
    errors = {
        "added, rms": [each.added_rms for each in layers],
        "added, largest": [each.added_max for each in layers],
        "hidden state": [each.hidden_rms for each in layers],
    }
    gain = {"gain": [each.gain for each in layers]}
    note = "The experts' output projected on the dense MLP's; 1 is the same function."
    figures = (
        _plot(title, layers, errors, unit="relative error", log=True),
        _plot("Gain by layer", layers, gain, note, unit="gain", span=(0.9, 1.1)),
    )
    words = (
        "Errors are relative to the root mean square of the dense model's values. The added error "
        "of a layer is measured on the dense model's own input; the hidden state accumulates the "
        "errors of all layers before it."
    )
    return _by_layer("errors", title, layers, errors | gain, figures, [words])


def routing_section(layers: Sequence[LayerMeasure]) -> Section | None:
    """Return the routers' choices by layer, None without any."""
    if not layers:
        return None
    routers = {
        "margin": [each.router_margin for each in layers],
        "entropy": [each.router_entropy for each in layers],
    }
    groups = {"whole groups": [each.whole_share for each in layers]}
    load = {
        "load, std / mean": [each.load_cv for each in layers],
        "idle experts": [float(each.idle_experts) for each in layers],
    }
    note = (
        "The margin is between the best two groups; where it is small, rounding can change the "
        "choice. The entropy is in nats."
    )
    title, unit = "Router margin and entropy by layer", "mean over tokens"
    figures = [_plot(title, layers, routers, note, unit=unit, span=(0, 1))]
    note = "The share of tokens that use whole virtual groups, which together are the dense MLP."
    title, unit = "Whole groups by layer", "share of tokens"
    figures.append(_plot(title, layers, groups, note, unit=unit, span=(0, 1.02)))
    return _by_layer("routing", "Routing", layers, routers | groups | load, figures)


def drift_section(layers: Sequence[LayerDrift]) -> Section | None:
    """Return how far training moved the experts, None where that was not measured."""
    if not layers:
        return None
    columns = {
        "most moved expert": [max(each.moved) for each in layers],
        "mean": [sum(each.moved) / len(each.moved) for each in layers],
        "apart": [each.apart for each in layers],
    }
    split, groups = sum(each.split_groups for each in layers), sum(e.num_groups for e in layers)
    note = (
        "Distances from the dense shard (most moved, mean) and from the mean of the shard's "
        f"copies (apart), relative to its norm. {split:,} of {groups:,} virtual groups are split."
    )
    title = "Weight drift by layer"
    figure = _plot(title, layers, columns, note, unit="relative distance", log=True)
    return _by_layer("drift", "Training", layers, columns, [figure])


def load_section(layers: Sequence[LayerMeasure | LayerLoad]) -> Section | None:
    """Return how many tokens chose each expert, None without any."""
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
        image=draw_heat_map(numbers, rows),
        title="Expert load",
        description=f"{counted(len(layers), 'layer')} of {counted(experts, 'expert')}; the largest "
        f"load is {most:.3g} times an even one (layer {layer}, expert {expert}), and no token "
        f"chose {counted(idle, 'expert')} of {experts * len(layers):,}.",
    )
    table = Table(
        caption="Number of tokens that chose each expert",
        columns=("layer", *(str(expert) for expert in range(experts))),
        rows=[(str(layer.layer), *map(str, layer.load)) for layer in layers],
        folded=_AS_NUMBERS,
    )
    words = "The number of tokens that chose each expert, relative to an even load."
    return Section(key="load", title="Expert load", words=[words], figures=[figure], tables=[table])


def _relative(load: Sequence[int], experts: int) -> list[float]:
    even = sum(load) / len(load) or 1.0
    return [*(tokens / even for tokens in load), *([0.0] * (experts - len(load)))]


def texts_section(
    texts: Sequence[TextMeasure], continuation: Continuation | None
) -> Section | None:
    """Return the texts with the KL of each token, None without any."""
    values = sorted(kl for text in texts for kl in text.kl if kl is not None)
    if not values:
        return None
    shares = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "largest": 1.0}
    quantiles = ", ".join(
        f"{name} {values[min(len(values) - 1, int(share * len(values)))]:.3g}"
        for name, share in shares.items()
    )
    zeros, infinite = sum(v <= 0 for v in values), sum(kl is None for t in texts for kl in t.kl)
    words = (
        "KL(dense ‖ MoE) is the difference between both models' predictions of the next token: 0 "
        "for equal ones; below 1e-8 it is rounding."
    )
    found = (
        f"{counted(len(values), 'token')}: {quantiles}; exactly 0 at {zeros:,}, not finite at "
        f"{infinite:,}."
    )
    edges = [f"{a:g} to {b:g}" for a, b in pairwise(_LEVELS)]
    tables = []
    if continuation is not None:
        rows = [(n, printable(getattr(continuation, n.lower()))) for n in ("text", "dense", "MoE")]
        caption = "How each model continues a text, with the most probable token each time"
        tables = [Table(caption=caption, columns=("model", "tokens"), rows=rows, folded=caption)]
    return Section(
        key="kl",
        title="Predictions, token by token",
        words=[words, found],
        tables=tables,
        legend=[f"KL below {_LEVELS[0]:g}", *edges, f"{_LEVELS[-1]:g} or more"],
        texts=list(_marked(texts)),
    )


def _marked(texts: Sequence[TextMeasure]) -> Iterator[tuple[str, list[tuple[str, str, int]]]]:
    left = _MAX_TOKENS
    for text in texts:
        tokens = [
            ("↵\n".join(map(printable, word.split("\n"))), _kl_text(kl), _level(kl))
            for word, kl in islice(zip(text.tokens, text.kl, strict=False), left)
        ]
        left -= len(tokens)
        if tokens:
            finite = [kl for kl in text.kl if kl is not None]
            most = f", KL at most {max(finite):.3g}" if finite else ""
            cut = f"; the first {len(tokens):,} are shown" if len(tokens) < len(text.tokens) else ""
            marked = sum(level > 0 for _, _, level in tokens)
            yield f"{counted(len(text.tokens), 'token')}{most}; {marked} marked{cut}.", tokens


def _level(kl: float | None) -> int:
    return len(_LEVELS) if kl is None else sum(kl >= level for level in _LEVELS)


def _kl_text(kl: float | None) -> str:
    return "KL not finite" if kl is None else f"KL {kl:.3g}"
