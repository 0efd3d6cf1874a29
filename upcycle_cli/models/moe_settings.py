"""Functions of the rows of MoE architectures: settings, and refusals.

Those named after an architecture return config keys for a dense model. A refusal returns the end of
"X cannot express this model: …", or None.
"""

from __future__ import annotations

from typing import Any

from upcycle_cli.models.dense import FULL, SLIDING, DenseModel
from upcycle_cli.models.layers import OLD_BLOCKS


def no_longrope(dense: DenseModel) -> str | None:
    """Refuse longrope."""
    if (dense.values["rope_scaling"] or {}).get("rope_type") != "longrope":
        return None
    return "its rotary embeddings are scaled by longrope, which is untested with the target"


def glm4_moe(dense: DenseModel) -> dict[str, Any]:
    """State which optional tensors its attention has."""
    return {
        "attention_bias": dense.has("self_attn.q_proj.bias"),
        "use_qk_norm": dense.has("self_attn.q_norm.weight"),
    }


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
    return {"layer_types": dense.values["layer_types"] or kinds}


def granitemoe_swa(dense: DenseModel) -> dict[str, Any]:
    """State the window, and the rotary base of each layer: 0 if it has no rotary embeddings."""
    window, thetas = (dense.values[key] for key in ("sliding_window", "layer_rope_theta"))
    thetas = [dense.values["rope_theta"]] * dense.num_layers if thetas is None else thetas
    return {"sliding_window": window, "layer_rope_theta": thetas}


def mellum(dense: DenseModel) -> dict[str, Any]:
    """State rotary embeddings per kind of layer; they are the same for both kinds."""
    rope = {"rope_type": "default", **(dense.values["rope_scaling"] or {})}
    rope["rope_theta"] = dense.values["rope_theta"]
    return {"rope_parameters": {kind: dict(rope) for kind in (FULL, SLIDING)}}


def qwen3_5_moe(dense: DenseModel) -> dict[str, Any]:
    """State the kind of each layer: by default every fourth has full attention."""
    interval = dense.values.get("full_attention_interval", 4)
    kinds = ["linear_attention" if (i + 1) % interval else FULL for i in range(dense.num_layers)]
    return {"layer_types": dense.values["layer_types"] or kinds}
