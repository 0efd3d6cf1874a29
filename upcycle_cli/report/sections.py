"""The sections: the recipe, values by layer, predictions by token, and expert load."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

from upcycle_cli.checkpoint.storage import RECORD_NAME
from upcycle_cli.core.text import counted, printable
from upcycle_cli.recipe.recipe import Recipe
from upcycle_cli.report.figures import draw_heat_map, draw_lines
from upcycle_cli.report.page import Figure, Section, Table, properties, spread

if TYPE_CHECKING:
    from upcycle_cli.inspection.expert_load import LayerLoad
    from upcycle_cli.inspection.weight_drift import LayerDrift
    from upcycle_cli.verification.result import LayerMeasure, TextMeasure

_LEVELS = (1e-8, 1e-4, 1e-2, 1e-1)
"""The KL at which the mark of a token becomes stronger."""
_MAX_TOKENS = 16_384
_AS_NUMBERS = "The same as numbers"


def recipe_section(record: Mapping[str, Any]) -> Section:
    """Return the recipe and the factors from upcycle.json, whose values can be anything.

    Defaults, empty values and factors of 1 are left out.
    """
    values: dict[str, object] = {}
    defaults = {field.name: field.default for field in fields(Recipe)}
    for key, prefix in (("recipe", ""), ("growth", ""), ("factors", "factor ")):
        part = record.get(key)
        if isinstance(part, dict):
            values |= {
                f"{prefix}{name.replace('_', ' ')}": value
                for name, value in part.items()
                if value not in (None, "", [], {}, 1.0 if prefix else defaults.get(name))
            }
    title = "Recipe and factors"
    if not values:
        words = f"This MoE has no readable {RECORD_NAME}, so its recipe is unknown."
        return Section(key="recipe", title=title, words=[words])
    caption = f"What {RECORD_NAME} says, without defaults and factors of 1"
    return Section(key="recipe", title=title, tables=[properties(values, caption)])


def _by_layer(
    key: str,
    title: str,
    layers: Sequence[LayerMeasure | LayerDrift],
    columns: Mapping[str, Sequence[float]],
    plots: Sequence[Figure | str],
    words: Sequence[str] = (),
) -> Section:
    """Return a section with values by layer, as figures or sentences and as one table."""
    values = zip(*columns.values(), strict=True)
    rows = [
        (str(each.layer), *(f"{v:.6g}" for v in row))
        for each, row in zip(layers, values, strict=True)
    ]
    table = Table(
        caption=f"{title}, by layer", columns=("layer", *columns), rows=rows, folded=_AS_NUMBERS
    )
    said = [plot for plot in plots if isinstance(plot, str)]
    figures = [plot for plot in plots if isinstance(plot, Figure)]
    return Section(key=key, title=title, words=[*words, *said], figures=figures, tables=[table])


def _plot(
    title: str,
    layers: Sequence[LayerMeasure | LayerDrift],
    series: Mapping[str, Sequence[float]],
    note: str = "",
    **drawn: Any,  # noqa: ANN401 - as draw_lines has them
) -> Figure | str:
    """Return a figure of values by layer and their ranges in words; only words if all are equal."""
    numbers = [each.layer for each in layers]
    ranges = "; ".join(f"{name}: {spread(values, numbers)}" for name, values in series.items())
    words = f"{ranges[0].upper()}{ranges[1:]}. {note}"
    shown = [{f"{v:.3g}" for v in values if math.isfinite(v)} for values in series.values()]
    if all(len(values) < 2 for values in shown):
        return words
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
    note = "The gain is the experts' output projected on the dense MLP's: 1 for the same function."
    plots = (
        _plot(title, layers, errors, unit="relative error", log=True),
        _plot("Gain by layer", layers, gain, note, unit="gain", span=(0.9, 1.1)),
    )
    words = (
        "Errors are relative to the root mean square of the dense model's values. The added error "
        "of a layer is measured on the dense model's own input; the hidden state accumulates the "
        "errors of all layers before it."
    )
    return _by_layer("errors", title, layers, errors | gain, plots, [words])


def routing_section(layers: Sequence[LayerMeasure]) -> Section | None:
    """Return the choices of the routers by layer, None without any."""
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
    plots = [_plot(title, layers, routers, note, unit=unit, span=(0, 1))]
    note = "This is the share of tokens that use whole virtual groups; a group is the dense MLP."
    title, unit = "Whole groups by layer", "share of tokens"
    plots.append(_plot(title, layers, groups, note, unit=unit, span=(0, 1.02)))
    return _by_layer("routing", "Routing", layers, routers | groups | load, plots)


def drift_section(layers: Sequence[LayerDrift]) -> Section | None:
    """Return how far training moved the experts, None if that was not measured."""
    if not layers:
        return None
    if not any(map(any, (each.moved for each in layers))):
        words = "No expert has moved from its dense shard."
        return Section(key="drift", title="Training", words=[words])
    columns = {
        "most moved expert": [max(each.moved) for each in layers],
        "mean": [sum(each.moved) / len(each.moved) for each in layers],
        "apart": [each.apart for each in layers],
    }
    split, groups = sum(each.split_groups for each in layers), sum(e.num_groups for e in layers)
    note = (
        "Distances from the dense shard (most moved, mean) and from the mean of the shard's "
        f"copies (apart), relative to the shard's norm. In {split:,} of {groups:,} virtual groups "
        "the router rows have become unequal."
    )
    title = "Weight drift by layer"
    plot = _plot(title, layers, columns, note, unit="relative distance", log=True)
    return _by_layer("drift", "Training", layers, columns, [plot])


def _group_size(record: Mapping[str, Any], experts: int) -> int:
    """Return the size of a virtual group by upcycle.json, whose values can be anything."""
    match record:
        case {"growth": {"expand": int(size)}}:
            pass
        case {"recipe": {"virtual_groups": True, "granularity": int(g), "shared_experts": int(k)}}:
            size = g - k
        case _:
            size = 1
    return size if size > 0 and experts % size == 0 else 1


def load_section(
    layers: Sequence[LayerMeasure | LayerLoad], record: Mapping[str, Any]
) -> Section | None:
    """Return how many tokens chose each expert, None without any.

    Where all experts of every group have equal loads, the figure has a column for each group.
    """
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
    words = (
        f"{counted(len(layers), 'layer')} of {counted(experts, 'expert')}. The largest load is "
        f"{most:.3g} times an even one (layer {layer}, expert {expert}). No token chose "
        f"{idle:,} of {counted(experts * len(layers), 'expert')}."
    )
    size, column = _group_size(record, experts), "expert"
    if size > 1:
        column = "virtual group"
        if all(len({*row[e : e + size]}) == 1 for row in rows for e in range(0, experts, size)):
            words += f" The {size} experts of each virtual group have equal loads."
            rows, size = [row[::size] for row in rows], 1
    figures = []
    if most != 1.0:
        image = draw_heat_map(numbers, rows, group_size=size, column=column)
        figures = [Figure(image=image, title="Expert load", description=words)]
    table = Table(
        caption="Number of tokens that chose each expert",
        columns=("layer", *(str(expert) for expert in range(experts))),
        rows=[(str(layer.layer), *map(str, layer.load)) for layer in layers],
        folded=_AS_NUMBERS,
    )
    said = [] if figures else [words]
    return Section(key="load", title="Expert load", words=said, figures=figures, tables=[table])


def _relative(load: Sequence[int], experts: int) -> list[float]:
    even = sum(load) / len(load) or 1.0
    return [*(tokens / even for tokens in load), *([0.0] * (experts - len(load)))]


def texts_section(texts: Sequence[TextMeasure]) -> Section | None:
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
        "KL(dense ‖ MoE) measures how much both models' predictions of the next token differ: 0 if "
        "they are equal; below 1e-8 it is rounding. Texts without a marked token are closed."
    )
    found = f"{counted(len(values), 'token')}: {quantiles}; exactly 0 at {zeros:,}"
    found += f"; not finite at {infinite:,}." if infinite else "."
    edges = [f"{a:g} to {b:g}" for a, b in pairwise(_LEVELS)]
    return Section(
        key="kl",
        title="Predictions, token by token",
        words=[words, found],
        legend=[f"KL below {_LEVELS[0]:g}", *edges, f"{_LEVELS[-1]:g} or more"],
        texts=list(_marked(texts)),
    )


def _marked(
    texts: Sequence[TextMeasure],
) -> Iterator[tuple[str, bool, list[tuple[str, str, int]]]]:
    left = _MAX_TOKENS
    for text in texts:
        held = min(left, len(text.tokens))
        tokens = [
            ("↵\n".join(map(printable, word.split("\n"))), _kl_text(kl), _level(kl))
            for word, kl in _whole_characters(text, held)
        ]
        left -= held
        if tokens:
            finite = [kl for kl in text.kl if kl is not None]
            most = f", KL at most {max(finite):.3g}" if finite else ""
            cut = f"; the first {held:,} are shown" if held < len(text.tokens) else ""
            marked = sum(level > 0 for _, _, level in tokens)
            words = f"{counted(len(text.tokens), 'token')}{most}; {marked:,} marked{cut}"
            yield words, marked > 0, tokens


def _whole_characters(text: TextMeasure, count: int) -> Iterator[tuple[str, float | None]]:
    """Yield words and their KL; several tokens of one character become one word."""
    kls: list[float | None] = []
    for word, kl in islice(zip(text.tokens, text.kl, strict=False), count):
        kls.append(kl)
        if word:
            yield word, max(kls, key=lambda each: math.inf if each is None else each)
            kls = []


def _level(kl: float | None) -> int:
    return len(_LEVELS) if kl is None else sum(kl >= level for level in _LEVELS)


def _kl_text(kl: float | None) -> str:
    return "KL not finite" if kl is None else f"KL {kl:.3g}"
