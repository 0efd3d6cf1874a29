"""qwen3_moe: for qwen3; both routings; every layer attends alike."""

from __future__ import annotations

from typing import Any

from upcycle_cli.families.dense import Decoder
from upcycle_cli.families.target import Keys, Names, Target, mixed_windows, sliding_settings
from upcycle_cli.recipe import Routing


def _refusal(decoder: Decoder) -> str | None:
    if mixed_windows(decoder):
        return "only some layers slide (layer_types), and its layers all attend alike"
    return None


def _settings(decoder: Decoder) -> dict[str, Any]:
    return sliding_settings(decoder) | {
        "attention_bias": decoder.o_bias,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


_MLP = "model.layers.{layer}.mlp"

QWEN3_MOE = Target(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    routings=(Routing.TOPK_SOFTMAX, Routing.SOFTMAX_TOPK),
    names=Names(
        router=f"{_MLP}.gate.weight",
        gate=f"{_MLP}.experts.{{expert}}.gate_proj.weight",
        up=f"{_MLP}.experts.{{expert}}.up_proj.weight",
        down=f"{_MLP}.experts.{{expert}}.down_proj.weight",
        fused_router=f"{_MLP}.gate.weight",
        fused_gate_up=f"{_MLP}.experts.gate_up_proj",
        fused_down=f"{_MLP}.experts.down_proj",
    ),
    keys=Keys(
        num_experts="num_experts",
        top_k="num_experts_per_tok",
        expert_size="moe_intermediate_size",
        norm_topk_prob="norm_topk_prob",
    ),
    refusal=_refusal,
    settings=_settings,
)
