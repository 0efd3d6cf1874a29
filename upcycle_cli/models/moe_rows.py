"""The MoE architectures of transformers that dense models can become, one row of data each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from upcycle_cli.models import layers, mlp
from upcycle_cli.models.defaults import defaults_of
from upcycle_cli.models.dense import FULL, SLIDING, DenseModel, rope_layers
from upcycle_cli.models.moe import ExtraTensor, Keys, MoeBlock, SharedExpert, Target
from upcycle_cli.recipe.recipe import ExpertLayout, Routing


def _no_longrope(dense: DenseModel) -> str | None:
    scaling = dense.values["rope_scaling"] or {}
    words = "its rotary embeddings are scaled by longrope, which is untested with the target"
    return words if scaling.get("rope_type") == "longrope" else None


def _granitemoe(dense: DenseModel) -> dict[str, Any]:
    """State the factors by which granite differs from llama, unless the source has them."""
    if "attention_multiplier" in defaults_of(dense.model_type):
        return {}
    found = dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0)
    found |= {"attention_multiplier": dense.values["head_dim"] ** -0.5}
    return {**found, "attention_bias": dense.has("self_attn.q_proj.bias")}


def _granitemoe_swa(dense: DenseModel) -> dict[str, Any]:
    """State the rotary base of each layer, 0 without rotary embeddings. A window must be given."""
    values = dense.values
    stated = values["layer_rope_theta"] if dense.model_type == "granite_swa" else None
    rotated = rope_layers(values, dense.num_layers)
    bases = stated or [values["rope_theta"] * rotates for rotates in rotated]
    window = values["sliding_window"] or values["max_position_embeddings"]
    return _granitemoe(dense) | {"sliding_window": window, "layer_rope_theta": bases}


def _granitemoehybrid(dense: DenseModel) -> dict[str, Any]:
    """State kinds of layers as releases do. By default all are attention, with rope."""
    if dense.model_type == "granitemoehybrid":
        names = {new: old for old, new in layers.OLD_BLOCKS.items()}
        return {"layer_types": [names.get(kind, kind) for kind in dense.values["layer_types"]]}
    kinds = {"layer_types": ["attention"] * dense.num_layers, "position_embedding_type": "rope"}
    # The default number of Mamba heads does not divide every hidden size.
    return _granitemoe(dense) | kinds | {"mamba_n_heads": 1} | _MAMBA


def _lfm2_moe(dense: DenseModel) -> dict[str, Any]:
    """State which layers are attention, which lfm2 states by either of two keys."""
    indices = dense.values["full_attn_idxs"]
    attends = range(dense.num_layers) if indices is None else indices
    kinds = [FULL if layer in attends else "conv" for layer in range(dense.num_layers)]
    return {"layer_types": dense.values["layer_types"] or kinds}


def _mellum(dense: DenseModel) -> dict[str, Any]:
    """State rotary embeddings per kind of layer; they are the same for both kinds."""
    rope = {"rope_type": "default", **(dense.values["rope_scaling"] or {})}
    rope["rope_theta"] = dense.values["rope_theta"]
    return {"rope_parameters": {kind: dict(rope) for kind in (FULL, SLIDING)}}


def _qwen3_5_moe(dense: DenseModel) -> dict[str, Any]:
    """State the kind of each layer: by default every fourth has full attention."""
    interval = dense.values.get("full_attention_interval", 4)
    kinds = ["linear_attention" if (i + 1) % interval else FULL for i in range(dense.num_layers)]
    return {"layer_types": dense.values["layer_types"] or kinds}


def _layouts(
    per_expert: Sequence[mlp.Weight] = mlp.swiglu("mlp.experts.{expert}"),
    fused: str = "mlp.experts",
    *,
    router: str = "mlp.gate.weight",
    in_memory: Mapping[str, Any] | None = None,
    **names: Any,  # noqa: ANN401 - the other fields of a block
) -> Mapping[ExpertLayout, MoeBlock]:
    """Return experts with released names, and mlp.stacked below `fused` as in transformers 5.

    `in_memory` has the names that differ there. The defaults are qwen3_moe's.
    """
    released, gated = mlp.matrices_of(per_expert), "gate" in mlp.parts_of(per_expert)
    names["router"] = router
    held = {**names, **(in_memory or {})}
    return {
        ExpertLayout.PER_EXPERT: MoeBlock(experts=released, **names),
        ExpertLayout.FUSED: MoeBlock(experts=mlp.stacked(fused, gated=gated), **held),
    }


def _shared_swiglu(prefix: str) -> tuple[mlp.Weight, ...]:
    return mlp.matrices_of(mlp.swiglu(prefix))


_MIXTRAL_LAYOUTS = _layouts(
    mlp.linear_layers(*(f"block_sparse_moe.experts.{{expert}}.w{i}" for i in (1, 3, 2))),
    router="block_sparse_moe.gate.weight",
    in_memory={"router": "mlp.gate.weight"},
)
_GRANITE_SHARED = mlp.gated_linear("shared_mlp.input_linear", "shared_mlp.output_linear")
_GRANITE_LAYOUTS = {
    ExpertLayout.STACKED: MoeBlock(
        experts=mlp.gated_linear("block_sparse_moe.input_linear", "block_sparse_moe.output_linear"),
        router="block_sparse_moe.router.layer.weight",
        shared=_GRANITE_SHARED,
    ),
    ExpertLayout.FUSED: MoeBlock(
        experts=mlp.stacked("block_sparse_moe.experts"),
        router="block_sparse_moe.router.weight",
        shared=_GRANITE_SHARED,
    ),
}
_GATED_SHARED: Any = {
    "layouts": _layouts(shared=_shared_swiglu("mlp.shared_expert")),
    "shared": SharedExpert(
        router="mlp.shared_expert_gate.weight", size_key="shared_expert_intermediate_size", size=64
    ),
}

_SIGMOID_TOPK = (Routing.SIGMOID_TOPK,)
_EITHER_SOFTMAX = (Routing.TOPK_SOFTMAX, Routing.SOFTMAX_TOPK)
_BY_NORM = ("norm_topk_prob", {True: Routing.TOPK_SOFTMAX, False: Routing.SOFTMAX_TOPK})
_SIGMOID = ("norm_topk_prob", {True: Routing.SIGMOID_TOPK})
_NO_O_BIAS = {"self_attn.o_proj.bias": "o_proj has a bias, but the target's o_proj has none"}
_NO_QKV_BIAS = {"self_attn.q_proj.bias": "q, k and v have biases, but the target's have none"}

_QWEN: Any = {
    "routings": _EITHER_SOFTMAX,
    "layouts": _layouts(),
    "keys": Keys(aliases=("num_local_experts",), routing=_BY_NORM),
}
_OLMO: Any = {**_QWEN, "keys": replace(_QWEN["keys"], expert_size="intermediate_size")}
_MIXTRAL_KEYS = Keys(
    num_experts="num_local_experts", aliases=("num_experts",), expert_size="intermediate_size"
)
_GRANITE: Any = {"layouts": _GRANITE_LAYOUTS, "keys": _MIXTRAL_KEYS}
_ONE_GROUP = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "norm_topk_prob": True}
_FOR_MLX = {"first_k_dense_replace": 0, "partial_rotary_factor": 1.0}
# llama.cpp's converter needs these even if no layer is a Mamba layer.
_MAMBA = {"mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_conv": 4, "mamba_expand": 2}
# vLLM ignores the correction bias without the first, and uses softmax without the second.
_FOR_VLLM = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
_DEEPSEEK: Any = {
    "routings": _SIGMOID_TOPK,
    "layouts": _layouts(
        shared=_shared_swiglu("mlp.shared_experts"),
        correction_bias="mlp.gate.e_score_correction_bias",
    ),
    "keys": Keys(
        num_experts="n_routed_experts",
        aliases=("num_local_experts", "num_experts"),
        routing=_SIGMOID,
        scale="routed_scaling_factor",
    ),
    "shared": SharedExpert(count_key="n_shared_experts"),
}
_BEFORE_MLP = "pre_feedforward_layernorm.weight"
_NO_SINKS = ExtraTensor(name="self_attn.sinks", factor=-1e4, size="num_attention_heads")

_ROWS: Sequence[Target] = (
    Target(
        model_type="mixtral",
        layouts=_MIXTRAL_LAYOUTS,
        keys=_MIXTRAL_KEYS,
        unsupported_tensors=_NO_O_BIAS | _NO_QKV_BIAS,
        refusal=_no_longrope,
        constants={"router_jitter_noise": 0.0},
    ),
    Target(
        # Its q, k and v biases and its shared expert are not optional. vLLM reads zero biases even
        # if a config denies them, and refuses a shared expert of size 0. llama.cpp computes the
        # shared gate as silu(x)/x, which is 0/0 for a zero row: the gate is random.
        model_type="qwen2_moe",
        **_QWEN | _GATED_SHARED | {"routings": _EITHER_SOFTMAX[::-1]},
        layers=layers.MLP_ONLY_LAYERS,
        required_biases=tuple(f"self_attn.{matrix}_proj" for matrix in "qkv"),
        unsupported_tensors=_NO_O_BIAS,
        constants={"qkv_bias": True},
    ),
    Target(model_type="qwen3_moe", **_QWEN, layers=layers.MLP_ONLY_LAYERS),
    Target(
        # Released models do not renormalise gates, and vLLM never does. The norm behind the experts
        # cancels that factor, so the exact routing can be the default.
        model_type="flex_olmo",
        **_OLMO,
    ),
    Target(
        model_type="glm4_moe",
        **_DEEPSEEK,
        constants=_ONE_GROUP | {"num_nextn_predict_layers": 0},
        layers=layers.FIRST_K_DENSE,
        unsupported_tensors=_NO_O_BIAS,
        settings=lambda dense: {
            "attention_bias": dense.has("self_attn.q_proj.bias"),
            "use_qk_norm": dense.has("self_attn.q_norm.weight"),
        },
    ),
    Target(model_type="dots1", **_DEEPSEEK, constants=_ONE_GROUP, layers=layers.FIRST_K_DENSE),
    Target(model_type="mellum", **_QWEN, layers=layers.MLP_TYPES, settings=_mellum),
    Target(
        model_type="hy_v3",
        routings=_SIGMOID_TOPK,
        layouts=_layouts(
            router="mlp.router.gate.weight",
            shared=_shared_swiglu("mlp.shared_mlp"),
            correction_bias="mlp.expert_bias",
            in_memory={
                "router": "mlp.gate.weight",
                "shared": _shared_swiglu("mlp.shared_experts"),
                "correction_bias": "mlp.e_score_correction_bias",
            },
        ),
        keys=Keys(
            aliases=("num_local_experts",),
            expert_size_copy="expert_hidden_dim",
            scale="router_scaling_factor",
        ),
        layers=layers.MLP_TYPES_AND_FIRST_DENSE,
        shared=SharedExpert(count_key="num_shared_experts"),
        # The last two are for vLLM.
        constants={"num_shared_experts": 1, "qk_norm": True, "route_norm": True},
    ),
    Target(
        model_type="solar_open",
        **_DEEPSEEK,
        constants=_ONE_GROUP | _FOR_MLX | {"attention_bias": False},
        unsupported_tensors=_NO_O_BIAS,
    ),
    Target(
        model_type="deepseek_v3",
        **_DEEPSEEK,
        constants=_ONE_GROUP | _FOR_VLLM | {"num_nextn_predict_layers": 0},
        layers=layers.FIRST_K_DENSE,
        # The size of a head's rotary part, which engines derive in different ways.
        settings=lambda dense: {"head_dim": dense.values["qk_rope_head_dim"]},
    ),
    Target(
        model_type="ernie4_5_moe",
        layouts=_layouts(
            shared=_shared_swiglu("mlp.shared_experts"),
            correction_bias="mlp.moe_statics.e_score_correction_bias",
            in_memory={"correction_bias": "mlp.gate.moe_statics.e_score_correction_bias"},
        ),
        keys=Keys(num_experts="moe_num_experts", aliases=("num_experts",), top_k="moe_k"),
        layers=layers.MOE_RANGE,
        bias_routing=Routing.TOPK_SOFTMAX,
        bias_rows=(1,),
        interleaved_rope=True,
        shared=SharedExpert(count_key="moe_num_shared_experts", required=False),
        unsupported_tensors=_NO_O_BIAS | _NO_QKV_BIAS,
        constants={"moe_num_shared_experts": 0, "use_bias": False},
    ),
    Target(
        model_type="hunyuan_v1_moe",
        layouts=_layouts(router="mlp.gate.wg.weight", shared=_shared_swiglu("mlp.shared_mlp")),
        keys=Keys(
            aliases=("num_local_experts",), top_k="moe_topk", expert_size="intermediate_size"
        ),
        shared=SharedExpert(),
    ),
    Target(
        model_type="lfm2_moe",
        routings=_SIGMOID_TOPK,
        layouts=_layouts(
            mlp.linear_layers(*(f"feed_forward.experts.{{expert}}.w{i}" for i in (1, 3, 2))),
            "feed_forward.experts",
            router="feed_forward.gate.weight",
            correction_bias="feed_forward.expert_bias",
        ),
        keys=Keys(routing=_SIGMOID, scale="routed_scaling_factor"),
        layers=layers.NUM_DENSE_LAYERS,
        constants={"use_expert_bias": True},
        settings=_lfm2_moe,
    ),
    Target(
        model_type="cohere2_moe",
        routings=(Routing.TOPK_SOFTMAX, Routing.SIGMOID_TOPK),
        layouts=_layouts(shared=_shared_swiglu("mlp.shared_experts")),
        keys=Keys(
            expert_size="intermediate_size",
            dense_size="prefix_dense_intermediate_size",
            routing=(
                "expert_selection_fn",
                {"softmax": Routing.TOPK_SOFTMAX, "sigmoid": Routing.SIGMOID_TOPK},
            ),
        ),
        layers=layers.MLP_TYPES,
        interleaved_rope=True,
        shared=SharedExpert(
            count_key="num_shared_experts",
            required=False,
            settings={"shared_expert_combination_strategy": "sum"},  # the default is the mean
        ),
        constants={
            "prefix_dense_sliding_window_pattern": 4,  # with 1, full attention has no positions
            "num_shared_experts": 0,
            "norm_topk_prob": True,
            "rms_norm_eps": None,
        },
    ),
    Target(model_type="qwen3_5_moe_text", **_GATED_SHARED, keys=Keys(), settings=_qwen3_5_moe),
    Target(
        # Experts beside an MLP. Each has a norm behind it: the MLP's has a zero weight, so the MLP
        # is small and adds nothing at first; the experts' cancels the factor on their gates. With a
        # factor of √ε, the norm behind both treats small outputs like the dense MLP's: see
        # docs/evidence/decisions.md. The router divides its input by √H, hence its scale.
        model_type="gemma4_text",
        layouts={
            ExpertLayout.FUSED: MoeBlock(
                experts=mlp.stacked("experts"),
                router="router.proj.weight",
                shared=_shared_swiglu("mlp"),
            )
        },
        keys=Keys(top_k="top_k_experts"),
        layers=layers.ENABLED,
        shared=SharedExpert(
            size_key="intermediate_size", size=64, norm="post_feedforward_layernorm_1.weight"
        ),
        extra_tensors=(
            ExtraTensor(name="post_feedforward_layernorm_1.weight", factor=0.0),
            ExtraTensor(name="post_feedforward_layernorm_2.weight"),
            ExtraTensor(name="pre_feedforward_layernorm_2.weight", of=_BEFORE_MLP),
            ExtraTensor(name="router.scale", root="hidden_size", of=_BEFORE_MLP),
            ExtraTensor(
                name="router.per_expert_scale", root="rms_norm_eps", per_expert=True, frozen=True
            ),
        ),
        keeps_mlp=True,
    ),
    Target(model_type="granitemoe", **_GRANITE, settings=_granitemoe),
    Target(
        model_type="granitemoe_swa",
        **_GRANITE | {"layouts": {ExpertLayout.FUSED: _GRANITE_LAYOUTS[ExpertLayout.FUSED]}},
        shared=SharedExpert(size_key="shared_intermediate_size", required=False),
        constants={"shared_intermediate_size": 0},
        extra_tensors=(_NO_SINKS,),  # exp(-1e4) is 0
        settings=_granitemoe_swa,
    ),
    Target(
        # A model without experts is dense, and its shared expert is the MLP.
        model_type="granitemoehybrid",
        **_GRANITE,
        layers=layers.ALL_OR_NONE,
        shared=SharedExpert(size_key="shared_intermediate_size", size=64),
        settings=_granitemoehybrid,
    ),
    Target(
        model_type="nemotron_h",
        routings=_SIGMOID_TOPK,
        layouts=_layouts(
            mlp.linear_layers(
                "", "mixer.experts.{expert}.up_proj", "mixer.experts.{expert}.down_proj"
            ),
            "mixer.experts",
            router="mixer.gate.weight",
            shared=mlp.linear_layers(
                "", "mixer.shared_experts.up_proj", "mixer.shared_experts.down_proj"
            )[:2],
            correction_bias="mixer.gate.e_score_correction_bias",
        ),
        keys=replace(_DEEPSEEK["keys"], aliases=("num_local_experts",)),
        layers=layers.BLOCK_TYPES,
        layer="backbone.layers.{layer}.",
        shared=SharedExpert(size_key="moe_shared_expert_intermediate_size", size=64),
        constants=_ONE_GROUP | {"moe_latent_size": None},  # experts read the hidden state itself
    ),
)
NATIVE: Mapping[str, Target] = {row.model_type: row for row in _ROWS}
WRAPPED_TARGETS: Mapping[str, Target] = {
    "qwen3_vl_moe_text": Target(
        model_type="qwen3_vl_moe_text",
        layouts={
            layout: MoeBlock(
                experts=mlp.stacked("mlp.experts", transposed=layout is ExpertLayout.STACKED),
                router="mlp.gate.weight",
            )
            for layout in (ExpertLayout.STACKED, ExpertLayout.FUSED)
        },
        keys=replace(_QWEN["keys"], routing=None),
        layers=layers.MLP_ONLY_LAYERS,
        constants={"norm_topk_prob": True},  # for vLLM
    )
}
"""Targets that exist only inside wrappers."""
GROW_ONLY: Mapping[str, Target] = {
    "olmoe": Target(model_type="olmoe", **_OLMO | {"routings": _EITHER_SOFTMAX[::-1]})
}
"""MoE types that no dense model becomes, but that can be grown."""
