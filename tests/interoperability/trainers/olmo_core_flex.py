"""OLMo-core's transformer with the weights of MODEL.

It converts tensors by the type in the config, and leaves the model's config to whoever calls. What
sends tokens to experts is made for GPUs: here every expert of its own takes every token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from answer import Rows, changed, config, next_token_loss, rope_of, serve, tensors
from olmo_core.nn.hf.config import get_hf_config
from olmo_core.nn.hf.convert import convert_state_from_hf, convert_state_to_hf
from olmo_core.nn.moe.parallel_mlp import ParallelMLPBase
from olmo_core.nn.rope import (
    PIRoPEScalingConfig,
    StepwiseRoPEScalingConfig,
    YaRNRoPEScalingConfig,
)
from olmo_core.nn.transformer import TransformerConfig
from transformers import AutoConfig


def on_cpu(
    self: Any, x: torch.Tensor, weights_TK: torch.Tensor, chosen_TK: torch.Tensor, _: torch.Tensor
) -> torch.Tensor:
    """Return the weighted sum of what the chosen experts make of each token, (…, D)."""
    x_TD = x.reshape(-1, x.shape[-1])
    out_TED = self.mlp(x_TD.expand(self.mlp.num_experts, *x_TD.shape)).transpose(0, 1)
    chosen_TK = chosen_TK.reshape(len(x_TD), -1)
    picked_TKD = out_TED[torch.arange(len(x_TD))[:, None], chosen_TK]
    sum_TD: torch.Tensor = (picked_TKD * weights_TK.reshape(*chosen_TK.shape, 1)).sum(1)
    return sum_TD.view_as(x)


ParallelMLPBase.forward = on_cpu


def measure(folder: Path, rows: Rows) -> tuple[float, list[str], dict[str, Any]]:
    """Say the loss as its router is by default and as MODEL's, and what is given back."""
    theirs = AutoConfig.from_pretrained(folder)
    state = convert_state_from_hf(theirs, tensors(folder), model_type=theirs.model_type)
    rope = rope_of(folder, ("linear", "yarn", "llama3"))
    losses, models = {}, {}
    for normalized in (False, config(folder)["norm_topk_prob"]):
        model = build(config(folder), rope, normalized=normalized)
        model.load_state_dict(state)
        with torch.no_grad():
            losses[normalized] = next_token_loss(model.eval()(torch.tensor(rows)), rows)
        models[normalized] = model
    model = models[config(folder)["norm_topk_prob"]]
    exported = get_hf_config(model)
    wrong = changed(folder, convert_state_to_hf(exported, model.state_dict()))
    measured = {"loss by default": losses[False], "norm_topk_prob": exported.norm_topk_prob}
    return losses[config(folder)["norm_topk_prob"]], wrong, measured


def build(settings: dict[str, Any], rope: dict[str, Any], *, normalized: bool) -> Any:
    """Return a model with gates that sum to one, or not."""
    made = TransformerConfig.llama_like_moe(
        d_model=settings["hidden_size"],
        vocab_size=settings["vocab_size"],
        n_layers=settings["num_hidden_layers"],
        n_heads=settings["num_attention_heads"],
        n_kv_heads=settings["num_key_value_heads"],
        num_experts=settings["num_experts"],
        top_k=settings["num_experts_per_tok"],
        expert_hidden_size=settings["intermediate_size"],
        dropless=False,
        capacity_factor=float(settings["num_experts"]),  # so that no token is dropped
        reordered_norm=True,
        layer_norm_eps=settings["rms_norm_eps"],
        rope_theta=rope["rope_theta"],
    )
    length = {"old_context_len": rope.get("original_max_position_embeddings")}
    match rope["rope_type"]:
        case "linear":
            made.block.sequence_mixer.rope.scaling = PIRoPEScalingConfig(factor=rope["factor"])
        case "yarn":
            made.block.sequence_mixer.rope.scaling = YaRNRoPEScalingConfig(
                factor=rope["factor"], **length
            )
        case "llama3":
            made.block.sequence_mixer.rope.scaling = StepwiseRoPEScalingConfig(
                factor=rope["factor"],
                low_freq_proportion=1 - 1 / rope["low_freq_factor"],
                high_freq_proportion=1 / rope["high_freq_factor"],
                **length,
            )
    made.block.sequence_mixer.head_dim = settings.get("head_dim")
    made.block.feed_forward_moe.router.normalize_expert_weights = 1.0 if normalized else None
    return made.build(init_device="cpu")


if __name__ == "__main__":
    serve(measure)
