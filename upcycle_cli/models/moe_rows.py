"""The MoE architectures: a row of data for each that dense models can become.

The last of all targets is the code that is shipped with a model, which takes what has no sibling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from upcycle_cli.models.gemma4_row import GEMMA4_TEXT
from upcycle_cli.models.layers import (
    ALL,
    ALL_OR_NONE,
    BLOCK_TYPES,
    FIRST_K_DENSE,
    MLP_ONLY_LAYERS,
    MLP_TYPES,
    MLP_TYPES_TOO,
    MOE_RANGE,
    NUM_DENSE_LAYERS,
)
from upcycle_cli.models.mlp import separate, swiglu, without_biases
from upcycle_cli.models.moe import CorrectionBias, Keys, SharedExpert, Target
from upcycle_cli.models.moe_layouts import (
    GATED_SHARED,
    GRANITE_LAYOUTS,
    GRANITE_SHARED,
    QWEN_LAYOUTS,
    layouts,
)
from upcycle_cli.models.moe_settings import (
    DEEPSEEK_SETTINGS,
    cohere2_moe_settings,
    deepseek_v3_settings,
    glm4_moe_settings,
    granitemoe_swa_settings,
    hybrid_settings,
    lfm2_moe_settings,
    mellum_settings,
    mixtral_refusal,
    no_mixed_windows,
    no_windows,
    odd_thetas,
    qwen3_5_moe_settings,
    window_settings,
)
from upcycle_cli.recipe.recipe import ExpertLayout, Routing

_BY_NORM = ("norm_topk_prob", {True: Routing.TOPK_SOFTMAX, False: Routing.SOFTMAX_TOPK})
_SIGMOID = ("norm_topk_prob", {True: Routing.SIGMOID_TOPK})


_GRANITE_KEYS = Keys(
    num_experts="num_local_experts", aliases=("num_experts",), expert_size="intermediate_size"
)
_NO_O_BIAS = "attention_bias is true, and its o_proj has no bias"
_NO_QKV_BIAS = "{model_type} has q, k and v biases, and its attention has none"
_QKV = tuple(f"self_attn.{matrix}_proj" for matrix in "qkv")


_DEEPSEEK: Any = {
    "routings": (Routing.SIGMOID_TOPK,),
    "layouts": QWEN_LAYOUTS,
    "keys": Keys(
        num_experts="n_routed_experts",
        aliases=("num_local_experts", "num_experts"),
        routing=_SIGMOID,
        scale="routed_scaling_factor",
    ),
    "correction_bias": CorrectionBias(name="mlp.gate.e_score_correction_bias"),
    "shared": SharedExpert(
        weights=without_biases(swiglu("mlp.shared_experts")), count_key="n_shared_experts"
    ),
}
"""What DeepSeek's mixture of experts has, and those that are made after it."""

