"""mistral: no biases; every layer slides unless sliding_window is null (4096 when absent)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle_cli.families.dense import (
    COMMON_DEFAULTS,
    FULL,
    SLIDING,
    Decoder,
    DenseFamily,
    Values,
    read_common,
)

DEFAULTS: Mapping[str, Any] = {
    **COMMON_DEFAULTS,
    "vocab_size": 32000,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _decoder(config: Mapping[str, Any]) -> Decoder:
    values = Values(config, DEFAULTS)
    common = read_common(values, config)
    window = values.optional_count("sliding_window")
    kind = FULL if window is None else SLIDING
    return Decoder(
        model_type="mistral",
        **common,
        sliding_window=window,
        layer_types=(kind,) * common["num_layers"],
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
    )


MISTRAL = DenseFamily(model_type="mistral", decoder=_decoder)
