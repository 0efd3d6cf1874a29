"""qwen3: norms on q and k, head_dim 128 when absent, attention_bias on q, k, v and o alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle_cli.families.dense import Decoder, DenseFamily, Values, qwen_layer_types, read_common
from upcycle_cli.families.qwen2 import DEFAULTS as QWEN2_DEFAULTS

DEFAULTS: Mapping[str, Any] = {**QWEN2_DEFAULTS, "head_dim": 128, "attention_bias": False}


def _decoder(config: Mapping[str, Any]) -> Decoder:
    values = Values(config, DEFAULTS)
    values.count("head_dim")  # null does not mean "derive it" here: transformers refuses it
    common = read_common(values, config)
    window, layer_types = qwen_layer_types(values, config, common["num_layers"])
    attention_bias = values.flag("attention_bias")
    return Decoder(
        model_type="qwen3",
        **common,
        sliding_window=window,
        layer_types=layer_types,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=False,
        qk_norm=True,
    )


QWEN3 = DenseFamily(model_type="qwen3", decoder=_decoder)
