"""qwen2: q, k and v always have a bias, o never; a window from layer `max_window_layers` on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle_cli.families.dense import (
    COMMON_DEFAULTS,
    Decoder,
    DenseFamily,
    Values,
    qwen_layer_types,
    read_common,
)

DEFAULTS: Mapping[str, Any] = {
    **COMMON_DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _decoder(config: Mapping[str, Any]) -> Decoder:
    values = Values(config, DEFAULTS)
    common = read_common(values, config)
    window, layer_types = qwen_layer_types(values, config, common["num_layers"])
    return Decoder(
        model_type="qwen2",
        **common,
        sliding_window=window,
        layer_types=layer_types,
        qkv_bias=True,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
    )


QWEN2 = DenseFamily(model_type="qwen2", decoder=_decoder)
