"""The attention class of a model: the settings of attention that software may not support.

What was measured holds for a target, a routing and an attention class. Settings that all models of
a type share are left out, since every measurement of that type includes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from upcycle_cli.models.defaults import defaults_of
from upcycle_cli.models.dense import SLIDING
from upcycle_cli.models.shipped import UPCYCLED_PREFIX

PLAIN = "plain"
_USUAL_ROPE = {"default", "mrope", "proportional"}
"""Rope types that scale nothing, or that all models of their type have."""
_BIASES = ("attention_bias", "use_bias", "bias")
"""The first key that a type has decides."""
_Values = Mapping[str, Any]


def attention_class(config: Mapping[str, Any]) -> str:
    """Return the attention class of a text config: "plain", or its properties, sorted.

    For a dense model, `config` is the config that the target would get.
    """
    model_type = str(config.get("model_type")).removeprefix(UPCYCLED_PREFIX)
    usual = defaults_of(model_type)
    values = {**usual, **config, "model_type": model_type}
    found = {name for name, holds in _PROPERTIES.items() if holds(values)}
    # In transformers a non-empty rope_scaling overrides rope_parameters.
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    ropes = [each for each in rope.values() if isinstance(each, dict)] or [rope]  # by kind of layer
    kinds = {str(each.get("rope_type") or each.get("type", "default")) for each in ropes}
    found |= {f"{kind} rope scaling" for kind in kinds - _USUAL_ROPE}
    share = "partial_rotary_factor"
    if share in usual and {each.get(share) or values[share] or 1.0 for each in ropes} != {1.0}:
        found.add("partial rotary")
    return ", ".join(sorted(found)) or PLAIN


def _differs_from_hidden(values: _Values) -> bool:
    """Whether the heads of a layer are wider or narrower than the hidden size together."""
    if values.get("kv_lora_rank") is not None:  # compressed attention has several head sizes
        return False
    heads, hidden_size = values.get("num_attention_heads"), values.get("hidden_size")
    layers = dict(values.get("per_layer_config") or {}).values()
    sizes = [each.get("head_dim") for each in (values, *layers)] + [values.get("global_head_dim")]
    return heads is not None and any(size and heads * size != hidden_size for size in sizes)


def _windows(values: _Values) -> str | None:
    """Return "all", "some", or None if no window can hide a token."""
    window, kinds = values.get("sliding_window"), values.get("layer_types")
    longest = values.get("max_position_embeddings")
    if type(window) is not int or not values.get("use_sliding_window", True):
        return None
    if not window or (longest and window >= longest):
        return None
    if isinstance(kinds, list):
        return None if SLIDING not in kinds else "all" if {*kinds} == {SLIDING} else "some"
    first, count = values.get("max_window_layers"), values.get("num_hidden_layers")
    if first is not None and count is not None:
        return None if first >= count else "some" if first > 0 else "all"
    by_rule = "layer_types" in values and values["model_type"] != "ministral"
    return "some" if by_rule else "all"


def _skips_rope(values: _Values) -> bool:
    if "no_rope_layers" in values:  # 1 for each layer with rope
        listed = values["no_rope_layers"]
        return not all(listed) if listed is not None else bool(values["no_rope_layer_interval"])
    if "position_embedding_type" in values and "layer_types" in values:
        return bool(values["position_embedding_type"] != "rope")
    # By default each fourth layer of muse_glimmer has none, and all layers of the others have it.
    return not all(values.get("layer_rope_theta") or [values["model_type"] != "muse_glimmer_text"])


def _any(*keys: str) -> Callable[[_Values], bool]:
    return lambda values: any(values.get(key) for key in keys)


_PROPERTIES: Mapping[str, Callable[[_Values], bool]] = {
    "head_dim × heads ≠ hidden size": _differs_from_hidden,
    "sliding window": lambda values: _windows(values) == "all",
    "sliding window on some layers": lambda values: _windows(values) == "some",
    "soft caps": _any("attn_logit_softcapping", "final_logit_softcapping"),
    "QK norm": _any("use_qk_norm", "qk_layernorm"),
    "attention biases": lambda values: bool(
        values.get("attention_out_bias") or next((values[k] for k in _BIASES if k in values), False)
    ),
    "layers without rope": _skips_rope,
    "shared keys and values": _any("num_kv_shared_layers", "attention_k_eq_v"),
    "ALiBi": _any("alibi"),
}
