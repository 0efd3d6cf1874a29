"""torchtitan's Qwen3 with the weights of MODEL.

Its registry has only released sizes, so the config is built as the registry builds one. Two things
are not as on a GPU: attention is not compiled, and experts compute in float32 and not in bfloat16,
so that what is compared is names, layout and routing.
"""

from __future__ import annotations

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from answer import Rows, changed, config, next_token_loss, rope_of, serve, tensors
from torchtitan.components.optimizer import register_moe_load_balancing_hook
from torchtitan.models import qwen3
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.models.qwen3.state_dict_adapter import Qwen3StateDictAdapter


def measure(folder: Path, rows: Rows) -> tuple[float, list[str], dict[str, Any]]:
    """Say the loss as its registry routes and as MODEL does, and what its adapter gives back."""
    settings, held = config(folder), tensors(folder)
    rope, scaling, losses = rope_of(folder, ("yarn",)), {}, {}
    if rope["rope_type"] == "yarn":
        scaling = {"scaling": "yarn", "rope_factor": rope["factor"]}
        scaling["original_seq_len"] = rope["original_max_position_embeddings"]
    for route_norm in (True, settings["norm_topk_prob"]):
        made = build_config(settings, scaling, route_norm=route_norm)
        model = made.build()
        adapter = Qwen3StateDictAdapter(made, None)
        state = adapter.from_hf(dict(held))
        absent, surplus = model.load_state_dict(state, strict=False)
        absent = [name for name in absent if not name.endswith("expert_bias_E")]
        if absent or surplus:
            raise SystemExit(f"Error: {[*absent, *surplus][0]} does not fit")
        losses[route_norm] = first_loss(model, rows)
    moved, kept = after_a_step(model, adapter)
    wrong = changed(folder, adapter.to_hf(model.state_dict()))
    measured = {"loss by default": losses[True], "bias moved by": moved, "exports it": kept}
    return losses[settings["norm_topk_prob"]], wrong, measured


def build_config(settings: dict[str, Any], scaling: dict[str, Any], *, route_norm: bool) -> Any:
    """Return the config of a Qwen3 model, as torchtitan's registry would."""
    dim, head_dim = settings["hidden_size"], settings["head_dim"]
    rope = qwen3.CosSinRoPE.Config(
        dim=head_dim,
        max_seq_len=settings["max_position_embeddings"],
        theta=settings["rope_theta"],
        **scaling,
    )
    layers = qwen3._build_qwen3_moe_layers(
        n_layers=settings["num_hidden_layers"],
        dim=dim,
        n_heads=settings["num_attention_heads"],
        n_kv_heads=settings["num_key_value_heads"],
        head_dim=head_dim,
        moe_hidden_dim=settings["moe_intermediate_size"],
        num_experts=settings["num_experts"],
        top_k=settings["num_experts_per_tok"],
        fuse_qkv=False,
        attn_backend="flex",
        moe_comm_backend="standard",
        rope=rope,
    )
    for layer in layers:
        layer.moe.router.route_norm = route_norm
    return qwen3.Qwen3Model.Config(
        vocab_size=settings["vocab_size"],
        dim=dim,
        norm=qwen3._qwen3_norm(dim),
        enable_weight_tying=settings["tie_word_embeddings"],
        tok_embeddings=qwen3.Embedding.Config(
            num_embeddings=settings["vocab_size"],
            embedding_dim=dim,
            param_init=qwen3._EMBEDDING_INIT,
        ),
        lm_head=qwen3.Linear.Config(
            in_features=dim, out_features=settings["vocab_size"], param_init=qwen3._LINEAR_INIT
        ),
        layers=layers,
    )


def experts_in_float32(self: GroupedExperts, x_RD: torch.Tensor, loads_E: torch.Tensor) -> Any:
    """Compute what GroupedExperts does, in the dtype of the weights."""
    parts = torch.split(x_RD, loads_E.tolist())
    return torch.cat(
        [
            (torch.nn.functional.silu(part @ w1.T) * (part @ w3.T)) @ w2.T
            for part, w1, w2, w3 in zip(parts, self.w1_EFD, self.w2_EDF, self.w3_EFD, strict=True)
        ]
    )


GroupedExperts.forward = experts_in_float32


def first_loss(model: Any, rows: Rows) -> float:
    """Return the loss of a batch in training."""
    ids_BT = torch.tensor(rows)
    positions_BT = torch.arange(ids_BT.shape[1]).expand(ids_BT.shape)
    masks = model.get_attention_masks(positions=positions_BT)
    with torch.no_grad():
        logits_BTV = model.train()(ids_BT, positions_BT, masks)
    return next_token_loss(logits_BTV, rows)


def after_a_step(model: Any, adapter: Any) -> tuple[float, bool]:
    """Return by how much its hook moves the bias of a choice, and whether an export has that."""
    hooks: list[Any] = []
    optimizers: Any = SimpleNamespace(register_step_pre_hook=hooks.append)
    alone: Any = SimpleNamespace(get_optional_mesh=lambda _: None, ep_enabled=False, tp=1)
    register_moe_load_balancing_hook(optimizers, [model], alone)
    for hook in hooks:
        hook(None, (), {})
    biases = [bias for name, bias in model.state_dict().items() if name.endswith("expert_bias_E")]
    moved = max(float(bias.abs().max()) for bias in biases)
    return moved, any("bias" in name for name in adapter.to_hf(model.state_dict()))


if __name__ == "__main__":
    serve(measure)
