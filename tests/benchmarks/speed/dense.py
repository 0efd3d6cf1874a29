"""A dense checkpoint of TinyLlama's shape, as many layers as it takes to be of a given size."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN = 2048
INTERMEDIATE = 5632
HEADS, KV_HEADS, HEAD_DIM = 32, 4, 64
VOCAB = 32000

_LAYER = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}


def make_dense(path: Path, gigabytes: float) -> int:
    """Write a checkpoint of about that size, in bfloat16, and return the bytes of its weights."""
    layer_bytes = 2 * sum(_size(shape) for shape in _LAYER.values())
    return _make(path, max(1, round((gigabytes * 1e9 - 4 * VOCAB * HIDDEN) / layer_bytes)))


def make_small(path: Path) -> int:
    """Write a checkpoint of one layer, a quarter as wide: converting it is all start-up."""
    return _make(path, 1, part=4)


def _make(path: Path, num_layers: int, *, part: int = 1) -> int:
    """Write a checkpoint whose every size is TinyLlama's divided by `part`."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for layer in range(num_layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in _LAYER.items()}
    shapes = {name: tuple(length // part for length in shape) for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.05, 0.05, generator=generator)
        for name, shape in shapes.items()
    }
    path.mkdir(parents=True)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    _write_json(path / "config.json", _config(num_layers, part))
    _make_tokenizer(path)
    return sum(tensor.nbytes for tensor in weights.values())


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _config(num_layers: int, part: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN // part,
        "intermediate_size": INTERMEDIATE // part,
        "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS // part,
        "num_key_value_heads": KV_HEADS // part,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB // part,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _make_tokenizer(path: Path) -> None:
    """Write a tokenizer of three words: mergekit-moe does not start without one."""
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    vocabulary = {token: index for index, token in enumerate(special.values())}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
    _write_json(
        path / "tokenizer.json",
        {"version": "1.0", "added_tokens": [], "model": model, **dict.fromkeys(parts)},
    )
    _write_json(
        path / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", **special},
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
