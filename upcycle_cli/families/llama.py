"""llama: attention_bias puts a bias on q, k, v and o; no window, whatever the config says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle_cli.families.dense import (
    COMMON_DEFAULTS,
    FULL,
    Decoder,
    DenseFamily,
    Values,
    read_common,
)

DEFAULTS: Mapping[str, Any] = {
    **COMMON_DEFAULTS,
    "vocab_size": 32000,
    "intermediate_size": 11008,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _decoder(config: Mapping[str, Any]) -> Decoder:
    values = Values(config, DEFAULTS)
    common = read_common(values, config)
    attention_bias = values.flag("attention_bias")
    return Decoder(
        model_type="llama",
        **common,
        sliding_window=None,
        layer_types=(FULL,) * common["num_layers"],
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=values.flag("mlp_bias"),
        qk_norm=False,
    )


LLAMA = DenseFamily(model_type="llama", decoder=_decoder)
