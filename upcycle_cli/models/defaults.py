"""How transformers reads a config: defaults of absent keys, checked values, and tensors.

`tests/family_defaults.py --write` generates `knowledge/defaults.json` from transformers. By model
type it has the "defaults" of config keys (null mostly means that a value is derived), the names of
the "classes", and the "tensors" of dense checkpoints with equal layers. A tensor is a shape with an
optional condition, such as "hidden_size,2*head_dim if use_bias": dimensions are sums of products of
config keys and integers; a condition is `if` or `unless` and a boolean key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from upcycle_cli.core.errors import UpcycleError, shown


@cache
def table(name: str) -> Mapping[str, Any]:
    """Return the content of `knowledge/<name>.json`."""
    result: dict[str, Any] = json.loads(
        (files(__package__) / "knowledge" / f"{name}.json").read_text("utf-8")
    )
    return result


def defaults_of(model_type: str) -> Mapping[str, Any]:
    """Return the default of each config key; empty for an unknown model type.

    "rope_theta" is missing without rope, "partial_rotary_factor" if it is always 1.
    """
    return MappingProxyType(table("defaults")["defaults"].get(model_type, {}))


def class_names(model_type: str) -> tuple[str, str, str]:
    """Return transformers' config, base model and causal language model of a type."""
    config, base, whole = table("defaults")["classes"][model_type]
    return config, base, whole


def tensor_shapes(model_type: str, values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a dense checkpoint; empty for an unknown model type.

    `values` are effective settings. The embedding comes first, then the layers in order, then the
    last norm and the head. A tied head is left out.
    """
    rows = table("defaults")["tensors"].get(model_type)
    if rows is None:
        return {}
    embedding, *rest = _shapes(rows["outside"], values).items()
    found, own = dict([embedding]), _shapes(rows["layer"], values).items()
    for layer in range(values["num_hidden_layers"]):
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in own}
    return found | dict(rest)


def _shapes(entries: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors, without those whose condition is false."""
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


_Rule = tuple[Callable[[Any], bool], str]
"""A condition that a value must meet, and what it must be, in words."""


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf  # type: ignore[operator]


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_token(value: object) -> bool:
    tokens = value if isinstance(value, list) else [value]
    return value is None or all(type(token) is int for token in tokens)


_COUNT: _Rule = (_is_count, "a positive integer")
_OPTIONAL: _Rule = (lambda value: value is None or _is_count(value), "a positive integer")
_NUMBER: _Rule = (_is_number, "a finite number and at least 0")
_FLAG: _Rule = (lambda value: type(value) is bool, "true or false")
_LIST: _Rule = (lambda value: not value or isinstance(value, list), "a list or null")
_OBJECT: _Rule = (lambda value: not value or isinstance(value, dict), "an object or null")
_TOKEN: _Rule = (_is_token, "a token id or null")
_ACTIVATION: _Rule = (
    lambda value: value in table("defaults")["activations"],
    "an activation that transformers knows, such as silu or gelu",
)
_MAX_LAYERS = 10_000  # a plan holds every tensor of every layer
_CHECKED: Mapping[str, _Rule] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), _COUNT),
    "num_hidden_layers": (
        lambda value: _is_count(value) and value <= _MAX_LAYERS,
        f"a positive integer, at most {_MAX_LAYERS}",
    ),
    **dict.fromkeys(("num_attention_heads", "max_position_embeddings"), _COUNT),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "sliding_window"), _OPTIONAL),
    **dict.fromkeys(("hidden_act", "mlp_hidden_act"), _ACTIVATION),
    **dict.fromkeys(("rms_norm_eps", "norm_eps", "layer_norm_epsilon"), _NUMBER),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), _FLAG),
    **dict.fromkeys(("bos_token_id", "pad_token_id", "eos_token_id"), _TOKEN),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), _OBJECT),
    **dict.fromkeys(("layer_rope_theta", "full_attn_idxs"), _LIST),
}
"""Keys that every forward pass reads, if a model type has them."""
_CHECKED_IF_READ: Mapping[str, _Rule] = {
    "rope_theta": (lambda value: _is_number(value) and value > 0, "a finite number above 0"),
    "partial_rotary_factor": (
        lambda value: _is_number(value) and 0 < value <= 1,
        "a number above 0 and at most 1",
    ),
    "use_sliding_window": _FLAG,
    "max_window_layers": _NUMBER,
}


