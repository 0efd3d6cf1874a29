"""The dense checkpoints of NVIDIA's Nemotron models, from their configs: names and shapes, no data.

fixtures/shapes/ holds what is known of six of them, and from where. The names are those on disk.
Of `nemotron_h` that is `backbone.` where transformers' own model says `model.`: releases have it,
and `save_pretrained` of transformers 5.24 writes it too, since it undoes on saving what it renames
on loading (with `save_original_format=False` it writes `model.`). It writes `layers_block_type`
instead of the releases' `hybrid_override_pattern` and `num_hidden_layers`, so both are read here.

Shapes are letters: H hidden, I intermediate, V vocabulary, Q and K rows of q and of k and v; of a
Mamba block M heads, D their width together, C channels of the convolution.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shapes import FIXTURES, Shapes, write_hollow

NAMES = (
    "nemotron-4-15b",
    "nemotron-4-340b",
    "minitron-4b-base",
    "nemotron-h-8b-base-8k",
    "nemotron-h-47b-base-8k",
    "nvidia-nemotron-nano-9b-v2",
)

MAMBA, ATTENTION, MLP = "M", "*", "-"
"""What a layer of a `nemotron_h` is, in the letters of `hybrid_override_pattern`."""
_BLOCK_TYPES = {"linear_attention": MAMBA, "full_attention": ATTENTION, "mlp": MLP}


@dataclass(frozen=True, kw_only=True)
class Released:
    """A released model: its config, and what a count of it must come to."""

    config: Mapping[str, Any]
    dense_parameters: int
    mlp_layers: int


def released(name: str) -> Released:
    """Read what fixtures/shapes/ says of a model."""
    content = json.loads((FIXTURES / "shapes" / f"{name}.json").read_text(encoding="utf-8"))
    assert content.pop("source")
    return Released(**content)


def dense_shapes(config: Mapping[str, Any]) -> Shapes:
    """Every tensor of the dense checkpoint, in the order of the layers."""
    match config["model_type"]:
        case "nemotron":
            return _nemotron(config)
        case "nemotron_h":
            return _nemotron_h(config)
        case other:
            raise ValueError(other)


def layer_kinds(config: Mapping[str, Any]) -> str:
    """What each layer of a `nemotron_h` is, a letter for each."""
    if "layers_block_type" in config:
        return "".join(_BLOCK_TYPES[kind] for kind in config["layers_block_type"])
    pattern: str = config["hybrid_override_pattern"]
    assert len(pattern) == config["num_hidden_layers"]
    return pattern


def write_dense(directory: Path, config: Mapping[str, Any]) -> Path:
    """Write a checkpoint whose weights are a hole in a file: it takes no space, whatever its size.

    Large ones have several shards and an index.
    """
    return write_hollow(directory, config, shapes=dense_shapes(config))


def _nemotron(config: Mapping[str, Any]) -> Shapes:
    V, H, I = config["vocab_size"], config["hidden_size"], config["intermediate_size"]  # noqa: E741
    assert not any(config[key] for key in ("attention_bias", "mlp_bias", "tie_word_embeddings"))
    shapes: Shapes = {"model.embed_tokens.weight": (V, H)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= _layer_norm(f"{prefix}.input_layernorm", H)
        shapes |= _attention(f"{prefix}.self_attn", config, head_dim=config["head_dim"])
        shapes |= _layer_norm(f"{prefix}.post_attention_layernorm", H)
        shapes |= _mlp(f"{prefix}.mlp", H, I)
    shapes |= _layer_norm("model.norm", H)
    shapes["lm_head.weight"] = (V, H)
    return shapes


def _nemotron_h(config: Mapping[str, Any]) -> Shapes:
    V, H, I = config["vocab_size"], config["hidden_size"], config["intermediate_size"]  # noqa: E741
    assert not any(config[key] for key in ("attention_bias", "mlp_bias", "tie_word_embeddings"))
    # The first releases say attention_head_dim, which transformers passes over for its own 128.
    head_dim = config["head_dim" if "head_dim" in config else "attention_head_dim"]
    shapes: Shapes = {"backbone.embeddings.weight": (V, H)}
    for layer, kind in enumerate(layer_kinds(config)):
        prefix = f"backbone.layers.{layer}"
        shapes[f"{prefix}.norm.weight"] = (H,)
        match kind:
            case "M":
                shapes |= _mamba(f"{prefix}.mixer", config)
            case "*":
                shapes |= _attention(f"{prefix}.mixer", config, head_dim=head_dim)
            case "-":
                shapes |= _mlp(f"{prefix}.mixer", H, I)
            case _:
                raise ValueError(kind)
    shapes["backbone.norm_f.weight"] = (H,)
    shapes["lm_head.weight"] = (V, H)
    return shapes


def _layer_norm(prefix: str, H: int) -> Shapes:
    return {f"{prefix}.weight": (H,), f"{prefix}.bias": (H,)}


def _attention(prefix: str, config: Mapping[str, Any], *, head_dim: int) -> Shapes:
    H = config["hidden_size"]
    Q, K = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    return {
        f"{prefix}.q_proj.weight": (Q, H),
        f"{prefix}.k_proj.weight": (K, H),
        f"{prefix}.v_proj.weight": (K, H),
        f"{prefix}.o_proj.weight": (H, Q),
    }


def _mlp(prefix: str, H: int, I: int) -> Shapes:  # noqa: E741
    return {f"{prefix}.up_proj.weight": (I, H), f"{prefix}.down_proj.weight": (H, I)}


def _mamba(prefix: str, config: Mapping[str, Any]) -> Shapes:
    assert config["use_conv_bias"]
    assert not config["use_bias"]
    H, M = config["hidden_size"], config["mamba_num_heads"]
    D = M * config["mamba_head_dim"]
    # x, and B and C of each group, go through the convolution; the gate and dt do not.
    C = D + 2 * config["n_groups"] * config["ssm_state_size"]
    return {
        f"{prefix}.dt_bias": (M,),
        f"{prefix}.A_log": (M,),
        f"{prefix}.D": (M,),
        f"{prefix}.conv1d.weight": (C, 1, config["conv_kernel"]),
        f"{prefix}.conv1d.bias": (C,),
        f"{prefix}.in_proj.weight": (D + C + M, H),
        f"{prefix}.norm.weight": (D,),
        f"{prefix}.out_proj.weight": (H, D),
    }
