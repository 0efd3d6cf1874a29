"""The method's formulas once more, from dense weights to an MoE's, with nothing of upcycle_cli.

`expected` returns each tensor that an MLP becomes, bit for bit, and all others as they are.
E groups, G shards, K of them shared, T experts a token, I the intermediate size, H the hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]
PARTS = ("gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a conversion was asked for: `orders` come from a file, `std` is the logits'."""

    target: str
    layout: str
    routing: str
    E: int
    G: int
    T: int
    K: int
    scaling: str | float = "exact"
    split: str = "balanced"
    shuffled: bool = False
    orders: Mapping[int, list[torch.Tensor]] | None = None
    std: float = 1.0
    seed: int = 0
    dtype: torch.dtype | None = None

    @property
    def needed(self) -> float:
        """Gates that sum to 1 leave 1/(G - K) of the MLP, uniform ones T/(E·(G - K)²)."""
        size = self.G - self.K
        return self.E * size**2 / self.T if self.routing == "softmax-topk" else float(size)


# Gate, up and down (under one name: joined, gate first), the norm before them, and its offset.
POST = "post_attention_layernorm"
LLAMA = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", POST, 0.0)
GATE_UP = ("mlp.gate_up_proj", "mlp.gate_up_proj", "mlp.down_proj", POST, 0.0)
GRANITE = ("shared_mlp.input_linear", "shared_mlp.input_linear", "shared_mlp.output_linear")
DENSE: Mapping[str, tuple[str, str, str, str, float]] = {
    "cohere2": (*LLAMA[:3], "input_layernorm", 0.0),
    "exaone": ("mlp.c_fc_0", "mlp.c_fc_1", "mlp.c_proj", "ln_2", 0.0),
    "gemma4_text": (*LLAMA[:3], "pre_feedforward_layernorm", 0.0),
    "gpt2": ("", "mlp.c_fc", "mlp.c_proj", "ln_2", 0.0),
    "granitemoehybrid": (*GRANITE, POST, 0.0),
    "lfm2": ("feed_forward.w1", "feed_forward.w3", "feed_forward.w2", "ffn_norm", 0.0),
    "nemotron": ("", "mlp.up_proj", "mlp.down_proj", POST, 1.0),
    "nemotron_h": ("", "mixer.up_proj", "mixer.down_proj", "norm", 0.0),
    "olmo2": (*LLAMA[:3], "", 0.0),
    **dict.fromkeys(("glm", "phi3"), GATE_UP),
    "qwen3_5_text": (*LLAMA[:4], 1.0),
}
LAYER = {"nemotron_h": "backbone.layers.", **dict.fromkeys(("exaone", "gpt2"), "transformer.h.")}
# exaone's names, with llama's.
RENAMED = {
    "transformer.h.": "model.layers.",
    "transformer.wte.": "model.embed_tokens.",
    "transformer.ln_f.": "model.norm.",
    "attn.attention.": "self_attn.",
    "out_proj.": "o_proj.",
    "ln_1.": "input_layernorm.",
    "ln_2.": "post_attention_layernorm.",
}
# By target, and layout where it matters: the module, the router and the shared expert.
MODULE = {"lfm2_moe": "feed_forward.", "nemotron_h": "mixer.", "gemma4_text": ""}
MODULE |= dict.fromkeys(("mixtral per-expert", "granite"), "block_sparse_moe.")
ROUTER = {"hunyuan_v1_moe": "mlp.gate.wg", "gemma4_text": "router.proj"}
ROUTER |= {"granite": "block_sparse_moe.router", "hy_v3 per-expert": "mlp.router.gate"}
SHARED = {"granite": "shared_mlp", "nemotron_h": "mixer.shared_experts"}
SHARED |= dict.fromkeys(("qwen2_moe", "qwen3_5_moe_text"), "mlp.shared_expert")
SHARED |= dict.fromkeys(("hunyuan_v1_moe", "hy_v3 per-expert"), "mlp.shared_mlp")


def places(w: Wanted, mlp: Tensors) -> tuple[list[str], str]:
    """Return the names of router, gate, up and down, and the prefix of the shared expert."""
    target = "granite" if w.target.startswith("granite") else w.target

    def find(table: Mapping[str, str], usual: str) -> str:
        return table.get(f"{target} {w.layout}", table.get(target, usual))

    module, shared = find(MODULE, "mlp."), find(SHARED, "mlp.shared_experts")
    router = find(ROUTER, f"{module}gate")
    if w.layout == "stacked":
        linear = [f"{module}{end}_linear.weight" for end in ("input", "input", "output")]
        return [f"{router}.layer.weight", *linear], shared
    if w.layout == "per-expert":
        ends = {"gate": "w1", "up": "w3", "down": "w2"} if target in ("mixtral", "lfm2_moe") else {}
        names = [f"{module}experts.{{e}}.{ends.get(p, p + '_proj')}.weight" for p in PARTS]
        return [f"{router}.weight", *names], shared
    # vLLM takes whatever is called experts in shipped code for SwiGLU.
    plain = target != "upcycled" or ("gate" in mlp and "up_bias" not in mlp)
    stack = module + ("experts" if plain else "expert_mlps")
    up = f"{stack}.gate_up_proj" if "gate" in mlp else f"{stack}.up_proj"
    return [f"{router}.weight", up, up, f"{stack}.down_proj"], shared


