"""The sections: the recipe, values by layer, predictions by token, and expert load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import islice, pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from upcycle_cli.checkpoint.storage import RECORD_NAME
from upcycle_cli.core.text import counted, printable
from upcycle_cli.recipe.recipe import Recipe
from upcycle_cli.report.figures import draw_heat_map, draw_lines
from upcycle_cli.report.page import Section, Table, properties, spread

if TYPE_CHECKING:
    from upcycle_cli.inspection.expert_load import LayerLoad
    from upcycle_cli.inspection.weight_drift import LayerDrift
    from upcycle_cli.verification.result import LayerMeasure, TextMeasure

_LEVELS = (1e-8, 1e-4, 1e-2, 1e-1)
"""The KL at which the mark of a token becomes stronger."""
_MAX_TOKENS = 16_384
_MEASURES = {
    "added error, rms*": "added_rms",
    "added error, largest*": "added_max",
    "hidden state*": "hidden_rms",
    "gain": "gain",
    "whole groups (%)": "whole_share",
    "router margin": "router_margin",
    "router entropy": "router_entropy",
    "expert load varies by": "load_cv",
    "never chosen": "idle_experts",
}
"""The columns of the table by layer, and their fields of `LayerMeasure`; * marks the plotted."""


def recipe_section(record: Mapping[str, Any]) -> Section | None:
    """Return recipe and factors from upcycle.json (any values), without defaults; None if empty."""
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
    if not values:
        return None
    tables = [properties(values, f"From {RECORD_NAME}, without defaults")]
    return Section(key="recipe", title="Recipe and factors", tables=tables)


def _by_layer(
    title: str,
    layers: Sequence[LayerMeasure | LayerDrift],
    columns: Mapping[str, Sequence[float]],
    *,
    unit: str,
    words: str,
) -> Section:
    """Return a section with a table of all columns, and a plot of the columns that end in *."""
    numbers = [each.layer for each in layers]
    values = {name.removesuffix("*"): column for name, column in columns.items()}
    ranges = {name: f"{name} {spread(column, numbers)}" for name, column in values.items()}
    plotted = {name: values[name] for name in values if f"{name}*" in columns}
    varies = any(" to " in ranges[name] for name in plotted)
    plot = draw_lines(numbers, plotted, unit=unit) if varies else ""
    said = [words, f"{'; '.join(ranges.values()).capitalize()}."]
    rows = zip(numbers, *values.values(), strict=True)
    table = Table(
        caption=f"{title} by layer",
        columns=("layer", *values),
        rows=[(str(layer), *(f"{v:.6g}" for v in row)) for layer, *row in rows],
        folded=True,
    )
    key = title.split(maxsplit=1)[0].lower()
    return Section(key=key, title=title, words=said, plot=plot, tables=[table])


def errors_section(layers: Sequence[LayerMeasure]) -> Section | None:
    """Return errors and routing by layer, None without any."""
    if not layers:
        return None
    return _by_layer(
        "Errors and routing",
        layers,
        {
            name: [getattr(each, key) * (100.0 if "%" in name else 1.0) for each in layers]
            for name, key in _MEASURES.items()
        },
        unit="relative error",
        words="Errors are relative to the root mean square of the dense model's values. The added "
        "error of a layer is measured on the dense model's own input; the hidden state accumulates "
        "the errors of all layers before it. The gain is the experts' output projected on the "
        "dense MLP's. The margin is between the best two groups: where it is small, rounding can "
        "change the choice. The entropy is in nats.",
    )


def drift_section(layers: Sequence[LayerDrift]) -> Section | None:
    """Return how far training moved the experts, None if that was not measured."""
    if not layers:
        return None
    columns = {
        "most moved expert*": [100 * max(each.moved) for each in layers],
        "mean*": [100 * sum(each.moved) / len(each.moved) for each in layers],
        "apart*": [100 * each.apart for each in layers],
    }
    words = (
        "Distances from the dense shard (most moved, mean) and from the mean of the shard's copies "
        "(apart), in % of the shard's norm."
    )
    return _by_layer("Training", layers, columns, unit="% of the norm", words=words)


def load_section(layers: Sequence[LayerMeasure | LayerLoad]) -> Section | None:
    """Return how many tokens chose each expert, None if that was not measured."""
    layers = [layer for layer in layers if layer.load]
    if not layers:
        return None
    numbers = [layer.layer for layer in layers]
    experts = len(layers[0].load)
    rows = [
        [tokens * experts / max(sum(layer.load), 1) for tokens in layer.load] for layer in layers
    ]
    most, layer, expert = max(
        (v, n, e) for n, row in zip(numbers, rows, strict=True) for e, v in enumerate(row)
    )
    words = (
        f"{counted(len(layers), 'layer')} of {counted(experts, 'expert')}. The largest load is "
        f"{most:.3g} times an even one (layer {layer}, expert {expert})."
    )
    plot = draw_heat_map(numbers, rows) if most != 1.0 else ""
    table = Table(
        caption="Number of tokens that chose each expert",
        columns=("layer", *(str(expert) for expert in range(experts))),
        rows=[(str(layer.layer), *map(str, layer.load)) for layer in layers],
        folded=True,
    )
    return Section(key="load", title="Expert load", words=[words], plot=plot, tables=[table])


def texts_section(texts: Sequence[TextMeasure]) -> Section | None:
    """Return the texts with the KL of each token, None without any."""
    values = [kl for text in texts for kl in text.kl if kl is not None]
    if not values:
        return None
    tokens = counted(len(values), "token")
    words = (
        "KL(dense ‖ MoE) measures how much both models' predictions of the next token differ: 0 if "
        f"they are equal; below {_LEVELS[0]:g} it is rounding. Over {tokens} its median is "
        f"{median(values):.3g}, its maximum {max(values):.3g}. Texts without a marked token are "
        "closed."
    )
    if infinite := sum(kl is None for text in texts for kl in text.kl):
        words += f" It is not finite at {counted(infinite, 'token')}."
    edges = [f"{a:g} to {b:g}" for a, b in pairwise(_LEVELS)]
    return Section(
        key="kl",
        title="Predictions, token by token",
        words=[words],
        legend=[f"KL below {_LEVELS[0]:g}", *edges, f"{_LEVELS[-1]:g} or more"],
        texts=list(_marked(texts)),
    )


def _marked(texts: Sequence[TextMeasure]) -> Iterator[tuple[str, bool, list[tuple[str, str, int]]]]:
    left = _MAX_TOKENS
    for text in texts:
        held = min(left, len(text.tokens))
        tokens = list[tuple[str, str, int]]()
        for word, kl in islice(zip(text.tokens, text.kl, strict=False), held):
            # A token that ends inside a character is empty.
            shown = "↵\n".join(map(printable, word.split("\n"))) or "·"
            level = len(_LEVELS) if kl is None else sum(kl >= least for least in _LEVELS)
            tokens.append((shown, "KL not finite" if kl is None else f"KL {kl:.3g}", level))
        left -= held
        if tokens:
            finite = [kl for kl in text.kl if kl is not None]
            most = f", KL at most {max(finite):.3g}" if finite else ""
            cut = f"; the first {held:,} are shown" if held < len(text.tokens) else ""
            marked = sum(level > 0 for _, _, level in tokens)
            words = f"{counted(len(text.tokens), 'token')}{most}; {marked:,} marked{cut}"
            yield words, marked > 0, tokens
