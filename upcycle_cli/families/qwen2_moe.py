"""qwen2_moe: for llama, mistral and qwen2; both routings.

The architecture always has a shared expert and q, k and v biases. A source without biases gets
zeros, since vLLM reads them unasked; the shared expert is 64 wide and all zeros, since vLLM refuses
an empty one; and its gate is drawn at random, since llama.cpp computes it as silu(x)/x, which is
0/0 for a zero row. Its output is zero whatever the gate.
"""

from __future__ import annotations

from typing import Any

from upcycle_cli.families.dense import Decoder
from upcycle_cli.families.target import Keys, Names, Target, bias_refusal, sliding_settings
from upcycle_cli.recipe import Routing

SHARED_EXPERT_SIZE = 64


def _refusal(decoder: Decoder) -> str | None:
    return bias_refusal(decoder, qkv_allowed=True)


def _settings(decoder: Decoder) -> dict[str, Any]:
    return sliding_settings(decoder) | {
        "qkv_bias": True,
        "shared_expert_intermediate_size": SHARED_EXPERT_SIZE,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


_MLP = "model.layers.{layer}.mlp"

QWEN2_MOE = Target(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    routings=(Routing.SOFTMAX_TOPK, Routing.TOPK_SOFTMAX),
    names=Names(
        router=f"{_MLP}.gate.weight",
        gate=f"{_MLP}.experts.{{expert}}.gate_proj.weight",
        up=f"{_MLP}.experts.{{expert}}.up_proj.weight",
        down=f"{_MLP}.experts.{{expert}}.down_proj.weight",
        fused_router=f"{_MLP}.gate.weight",
        fused_gate_up=f"{_MLP}.experts.gate_up_proj",
        fused_down=f"{_MLP}.experts.down_proj",
        shared_gate=f"{_MLP}.shared_expert.gate_proj.weight",
        shared_up=f"{_MLP}.shared_expert.up_proj.weight",
        shared_down=f"{_MLP}.shared_expert.down_proj.weight",
        shared_router=f"{_MLP}.shared_expert_gate.weight",
    ),
    keys=Keys(
        num_experts="num_experts",
        top_k="num_experts_per_tok",
        expert_size="moe_intermediate_size",
        norm_topk_prob="norm_topk_prob",
    ),
    refusal=_refusal,
    settings=_settings,
    shared_expert_size=SHARED_EXPERT_SIZE,
    forced_qkv_bias=True,
)