def factors(w: Wanted, *, gated: bool, degree: int) -> dict[str, float]:
    """Return what gate, up, down and the down bias are multiplied by, and gates by the config."""
    c = w.scaling if isinstance(w.scaling, float) else w.needed
    c = 1.0 if w.scaling == "none" else c
    lossless = math.frexp(c)[0] == 0.5
    gate = up = down = config = 1.0
    if w.scaling == "paper":
        up = down = c ** (1 / 3) if gated or degree == 2 else math.sqrt(c)
        gate = up if gated else 1.0
    elif w.split == "config":
        config = c
    elif w.split == "down" or degree == 0:
        down = c
    elif degree == 1:
        half = math.log2(c) / 2
        up = 2.0 ** (math.ceil(half) if lossless else round(half))
        down = c / up
    else:
        up = 2.0 ** round(math.log2(c) / 3) if lossless else c ** (1 / 3)
        down = c / up**2 if lossless else up
    bias = 1.0 if w.scaling == "none" else w.needed / (w.G - w.K) / config
    return {"gate": gate, "up": up, "down": down, "down_bias": bias, "config": config}


def draws(w: Wanted, stream: str) -> np.random.RandomState:
    seed = np.frombuffer(sha256(f"{w.seed}/{stream}".encode()).digest(), "<u4")
    return np.random.RandomState(seed)


def expected(dense: Tensors, config: Mapping[str, Any], w: Wanted) -> Tensors:
    """Return the tensors of an MoE without any dense MLP."""
    *names, norm, offset = DENSE.get(config["model_type"], LLAMA)
    made = {name: tensor.to(w.dtype or tensor.dtype) for name, tensor in dense.items()}
    act = config.get("hidden_act", config.get("mlp_hidden_act"))
    for layer in range(99):
        base = f"{LAYER.get(config['model_type'], 'model.layers.')}{layer}."
        if not (mlp := take_mlp(made, base, names)):
            continue
        if config["model_type"] == "gpt2":  # matrices are (in, out)
            mlp = {part: t.T if t.dim() == 2 else t for part, t in mlp.items()}
        gated = "gate" in mlp
        by = factors(w, gated=gated, degree=1 if gated else {"relu": 1, "relu2": 2}.get(act, 0))
        out = experts(mlp, w, layer, by)
        if config["model_type"] == "gpt2":
            out = {n: t.mT.contiguous() if t.dim() == 3 else t for n, t in out.items()}
        gamma = dense[f"{base}{norm}.weight"] if norm else torch.ones(mlp["up"].shape[1])
        length = math.sqrt(math.fsum((gamma.double() + offset).square().tolist()))
        drawn = draws(w, f"layers.{layer}.router").standard_normal((w.E, len(gamma)))
        rows = torch.from_numpy(drawn * (w.std / length)).to(mlp["up"].dtype)
        out[places(w, mlp)[0][0]] = rows.repeat_interleave(w.G - w.K, dim=0)
        made |= {base + name: tensor for name, tensor in out.items()}
    for old, new in RENAMED.items() if config["model_type"] == "exaone" else ():
        made = {name.replace(old, new): tensor for name, tensor in made.items()}
    return made


def take_mlp(made: Tensors, base: str, names: Sequence[str]) -> Tensors:
    """Take gate and up as (I, H), down as (H, I), and biases, out of what stays as it is."""
    mlp: Tensors = {}
    for end in ("weight", "bias"):
        held = {name: made.pop(f"{base}{name}.{end}", None) for name in dict.fromkeys(names)}
        for number, (part, name) in enumerate(zip(PARTS, names, strict=True)):
            tensor = held[name]
            if tensor is not None:
                halves = tensor.chunk(2) if names[0] == name == names[1] else (tensor,) * 3
                mlp[part + "_bias" * (end == "bias")] = halves[number]
    return mlp


def experts(mlp: Tensors, w: Wanted, layer: int, by: Mapping[str, float]) -> Tensors:
    """Return the experts of a layer, and its shared expert, by their names in it."""
    (_, *names), beside = places(w, mlp)
    inner, size, out = len(mlp["up"]), len(mlp["up"]) // w.G, Tensors()
    shared, orders = size * w.K, [torch.arange(inner) for _ in range(w.E)]
    for g in range(1, w.E if w.shuffled else 1):  # what is shared is the same for all
        drawn = draws(w, f"layers.{layer}.neuron_order.{g}").random_sample(inner - shared)
        orders[g][shared:] = shared + torch.from_numpy(np.argsort(drawn, kind="stable"))
    orders = orders if w.orders is None else w.orders[layer]

    def shard(part: str, rows: torch.Tensor, factor: float) -> torch.Tensor:
        whole, dim = mlp[part], int(part == "down")
        tensor = whole if part == "down_bias" else whole.index_select(dim, rows)
        return (tensor.float() * torch.tensor(factor)).to(tensor.dtype)  # rounded once

    # Expert e = g·(G - K) + s - K holds shard s of group g.
    cuts = [order[s * size : (s + 1) * size] for order in orders for s in range(w.K, w.G)]
    for part in mlp:
        matrix = part.removesuffix("_bias")
        name = names[PARTS.index(matrix)] + "_bias" * (part != matrix)
        factor = by[part if part == "down_bias" else matrix]
        stack = torch.stack([shard(part, rows, factor) for rows in cuts])
        if "{e}" in name:
            out |= {name.format(e=e): tensor for e, tensor in enumerate(stack)}
        else:
            out[name] = torch.cat([out[name], stack], dim=1) if name in out else stack
    for part in PARTS if w.K else ():
        half = part == "down" and beside == "mlp.shared_expert"  # a gate of its own, of 1/2
        name = f"{beside}.{part}_proj.weight"
        if beside == "shared_mlp":
            name = f"{beside}.{'output' if part == 'down' else 'input'}_linear.weight"
        if part in mlp:
            tensor = shard(part, orders[0][:shared], 2.0 if half else 1.0)
            out[name] = torch.cat([out[name], tensor]) if name in out else tensor
    return out
