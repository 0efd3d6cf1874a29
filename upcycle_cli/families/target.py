"""The MoE side of a family: what a target architecture can express, its names and its config.

A target states its tensor names as data (`Names`), says why it cannot take a decoder (`refusal`),
writes the config keys that its forward pass reads (`settings`), and derives the shapes of all its
tensors from that config alone (`expected`), which is what the plan is type-checked against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from upcycle_cli.families.dense import SLIDING, Decoder, Shapes, shared_shapes
from upcycle_cli.recipe import Recipe, Routing


class ExpertLayout(StrEnum):
    """How expert weights are named on disk."""

    PER_EXPERT = "per-expert"
    """A tensor per matrix and expert, as in the released checkpoints; every engine reads it."""
    FUSED = "fused"
    """A tensor per layer for gate and up, one for down, as transformers 5 holds them in memory."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """Templates of the tensor names of one layer, with `{layer}` and `{expert}` to fill in.

    Fused gate_up is (N, 2·expert size, hidden), gate before up; fused down is
    (N, hidden, expert size).
    """

    router: str
    gate: str
    up: str
    down: str
    fused_router: str
    fused_gate_up: str
    fused_down: str
    shared_gate: str | None = None
    shared_up: str | None = None
    shared_down: str | None = None
    shared_router: str | None = None


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Which config keys say what; `norm_topk_prob` is None where the routing is fixed."""

    num_experts: str
    top_k: str
    expert_size: str
    norm_topk_prob: str | None


@dataclass(frozen=True, kw_only=True)
class Target:
    """An MoE architecture of transformers that dense models can be upcycled to."""

    model_type: str
    architecture: str
    routings: tuple[Routing, ...]
    """What it can express; the first is what the released models use, hence the default."""
    names: Names
    keys: Keys
    refusal: Callable[[Decoder], str | None]
    """Why it cannot express a decoder, or None when it can."""
    settings: Callable[[Decoder], dict[str, Any]]
    """The config keys of its own that it needs beside the shared ones."""
    shared_expert_size: int | None = None
    """Intermediate size of the inert shared expert that the architecture insists on."""
    forced_qkv_bias: bool = False
    """Whether q, k and v must have a bias tensor even when it is zero."""


def moe_config(
    config: Mapping[str, Any],
    decoder: Decoder,
    target: Target,
    recipe: Recipe,
    *,
    untie_embeddings: bool,
    dtype: str | None,
) -> dict[str, Any]:
    """Return the MoE's config: the source's, with every key that the forward pass reads stated.

    `dtype` is torch's name for the output dtype, or None to leave what the source says.
    """
    rope_scaling = None if decoder.rope_scaling is None else dict(decoder.rope_scaling)
    result = dict(config) | {
        "architectures": [target.architecture],
        "model_type": target.model_type,
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "head_dim": decoder.head_dim,
        "hidden_act": decoder.hidden_act,
        "rms_norm_eps": decoder.rms_norm_eps,
        "attention_dropout": decoder.attention_dropout,
        "max_position_embeddings": decoder.max_position_embeddings,
        "rope_theta": decoder.rope_theta,
        "rope_scaling": rope_scaling,
        "tie_word_embeddings": decoder.tie_word_embeddings and not untie_embeddings,
        "bos_token_id": decoder.bos_token_id,
        "eos_token_id": decoder.eos_token_id,
        "pad_token_id": decoder.pad_token_id,
        "router_aux_loss_coef": 0.01,  # the paper's load-balancing coefficient
        "output_router_logits": False,
    }
    if "rope_parameters" in config:
        result["rope_parameters"] = {
            "rope_type": "default",
            **(rope_scaling or {}),
            "rope_theta": decoder.rope_theta,
        }
    result |= target.settings(decoder)
    # Aliases in transformers: a source that says `"num_experts": 0` would undo num_local_experts.
    result.pop("num_experts", None)
    result.pop("num_local_experts", None)
    result |= {
        target.keys.num_experts: recipe.num_experts,
        target.keys.top_k: recipe.top_k,
        target.keys.expert_size: decoder.intermediate_size // recipe.granularity,
    }
    if target.keys.norm_topk_prob is not None:
        result[target.keys.norm_topk_prob] = recipe.routing is Routing.TOPK_SOFTMAX
    if dtype is not None:
        result |= {"dtype": dtype, "torch_dtype": dtype}
    # A local path of the person who saved it belongs to nobody.
    if str(result.get("_name_or_path", "")).startswith(("/", "~")):
        del result["_name_or_path"]
    return result


