"""What holds of any conversion, whatever the recipe, the model and the options.

Each drawn conversion is held to the oracle, bit for bit, whatever its shards, dtypes and seeds.
Each drawn combination of routers, orders and shared experts that is exact computes the dense
model's function, and `verify` passes it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from conftest import difference, logits, random_ids, read_json, read_tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Wanted
from safetensors.torch import save_file
from shapes import PAIRS, TORCH, model_shapes, tiny_config, write_model
from test_oracle import STD, check, converted, orders_of_groups

from upcycle_cli import Options, Recipe, convert, verify
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.recipe.options import ExpertLayout, NeuronOrder, Promise, RouterInit, Routing

TARGETS = ("mixtral", "qwen2_moe", "glm4_moe")
"""Of one dense model; together they have all routings, and two have a shared expert."""


@st.composite
def wishes(draw: st.DrawFn, targets: tuple[str, ...], groups: range) -> dict[str, Any]:
    """Draw what each conversion needs."""
    target = draw(st.sampled_from(targets))
    return {
        "target": target,
        "layout": str(draw(st.sampled_from(tuple(NATIVE[target].layouts)))),
        "routing": str(draw(st.sampled_from(NATIVE[target].routings))),
        "E": draw(st.sampled_from(groups)),
        "G": draw(st.sampled_from([1, 2, 3, 4])),
        "seed": draw(st.integers(0, 2**63 - 1)),
    }


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_bytes_are_the_oracles_and_shapes_those_of_transformers(
    data: st.DataObject,
) -> None:
    draw = data.draw
    model_type = draw(st.sampled_from(sorted(PAIRS)))
    wish = draw(wishes(PAIRS[model_type], range(1, 5)))
    wanted = Wanted(
        **wish,
        T=wish["G"] * draw(st.integers(1, wish["E"])),
        K=0,
        scaling=draw(st.sampled_from(["exact", "paper", "none"]) | st.floats(1, 100)),
        split=draw(st.sampled_from(["balanced", "down"])),
        shuffled=draw(st.booleans()),
        std=draw(st.just(STD[wish["routing"]]) | st.floats(1e-3, 10)),
        dtype=draw(st.sampled_from([None, torch.bfloat16, torch.float16, torch.float32])),
    )
    layers, tied = draw(st.integers(1, 2)), draw(st.booleans())
    config = tiny_config(model_type, num_hidden_layers=layers, tie_word_embeddings=tied)
    with tempfile.TemporaryDirectory() as directory:
        dense, moe = Path(directory) / "dense", Path(directory) / "moe"
        dtype, seed = draw(st.sampled_from(sorted(TORCH))), draw(st.integers(0, 2**32))
        write_model(dense, config, dtype=dtype, seed=seed)
        shard_bytes, untie = draw(st.integers(1, 20_000)), draw(st.booleans())
        converted(dense, moe, wanted, max_shard_bytes=shard_bytes, untie_embeddings=untie)
        check(dense, moe, wanted)
        written, found = read_json(moe / "config.json"), read_tensors(moe)
    shapes = model_shapes(written, ExpertLayout(wanted.layout))
    if "lm_head.weight" in found:  # which a tied model may carry
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes
    assert len({tensor.dtype for tensor in found.values()}) == 1


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_every_exact_combination_is_the_dense_function(
    llama: Path, text: Path, data: st.DataObject
) -> None:
    wish = data.draw(wishes(TARGETS, range(2, 4)))
    target, E, G = wish["target"], wish["E"], wish["G"]
    K = 0 if NATIVE[target].shared is None else data.draw(st.integers(0, G - 1))
    # With softmax-topk only the choice of all experts is exact.
    chosen = E if wish["routing"] == Routing.SOFTMAX_TOPK else data.draw(st.integers(1, E))
    recipe = Recipe(
        expansion=E,
        granularity=G,
        shared_experts=K,
        top_k=chosen * (G - K),
        routing=Routing(wish["routing"]),
        router_init=data.draw(st.sampled_from(sorted({*RouterInit} - {RouterInit.PROMPTS}))),
        neuron_order=data.draw(st.sampled_from(NeuronOrder)),
        seed=wish["seed"],
    )
    with tempfile.TemporaryDirectory() as directory:
        folder, rows, order = Path(directory), None, None
        generator = torch.Generator().manual_seed(recipe.seed % 2**32)
        if recipe.router_init is RouterInit.FILE:
            drawn = torch.randn((2, recipe.router_rows, 32), generator=generator)
            rows = folder / "rows.safetensors"
            save_file({f"layers.{i}.router": drawn[i].clone() for i in range(2)}, rows)
        if recipe.neuron_order is NeuronOrder.FILE:
            w = Wanted(**wish | {"seed": recipe.seed % 2**32}, T=0, K=K)
            held = orders_of_groups(w, llama).items()
            order = folder / "orders.safetensors"
            save_file({f"layers.{i}.neuron_order": torch.stack(o) for i, o in held}, order)
        done = convert(
            llama,
            folder / "moe",
            recipe,
            target=target,
            options=Options(expert_layout=ExpertLayout(wish["layout"])),
            calibration=text,
            router_rows=rows,
            neuron_orders=order,
        )
        assert done.plan.promise is Promise.EXACT
        wanted, found = (logits(path, random_ids(), torch.float32) for path in (llama, done.output))
        assert difference(found, wanted) < 1e-5
        report = verify(llama, done.output, router_init=rows, calibration=text)
        assert report.passed, report
