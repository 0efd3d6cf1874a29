"""Dense checkpoints with random weights in the shapes of released models, as large as asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Shape:
    """The sizes of a model type; heads are of `head_dim`."""

    model_type: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int = 32000

    @property
    def layer(self) -> dict[str, tuple[int, ...]]:
        """The tensors of a layer, by their names in it."""
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (width, self.hidden),
            "self_attn.k_proj": (kv_width, self.hidden),
            "self_attn.v_proj": (kv_width, self.hidden),
            "self_attn.o_proj": (self.hidden, width),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
            "input_layernorm": (self.hidden,),
            "post_attention_layernorm": (self.hidden,),
        }

    @property
    def layer_bytes(self) -> int:
        """The bytes of a layer in bfloat16."""
        return 2 * sum(map(math.prod, self.layer.values()))

    def config(self, num_layers: int) -> dict[str, object]:
        """Return config.json."""
        return {
            "architectures": [f"{self.model_type.title()}ForCausalLM"],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": num_layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
            **({"sliding_window": 4096} if self.model_type == "mistral" else {}),
        }


TINYLLAMA = Shape("llama", 2048, 5632, 32, 4, 64)
A_QUARTER = Shape("llama", 512, 1408, 8, 1, 64, 8000)
MISTRAL_7B = Shape("mistral", 4096, 14336, 32, 8, 128)


def make_dense(path: Path, gigabytes: float) -> int:
    """Write TinyLlama with as many layers as make that size; return the bytes of its weights."""
    ends = 4 * TINYLLAMA.vocab * TINYLLAMA.hidden
    return make_layers(
        path, TINYLLAMA, max(1, round((gigabytes * 1e9 - ends) / TINYLLAMA.layer_bytes))
    )


def make_small(path: Path) -> int:
    """Write one layer, a quarter as wide: converting it is all start-up."""
    return make_layers(path, A_QUARTER, 1)


def make_layers(path: Path, shape: Shape, num_layers: int, *, shards: bool = False) -> int:
    """Write a bfloat16 checkpoint, in one file or a file a layer; return its weights' bytes."""
    path.mkdir(parents=True)
    parts = [*_parts(shape, num_layers)]
    if not shards:
        parts = [{name: size for part in parts for name, size in part.items()}]
    generator, total = torch.Generator().manual_seed(0), 0
    places: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        several = f"model-{number:05}-of-{len(parts):05}.safetensors"
        file = several if shards else "model.safetensors"
        weights = {
            name: torch.ones(size, dtype=torch.bfloat16)
            if len(size) == 1
            else torch.empty(size, dtype=torch.bfloat16).uniform_(-0.03, 0.03, generator=generator)
            for name, size in part.items()
        }
        save_file(weights, path / file, metadata={"format": "pt"})
        places |= dict.fromkeys(weights, file)
        total += sum(weight.nbytes for weight in weights.values())
    if not shards:
        _make_tokenizer(path)
    else:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(path / "model.safetensors.index.json", index)
    _write_json(path / "config.json", shape.config(num_layers))
    return total


def _parts(shape: Shape, num_layers: int) -> Iterator[dict[str, tuple[int, ...]]]:
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    yield {**dict.fromkeys(ends, (shape.vocab, shape.hidden)), "model.norm.weight": (shape.hidden,)}
    for layer in range(num_layers):
        yield {f"model.layers.{layer}.{name}.weight": size for name, size in shape.layer.items()}


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
