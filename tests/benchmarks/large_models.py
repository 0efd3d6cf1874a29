"""Dense checkpoints with random weights in the shapes of released models, as large as needed."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine_fixtures import fill
from shapes import big_config, tensor_shapes, write_hollow

Config = Mapping[str, Any]
MISTRAL_7B: Config = big_config("mistral-7b-v0.1")
TINYLLAMA: Config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
ONE_SMALL_LAYER: Config = {
    **TINYLLAMA,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "vocab_size": 8000,
}
"""Converting it is all start-up."""


def nbytes_of(config: Config) -> int:
    """Return the bytes of a model's weights in bfloat16."""
    return 2 * sum(map(math.prod, tensor_shapes(config).values()))


def tinyllama_of(gigabytes: float) -> Config:
    """Return TinyLlama's config with as many layers as make that size."""
    one, two = (nbytes_of({**TINYLLAMA, "num_hidden_layers": count}) for count in (1, 2))
    layers = max(1, 1 + round((gigabytes * 1e9 - one) / (two - one)))
    return {**TINYLLAMA, "num_hidden_layers": layers}


def write_random(path: Path, config: Config, *, shard_bytes: int = 1 << 62) -> Path:
    """Write a bfloat16 checkpoint: norms of ones, random weights within ±[2⁻⁷, 2⁻⁶)."""
    write_hollow(path, config, shard_bytes=shard_bytes)
    fill(path, seed=0, random_bits=0x807F)
    return path
