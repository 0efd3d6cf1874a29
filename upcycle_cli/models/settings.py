"""What a config means: its values, checked, with the defaults of its model type filled in.

What a target writes is made of these values alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.models.defaults import defaults_of, known_names

_Rules = tuple[tuple[Callable[[Any], bool], str], ...]


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_token(value: object) -> bool:
    return value is None or type(value) is int


def _is_tokens(value: object) -> bool:
    return _is_token(value) or (isinstance(value, list) and all(type(i) is int for i in value))


_MAX_LAYERS = 10_000  # a plan holds every tensor of every layer
_COUNT: _Rules = ((_is_count, "a positive integer"),)
_OPTIONAL: _Rules = ((lambda value: value is None or _is_count(value), "a positive integer"),)
_NUMBER: _Rules = (
    (lambda value: type(value) in (int, float), "a number"),
    (lambda value: 0 <= value < math.inf, "a finite number and at least 0"),
)
_FLAG: _Rules = ((lambda value: type(value) is bool, "true or false"),)
_TOKEN: _Rules = ((_is_token, "a token id or null"),)
_ACTIVATION: _Rules = (
    (
        lambda value: isinstance(value, str) and value in known_names("activations"),
        "an activation that transformers knows, such as silu or gelu",
    ),
)
_RULES: Mapping[str, _Rules] = {
    "vocab_size": _COUNT,
    "hidden_size": _COUNT,
    "intermediate_size": _COUNT,
    "num_hidden_layers": (
        *_COUNT,
        (lambda value: value <= _MAX_LAYERS, f"at most {_MAX_LAYERS}"),
    ),
    "num_attention_heads": _COUNT,
    "num_key_value_heads": _OPTIONAL,
    "head_dim": _OPTIONAL,
    "hidden_act": _ACTIVATION,
    "mlp_hidden_act": _ACTIVATION,
    "rms_norm_eps": _NUMBER,
    "norm_eps": _NUMBER,
    "layer_norm_epsilon": _NUMBER,
    "attention_dropout": (
        _NUMBER[0],
        (lambda value: 0 <= value < 1, "less than 1 and at least 0"),
    ),
    "max_position_embeddings": _COUNT,
    "tie_word_embeddings": _FLAG,
    "attention_bias": _FLAG,
    "mlp_bias": _FLAG,
    "bos_token_id": _TOKEN,
    "eos_token_id": ((_is_tokens, _TOKEN[0][1]),),
    "pad_token_id": _TOKEN,
}
"""What each key that a forward pass reads may be, whichever model type has it."""
_WHERE_USED: Mapping[str, _Rules] = {
    "rope_theta": (*_NUMBER, (lambda value: value != 0, "larger than 0")),
    "sliding_window": _OPTIONAL,
    "use_sliding_window": _FLAG,
    "max_window_layers": _NUMBER,
}
"""The same of keys that count under a condition only."""
_NO_ROPE_NUMBERS = ("rope_type", "type", "mscale", "mscale_all_dim")  # 0 leaves the last two out


class Values:
    """Reads settings from a config, with the defaults of its model type."""

    def __init__(
        self, config: Mapping[str, Any], model_type: str, keys: Mapping[str, str] | None = None
    ) -> None:
        self.config, self.defaults, self.keys = config, defaults_of(model_type), keys or {}

    def __getitem__(self, key: str) -> Any:  # noqa: ANN401 - a JSON value
        """Return a setting; raises UpcycleError for one that no model has."""
        own = self.keys.get(key, key)
        value = self.config.get(own, self.defaults.get(own))
        if value is None and key == "intermediate_size" and key in self.keys:
            return 4 * self["hidden_size"]  # which is what null means to those types
        usual = self.defaults.get(own)
        if usual is not None and type(value) is type(usual) and value == usual:
            return value
        rules = _RULES.get(key) or _WHERE_USED.get(key, ())
        # Where a type has a size of its own, null does not mean "derive it": it is refused there.
        if key == "head_dim" and self.defaults.get(key) is not None:
            rules = _COUNT
        for holds, wanted in rules:
            if not holds(value):
                found = "null" if value is None else shown(value)
                raise UpcycleError(f"config.json: {own} must be {wanted}, not {found}.")
        return value

    def effective(self) -> dict[str, Any]:
        """Return every setting, checked, and with what is derived from others.

        "rope_theta" and "rope_scaling" stand for all forms of rope settings; the latter is
        everything but theta, None for the plain kind. Raises UpcycleError as for a single one.
        """
        known = {**self.defaults, **self.config, **dict.fromkeys(self.keys)}
        found = known | {key: self[key] for key in _RULES if key in known}
        if "num_attention_heads" in found:
            found |= _heads(found)
        if "rope_theta" in self.defaults:
            found["rope_theta"], found["rope_scaling"] = _read_rope(self)
        if "partial_rotary_factor" in self.defaults:
            found["partial_rotary_factor"] = _read_share(self.config, known)
        return found


def _heads(found: Mapping[str, Any]) -> dict[str, int]:
    """Return the size of a head and the number of those of keys and values."""
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


def _read_rope(values: Values) -> tuple[float, Mapping[str, Any] | None]:
    """Return theta, and everything else of the rope settings; None for the plain kind."""
    # transformers lets a non-empty rope_scaling win over rope_parameters, and a theta inside
    # either over the one at the top level.
    key = "rope_scaling" if values.config.get("rope_scaling") else "rope_parameters"
    parameters = values.config.get(key) or {}
    if not isinstance(parameters, dict):
        raise UpcycleError(
            f"config.json: {key} must be an object or null, not {shown(parameters)}."
        )
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
        if name not in _NO_ROPE_NUMBERS and not all(map(_is_usable, numbers)):
            raise UpcycleError(
                f"config.json: {key} has {name} {shown(value)}, and no rotary embedding has."
            )
    if kind == "default" and scaling.keys() <= {"rope_type", "type", "partial_rotary_factor"}:
        return theta, None
    return theta, scaling | {"rope_type": kind}


def _read_share(config: Mapping[str, Any], known: Mapping[str, Any]) -> float:
    """Return the part of each head that is turned; what is inside the rope settings goes first."""
    key = "partial_rotary_factor"
    inner = config.get("rope_scaling") or config.get("rope_parameters") or {}
    share = inner.get(key, known[key])
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise UpcycleError(
            f"config.json: {key} must be a number above 0 and at most 1, not {shown(share)}."
        )
    return float(share)


def _is_usable(value: object) -> bool:
    """Whether this can be a setting of rotary embeddings: a flag, or a positive number."""
    if value is None or isinstance(value, bool):
        return True
    return isinstance(value, int | float) and math.isfinite(value) and value > 0
