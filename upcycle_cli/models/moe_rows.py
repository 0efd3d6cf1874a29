"""The MoE architectures of transformers: one row of data for each that dense models can become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from upcycle_cli.models import layers, moe_settings
from upcycle_cli.models.mlp import (
    Weight,
    gated_linear,
    linear_layers,
    matrices_of,
    parts_of,
    stacked,
    swiglu,
)
from upcycle_cli.models.moe import (
    CorrectionBias,
    ExtraTensor,
    Keys,
    MoeBlock,
    ParallelMlp,
    SharedExpert,
    Target,
)
from upcycle_cli.recipe.recipe import ExpertLayout, Routing


def _layouts(
    per_expert: Sequence[Weight], fused: str, *, router: str, fused_router: str | None = None
) -> Mapping[ExpertLayout, MoeBlock]:
    """Return experts with released names, and stacked below `fused` as in transformers 5."""
    gated = "gate" in parts_of(per_expert)
    return {
        ExpertLayout.PER_EXPERT: MoeBlock(experts=matrices_of(per_expert), router=router),
        ExpertLayout.FUSED: MoeBlock(
            experts=stacked(fused, gated=gated), router=fused_router or router
        ),
    }


def _shared_swiglu(prefix: str) -> tuple[Weight, ...]:
    """Return the weights of a shared expert without biases."""
    return matrices_of(swiglu(prefix))


_MIXTRAL_LAYOUTS = _layouts(
    linear_layers(*(f"block_sparse_moe.experts.{{expert}}.w{i}" for i in (1, 3, 2))),
    "mlp.experts",
    router="block_sparse_moe.gate.weight",
    fused_router="mlp.gate.weight",
)
_QWEN_LAYOUTS = _layouts(swiglu("mlp.experts.{expert}"), "mlp.experts", router="mlp.gate.weight")
_GRANITE_LAYOUTS = {
    ExpertLayout.STACKED: MoeBlock(
        experts=gated_linear("block_sparse_moe.input_linear", "block_sparse_moe.output_linear"),
        router="block_sparse_moe.router.layer.weight",
    ),
    ExpertLayout.FUSED: MoeBlock(
        experts=stacked("block_sparse_moe.experts"), router="block_sparse_moe.router.weight"
    ),
}
_GRANITE_SHARED = gated_linear("shared_mlp.input_linear", "shared_mlp.output_linear")
_GATED_SHARED = SharedExpert(
    weights=_shared_swiglu("mlp.shared_expert"),
    router="mlp.shared_expert_gate.weight",
    size_key="shared_expert_intermediate_size",
    size=64,
)

_SIGMOID_TOPK = (Routing.SIGMOID_TOPK,)
_EITHER_SOFTMAX = (Routing.TOPK_SOFTMAX, Routing.SOFTMAX_TOPK)
_BY_NORM = ("norm_topk_prob", {True: Routing.TOPK_SOFTMAX, False: Routing.SOFTMAX_TOPK})
_SIGMOID = ("norm_topk_prob", {True: Routing.SIGMOID_TOPK})
_NO_O_BIAS = {
    "self_attn.o_proj.bias": "attention_bias is true, and the target's o_proj has no bias"
}
_NO_QKV_BIAS = {
    "self_attn.q_proj.bias": "{model_type} has q, k and v biases, and the target's attention has "
    "none"
}

_QWEN: Any = {
    "routings": _EITHER_SOFTMAX,
    "layouts": _QWEN_LAYOUTS,
    "keys": Keys(aliases=("num_local_experts",), routing=_BY_NORM),
}
_OLMO: Any = {**_QWEN, "keys": replace(_QWEN["keys"], expert_size="intermediate_size")}
_MIXTRAL_KEYS = Keys(
    num_experts="num_local_experts", aliases=("num_experts",), expert_size="intermediate_size"
)
_GRANITE: Any = {"layouts": _GRANITE_LAYOUTS, "keys": _MIXTRAL_KEYS}
_DEEPSEEK: Any = {
    "routings": _SIGMOID_TOPK,
    "layouts": _QWEN_LAYOUTS,
    "keys": Keys(
        num_experts="n_routed_experts",
        aliases=("num_local_experts", "num_experts"),
        routing=_SIGMOID,
        scale="routed_scaling_factor",
    ),
    "correction_bias": CorrectionBias(name="mlp.gate.e_score_correction_bias"),
    "shared": SharedExpert(
        weights=_shared_swiglu("mlp.shared_experts"), count_key="n_shared_experts"
    ),
}
_BEFORE_MLP = "pre_feedforward_layernorm.weight"

_ROWS: Sequence[Target] = (
    Target(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        layouts=_MIXTRAL_LAYOUTS,
        keys=_MIXTRAL_KEYS,
        unsupported_tensors=_NO_O_BIAS | _NO_QKV_BIAS,
        refusal=moe_settings.mixtral_refusal,
        settings=lambda dense: {"sliding_window": dense.windows[0], "router_jitter_noise": 0.0},
    ),
    Target(
        # Its q, k and v biases and its shared expert are not optional. vLLM reads zero biases even
        # if a config denies them, and refuses a shared expert of size 0. llama.cpp computes the
        # shared gate as silu(x)/x, which is 0/0 for a zero row: the gate is random.
        model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        **_QWEN | {"routings": _EITHER_SOFTMAX[::-1]},
        layers=layers.MLP_ONLY_LAYERS,
        shared=_GATED_SHARED,
        required_biases=tuple(f"self_attn.{matrix}_proj" for matrix in "qkv"),
        unsupported_tensors=_NO_O_BIAS,
        settings=lambda dense: moe_settings.windows(dense) | {"qkv_bias": True},
    ),
    Target(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        **_QWEN,
        layers=layers.MLP_ONLY_LAYERS,
        refusal=moe_settings.no_mixed_windows,
        settings=lambda dense: (
            moe_settings.windows(dense) | {"attention_bias": dense.values["attention_bias"]}
        ),
    ),
    Target(
        # Released models do not renormalise gates, and vLLM never does. The norm behind the experts
        # cancels that factor, so the exact routing can be the default.
        model_type="flex_olmo",
        architecture="FlexOlmoForCausalLM",
        **_OLMO,
    ),
    Target(
        model_type="glm4_moe",
        architecture="Glm4MoeForCausalLM",
        **_DEEPSEEK,
        layers=layers.FIRST_K_DENSE,
        unsupported_tensors=_NO_O_BIAS,
        refusal=moe_settings.no_windows,
        settings=moe_settings.glm4_moe,
    ),
    Target(
        model_type="dots1",
        architecture="Dots1ForCausalLM",
        **_DEEPSEEK,
        layers=layers.FIRST_K_DENSE,
        settings=lambda dense: {**moe_settings.DEEPSEEK, **moe_settings.windows(dense)},
    ),
    Target(
        model_type="mellum",
        architecture="MellumForCausalLM",
        **_QWEN,
        layers=layers.MLP_TYPES,
        settings=moe_settings.mellum,
    ),
    Target(
        model_type="hy_v3",
        architecture="HYV3ForCausalLM",
        routings=_SIGMOID_TOPK,
        layouts=_layouts(
            swiglu("mlp.experts.{expert}"),
            "mlp.experts",
            router="mlp.router.gate.weight",
            fused_router="mlp.gate.weight",
        ),
        keys=Keys(
            aliases=("num_local_experts",),
            expert_size_copy="expert_hidden_dim",
            scale="router_scaling_factor",
        ),
        layers=layers.MLP_TYPES_AND_FIRST_DENSE,
        correction_bias=CorrectionBias(name="mlp.expert_bias", fused="mlp.e_score_correction_bias"),
        shared=SharedExpert(
            weights=_shared_swiglu("mlp.shared_mlp"),
            fused=_shared_swiglu("mlp.shared_experts"),
            count_key="num_shared_experts",
        ),
        refusal=moe_settings.no_windows,
        # The last two are for vLLM.
        settings=lambda _: {"num_shared_experts": 1, "qk_norm": True, "route_norm": True},
    ),
    Target(
        model_type="solar_open",
        architecture="SolarOpenForCausalLM",
        **_DEEPSEEK,
        unsupported_tensors=_NO_O_BIAS,
        # The last two are for MLX.
        settings=lambda _: {
            **moe_settings.DEEPSEEK,
            "first_k_dense_replace": 0,
            "partial_rotary_factor": 1.0,
        },
    ),
    Target(
        model_type="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        **_DEEPSEEK,
        layers=layers.FIRST_K_DENSE,
        settings=moe_settings.deepseek_v3,
    ),
    Target(
        model_type="ernie4_5_moe",
        architecture="Ernie4_5_MoeForCausalLM",
        layouts=_QWEN_LAYOUTS,
        keys=Keys(num_experts="moe_num_experts", aliases=("num_experts",), top_k="moe_k"),
        layers=layers.MOE_RANGE,
        correction_bias=CorrectionBias(
            name="mlp.moe_statics.e_score_correction_bias",
            fused="mlp.gate.moe_statics.e_score_correction_bias",
            routing=Routing.TOPK_SOFTMAX,
            rows=1,
        ),
        shared=SharedExpert(
            weights=_shared_swiglu("mlp.shared_experts"),
            count_key="moe_num_shared_experts",
            required=False,
        ),
        settings=lambda _: {"moe_num_shared_experts": 0},
    ),
    Target(
        model_type="hunyuan_v1_moe",
        architecture="HunYuanMoEV1ForCausalLM",
        layouts=_layouts(
            swiglu("mlp.experts.{expert}"), "mlp.experts", router="mlp.gate.wg.weight"
        ),
        keys=Keys(
            aliases=("num_local_experts",), top_k="moe_topk", expert_size="intermediate_size"
        ),
        shared=SharedExpert(weights=_shared_swiglu("mlp.shared_mlp")),
    ),
    Target(
        model_type="lfm2_moe",
        architecture="Lfm2MoeForCausalLM",
        routings=_SIGMOID_TOPK,
        layouts=_layouts(
            linear_layers(*(f"feed_forward.experts.{{expert}}.w{i}" for i in (1, 3, 2))),
            "feed_forward.experts",
            router="feed_forward.gate.weight",
        ),
        keys=Keys(routing=_SIGMOID, scale="routed_scaling_factor"),
        layers=layers.NUM_DENSE_LAYERS,
        correction_bias=CorrectionBias(name="feed_forward.expert_bias"),
        settings=moe_settings.lfm2_moe,
    ),
    Target(
        model_type="cohere2_moe",
        architecture="Cohere2MoeForCausalLM",
        routings=(Routing.TOPK_SOFTMAX, Routing.SIGMOID_TOPK),
        layouts=_QWEN_LAYOUTS,
        keys=Keys(
            expert_size="intermediate_size",
            dense_size="prefix_dense_intermediate_size",
            routing=(
                "expert_selection_fn",
                {"softmax": Routing.TOPK_SOFTMAX, "sigmoid": Routing.SIGMOID_TOPK},
            ),
        ),
        layers=layers.MLP_TYPES,
        shared=SharedExpert(
            weights=_shared_swiglu("mlp.shared_experts"),
            count_key="num_shared_experts",
            required=False,
            settings={"shared_expert_combination_strategy": "sum"},  # the default is the mean
        ),
        settings=moe_settings.cohere2_moe,
    ),
    Target(
        model_type="qwen3_5_moe_text",
        architecture="Qwen3_5MoeForCausalLM",
        layouts=_QWEN_LAYOUTS,
        keys=Keys(),
        shared=_GATED_SHARED,
        settings=moe_settings.qwen3_5_moe,
    ),
    Target(
        # Experts beside an MLP. Each has a norm behind it: the MLP's has a zero weight, so the MLP
        # is small and adds nothing at first; the experts' cancels the factor on their gates. With a
        # factor of √ε, the norm behind both treats small outputs like the dense MLP's: see
        # docs/decisions.md. The router divides its input by √H, hence its scale.
        model_type="gemma4_text",
        architecture="Gemma4ForCausalLM",
        layouts={
            ExpertLayout.FUSED: MoeBlock(experts=stacked("experts"), router="router.proj.weight")
        },
        keys=Keys(top_k="top_k_experts"),
        layers=layers.ENABLED,
        shared=SharedExpert(
            weights=_shared_swiglu("mlp"),
            size_key="intermediate_size",
            size=64,
            norm="post_feedforward_layernorm_1.weight",
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
        parallel_mlp=ParallelMlp(),
        refusal=moe_settings.no_eps,
    ),
    Target(model_type="granitemoe", architecture="GraniteMoeForCausalLM", **_GRANITE),
    Target(
        model_type="granitemoe_swa",
        architecture="GraniteMoeSWAForCausalLM",
        **_GRANITE | {"layouts": {ExpertLayout.FUSED: _GRANITE_LAYOUTS[ExpertLayout.FUSED]}},
        shared=SharedExpert(
            weights=_GRANITE_SHARED, size_key="shared_intermediate_size", required=False
        ),
        refusal=moe_settings.wrong_thetas,
        settings=moe_settings.granitemoe_swa,
    ),
    Target(
        # A model without experts is dense, and its shared expert is the MLP.
        model_type="granitemoehybrid",
        architecture="GraniteMoeHybridForCausalLM",
        **_GRANITE | {"layers": layers.ALL_OR_NONE},
        shared=SharedExpert(weights=_GRANITE_SHARED, size_key="shared_intermediate_size", size=64),
        settings=moe_settings.granitemoehybrid,
    ),
    Target(
        model_type="nemotron_h",
        architecture="NemotronHForCausalLM",
        routings=_SIGMOID_TOPK,
        layouts=_layouts(
            linear_layers("", "mixer.experts.{expert}.up_proj", "mixer.experts.{expert}.down_proj"),
            "mixer.experts",
            router="mixer.gate.weight",
        ),
        keys=replace(_DEEPSEEK["keys"], aliases=("num_local_experts",)),
        layers=layers.BLOCK_TYPES,
        layer="backbone.layers.{layer}.",
        correction_bias=CorrectionBias(name="mixer.gate.e_score_correction_bias"),
        shared=SharedExpert(
            weights=linear_layers(
                "", "mixer.shared_experts.up_proj", "mixer.shared_experts.down_proj"
            )[:2],
            size_key="moe_shared_expert_intermediate_size",
            size=64,
        ),
        settings=moe_settings.nemotron_h,
    ),
)
NATIVE: Mapping[str, Target] = {row.model_type: row for row in _ROWS}
WRAPPED_TARGETS: Mapping[str, Target] = {
    "qwen3_vl_moe_text": Target(
        model_type="qwen3_vl_moe_text",
        architecture="Qwen3VLMoeForConditionalGeneration",
        layouts={
            layout: MoeBlock(
                experts=stacked("mlp.experts", transposed=layout is ExpertLayout.STACKED),
                router="mlp.gate.weight",
            )
            for layout in (ExpertLayout.STACKED, ExpertLayout.FUSED)
        },
        keys=replace(_QWEN["keys"], routing=None),
        layers=layers.MLP_ONLY_LAYERS,
        settings=lambda _: {"norm_topk_prob": True},  # for vLLM
    )
}
"""Targets that exist only inside wrappers."""
GROW_ONLY: Mapping[str, Target] = {
    "olmoe": Target(
        model_type="olmoe",
        architecture="OlmoeForCausalLM",
        **_OLMO | {"routings": _EITHER_SOFTMAX[::-1]},
    )
}
"""MoE types that no dense model becomes, but that --expand supports."""
