"""What transformers assumes: the defaults of absent config keys, and the tensors of a checkpoint.

`knowledge/defaults.json` is generated from transformers by `tests/family_defaults.py --write`.
"defaults" has the default of each key by model type; null mostly means that a value is derived from
others. "classes" has the names of the config, the base model and the causal language model.
"tensors" has the tensors of dense checkpoints: "outside" of layers, and by kind of layer within
"layers". An entry is a shape with an optional condition, such as "hidden_size,2*head_dim if
use_bias": dimensions are sums of products of config keys and integers; a condition is `if` or
`unless` and a boolean key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

LAYER = "layer"
"""The kind of every layer in models whose layers are all alike."""


@cache
def table(name: str) -> Mapping[str, Any]:
    """Return the content of `knowledge/<name>.json`."""
    result: dict[str, Any] = json.loads(
        (files(__package__) / "knowledge" / f"{name}.json").read_text("utf-8")
    )
    return result


def defaults_of(model_type: str) -> Mapping[str, Any]:
    """Return the default of each config key; empty for an unknown model type.

    Model types without rope lack "rope_theta". "partial_rotary_factor" is there if it varies.
    """
    return MappingProxyType(table("defaults")["defaults"].get(model_type, {}))


def class_names(model_type: str) -> Sequence[str]:
    """Return transformers' config, base model and causal language model of a type."""
    names: Sequence[str] = table("defaults")["classes"][model_type]
    return names


def tensor_shapes(
    model_type: str, values: Mapping[str, Any], kinds: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a dense checkpoint; empty for an unknown model type.

    `values` are effective settings, `kinds` the kind of each layer. The embedding comes first, then
    the layers in order, then the last norm and the head. A tied head is left out.
    """
    rows = table("defaults")["tensors"].get(model_type)
    if rows is None:
        return {}
    embedding, *rest = _shapes(rows["outside"], values).items()
    layers = {kind: _shapes(rows["layers"][kind], values) for kind in set(kinds)}
    found = dict([embedding])
    for layer, kind in enumerate(kinds):
        prefix = rows["prefix"].format(layer=layer)
        found |= {prefix + name: shape for name, shape in layers[kind].items()}
    return found | dict(rest)


def _shapes(entries: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of those tensors whose condition holds."""
    found = {}
    for name, entry in entries.items():
        shape, *condition = entry.split(" ")
        if not condition or bool(values[condition[1]]) == (condition[0] == "if"):
            found[name] = tuple(dimension(text, values) for text in shape.split(","))
    return found


def dimension(text: str, values: Mapping[str, Any]) -> int:
    """Return the value of a sum of products of keys and integers."""
    terms = (term.split("*") for term in text.split("+"))
    return sum(math.prod(int(values.get(factor, factor)) for factor in term) for term in terms)
