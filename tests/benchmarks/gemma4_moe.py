"""How exactly the mixture of experts of gemma4_text can be a dense gemma4_text.

    python tests/benchmarks/gemma4_moe.py

makes tiny dense models with smaller and smaller MLP outputs, and converts each to transformers' own
class (E2G2T2), which multiplies gates by √ε; then it multiplies them by 1/√ε. It prints the largest
difference of the logits, relative to the largest logit, in float32. Then it silences the MLP beside
the experts in three ways, takes a few steps of AdamW with each, and prints the KL to the dense
model's predictions.
"""

from __future__ import annotations

import copy
import math
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from markdown_table import header, row
from smollm2 import load, mean_kl

from upcycle_cli import Recipe, convert

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "vocab_size_per_layer_input": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
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
ROOT_EPS = math.sqrt(1e-6)  # of rms_norm_eps
BESIDE = ("zero down", "zero norm", "zero norm, dense MLP")
IDS = torch.randint(260, (4, 48), generator=torch.Generator().manual_seed(2))


def dense_model(size: float) -> Any:  # noqa: ANN401 - transformers is untyped
    """Return a dense model with down projections scaled by `size`."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma4_text", **SIZES)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 1.0 if "embed" in name else 0.2 * (size if "down_proj" in name else 1.0)
        parameter.data = 1 + 0.3 * noise.clamp(-2, 2) if "norm" in name else scale * noise
    return model


@torch.no_grad()
def moe_model(dense: Any, gates: float, beside: str = "zero norm") -> Any:  # noqa: ANN401
    """Return its mixture of experts, with gates times a factor and a silent MLP beside them."""
    with tempfile.TemporaryDirectory() as name:
        source, moe = Path(name) / "dense", Path(name) / "moe"
        dense.save_pretrained(source)
        convert(source, moe, Recipe("E2G2T2"), target="gemma4_text")
        model = load(moe)
    for layer, old in zip(model.model.layers, dense.model.layers, strict=True):
        layer.router.per_expert_scale *= gates / ROOT_EPS
        if beside == "zero down":
            layer.post_feedforward_layernorm_1.weight.fill_(1)
            layer.mlp.down_proj.weight.zero_()
        elif beside == "zero norm, dense MLP":
            layer.mlp = copy.deepcopy(old.mlp)
    return model


@torch.no_grad()
def predictions(model: Any) -> torch.Tensor:  # noqa: ANN401
    """Return the logits (P, V)."""
    logits_BSV: torch.Tensor = model(IDS).logits
    return logits_BSV.flatten(0, 1)


def steps(model: Any, wanted: torch.Tensor, rate: float) -> str:  # noqa: ANN401
    """Return the KL after 1, 2 and 5 steps."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, found = torch.optim.AdamW(trained, lr=rate), []
    for _ in range(5):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        found.append(mean_kl(wanted, predictions(model)))
    return ", ".join(f"{found[step]:.1e}" for step in (0, 1, 4))


def main() -> None:
    """Print both tables."""
    print(header("smallest mean square of an MLP's output", "gates × 1", "gates × √ε"))
    for size in (1.0, 0.1, 0.01, 0.001):
        dense, seen = dense_model(size), list[float]()
        for layer in dense.model.layers:
            layer.mlp.register_forward_hook(
                lambda _, __, out, seen=seen: seen.append(float(out.square().mean(-1).min()))
            )
        wanted = predictions(dense)
        found = [predictions(moe_model(dense, gates)) for gates in (1.0, ROOT_EPS)]
        off = [float((each - wanted).abs().max() / wanted.abs().max()) for each in found]
        print(row(*(f"{number:.1e}" for number in (min(seen), *off))))

    print("", header("MLP beside", "gates", "their scale", "lr", "KL after 1, 2, 5"), sep="\n")
    wanted = predictions(dense_model(1.0))
    for rate in (1e-5, 1e-4, 3e-4):
        found_KL = steps(dense_model(1.0), wanted, rate)
        print(row("the dense model", "", "", f"{rate:g}", found_KL))
        for beside, gates, is_frozen in product(BESIDE, (1.0, ROOT_EPS), (True, False)):
            model = moe_model(dense_model(1.0), gates, beside)
            for layer in model.model.layers:
                layer.router.per_expert_scale.requires_grad_(not is_frozen)
            scale, kl = "frozen" if is_frozen else "trained", steps(model, wanted, rate)
            print(row(beside, f"× {gates:g}", scale, f"{rate:g}", kl), flush=True)


if __name__ == "__main__":
    main()
