"""What transformers takes for granted, as data: defaults of absent keys, and tensors with shapes.

`defaults.json` is read out of transformers' own classes by `tests/family_defaults.py --write`, and
holds for the release it names. Under "defaults" it has what an absent key means to a model type;
null is a default too, and mostly means that the value is derived from others. Under "tensors" it
has what a dense checkpoint holds: those outside the layers by their names, the embedding first,
and those of each kind of layer by their names below "prefix". An entry is a shape with an optional
condition, "hidden_size,2*n_groups*ssm_state_size if use_bias": dimensions are sums of products of
config keys and integers, the condition is `if` or `unless` and a boolean key.
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
"""The kind of every layer where all are alike."""


@cache
def table(name: str) -> Mapping[str, Any]:
    """Return what a JSON file beside this module holds, such as `defaults`."""
    result: dict[str, Any] = json.loads(
        (files(__package__) / "knowledge" / f"{name}.json").read_text("utf-8")
    )
    return result


def defaults_of(model_type: str) -> Mapping[str, Any]:
    """Return what each key means to a model type when a config lacks it.

    "rope_theta" and "partial_rotary_factor" are what holds when no rope setting says otherwise;
    the latter is listed only where it is not 1. Neither is there for a model type without rope.
    Nothing for a model type that the table lacks.
    """
    return MappingProxyType(table("defaults")["defaults"].get(model_type, {}))


def known_names(of: str) -> Sequence[str]:
    """Return the "activations" without weights, or the "rope_kinds", that transformers knows."""
    names: Sequence[str] = table("defaults")[of]
    return names


def tensor_shapes(
    model_type: str, values: Mapping[str, Any], kinds: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Return every tensor of a dense checkpoint with its shape, by the names it has on disk.

    `values` holds the effective value of every key, head_dim and num_key_value_heads derived;
    `kinds` says what each layer is, `LAYER` where all are alike. The embedding comes first, the
    layers follow in order, then the last norm and the head. A tied head is not listed. Nothing for
    a model type that the table lacks.
    """
    rows = table("defaults")["tensors"].get(model_type)
    if rows is None:
        return {}
    embedding, *rest = _sized(rows["outside"], values).items()
    layers = {kind: _sized(rows["layers"][kind], values) for kind in set(kinds)}
    found = dict([embedding])
    for layer, kind in enumerate(kinds):
        prefix = rows["prefix"].format(layer=layer)
        found |= {prefix + name: shape for name, shape in layers[kind].items()}
    return found | dict(rest)


def _sized(entries: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return those that are there, with their shapes."""
    found = {}
    for name, entry in entries.items():
        shape, *condition = entry.split(" ")
        match condition:
            case []:
                is_there = True
            case ["if" | "unless" as word, key]:
                is_there = bool(values[key]) == (word == "if")
            case _:
                raise ValueError(f"defaults.json: no condition: {' '.join(condition)}")
        if is_there:
            found[name] = tuple(dimension(text, values) for text in shape.split(","))
    return found


def dimension(text: str, values: Mapping[str, Any]) -> int:
    """Return what a sum of products of keys and integers comes to."""
    terms = (term.split("*") for term in text.split("+"))
    return sum(math.prod(int(values.get(factor, factor)) for factor in term) for term in terms)
