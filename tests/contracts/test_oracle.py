"""What `convert` writes is what the oracle makes of the dense weights, bit for bit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from configs import NATIVE_PAIRS, source_of
from conftest import MakeDense, read_json, read_tensors
from oracle import LAYER, Tensors, Wanted, expected
from safetensors.torch import save_file
from shapes import same_bits

from upcycle_cli import Options, Recipe, convert
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.recipe.options import NeuronOrder

SHIPPED = ("llama", "nemotron", "olmo2", "gpt2")
ROWS = [*NATIVE_PAIRS, *((name, "upcycled") for name in SHIPPED)]
INTERLEAVED = ("cohere2", "cohere2_moe", "ernie4_5", "ernie4_5_moe", "glm", "helium")
STD = {"softmax-topk": 0.001, "topk-softmax": 1.0, "sigmoid-topk": 1.0}
SHAPES = ((2, 2, 1, 0), (3, 4, 2, 1), (2, 3, 1, 0), (2, 1, 2, 0))
"""E, G, the groups that a token chooses, and K."""
SCALINGS: tuple[str | float, ...] = ("exact", "exact", 2.5, "paper", "none")
DRAWN = (
    re.compile(r"shared.*(gate|up)_proj|shared_expert_gate|shared_mlp.input_linear"),
    re.compile(r"\.mlp\.\w+_proj"),
)
"""Weights of a shared expert that does nothing yet: its down matrix is zero, or gemma4's norm."""


def combinations(target: str) -> Iterator[Wanted]:
    """Each layout with each routing, split and order; shapes and scalings take turns."""
    row = NATIVE.get(target)
    layouts = ["fused"] if row is None else [str(layout) for layout in row.layouts]
    routings = [*STD] if row is None else [str(routing) for routing in row.routings]
    splits = ["balanced", "down"]
    if row is None or row.keys.scale is not None:
        splits.append("config")
    every = product(layouts, routings, splits, ("sliced", "shuffled", "file"))
    for number, (layout, routing, split, order) in enumerate(every):
        e, g, chosen, k = SHAPES[number % len(SHAPES)]
        if row is None or row.shared is None or row.shared.objection(k) is not None:
            k = 0
        yield Wanted(
            target=target,
            layout=layout,
            routing=routing,
            E=e,
            G=g,
            T=chosen * (g - k),
            K=k,
            scaling=SCALINGS[number % len(SCALINGS)],
            split=split,
            shuffled=order == "shuffled",
            orders={} if order == "file" else None,
            std=STD[routing],
            seed=number,
        )


def orders_of_groups(w: Wanted, dense: Path) -> dict[int, list[torch.Tensor]]:
    """Draw an order for each group; all groups begin with the neurons that are shared."""
    generator = torch.Generator().manual_seed(w.seed)
    config = read_json(dense / "config.json")
    prefix, down = (
        LAYER.get(config["model_type"], "model.layers."),
        oracle.DENSE.get(config["model_type"], oracle.LLAMA)[2],
    )
    found = {}
    for name, tensor in read_tensors(dense).items():
        if name.endswith(f".{down}.weight"):
            inner = tensor.shape[int(config["model_type"] != "gpt2")]
            shared = inner // w.G * w.K
            first = torch.randperm(inner, generator=generator)
            ends = (torch.randperm(inner - shared, generator=generator) for _ in range(w.E))
            layer = int(name.removeprefix(prefix).split(".")[0])
            found[layer] = [torch.cat([first[:shared], first[shared:][end]]) for end in ends]
    return found


def converted(dense: Path, output: Path, w: Wanted, **options: Any) -> Path:  # noqa: ANN401
    """Convert as wanted, with other fields of `Options`."""
    order, path = "shuffled" if w.shuffled else "sliced", None
    if w.orders is not None:
        order, path = "file", output.with_suffix(".safetensors")
        save_file({f"layers.{i}.neuron_order": torch.stack(o) for i, o in w.orders.items()}, path)
    if w.dtype is not None:
        options["dtype"] = str(w.dtype).removeprefix("torch.")
    recipe = Recipe(
        expansion=w.E,
        granularity=w.G,
        top_k=w.T,
        shared_experts=w.K,
        routing=w.routing,
        scaling=w.scaling,
        scale_split=w.split,
        neuron_order=order,
        router_logit_std=w.std,
        seed=w.seed,
    )
    options["expert_layout"] = w.layout
    given = Options(**options)
    convert(dense, output, recipe, target=w.target, options=given, neuron_orders=path)
    return output


