"""What the config of an MoE architecture needs said of a dense model, and what it cannot express.

Functions that rows of `moe_rows.py` name: a refusal returns words that end the sentence "X cannot
express this model: …", or None; settings are config keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle_cli.core.errors import shown
from upcycle_cli.models.dense import FULL, SLIDING, DenseModel
from upcycle_cli.models.layers import OLD_BLOCKS

_LINEAR = "linear_attention"


def no_mixed_windows(dense: DenseModel) -> str | None:
    """Of targets whose layers have all the same window, or none."""
    if len({*dense.windows}) == 1:
        return None
    return "only some layers slide (layer_types), and its layers all attend alike"


def mixtral_refusal(dense: DenseModel) -> str | None:
    """Of mixtral."""
    if dense.rotary_share != 1.0:
        return "positions turn only a part of each head (partial_rotary_factor), and its turn all"
    if (dense.values["rope_scaling"] or {}).get("rope_type") == "longrope":
        return "its rotary embeddings are stretched by longrope, which nobody has tried with it"
    return no_mixed_windows(dense)


def no_windows(dense: DenseModel) -> str | None:
    """Of targets that know of no windows."""
    return "some layers have a window, and its layers see all" if any(dense.windows) else None


def window_settings(dense: DenseModel) -> dict[str, Any]:
    """State windows in the terms of the Qwen MoE configs."""
    first = next((i for i, window in enumerate(dense.windows) if window), None)
    return {
        "use_sliding_window": first is not None,
        "sliding_window": None if first is None else dense.windows[first],
        "max_window_layers": dense.num_layers if first is None else first,
        "layer_types": [SLIDING if window else FULL for window in dense.windows],
    }


DEEPSEEK_SETTINGS: Mapping[str, Any] = {
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
}


def glm4_moe_settings(dense: DenseModel) -> dict[str, Any]:
    """State of attention what varies in it, and that there are no groups and no further tokens."""
    return {
        **DEEPSEEK_SETTINGS,
        "attention_bias": dense.has("self_attn.q_proj.bias"),
        "use_qk_norm": dense.has("self_attn.q_norm.weight"),
        "partial_rotary_factor": dense.rotary_share,
        "num_nextn_predict_layers": 0,
    }


def deepseek_v3_settings(dense: DenseModel) -> dict[str, Any]:
    """State a size that its own config class derives, and others mostly do from other sizes."""
    return {
        **DEEPSEEK_SETTINGS,
        # That of the rotary part, whatever the sizes of queries and values.
        "head_dim": dense.values["qk_rope_head_dim"],
        "num_nextn_predict_layers": 0,
        # vLLM has no correction bias without the one, and a softmax without the other.
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    }


def hybrid_settings(dense: DenseModel) -> dict[str, Any]:
    """Say of a model that knows no other layers that all have attention, and see positions.

    Layers are called as released models and engines have it, and transformers 5 no more.
    """
    if "layer_types" in dense.values:
        names = {new: old for old, new in OLD_BLOCKS.items()}
        return {"layer_types": [names.get(kind, kind) for kind in dense.values["layer_types"]]}
    return {
        "layer_types": ["attention"] * dense.num_layers,
        "position_embedding_type": "rope",
        "mamba_n_heads": 1,  # its usual number does not divide every hidden size
        # llama.cpp's converter asks for these even where no layer has them: the usual ones.
        "mamba_n_groups": 1,
        "mamba_d_state": 256,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
    }


def lfm2_moe_settings(dense: DenseModel) -> dict[str, Any]:
    """State which layers attend, which there are two keys for, and that experts have a bias."""
    indices = dense.values["full_attn_idxs"]
    attends = range(dense.num_layers) if indices is None else indices
    kinds = [FULL if layer in attends else "conv" for layer in range(dense.num_layers)]
    return {"layer_types": dense.values["layer_types"] or kinds, "use_expert_bias": True}


def granitemoe_swa_settings(dense: DenseModel) -> dict[str, Any]:
    """State which layers have a window and which rotary embeddings, and no shared expert."""
    windows = window_settings(dense)
    return {
        "layer_types": windows["layer_types"],
        "sliding_window": dense.values["sliding_window"],
        "layer_rope_theta": _layer_thetas(dense),
        "shared_intermediate_size": 0,
    }


def _layer_thetas(dense: DenseModel) -> list[float]:
    """Return the base of the rotary embeddings of each layer; 0 where there are none."""
    thetas = dense.values["layer_rope_theta"]
    return [dense.values["rope_theta"]] * dense.num_layers if thetas is None else thetas


def odd_thetas(dense: DenseModel) -> str | None:
    """Of targets that read the rotary embeddings of each layer."""
    thetas: object = _layer_thetas(dense)
    if isinstance(thetas, list) and len(thetas) == dense.num_layers:
        return None
    return f"layer_rope_theta is {shown(thetas)}, and there are {dense.num_layers} layers"


def mellum_settings(dense: DenseModel) -> dict[str, Any]:
    """State windows and rotary embeddings by kinds of layers, which all have the same ones."""
    windows = window_settings(dense)
    rope = {"rope_type": "default", **(dense.values["rope_scaling"] or {})}
    rope["rope_theta"] = dense.values["rope_theta"]
    return {
        "layer_types": windows["layer_types"],
        "sliding_window": windows["sliding_window"],
        "rope_parameters": {kind: dict(rope) for kind in (FULL, SLIDING)},
    }


def cohere2_moe_settings(dense: DenseModel) -> dict[str, Any]:
    """State the windows, and that a dense layer without one sees no positions either.

    It does if the pattern of the first layers is 1.
    """
    return {
        "layer_types": [SLIDING if window else FULL for window in dense.windows],
        "sliding_window": next(filter(None, dense.windows), None),
        "prefix_dense_sliding_window_pattern": 4,
        "num_shared_experts": 0,
        "norm_topk_prob": True,
        "rms_norm_eps": None,
    }


def qwen3_5_moe_settings(dense: DenseModel) -> dict[str, Any]:
    """State the kinds of all layers, of which each fourth has full attention if nothing says so."""
    interval = dense.values.get("full_attention_interval", 4)
    kinds = [_LINEAR if (i + 1) % interval else FULL for i in range(dense.num_layers)]
    return {"layer_types": dense.values["layer_types"] or kinds}
