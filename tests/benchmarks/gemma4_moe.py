"""How exactly the mixture of experts of gemma4_text can be a dense gemma4_text.

    python tests/benchmarks/gemma4_moe.py

makes tiny dense models whose MLPs put out less and less, and of each the MoE of transformers' own
class (E2G2T2) by hand: once with gates as they are, once with gates times √ε. It prints the largest
difference of the logits, relative to the largest logit, in float32. Then it takes a few steps of
AdamW with such MoEs, whose MLP beside the experts is silent in three ways, and prints how far, by
KL, predictions are from the dense model's by then.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

HIDDEN, WIDTH, EXPANSION, GRANULARITY, INERT = 32, 48, 2, 2, 16
SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "vocab_size_per_layer_input": 260,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "hidden_size_per_layer_input": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
    "pad_token_id": None,
}
EPS = 1e-6  # rms_norm_eps
BESIDE = ("zero down", "zero norm", "zero norm, dense MLP")


def main() -> None:
    ids = torch.randint(260, (4, 48), generator=torch.Generator().manual_seed(2))
    print("| smallest mean square of an MLP's output | gates × 1 | gates × √ε |\n|---|---|---|")
    for size in (1.0, 0.1, 0.01, 0.001):
        dense, seen = dense_model(size), list[float]()
        for layer in dense.model.layers:
            layer.mlp.register_forward_hook(
                lambda _, __, out, seen=seen: seen.append(float(out.square().mean(-1).min()))
            )
        with torch.no_grad():
            wanted = dense(ids).logits
            found = [moe_model(dense, gates)(ids).logits for gates in (1.0, math.sqrt(EPS))]
        off = [float((logits - wanted).abs().max() / wanted.abs().max()) for logits in found]
        print(f"| {min(seen):.1e} | {off[0]:.1e} | {off[1]:.1e} |")
    print_steps(ids)


def print_steps(ids: torch.Tensor) -> None:
    print("\n| MLP beside the experts | gates | their scale | lr | KL after 1, 2, 5 steps |")
    print("|---|---|---|---|---|")
    dense = dense_model(1.0)
    with torch.no_grad():
        wanted = dense(ids).logits.log_softmax(-1)
    for rate in (1e-5, 1e-4, 3e-4):
        found = steps(dense_model(1.0), ids, wanted, rate)
        print(f"| the dense model | | | {rate:g} | {found} |")
        for beside, gates, is_frozen in product(BESIDE, (1.0, math.sqrt(EPS)), (True, False)):
            model = moe_model(dense, gates, beside)
            for layer in model.model.layers:
                layer.router.per_expert_scale.requires_grad_(not is_frozen)
            words, found = ("frozen" if is_frozen else "trained"), steps(model, ids, wanted, rate)
            print(f"| {beside} | × {gates:g} | {words} | {rate:g} | {found} |", flush=True)


def steps(model: Any, ids: torch.Tensor, wanted: torch.Tensor, rate: float) -> str:  # noqa: ANN401
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, found = torch.optim.AdamW(trained, lr=rate), []
    for _ in range(5):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        with torch.no_grad():
            now = model(ids).logits.log_softmax(-1)
        found.append(float((wanted.exp() * (wanted - now)).sum(-1).mean()))
    return ", ".join(f"{found[step]:.1e}" for step in (0, 1, 4))


def dense_model(size: float) -> Any:  # noqa: ANN401 - transformers is untyped
    model = _made({})
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 1.0 if "embed" in name else 0.2 * (size if "down_proj" in name else 1.0)
        parameter.data = 1 + 0.3 * noise.clamp(-2, 2) if "norm" in name else scale * noise
    return model


def moe_model(dense: Any, gates: float, beside: str = "zero down") -> Any:  # noqa: ANN401
    num_experts, width = EXPANSION * GRANULARITY, WIDTH // GRANULARITY
    experts = {"num_experts": num_experts, "top_k_experts": 2, "moe_intermediate_size": width}
    inert = WIDTH if "dense" in beside else INERT
    model = _made({"enable_moe_block": True, "intermediate_size": inert, **experts})
    held, own = dense.state_dict(), model.state_dict()
    own |= {name: held[name] for name in own.keys() & held.keys() if ".mlp." not in name}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        gate, up, down = (
            held[f"{prefix}mlp.{part}_proj.weight"].chunk(GRANULARITY, dim)
            for part, dim in (("gate", 0), ("up", 0), ("down", 1))
        )
        shards = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
        gamma = held[f"{prefix}pre_feedforward_layernorm.weight"]
        rows = torch.randn(EXPANSION, HIDDEN, generator=torch.Generator().manual_seed(1))
        own |= {
            f"{prefix}experts.gate_up_proj": torch.stack(shards * EXPANSION),
            f"{prefix}experts.down_proj": torch.stack(list(down) * EXPANSION),
            f"{prefix}pre_feedforward_layernorm_2.weight": gamma,
            f"{prefix}router.scale": gamma * math.sqrt(HIDDEN),  # it sees what the MLP sees
            f"{prefix}router.proj.weight": rows.repeat_interleave(GRANULARITY, 0) / gamma.norm(),
            f"{prefix}router.per_expert_scale": torch.full((num_experts,), GRANULARITY * gates),
        }
        if beside == "zero down":
            own[f"{prefix}mlp.down_proj.weight"] = torch.zeros(HIDDEN, INERT)
        else:
            own[f"{prefix}post_feedforward_layernorm_1.weight"] = torch.zeros(HIDDEN)
        for part, dim in (("gate", 0), ("up", 0), ("down", 1)):
            name = f"{prefix}mlp.{part}_proj.weight"
            if beside != "zero down" or part != "down":
                own[name] = held[name].narrow(dim, 0, inert).clone()
    model.load_state_dict(own)
    return model


def _made(settings: dict[str, Any]) -> Any:  # noqa: ANN401
    config = AutoConfig.for_model("gemma4_text", **{**SIZES, **settings})
    return AutoModelForCausalLM.from_config(config).eval()


if __name__ == "__main__":
    main()