def untouched(dense: Tensors, config: dict[str, Any], target: str) -> Tensors:
    """Split what phi3 fuses, and order rotary rows in pairs or by halves, as the target does."""
    heads, size = config["num_attention_heads"], config.get("head_dim") or 8
    ropes = [name in INTERLEAVED for name in (config["model_type"], target)]
    result: Tensors = {}
    for name, tensor in dense.items():
        if name.endswith("qkv_proj.weight"):
            keys = (len(tensor) - heads * size) // 2
            for part, rows in zip(
                "qkv", torch.split(tensor, [heads * size, keys, keys]), strict=True
            ):
                result[name.replace("qkv", part)] = rows
        else:
            result[name] = tensor
    for name in result if ropes[0] is not ropes[1] else ():
        if re.search(r"attn\.[qk]_proj", name):
            by_head = result[name].reshape(-1, size, *result[name].shape[1:])
            turned = size // 2 if config["model_type"] == "glm" else size
            rotary, rest = by_head[:, :turned], by_head[:, turned:]
            if ropes[0]:
                moved = torch.cat([rotary[:, 0::2], rotary[:, 1::2]], dim=1)
            else:
                moved = torch.stack(rotary.chunk(2, dim=1), dim=2).flatten(1, 2)
            result[name] = torch.cat([moved, rest], dim=1).flatten(0, 1)
    return result


def check(dense: Path, moe: Path, w: Wanted) -> None:
    config, found = read_json(dense / "config.json"), read_tensors(moe)
    tensors = read_tensors(dense)
    if w.target != "upcycled":
        tensors = untouched(tensors, config, w.target)
    wanted = expected(tensors, config, w)
    if w.target == "gemma4_text":
        wanted |= beside_gemma(tensors, config, w.E * w.G)
    if config["model_type"] == "smollm3" and w.target == "granitemoe_swa":
        sinks = (name for name in found if name.endswith("self_attn.sinks"))
        wanted |= {name: torch.full((config["num_attention_heads"],), -1e4) for name in sinks}
    if "lm_head.weight" in found and config.get("tie_word_embeddings"):
        wanted.setdefault("lm_head.weight", wanted["model.embed_tokens.weight"])
    for name, tensor in wanted.items():
        assert same_bits(found.pop(name), tensor), name
    row = NATIVE.get(w.target)
    key = "routed_scaling_factor" if row is None else row.keys.scale
    if key is not None:
        in_config = w.split == "config" and w.scaling not in ("paper", "none")
        c = w.scaling if isinstance(w.scaling, float) else w.needed
        assert read_json(moe / "config.json")[key] == (c if in_config else 1.0)
    for name, tensor in found.items():
        assert DRAWN[w.target == "gemma4_text"].search(name) or not tensor.any(), name


def beside_gemma(dense: Tensors, config: dict[str, Any], count: int) -> Tensors:
    """What gemma4 has around experts, so that its norms make of them what they made of the MLP."""
    found: Tensors = {}
    for name in [name for name in dense if name.endswith("pre_feedforward_layernorm.weight")]:
        base, norm = name.removesuffix("pre_feedforward_layernorm.weight"), dense[name]
        found[f"{base}post_feedforward_layernorm_1.weight"] = torch.zeros_like(norm)
        found[f"{base}post_feedforward_layernorm_2.weight"] = torch.ones_like(norm)
        found[f"{base}pre_feedforward_layernorm_2.weight"] = norm
        found[f"{base}router.scale"] = norm * torch.tensor(math.sqrt(config["hidden_size"]))
        scale = math.sqrt(config["rms_norm_eps"])
        found[f"{base}router.per_expert_scale"] = torch.full((count,), scale)
    return found


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_the_bytes_are_those_of_the_formulas(
    make_dense: MakeDense, tmp_path: Path, row: tuple[str, str]
) -> None:
    dense = make_dense("gpt2", n_inner=48) if row[0] == "gpt2" else make_dense(row[0])
    # Some combinations are enough for a second dense type with the same target.
    step = 1 if row[0] in SHIPPED or row[0] == source_of(row[1]) else 5
    for number, combination in enumerate([*combinations(row[1])][::step]):
        w = combination
        if w.orders is not None:
            w = replace(w, orders=orders_of_groups(w, dense))
        check(dense, converted(dense, tmp_path / f"moe{number}", w), w)


def test_clustered_neurons_have_one_order_for_all_groups(llama: Path, tmp_path: Path) -> None:
    """What a calibration finds is read from the first group's gates, which no factor scales."""
    recipe = Recipe("E2G3T3", neuron_order=NeuronOrder.CLUSTERED)
    moe = convert(llama, tmp_path / "moe", recipe, target="mixtral").output
    dense, found = read_tensors(llama), read_tensors(moe)
    orders = {}
    for layer in range(2):
        gate = dense[f"model.layers.{layer}.mlp.gate_proj.weight"]
        experts = f"model.layers.{layer}.block_sparse_moe.experts"
        rows = torch.cat([found[f"{experts}.{e}.w1.weight"] for e in range(3)])
        order = torch.tensor([int((gate == row).all(1).nonzero()) for row in rows])
        assert sorted(order.tolist()) == list(range(len(gate)))
        orders[layer] = [order] * 2
    assert any(orders[layer][0].diff().ne(1).any() for layer in orders)
    w = Wanted(target="mixtral", layout="per-expert", routing="topk-softmax", E=2, G=3, T=3, K=0)
    check(llama, moe, replace(w, orders=orders))
