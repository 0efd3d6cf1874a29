"""Effective values of a config: checked, with the defaults of its model type filled in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.models.defaults import defaults_of, known_names

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
_TOKEN: _Rule = (_is_token, "a token id or null")
_ACTIVATION: _Rule = (
    lambda value: value in known_names("activations"),
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
    **dict.fromkeys(("num_key_value_heads", "head_dim"), _OPTIONAL),
    **dict.fromkeys(("hidden_act", "mlp_hidden_act"), _ACTIVATION),
    **dict.fromkeys(("rms_norm_eps", "norm_eps", "layer_norm_epsilon"), _NUMBER),
    "attention_dropout": (
        lambda value: _is_number(value) and value < 1,
        "a number less than 1 and at least 0",
    ),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), _FLAG),
    **dict.fromkeys(("bos_token_id", "pad_token_id", "eos_token_id"), _TOKEN),
}
"""Keys that every forward pass reads, if a model type has them."""
_CHECKED_IF_READ: Mapping[str, _Rule] = {
    "rope_theta": (lambda value: _is_number(value) and value > 0, "a finite number above 0"),
    "sliding_window": _OPTIONAL,
    "use_sliding_window": _FLAG,
    "max_window_layers": _NUMBER,
}
_NOT_NUMBERS = ("rope_type", "type", "mscale", "mscale_all_dim")  # mscale may be 0


class ConfigValues:
    """Reads settings from a config, with the defaults of its model type."""

    def __init__(
        self, config: Mapping[str, Any], model_type: str, keys: Mapping[str, str] | None = None
    ) -> None:
        self.config, self.defaults, self.keys = config, defaults_of(model_type), keys or {}

    def __getitem__(self, key: str) -> Any:  # noqa: ANN401 - a JSON value
        """Return a setting; raises UpcycleError for an invalid one."""
        own = self.keys.get(key, key)
        value = self.config.get(own, self.defaults.get(own))
        if value is None and key == "intermediate_size" and key in self.keys:
            return 4 * self["hidden_size"]  # the meaning of null in these types
        default = self.defaults.get(own)
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
        """Return every setting, checked, and derived from others where it is absent.

        "rope_theta" and "rope_scaling" stand for all forms of rope settings; the latter holds
        everything but theta, and is None for plain rope. Raises UpcycleError as `__getitem__` does.
        """
        known = {**self.defaults, **self.config, **dict.fromkeys(self.keys)}
        found = known | {key: self[key] for key in _CHECKED if key in known}
        if "num_attention_heads" in found:
            found |= _heads(found)
        if "rope_theta" in self.defaults:
            found["rope_theta"], found["rope_scaling"] = _read_rope(self)
        if "partial_rotary_factor" in self.defaults:
            found["partial_rotary_factor"] = _rotary_share(self.config, known)
        return found


def _heads(found: Mapping[str, Any]) -> dict[str, int]:
    """Return the size of a head and the number of key-value heads."""
    heads, hidden_size = found["num_attention_heads"], found["hidden_size"]
    head_dim = found.get("head_dim")
    if head_dim is None and hidden_size % heads:
        raise UpcycleError(
            f"config.json: hidden_size {hidden_size} is not a multiple of "
            f"num_attention_heads {heads}, and head_dim is not given."
        )
    groups = found.get("num_key_value_heads") or heads
    if heads % groups:
        raise UpcycleError(
            f"config.json: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {groups}."
        )
    return {"head_dim": head_dim or hidden_size // heads, "num_key_value_heads": groups}


def _read_rope(values: ConfigValues) -> tuple[float, Mapping[str, Any] | None]:
    """Return theta, and all other rope settings; None for plain rope."""
    # In transformers a non-empty rope_scaling overrides rope_parameters, and a theta inside either
    # overrides the one at the top level.
    key = "rope_scaling" if values.config.get("rope_scaling") else "rope_parameters"
    parameters = values.config.get(key) or {}
    if not isinstance(parameters, dict):
        words = f"{key} must be an object or null, not {shown(parameters)}"
        raise UpcycleError(f"config.json: {words}.")
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UpcycleError(
            f"config.json: {key} differs from layer to layer, which no target can express."
        )
    theta = parameters.get("rope_theta")
    if theta is None:
        theta = values["rope_theta"]
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    kinds = known_names("rope_kinds")
    if kind not in kinds:
        raise UpcycleError(
            f"config.json: {key} must name its rope_type, one of {', '.join(kinds)}, "
            f"not {shown(kind)}."
        )
    for name, value in {**scaling, "rope_theta": theta}.items():
        numbers = value if isinstance(value, list) else [value]
        fit = (x is None or type(x) is bool or (_is_number(x) and x > 0) for x in numbers)
        if name not in _NOT_NUMBERS and not all(fit):
            raise UpcycleError(f"config.json: {name} in {key} cannot be {shown(value)}.")
    if kind == "default" and scaling.keys() <= {"rope_type", "type", "partial_rotary_factor"}:
        return theta, None
    return theta, scaling | {"rope_type": kind}


def _rotary_share(config: Mapping[str, Any], known: Mapping[str, Any]) -> float:
    """Return the rotated share of each head; the value inside rope settings takes precedence."""
    key = "partial_rotary_factor"
    inner = config.get("rope_scaling") or config.get("rope_parameters") or {}
    share = inner.get(key, known[key])
    if not _is_number(share) or not 0 < share <= 1:
        raise UpcycleError(
            f"config.json: {key} must be a number above 0 and at most 1, not {shown(share)}."
        )
    return float(share)