def config_routing(config: Mapping[str, Any], target: Target) -> Routing:
    """Return the routing that an MoE's config stands for."""
    key = target.keys.norm_topk_prob
    if key is None:
        return target.routings[0]
    # Absent means false in transformers, for every architecture that has the key.
    return Routing.TOPK_SOFTMAX if config.get(key, False) else Routing.SOFTMAX_TOPK


def expected(
    decoder: Decoder, config: Mapping[str, Any], target: Target, layout: ExpertLayout
) -> Shapes:
    """Return every tensor of the MoE with its shape.

    The expert tensors follow from the MoE's `config` alone; `decoder` gives the attention, norms
    and embeddings, whose settings the two models share.
    """
    shapes = shared_shapes(decoder)
    for layer in range(config["num_hidden_layers"]):
        shapes |= dict(_layer_shapes(config, target, layout, layer))
        if target.forced_qkv_bias:
            attn = f"model.layers.{layer}.self_attn"
            for matrix in "qkv":
                rows = shapes[f"{attn}.{matrix}_proj.weight"][0]
                shapes[f"{attn}.{matrix}_proj.bias"] = (rows,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], config["hidden_size"])
    return shapes


def _layer_shapes(
    config: Mapping[str, Any], target: Target, layout: ExpertLayout, layer: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    # H hidden, I expert intermediate size, N experts, S shared expert size
    H: int = config["hidden_size"]
    I: int = config[target.keys.expert_size]  # noqa: E741
    N: int = config[target.keys.num_experts]
    names = target.names
    if layout is ExpertLayout.FUSED:
        yield names.fused_router.format(layer=layer), (N, H)
        yield names.fused_gate_up.format(layer=layer), (N, 2 * I, H)
        yield names.fused_down.format(layer=layer), (N, H, I)
    else:
        yield names.router.format(layer=layer), (N, H)
        for expert in range(N):
            yield names.gate.format(layer=layer, expert=expert), (I, H)
            yield names.up.format(layer=layer, expert=expert), (I, H)
            yield names.down.format(layer=layer, expert=expert), (H, I)
    if names.shared_gate and names.shared_up and names.shared_down and names.shared_router:
        S: int = config["shared_expert_intermediate_size"]
        yield names.shared_gate.format(layer=layer), (S, H)
        yield names.shared_up.format(layer=layer), (S, H)
        yield names.shared_down.format(layer=layer), (H, S)
        yield names.shared_router.format(layer=layer), (1, H)


def bias_refusal(decoder: Decoder, *, qkv_allowed: bool) -> str | None:
    """Say which bias of a llama-like decoder stands in the way, if any."""
    if decoder.mlp_bias:
        return "mlp_bias is true, and its experts have no bias"
    if decoder.o_bias:
        return "attention_bias is true, and its o_proj has no bias"
    if decoder.qkv_bias and not qkv_allowed:
        return f"{decoder.model_type} has q, k and v biases, and its attention has none"
    return None


def mixed_windows(decoder: Decoder) -> bool:
    """Whether some layers slide and others do not."""
    return len(set(decoder.layer_types)) > 1


def has_plain_attention(config: Mapping[str, Any]) -> bool:
    """Whether an MoE config's heads make up the hidden size, no layer slides, and rope is plain."""
    heads, head_dim = config.get("num_attention_heads"), config.get("head_dim")
    whole = head_dim is None or (
        type(heads) is int
        and type(head_dim) is int
        and heads * head_dim == config.get("hidden_size")
    )
    slides = bool(config.get("sliding_window")) and config.get("use_sliding_window", True)
    ropes = [config.get(key) for key in ("rope_scaling", "rope_parameters")]
    kinds = {rope.get("rope_type", "default") for rope in ropes if isinstance(rope, dict)}
    return whole and not slides and kinds <= {"default"}


def sliding_settings(decoder: Decoder) -> dict[str, Any]:
    """State a window in the terms of the Qwen MoE configs."""
    return {
        "use_sliding_window": decoder.sliding_window is not None,
        "sliding_window": decoder.sliding_window,
        "max_window_layers": next(
            (i for i, kind in enumerate(decoder.layer_types) if kind == SLIDING),
            decoder.num_layers,
        ),
        "layer_types": list(decoder.layer_types),
    }