class ConfigValues:
    """Reads settings from a config, with the defaults of its model type."""

    def __init__(
        self, config: Mapping[str, Any], model_type: str, keys: Mapping[str, str] | None = None
    ) -> None:
        self.config, self.defaults, self.keys = config, defaults_of(model_type), keys or {}
        self.known = {**self.defaults, **config, **dict.fromkeys(self.keys)}
        self.model_type = model_type

    def __getitem__(self, key: str) -> Any:  # noqa: ANN401 - a JSON value
        """Return a setting; raises UpcycleError for an invalid one."""
        return self._checked(key, self.config)

    def _checked(self, key: str, config: Mapping[str, Any]) -> Any:  # noqa: ANN401
        own = self.keys.get(key, key)
        default = self.defaults.get(own)
        value = config.get(own, default)
        if key == "intermediate_size" and isinstance(value, list) and value[1:] == value[:-1]:
            value = next(iter(value), None)  # gemma3n states the size of each layer
        if value is None and key == "intermediate_size" and key in self.keys:
            return 4 * self["hidden_size"]  # the meaning of null in these types
        if default is not None and type(value) is type(default) and value == default:
            return value
        rule = _CHECKED.get(key) or _CHECKED_IF_READ.get(key)
        # A type with its own default does not derive head_dim if a config says null.
        if key == "head_dim" and default is not None:
            rule = _COUNT
        if rule is not None and not rule[0](value):
            found = "null" if value is None else shown(value)
            raise UpcycleError(f"config.json: {own} must be {rule[1]}, not {found}.")
        return value

    def effective(self) -> dict[str, Any]:
        """Return every setting, checked, and derived from others if it is absent.

        "rope_theta" and "rope_scaling" replace all forms of rope settings; the latter is None for
        plain rope. Raises UpcycleError for invalid values.
        """
        found = self.known | {key: self[key] for key in _CHECKED if key in self.known}
        if "num_attention_heads" in found:
            heads, hidden_size = found["num_attention_heads"], found["hidden_size"]
            if found.get("head_dim") is None and hidden_size % heads:
                raise UpcycleError(
                    f"config.json: hidden_size {hidden_size} is not a multiple of "
                    f"num_attention_heads {heads}, and head_dim is not given."
                )
            found["head_dim"] = found.get("head_dim") or hidden_size // heads
            found["num_key_value_heads"] = found.get("num_key_value_heads") or heads
        if "rope_theta" in self.defaults:
            found["rope_theta"], found["rope_scaling"] = self._rope()
        if "partial_rotary_factor" in self.defaults:
            inner = self.config.get("rope_scaling") or self.config.get("rope_parameters") or {}
            stated = {**self.config, **inner}
            found["partial_rotary_factor"] = self._checked("partial_rotary_factor", stated)
        return found

    def _rope(self) -> tuple[float, Mapping[str, Any] | None]:
        """Return theta, and all other rope settings; None for plain rope."""
        # In transformers a non-empty rope_scaling overrides rope_parameters, and a theta inside
        # either overrides the one at the top level.
        key = "rope_scaling" if self.config.get("rope_scaling") else "rope_parameters"
        parameters = self.config.get(key) or {}
        if any(isinstance(value, dict) for value in parameters.values()):
            raise UpcycleError(
                f"config.json: {key} differs from layer to layer, which no target can express."
            )
        inside = {name: value for name, value in parameters.items() if value is not None}
        theta = self._checked("rope_theta", {**self.config, **inside})
        scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if self.model_type == "phi3" and kind == "yarn":
            kind = "longrope"  # as transformers reads it
        kinds = table("defaults")["rope_kinds"]
        if kind not in kinds:
            raise UpcycleError(
                f"config.json: {key} must name its rope_type, one of {', '.join(kinds)}, "
                f"not {shown(kind)}."
            )
        if kind == "default" and scaling.keys() <= {"rope_type", "type", "partial_rotary_factor"}:
            return theta, None
        return theta, scaling | {"rope_type": kind}
