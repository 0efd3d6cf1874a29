"""Shared experts: shards that every token uses, or an inert one that an architecture requires."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import source_of
from conftest import MakeDense, difference, logits, random_ids, read_tensors
from shapes import write_orders

from upcycle_cli import (
    MergeRequest,
    Recipe,
    UpcycleError,
    build_plan,
    convert,
    open_checkpoint,
    verify,
)
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.plan.inputs import Inputs
from upcycle_cli.recipe.recipe import NeuronOrder, Routing
from upcycle_cli.verification.prompts import TextOptions

SHARING = [name for name, row in NATIVE.items() if row.shared and not row.shared.objection(1)]
INERT = [name for name in SHARING if (row := NATIVE[name].shared) and row.required]
"""The targets that require a shared expert, which a zero down matrix silences."""
FIRST = ("gate_proj.weight", "up_proj.weight", "input_linear.weight")
DOWN = ("down_proj.weight", "output_linear.weight")


def shared(count: int = 1, routing: Routing | None = None, **settings: Any) -> Recipe:  # noqa: ANN401
    """Two groups of 3 − `count`; softmax-topk selects all experts, which is exact."""
    top_k = (3 - count) * (2 if routing is Routing.SOFTMAX_TOPK else 1)
    return Recipe(
        expansion=2, granularity=3, top_k=top_k, shared_experts=count, routing=routing, **settings
    )


@pytest.mark.parametrize(
    ("target", "routing"), [(name, r) for name in SHARING for r in NATIVE[name].routings]
)
def test_the_logits_are_the_dense_models(
    make_dense: MakeDense, tmp_path: Path, target: str, routing: Routing
) -> None:
    dense, row = make_dense(source_of(target)), NATIVE[target].shared
    assert row is not None
    for count in [count for count in (1, 2) if row.objection(count) is None]:
        moe = tmp_path / f"moe{count}"
        convert(dense, moe, shared(count, routing), target=target)
        found, wanted = (logits(path, random_ids(), torch.float32) for path in (moe, dense))
        assert difference(found, wanted) < 1e-5
        report = verify(dense, moe, texts=TextOptions(tokens=64))
        assert report.passed, report


# An inert shared expert ---------------------------------------------------------------------------


def inert(make_dense: MakeDense, target: str, moe: Path, **settings: Any) -> Path:  # noqa: ANN401
    dense, able = make_dense(source_of(target)), NATIVE[target].routings
    routing = able[-1] if able[0] is Routing.SOFTMAX_TOPK else able[0]
    wanted = Recipe("E2G2T2", routing=routing, **settings)
    convert(dense, moe, wanted, target=target)
    return dense


def shared_of(tensors: Mapping[str, torch.Tensor], ends: tuple[str, ...]) -> list[torch.Tensor]:
    return [held for name, held in tensors.items() if ".shared_" in name and name.endswith(ends)]


@pytest.mark.parametrize("target", INERT)
def test_only_the_down_matrix_of_an_inert_one_is_zero(
    make_dense: MakeDense, tmp_path: Path, target: str
) -> None:
    for name, seed in (("moe", 0), ("again", 0), ("other", 1)):
        dense = inert(make_dense, target, tmp_path / name, seed=seed)
    tensors, again, other = (read_tensors(tmp_path / name) for name in ("moe", "again", "other"))
    own = [held.std() for name, held in read_tensors(dense).items() if name.endswith(FIRST)]
    first = shared_of(tensors, FIRST)
    assert len(first) >= 2
    for held in first:  # as large as the dense MLP's, with mean zero
        assert held.std().item() == pytest.approx(torch.stack(own).mean().item(), rel=0.2)
        assert abs(held.mean().item()) < 0.2 * held.std().item()
    down = shared_of(tensors, DOWN)
    assert len(down) == 2
    assert not any(held.any() for held in down)
    assert all(map(torch.equal, first, shared_of(again, FIRST)))
    assert not any(map(torch.equal, first, shared_of(other, FIRST)))
    assert not any(torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])


@pytest.mark.parametrize("target", INERT)
def test_an_inert_one_learns(make_dense: MakeDense, tmp_path: Path, target: str) -> None:
    """Its down matrix gets gradients first, then all of it; zeros alone would never learn."""
    from transformers import AutoModelForCausalLM

    inert(make_dense, target, tmp_path / "moe")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "moe", dtype=torch.float32, experts_implementation="eager"
    ).train()
    held = {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".shared_" in name and name.endswith(FIRST + DOWN)
    }
    assert held
    optimizer, ids = torch.optim.SGD(model.parameters(), lr=0.1), random_ids()

    def largest_gradients() -> dict[str, float]:
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: float(parameter.grad.abs().max()) for name, parameter in held.items()}

    for name, size in largest_gradients().items():
        assert (size > 0) == name.endswith(DOWN), name
    optimizer.step()
    assert all(size > 0 for size in largest_gradients().values())


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        ({"shared_experts": 3}, {}, "less than G = 3, not 3"),
        ({"shared_experts": -1}, {}, "less than G = 3, not -1"),
        ({"top_k": 3}, {}, "not a multiple of 2, the routed shards of granularity 3"),
        ({"top_k": 6}, {}, "top-k 6 is too large: E2G3T6 makes 4 experts per layer (E·(G − K))"),
        ({}, {"target": "mixtral"}, "mixtral cannot express this model: it has no shared expert"),
        ({}, {"target": "upcycled"}, "upcycled cannot express this model: it has no shared expert"),
    ],
)
def test_refuse_shared_experts(
    llama: Path, settings: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    sizes = {"expansion": 2, "granularity": 3, "top_k": 2, "shared_experts": 1}
    with pytest.raises(UpcycleError) as refused:
        build_plan(Recipe(**(sizes | settings)), open_checkpoint(llama), **options)
    assert words in str(refused.value)


def test_refuse_other_sources_of_shared_neurons(
    make_dense: MakeDense, llama: Path, tmp_path: Path
) -> None:
    dense = open_checkpoint(make_dense("hunyuan_v1_dense"))
    with pytest.raises(UpcycleError, match="its shared expert is as wide as one expert, not 2"):
        build_plan(shared(2), dense, target="hunyuan_v1_moe")
    inputs = Inputs.read(orders=write_orders(tmp_path / "orders.safetensors", alike=15))
    recipe = shared(neuron_order=NeuronOrder.FILE)
    with pytest.raises(UpcycleError, match="differ in the first 16"):
        build_plan(recipe, open_checkpoint(llama), target="glm4_moe", inputs=inputs)
    merge = MergeRequest(experts_from=[make_dense("llama", dtype="bfloat16")])
    with pytest.raises(UpcycleError, match="single dense model"):
        convert(llama, tmp_path / "moe", shared(), target="glm4_moe", merge=merge)
