"""mixtral: for llama and mistral without biases; gates always sum to 1; one window for all layers.

The expert size goes into `intermediate_size` itself. w1, w3, w2 are gate, up, down.
"""

from __future__ import annotations

from typing import Any

from upcycle_cli.families.dense import Decoder
from upcycle_cli.families.target import Keys, Names, Target, bias_refusal, mixed_windows
from upcycle_cli.recipe import Routing


def _refusal(decoder: Decoder) -> str | None:
    if mixed_windows(decoder):
        return "only some layers slide, and its layers all attend alike"
    return bias_refusal(decoder, qkv_allowed=False)


def _settings(decoder: Decoder) -> dict[str, Any]:
    return {"sliding_window": decoder.sliding_window, "router_jitter_noise": 0.0}


_MOE = "model.layers.{layer}.block_sparse_moe"
_FUSED = "model.layers.{layer}.mlp"

MIXTRAL = Target(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    routings=(Routing.TOPK_SOFTMAX,),
    names=Names(
        router=f"{_MOE}.gate.weight",
        gate=f"{_MOE}.experts.{{expert}}.w1.weight",
        up=f"{_MOE}.experts.{{expert}}.w3.weight",
        down=f"{_MOE}.experts.{{expert}}.w2.weight",
        fused_router=f"{_FUSED}.gate.weight",
        fused_gate_up=f"{_FUSED}.experts.gate_up_proj",
        fused_down=f"{_FUSED}.experts.down_proj",
    ),
    keys=Keys(
        num_experts="num_local_experts",
        top_k="num_experts_per_tok",
        expert_size="intermediate_size",
        norm_topk_prob=None,
    ),
    refusal=_refusal,
    settings=_settings,
)