_ROWS: Sequence[Target] = (
    Target(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        routings=(Routing.TOPK_SOFTMAX,),
        layouts=layouts(
            separate(
                *(f"block_sparse_moe.experts.{{expert}}.{matrix}" for matrix in ("w1", "w3", "w2"))
            ),
            "mlp.experts",
            router="block_sparse_moe.gate.weight",
            fused_router="mlp.gate.weight",
        ),
        keys=Keys(
            num_experts="num_local_experts",
            aliases=("num_experts",),
            expert_size="intermediate_size",
        ),
        layers=ALL,
        lacks={"self_attn.o_proj.bias": _NO_O_BIAS, "self_attn.q_proj.bias": _NO_QKV_BIAS},
        refusal=mixtral_refusal,
        settings=lambda dense: {"sliding_window": dense.windows[0], "router_jitter_noise": 0.0},
    ),
    Target(
        # It always has a shared expert and q, k and v biases. A source without biases gets zeros,
        # since vLLM reads them unasked; the shared expert is 64 wide, since vLLM refuses an empty
        # one; and its gate is drawn at random, since llama.cpp computes it as silu(x)/x, which is
        # 0/0 for a zero row.
        model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        routings=(Routing.SOFTMAX_TOPK, Routing.TOPK_SOFTMAX),
        layouts=QWEN_LAYOUTS,
        keys=Keys(num_experts="num_experts", aliases=("num_local_experts",), routing=_BY_NORM),
        layers=MLP_ONLY_LAYERS,
        shared=GATED_SHARED,
        zero_biases=_QKV,
        lacks={"self_attn.o_proj.bias": _NO_O_BIAS},
        settings=lambda dense: window_settings(dense) | {"qkv_bias": True},
    ),
    Target(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        routings=(Routing.TOPK_SOFTMAX, Routing.SOFTMAX_TOPK),
        layouts=QWEN_LAYOUTS,
        keys=Keys(num_experts="num_experts", aliases=("num_local_experts",), routing=_BY_NORM),
        layers=MLP_ONLY_LAYERS,
        refusal=no_mixed_windows,
        settings=lambda dense: (
            window_settings(dense) | {"attention_bias": dense.values["attention_bias"]}
        ),
    ),
    Target(
        # Released models do not renormalise, nor does vLLM whatever a config says; but the norm
        # behind the experts takes such a factor out, so the exact routing can be the default.
        model_type="flex_olmo",
        architecture="FlexOlmoForCausalLM",
        routings=(Routing.TOPK_SOFTMAX, Routing.SOFTMAX_TOPK),
        layouts=QWEN_LAYOUTS,
        keys=Keys(
            num_experts="num_experts",
            aliases=("num_local_experts",),
            expert_size="intermediate_size",
            routing=_BY_NORM,
        ),
        layers=ALL,
    ),
    Target(
        model_type="glm4_moe",
        architecture="Glm4MoeForCausalLM",
        **_DEEPSEEK,
        layers=FIRST_K_DENSE,
        lacks={"self_attn.o_proj.bias": _NO_O_BIAS},
        refusal=no_windows,
        settings=glm4_moe_settings,
    ),
    Target(
        model_type="dots1",
        architecture="Dots1ForCausalLM",
        **_DEEPSEEK,
        layers=FIRST_K_DENSE,
        settings=lambda dense: {**DEEPSEEK_SETTINGS, **window_settings(dense)},
    ),
    Target(
        model_type="mellum",
        architecture="MellumForCausalLM",
        routings=(Routing.TOPK_SOFTMAX, Routing.SOFTMAX_TOPK),
        layouts=QWEN_LAYOUTS,
        keys=Keys(num_experts="num_experts", aliases=("num_local_experts",), routing=_BY_NORM),
        layers=MLP_TYPES,
        settings=mellum_settings,
    ),
    Target(
        model_type="hy_v3",
        architecture="HYV3ForCausalLM",
        routings=(Routing.SIGMOID_TOPK,),
        layouts=layouts(
            swiglu("mlp.experts.{expert}"),
            "mlp.experts",
            router="mlp.router.gate.weight",
            fused_router="mlp.gate.weight",
        ),
        keys=Keys(
            num_experts="num_experts",
            aliases=("num_local_experts",),
            expert_size_too="expert_hidden_dim",
            scale="router_scaling_factor",
        ),
        layers=MLP_TYPES_TOO,
        correction_bias=CorrectionBias(name="mlp.expert_bias", fused="mlp.e_score_correction_bias"),
        shared=SharedExpert(
            weights=without_biases(swiglu("mlp.shared_mlp")),
            fused=without_biases(swiglu("mlp.shared_experts")),
            count_key="num_shared_experts",
        ),
        refusal=no_windows,
        # The last two are for vLLM.
        settings=lambda _: {"num_shared_experts": 1, "qk_norm": True, "route_norm": True},
    ),
    Target(
        model_type="solar_open",
        architecture="SolarOpenForCausalLM",
        **_DEEPSEEK,
        layers=ALL,
        lacks={"self_attn.o_proj.bias": _NO_O_BIAS},
        # The last two are for MLX.
        settings=lambda _: {
            **DEEPSEEK_SETTINGS,
            "first_k_dense_replace": 0,
            "partial_rotary_factor": 1.0,
        },
    ),
    Target(
        model_type="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        **_DEEPSEEK,
        layers=FIRST_K_DENSE,
        settings=deepseek_v3_settings,
    ),
    Target(
        model_type="ernie4_5_moe",
        architecture="Ernie4_5_MoeForCausalLM",
        routings=(Routing.TOPK_SOFTMAX,),
        layouts=QWEN_LAYOUTS,
        keys=Keys(num_experts="moe_num_experts", aliases=("num_experts",), top_k="moe_k"),
        layers=MOE_RANGE,
        correction_bias=CorrectionBias(
            name="mlp.moe_statics.e_score_correction_bias",
            fused="mlp.gate.moe_statics.e_score_correction_bias",
            routing=Routing.TOPK_SOFTMAX,
            rows=1,
        ),
        shared=SharedExpert(
            weights=without_biases(swiglu("mlp.shared_experts")),
            count_key="moe_num_shared_experts",
            insisted_on=False,
        ),
        settings=lambda _: {"moe_num_shared_experts": 0},
    ),
    Target(
        model_type="hunyuan_v1_moe",
        architecture="HunYuanMoEV1ForCausalLM",
        routings=(Routing.TOPK_SOFTMAX,),
        layouts=layouts(swiglu("mlp.experts.{expert}"), "mlp.experts", router="mlp.gate.wg.weight"),
        keys=Keys(
            num_experts="num_experts",
            aliases=("num_local_experts",),
            top_k="moe_topk",
            expert_size="intermediate_size",
        ),
        layers=ALL,
        shared=SharedExpert(weights=without_biases(swiglu("mlp.shared_mlp"))),
    ),
    Target(
        model_type="lfm2_moe",
        architecture="Lfm2MoeForCausalLM",
        routings=(Routing.SIGMOID_TOPK,),
        layouts=layouts(
            separate(*(f"feed_forward.experts.{{expert}}.w{i}" for i in (1, 3, 2))),
            "feed_forward.experts",
            router="feed_forward.gate.weight",
        ),
        keys=Keys(num_experts="num_experts", routing=_SIGMOID, scale="routed_scaling_factor"),
        layers=NUM_DENSE_LAYERS,
        correction_bias=CorrectionBias(name="feed_forward.expert_bias"),
        settings=lfm2_moe_settings,
    ),
    Target(
        model_type="cohere2_moe",
        architecture="Cohere2MoeForCausalLM",
        routings=(Routing.TOPK_SOFTMAX, Routing.SIGMOID_TOPK),
        layouts=QWEN_LAYOUTS,
        keys=Keys(
            num_experts="num_experts",
            expert_size="intermediate_size",
            dense_size="prefix_dense_intermediate_size",
            routing=(
                "expert_selection_fn",
                {"softmax": Routing.TOPK_SOFTMAX, "sigmoid": Routing.SIGMOID_TOPK},
            ),
        ),
        layers=MLP_TYPES,
        shared=SharedExpert(
            weights=without_biases(swiglu("mlp.shared_experts")),
            count_key="num_shared_experts",
            insisted_on=False,
            # The other one, which is the default, halves the sum.
            settings={"shared_expert_combination_strategy": "sum"},
        ),
        settings=cohere2_moe_settings,
    ),
    Target(
        model_type="qwen3_5_moe_text",
        architecture="Qwen3_5MoeForCausalLM",
        routings=(Routing.TOPK_SOFTMAX,),
        layouts=QWEN_LAYOUTS,
        keys=Keys(num_experts="num_experts"),
        layers=ALL,
        shared=GATED_SHARED,
        settings=qwen3_5_moe_settings,
    ),
    GEMMA4_TEXT,
    Target(
        model_type="granitemoe",
        architecture="GraniteMoeForCausalLM",
        routings=(Routing.TOPK_SOFTMAX,),
        layouts=GRANITE_LAYOUTS,
        keys=_GRANITE_KEYS,
        layers=ALL,
    ),
    Target(
        model_type="granitemoe_swa",
        architecture="GraniteMoeSWAForCausalLM",
        routings=(Routing.TOPK_SOFTMAX,),
        layouts={ExpertLayout.FUSED: GRANITE_LAYOUTS[ExpertLayout.FUSED]},
        keys=_GRANITE_KEYS,
        layers=ALL,
        shared=SharedExpert(
            weights=GRANITE_SHARED, size_key="shared_intermediate_size", insisted_on=False
        ),
        refusal=odd_thetas,
        settings=granitemoe_swa_settings,
    ),
    Target(
        # Without experts, the shared expert is the MLP of a dense model.
        model_type="granitemoehybrid",
        architecture="GraniteMoeHybridForCausalLM",
        routings=(Routing.TOPK_SOFTMAX,),
        layouts=GRANITE_LAYOUTS,
        keys=_GRANITE_KEYS,
        layers=ALL_OR_NONE,
        shared=SharedExpert(weights=GRANITE_SHARED, size_key="shared_intermediate_size", size=64),
        settings=hybrid_settings,
    ),
    Target(
        model_type="nemotron_h",
        architecture="NemotronHForCausalLM",
        routings=(Routing.SIGMOID_TOPK,),
        layouts=layouts(
            separate("", "mixer.experts.{expert}.up_proj", "mixer.experts.{expert}.down_proj"),
            "mixer.experts",
            router="mixer.gate.weight",
        ),
        keys=Keys(
            num_experts="n_routed_experts",
            aliases=("num_local_experts",),
            routing=_SIGMOID,
            scale="routed_scaling_factor",
        ),
        layers=BLOCK_TYPES,
        layer="backbone.layers.{layer}.",
        correction_bias=CorrectionBias(name="mixer.gate.e_score_correction_bias"),
        shared=SharedExpert(
            weights=without_biases(
                separate("", "mixer.shared_experts.up_proj", "mixer.shared_experts.down_proj")
            ),
            size_key="moe_shared_expert_intermediate_size",
            size=64,
        ),
        settings=lambda _: {
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "moe_latent_size": None,
            "norm_topk_prob": True,
        },
    ),
)
NATIVE: Mapping[str, Target] = {row.model_type: row for row in _ROWS}
FURTHER: Mapping[str, Target] = {
    "olmoe": Target(
        model_type="olmoe",
        architecture="OlmoeForCausalLM",
        routings=(Routing.SOFTMAX_TOPK, Routing.TOPK_SOFTMAX),
        layouts=QWEN_LAYOUTS,
        keys=Keys(
            num_experts="num_experts",
            aliases=("num_local_experts",),
            expert_size="intermediate_size",
            routing=_BY_NORM,
        ),
        layers=ALL,
    ),
}
"""Those that no dense model becomes, and whose models can be grown."""
