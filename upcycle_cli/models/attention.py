"""The attention class of a model: the settings of attention that software may not support.

What was measured holds for a target, a routing and an attention class. Settings that all models of
a type share are left out, since every measurement of that type includes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from upcycle_cli.models.defaults import defaults_of
from upcycle_cli.models.shipped import UPCYCLED_PREFIX

PLAIN = "plain"
_SLIDING = "sliding_attention"
_ALL_SLIDE = ("ministral",)
"""Types whose layers all have the window if `layer_types` is absent."""
_USUAL_ROPE = ("default", "mrope", "proportional")
"""Rope types that scale nothing, or that all models of their type have."""
_RENAMED = {"su": "longrope"}
_BIASES = ("attention_bias", "use_bias", "bias")
"""The first key that a type has decides."""
Values = Mapping[str, Any]
"""The settings of a text model, with the defaults of its type."""


def attention_class(config: Mapping[str, Any]) -> str:
    """Return the attention class of a text config: "plain", or its properties, sorted.

    For a dense model, `config` is the config that the target would get.
    """
    properties = properties_of(config)
    return ", ".join(properties) if properties else PLAIN


def properties_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the properties of attention that the config decides, sorted."""
    model_type = str(config.get("model_type")).removeprefix(UPCYCLED_PREFIX)
    usual = defaults_of(model_type)
    values = {**usual, **config, "model_type": model_type}
    found = {name for name, holds in _PROPERTIES.items() if holds(values)}
    found |= {f"{kind} rope scaling" for kind in _rope_kinds(values)}
    if "partial_rotary_factor" in usual and _rotary_share(values) != 1.0:
        found.add("partial rotary")
    return tuple(sorted(found))


def _differs_from_hidden(values: Values) -> bool:
    """Whether the heads of a layer are wider or narrower than the hidden size together."""
    if values.get("kv_lora_rank") is not None:  # compressed attention has several head sizes
        return False
    heads, hidden_size = values.get("num_attention_heads"), values.get("hidden_size")
    layers = dict(values.get("per_layer_config") or {}).values()
    sizes = [each.get("head_dim") for each in (values, *layers)] + [values.get("global_head_dim")]
    return heads is not None and any(size and heads * size != hidden_size for size in sizes)


def _windows(values: Values) -> str | None:
    """Return "all", "some", or None if no window can hide a token."""
    window, longest = values.get("sliding_window"), values.get("max_position_embeddings")
    if not window or not values.get("use_sliding_window", True):
        return None
    if isinstance(longest, int) and window >= longest:
        return None
    kinds = values.get("layer_types")
    if isinstance(kinds, list):
        slide = [kind == _SLIDING for kind in kinds]
        return "all" if all(slide) else "some" if any(slide) else None
    first, count = values.get("max_window_layers"), values.get("num_hidden_layers")
    if isinstance(first, int) and isinstance(count, int):
        return "all" if first <= 0 else "some" if first < count else None
    by_rule = "layer_types" in values and values["model_type"] not in _ALL_SLIDE
    return "some" if by_rule else "all"


def _has_biases(values: Values) -> bool:
    decides = next((key for key in _BIASES if key in values), None)
    return bool(decides and values[decides]) or bool(values.get("attention_out_bias"))


def _skips_rope(values: Values) -> bool:
    """Whether the config takes rotary embeddings from some layers."""
    if "no_rope_layers" in values:  # 1 for each layer with rope
        listed = values["no_rope_layers"]
        return not all(listed) if listed is not None else bool(values["no_rope_layer_interval"])
    if "position_embedding_type" in values and "layer_types" in values:
        return bool(values["position_embedding_type"] != "rope")
    return not all(values.get("layer_rope_theta") or [1.0])


_PROPERTIES: Mapping[str, Callable[[Values], bool]] = {
    "head_dim × heads ≠ hidden size": _differs_from_hidden,
    "sliding window": lambda values: _windows(values) == "all",
    "sliding window on some layers": lambda values: _windows(values) == "some",
    "soft caps": lambda values: bool(
        values.get("attn_logit_softcapping") or values.get("final_logit_softcapping")
    ),
    "QK norm": lambda values: bool(values.get("use_qk_norm") or values.get("qk_layernorm")),
    "attention biases": _has_biases,
    "layers without rope": _skips_rope,
    "shared keys and values": lambda values: bool(
        values.get("num_kv_shared_layers") or values.get("attention_k_eq_v")
    ),
    "ALiBi": lambda values: bool(values.get("alibi")),
}


def _ropes(values: Values) -> Iterator[Values]:
    """Yield the settings of rotary embeddings, of each kind of layer if kinds differ."""
    # In transformers a non-empty rope_scaling overrides rope_parameters.
    stated = values.get("rope_scaling") or values.get("rope_parameters")
    if isinstance(stated, dict):
        inner = [each for each in stated.values() if isinstance(each, dict)]
        yield from inner or [stated]


def _rope_kinds(values: Values) -> set[str]:
    kinds = {str(rope.get("rope_type") or rope.get("type", "default")) for rope in _ropes(values)}
    return {_RENAMED.get(kind, kind) for kind in kinds.difference(_USUAL_ROPE)}


def _rotary_share(values: Values) -> float:
    """Return the smallest share of a head that is rotated."""
    key = "partial_rotary_factor"
    shares = [rope[key] for rope in _ropes(values) if rope.get(key)]
    return float(min(shares or [values[key] or 1.0]))
