"""What a dense config means, by the account of transformers' own config and model classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from configs import FULL, NATIVE_PAIRS, SIZES, SLIDING, converted, dense_model, transformers_config
from shapes import BIG, big_config, model_shapes

from upcycle_cli import Recipe, UpcycleError
from upcycle_cli.models.dense import DenseModel
from upcycle_cli.models.lookup import choose

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
NEW_ROPE = {"rope_type": "default", "rope_theta": 7e4}
SLIDES = {"sliding_window": 8, "use_sliding_window": True}
ANY: Mapping[str, dict[str, Any]] = {
    "minimal": {},
    "null heads": {"num_key_value_heads": None},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "new yarn": {"rope_parameters": {**YARN, "rope_theta": 7e4}},
    "window": {"sliding_window": 8},
    "no window": {"sliding_window": None},
    "window used": SLIDES,
    "window on the last": {**SLIDES, "max_window_layers": 3},
    "window on all": {**SLIDES, "max_window_layers": 0},
    "window used and null": {"sliding_window": None, "use_sliding_window": True},
    "window by layer": {**SLIDES, "layer_types": [SLIDING, FULL, FULL, SLIDING]},
    "window used nowhere": {**SLIDES, "layer_types": [FULL] * 4},
    "head_dim": {"head_dim": 16},
    "null head_dim": {"head_dim": None},
}
LLAMA: Mapping[str, dict[str, Any]] = {
    "fewer kv heads": {"num_key_value_heads": 2},
    "integer theta": {"rope_theta": 1_000_000},
    "llama3 scaling": {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
    "old linear scaling": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "new rope": {"rope_parameters": NEW_ROPE},
    "new yarn, old theta": {"rope_parameters": YARN, "rope_theta": 6e4},
    "theta twice": {"rope_parameters": NEW_ROPE, "rope_theta": 6e4},
    "old scaling beside new": {
        "rope_scaling": YARN,
        "rope_parameters": NEW_ROPE,
        "rope_theta": 6e4,
    },
    "empty scaling": {"rope_scaling": {}, "rope_theta": 6e4},
    "default scaling": {"rope_scaling": {"rope_type": "default"}, "rope_theta": 6e4},
    "tokens": {"bos_token_id": 3, "eos_token_id": [4, 5], "pad_token_id": 6},
    "null tokens": {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    "eps, act, dropout": {"rms_norm_eps": 1e-3, "hidden_act": "gelu", "attention_dropout": 0.5},
    "positions": {"max_position_embeddings": 77},
    "attention bias": {"attention_bias": True},
    "no experts": {"num_experts": 0, "num_experts_per_tok": 3, "router_jitter_noise": 0.1},
    "no local experts": {"num_local_experts": 0, "n_routed_experts": None},
}
# transformers' own classes or models refuse these.
INVALID = {("mistral", "null heads"), ("qwen2", "null head_dim"), ("qwen3", "null head_dim")}
CONFIGS = [
    pytest.param({"model_type": model_type, **SIZES, **changes}, id=f"{model_type}, {name}")
    for model_type in ("llama", "mistral", "qwen2", "qwen3")
    for name, changes in {**ANY, **(LLAMA if model_type == "llama" else {})}.items()
    if (model_type, name) not in INVALID
]
RELEASED = [pytest.param(big_config(name), id=name) for name in BIG]


def window_of(theirs: Any, layer: int) -> int | None:  # noqa: ANN401
    """The window that transformers' modelling code reads from a config."""
    slides = {
        **dict.fromkeys(("llama", "glm4_moe", "solar_open", "hy_v3"), False),
        **dict.fromkeys(("ernie4_5_moe", "granitemoe", "granitemoehybrid"), False),
        **dict.fromkeys(("mistral", "mixtral", "qwen3_moe"), True),
    }
    if theirs.model_type not in slides:
        return theirs.sliding_window if theirs.layer_types[layer] == SLIDING else None
    return theirs.sliding_window if slides[theirs.model_type] else None


def meaning(theirs: Any) -> dict[str, Any]:  # noqa: ANN401
    """What a forward pass reads, from transformers' own config object."""
    rope = dict(theirs.rope_parameters)
    if FULL in rope:  # by kind of layer
        rope, other = dict(rope[FULL]), rope[SLIDING]
        assert rope == other
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    rope.pop("type", None)
    if rope.get("partial_rotary_factor") == 1.0:  # the default
        del rope["partial_rotary_factor"]
    heads, layers = theirs.num_attention_heads, theirs.num_hidden_layers
    same = (
        *("vocab_size", "hidden_size", "hidden_act", "rms_norm_eps", "attention_dropout"),
        *("max_position_embeddings", "tie_word_embeddings", "num_hidden_layers"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "num_attention_heads"),
    )
    return {key: getattr(theirs, key) for key in same if hasattr(theirs, key)} | {
        "num_key_value_heads": theirs.num_key_value_heads or heads,
        "head_dim": getattr(theirs, "head_dim", None) or theirs.hidden_size // heads,
        "rope_theta": theta,
        "rope": None if kind == "default" else {"rope_type": kind, **rope},
        "windows": [window_of(theirs, i) for i in range(layers)],
    }


def our_meaning(dense: DenseModel, keys: set[str]) -> dict[str, Any]:
    scaling = dense.values["rope_scaling"]
    return {key: dense.values[key] for key in keys - {"rope", "windows"}} | {
        "rope": None if scaling is None else {k: v for k, v in scaling.items() if k != "type"},
        "windows": list(dense.windows),
    }


@pytest.mark.parametrize("config", [*CONFIGS, *RELEASED])
def test_a_config_means_what_transformers_reads_before_and_after(config: dict[str, Any]) -> None:
    theirs = transformers_config(config)
    wanted, dense = meaning(theirs), dense_model(config)
    assert our_meaning(dense, {*wanted}) == wanted
    assert dense.intermediate_size == theirs.intermediate_size
    for target in [t for name, t in NATIVE_PAIRS if name == config["model_type"]]:
        try:
            choose(config, target, None)
        except UpcycleError:
            continue  # it cannot express this model
        moe = converted(config, target, Recipe("E2G2T2"))
        found = meaning(transformers_config(moe))
        assert wanted | found == wanted, target
        assert wanted.keys() - found.keys() <= {"attention_dropout"}  # which ernie4_5_moe lacks


@pytest.mark.parametrize("config", [*CONFIGS, *RELEASED])
def test_the_tensors_are_those_of_transformers(config: dict[str, Any]) -> None:
    few = {**config, "num_hidden_layers": min(4, config["num_hidden_layers"])}
    assert dense_model(few).shapes == model_shapes(few)
