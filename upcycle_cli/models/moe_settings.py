"""Functions that rows of MoE architectures name: settings, and refusals.

A function named after an architecture returns the config keys that it needs. A refusal returns the
rest of the sentence "X cannot express this model: …", or None.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle_cli.core.errors import shown
from upcycle_cli.models.dense import FULL, SLIDING, DenseModel
from upcycle_cli.models.layers import OLD_BLOCKS

DEEPSEEK: Mapping[str, Any] = {
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
}
"""No groups of experts, one shared expert."""


def no_mixed_windows(dense: DenseModel) -> str | None:
    """Refuse a sliding window in some layers only."""
    if len({*dense.windows}) == 1:
        return None
    return (
        "only some layers have a sliding window (layer_types), and the target's layers are all "
        "alike"
    )


def no_windows(dense: DenseModel) -> str | None:
    """Refuse sliding windows."""
    if not any(dense.windows):
        return None
    return "some layers have a sliding window, and the target supports none"


def mixtral_refusal(dense: DenseModel) -> str | None:
    """Refuse partial rotary embeddings, longrope and mixed windows."""
    if dense.rotary_share != 1.0:
        return (
            "only a part of each head is rotated (partial_rotary_factor), and the target rotates "
            "all of it"
        )
    if (dense.values["rope_scaling"] or {}).get("rope_type") == "longrope":
        return "its rotary embeddings are scaled by longrope, which is untested with the target"
    return no_mixed_windows(dense)


def no_eps(dense: DenseModel) -> str | None:
    """Refuse a zero epsilon, by whose root gates are multiplied."""
    if dense.values["rms_norm_eps"]:
        return None
    return "rms_norm_eps is 0, and the target's gates are multiplied by its root"


def wrong_thetas(dense: DenseModel) -> str | None:
    """Refuse a list of rotary bases of another length than the layers."""
    thetas: object = _layer_thetas(dense)
    if isinstance(thetas, list) and len(thetas) == dense.num_layers:
        return None
    return f"layer_rope_theta is {shown(thetas)}, and there are {dense.num_layers} layers"


def windows(dense: DenseModel) -> dict[str, Any]:
    """Return sliding windows in the keys of Qwen's MoE configs."""
    first = next((i for i, window in enumerate(dense.windows) if window), None)
    return {
        "use_sliding_window": first is not None,
        "sliding_window": None if first is None else dense.windows[first],
        "max_window_layers": dense.num_layers if first is None else first,
        "layer_types": [SLIDING if window else FULL for window in dense.windows],
    }


def glm4_moe(dense: DenseModel) -> dict[str, Any]:
    """State what varies in its attention, and that there is no multi-token prediction."""
    return {
        **DEEPSEEK,
        "attention_bias": dense.has("self_attn.q_proj.bias"),
        "use_qk_norm": dense.has("self_attn.q_norm.weight"),
        "partial_rotary_factor": dense.rotary_share,
        "num_nextn_predict_layers": 0,
    }


def deepseek_v3(dense: DenseModel) -> dict[str, Any]:
    """State the size of a head's rotary part, which engines derive in different ways."""
    return {
        **DEEPSEEK,
        "head_dim": dense.values["qk_rope_head_dim"],
        "num_nextn_predict_layers": 0,
        # vLLM ignores the correction bias without the first, and uses softmax without the second.
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    }


def nemotron_h(_: DenseModel) -> dict[str, Any]:
    """State that experts read the hidden state itself, and not a smaller latent."""
    before = {key: value for key, value in DEEPSEEK.items() if key != "norm_topk_prob"}
    return before | {"moe_latent_size": None, "norm_topk_prob": True}


def granitemoehybrid(dense: DenseModel) -> dict[str, Any]:
    """State kinds of layers in the names that released models and engines use.

    A granite model has no such kinds: all layers are attention, with rotary embeddings.
    """
    if "layer_types" in dense.values:
        names = {new: old for old, new in OLD_BLOCKS.items()}
        return {"layer_types": [names.get(kind, kind) for kind in dense.values["layer_types"]]}
    return {
        "layer_types": ["attention"] * dense.num_layers,
        "position_embedding_type": "rope",
        "mamba_n_heads": 1,  # the default does not divide every hidden size
        # llama.cpp's converter needs these even if no layer is a Mamba layer.
        "mamba_n_groups": 1,
        "mamba_d_state": 256,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
    }


def lfm2_moe(dense: DenseModel) -> dict[str, Any]:
    """State which layers are attention, which lfm2 states by either of two keys."""
    indices = dense.values["full_attn_idxs"]
    attends = range(dense.num_layers) if indices is None else indices
    kinds = [FULL if layer in attends else "conv" for layer in range(dense.num_layers)]
    return {"layer_types": dense.values["layer_types"] or kinds, "use_expert_bias": True}


def granitemoe_swa(dense: DenseModel) -> dict[str, Any]:
    """State the window and the rotary base of each layer, and that there is no shared expert."""
    return {
        "layer_types": windows(dense)["layer_types"],
        "sliding_window": dense.values["sliding_window"],
        "layer_rope_theta": _layer_thetas(dense),
        "shared_intermediate_size": 0,
    }


def _layer_thetas(dense: DenseModel) -> list[float]:
    """Return the rotary base of each layer; 0 for a layer without rotary embeddings."""
    thetas = dense.values["layer_rope_theta"]
    return [dense.values["rope_theta"]] * dense.num_layers if thetas is None else thetas


def mellum(dense: DenseModel) -> dict[str, Any]:
    """State rotary embeddings per kind of layer; they are the same for both kinds."""
    stated = windows(dense)
    rope = {"rope_type": "default", **(dense.values["rope_scaling"] or {})}
    rope["rope_theta"] = dense.values["rope_theta"]
    return {
        "layer_types": stated["layer_types"],
        "sliding_window": stated["sliding_window"],
        "rope_parameters": {kind: dict(rope) for kind in (FULL, SLIDING)},
    }


def cohere2_moe(dense: DenseModel) -> dict[str, Any]:
    """State the windows, and a pattern other than 1, for which full attention has no positions."""
    return {
        "layer_types": windows(dense)["layer_types"],
        "sliding_window": next(filter(None, dense.windows), None),
        "prefix_dense_sliding_window_pattern": 4,
        "num_shared_experts": 0,
        "norm_topk_prob": True,
        "rms_norm_eps": None,
    }


def qwen3_5_moe(dense: DenseModel) -> dict[str, Any]:
    """State the kind of each layer: by default every fourth has full attention."""
    interval = dense.values.get("full_attention_interval", 4)
    kinds = ["linear_attention" if (i + 1) % interval else FULL for i in range(dense.num_layers)]
    return {"layer_types": dense.values["layer_types"] or kinds}
