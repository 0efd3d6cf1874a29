"""Shards that are an expert for every token, and the others routed in groups of G − K."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense, logits, random_ids, read_json, read_tensors, write_json
from safetensors.torch import save_file

from upcycle_cli import (
    MergeRequest,
    Options,
    Recipe,
    UpcycleError,
    build_plan,
    convert,
    inspect,
    open_checkpoint,
    verify,
)
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.plan.permutation_file import read_permutation_file
from upcycle_cli.recipe.recipe import NeuronOrder, Routing
from upcycle_cli.verification.result import Status

ABLE = [name for name, row in NATIVE.items() if row.shared is not None]
ROUTED = [(name, routing) for name in ABLE for routing in NATIVE[name].routings]


def shared(count: int = 1, routing: Routing | None = None, **settings: Any) -> Recipe:  # noqa: ANN401
    """Two groups of 3 - `count`; with softmax-topk all experts are chosen, which is exact."""
    top_k = (3 - count) * (2 if routing is Routing.SOFTMAX_TOPK else 1)
    return Recipe(
        expansion=2, granularity=3, top_k=top_k, shared_experts=count, routing=routing, **settings
    )


def counts(target: str) -> list[int]:
    row = NATIVE[target].shared
    assert row is not None
    return [count for count in (1, 2) if row.objection(count) is None]


def dense_for(make_dense: MakeDense, target: str) -> Path:
    return make_dense(next(name for name, row in DENSE.items() if target in row.targets))


@pytest.mark.parametrize(("target", "routing"), ROUTED)
def test_the_logits_are_those_of_the_dense_model(
    make_dense: MakeDense, tmp_path: Path, target: str, routing: Routing
) -> None:
    dense = dense_for(make_dense, target)
    wanted = logits(dense, random_ids(), torch.float32)
    for count in counts(target):
        moe = tmp_path / f"moe{count}"
        convert(dense, moe, shared(count, routing), target=target)
        found = logits(moe, random_ids(), torch.float32)
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5
        report = verify(dense, moe)
        assert report.passed, report
        assert report.checks[3].metrics["shared_experts"] == count


def write_orders(path: Path, *, alike: int) -> Path:
    """Orders of 48 neurons for each of two groups and layers, alike in so many of the first."""
    generator = torch.Generator().manual_seed(3)
    orders = {}
    for layer in range(2):
        first = torch.randperm(48, generator=generator)
        rest = first[alike:][torch.randperm(48 - alike, generator=generator)]
        orders[f"layers.{layer}.neuron_order"] = torch.stack(
            [first, torch.cat([first[:alike], rest])]
        )
    save_file(orders, path)
    return path


@pytest.mark.parametrize("target", ["qwen2_moe", "glm4_moe", "granitemoehybrid"])
@pytest.mark.parametrize("order", [NeuronOrder.SHUFFLED, NeuronOrder.FILE])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_groups_with_orders_of_their_own_share_the_same_neurons(
    make_dense: MakeDense, tmp_path: Path, target: str, order: NeuronOrder, dtype: str | None
) -> None:
    dense = dense_for(make_dense, target)
    options = Options(dtype=dtype)
    if order is NeuronOrder.FILE:
        file = read_permutation_file(write_orders(tmp_path / "orders.safetensors", alike=32))
        options = Options(dtype=dtype, neuron_orders=file)
    moe = tmp_path / "moe"
    convert(dense, moe, shared(2, neuron_order=order), target=target, options=options)
    report = verify(dense, moe)
    assert report.passed, report
    reordered = {NeuronOrder.SHUFFLED: 2, NeuronOrder.FILE: 4}[order]
    assert report.checks[3].metrics["reordered_groups"] == reordered


# What is not as it should be -------------------------------------------------------------------

SHARED = "model.layers.1.mlp.shared_expert"
EXPERT = "model.layers.1.mlp.experts.0"
Tensors = dict[str, torch.Tensor]
DAMAGES: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "a value of its gate matrix": (lambda held: _add(held, f"{SHARED}.gate_proj"), "shared_expert"),
    "a value of its up matrix": (lambda held: _add(held, f"{SHARED}.up_proj"), "shared_expert"),
    "a value of its down matrix": (lambda held: _add(held, f"{SHARED}.down_proj"), "shared_expert"),
    "two neurons of one matrix swapped": (
        lambda held: _swap(held, (f"{SHARED}.up_proj", 3), (f"{SHARED}.up_proj", 4)),
        "shared_expert",
    ),
    "a neuron swapped with one that is routed": (
        lambda held: _swap(held, (f"{SHARED}.gate_proj", 3), (f"{EXPERT}.gate_proj", 3)),
        "shared_expert",
    ),
    "its output halved": (lambda held: _times(held, f"{SHARED}.down_proj", 0.5), "shared_expert"),
    "its output nothing": (lambda held: _times(held, f"{SHARED}.down_proj", 0.0), "shared_expert"),
    "a gate that opens for some tokens": (
        lambda held: _times(held, f"{SHARED}_gate", 1e9),
        "must be 1/2",
    ),
    "a routed expert that holds what is shared": (
        lambda held: held.update(
            {
                f"{EXPERT}.{part}_proj.weight": held[f"{SHARED}.{part}_proj.weight"].clone()
                for part in ("gate", "up")
            }
        ),
        "holds shard 0 where shard 1 belongs",
    ),
}


def _add(held: Tensors, name: str) -> None:
    held[f"{name}.weight"][5, 7] += 0.5


def _times(held: Tensors, name: str, factor: float) -> None:
    held[f"{name}.weight"] *= factor


def _swap(held: Tensors, *rows: tuple[str, int]) -> None:
    (one, first), (other, second) = ((held[f"{name}.weight"], row) for name, row in rows)
    one[first], other[second] = other[second].clone(), one[first].clone()


@pytest.mark.parametrize("order", [NeuronOrder.SLICED, NeuronOrder.SHUFFLED])
def test_damage_to_what_is_shared_is_noticed(
    llama: Path, tmp_path: Path, order: NeuronOrder
) -> None:
    recipe = shared(routing=Routing.TOPK_SOFTMAX, neuron_order=order)
    moe = convert(llama, tmp_path / "moe", recipe, target="qwen2_moe").output
    whole = read_tensors(moe)
    for damage, (spoil, words) in DAMAGES.items():
        held = {name: tensor.clone() for name, tensor in whole.items()}
        spoil(held)
        save_file(held, moe / "model.safetensors", metadata={"format": "pt"})
        (weights,) = verify(llama, moe, checks=["weights"]).checks
        assert weights.status is Status.FAILED, damage
        assert any(words in failure for failure in weights.failures), (damage, weights.failures)


@pytest.mark.parametrize("target", ["qwen2_moe", "glm4_moe"])
def test_a_first_layer_whose_shared_expert_does_nothing(
    llama: Path, tmp_path: Path, target: str
) -> None:
    """That is what says that one is inert, and then the experts do not add up."""
    moe = convert(llama, tmp_path / "moe", shared(), target=target).output
    held = read_tensors(moe)
    for name, tensor in held.items():
        if "shared_expert" in name and "down" in name:
            tensor.zero_()
    save_file(held, moe / "model.safetensors", metadata={"format": "pt"})
    assert not verify(llama, moe, checks=["weights"]).accepted


@pytest.mark.parametrize("value", [0, 2])
def test_a_record_of_other_shared_experts(llama: Path, tmp_path: Path, value: int) -> None:
    moe = convert(llama, tmp_path / "moe", shared(), target="glm4_moe").output
    record = read_json(moe / "upcycle.json")
    assert record["recipe"]["shared_experts"] == 1
    record["recipe"]["shared_experts"] = value
    write_json(moe / "upcycle.json", record)
    (claims,) = verify(llama, moe, checks=["directory"]).checks
    assert any("shared experts 1" in failure for failure in claims.failures)


def test_nothing_is_said_where_nothing_is_shared(llama: Path, tmp_path: Path) -> None:
    moe = convert(llama, tmp_path / "moe", shared(0), target="glm4_moe").output
    assert "shared_experts" not in read_json(moe / "upcycle.json")["recipe"]


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        ({"shared_experts": 3}, {}, "there cannot be 3 shared"),
        ({"shared_experts": -1}, {}, "there cannot be -1 shared"),
        ({"top_k": 3}, {}, "not a multiple of 2, the routed shards of granularity 3"),
        ({"top_k": 6}, {}, "more than the 4 experts that E2G3T6 makes (E·(G − K))"),
        ({}, {"target": "mixtral"}, "mixtral cannot express this model: it has no shared expert"),
        ({}, {"target": "upcycled"}, "upcycled cannot express this model: it has no shared expert"),
    ],
)
def test_what_is_refused(
    llama: Path, settings: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    sizes = {"expansion": 2, "granularity": 3, "top_k": 2, "shared_experts": 1}
    with pytest.raises(UpcycleError) as refused:
        build_plan(Recipe(**(sizes | settings)), open_checkpoint(llama), **options)
    assert words in str(refused.value)


def test_a_shared_expert_as_wide_as_one(make_dense: MakeDense) -> None:
    dense = open_checkpoint(dense_for(make_dense, "hunyuan_v1_moe"))
    with pytest.raises(UpcycleError, match="its shared expert is as wide as one expert, not 2"):
        build_plan(shared(2), dense, target="hunyuan_v1_moe")


def test_orders_that_do_not_agree_on_what_is_shared(llama: Path, tmp_path: Path) -> None:
    file = read_permutation_file(write_orders(tmp_path / "orders.safetensors", alike=15))
    options = Options(neuron_orders=file)
    recipe = shared(neuron_order=NeuronOrder.FILE)
    with pytest.raises(UpcycleError, match="differ in their first 16 places"):
        build_plan(recipe, open_checkpoint(llama), target="glm4_moe", options=options)


def test_several_models_share_nothing(make_dense: MakeDense, llama: Path, tmp_path: Path) -> None:
    merge = MergeRequest(experts_from=[make_dense("llama", dtype="bfloat16")])
    with pytest.raises(UpcycleError, match="several models have nothing in common"):
        convert(llama, tmp_path / "moe", shared(), target="glm4_moe", merge=merge)


def test_auto_takes_the_first_target_that_has_one(llama: Path) -> None:
    plan = build_plan(shared(), open_checkpoint(llama))
    assert plan.family.target.model_type == "qwen2_moe"


@pytest.mark.parametrize("order", [NeuronOrder.SLICED, NeuronOrder.FILE])
def test_inspect_tells_what_is_shared_and_how_far_the_rest_has_come(
    llama: Path, tmp_path: Path, order: NeuronOrder
) -> None:
    options = Options()
    if order is NeuronOrder.FILE:
        file = read_permutation_file(write_orders(tmp_path / "orders.safetensors", alike=32))
        options = Options(neuron_orders=file)
    recipe = shared(2, neuron_order=order)
    moe = convert(llama, tmp_path / "moe", recipe, target="glm4_moe", options=options).output
    found = inspect(moe, weights=True, dense=llama).weights
    assert found is not None
    assert (found.shared_width, found.shared_works, found.shared_neurons) == (32, True, 32)
    assert found.movement is not None
    assert not any(any(layer.moved) for layer in found.movement)
    assert found.factors == {"gate": 1.0, "up": 1.0, "down": 1.0}


def test_inspect_tells_one_that_does_nothing(llama: Path, tmp_path: Path) -> None:
    moe = convert(llama, tmp_path / "moe", shared(0), target="glm4_moe").output
    found = inspect(moe, weights=True, dense=llama).weights
    assert found is not None
    assert (found.shared_width, found.shared_works, found.shared_neurons) == (16, False, 0)
