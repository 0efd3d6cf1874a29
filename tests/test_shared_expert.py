"""A shared expert that the architecture insists on: it does nothing at first, and it can learn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense, logits, random_ids, read_tensors

from upcycle_cli import Recipe, convert, verify
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.recipe.recipe import Routing

TARGETS = [
    name
    for i, (name, row) in enumerate(NATIVE.items())
    if row.shared is not None and row.shared.required
    # One that goes through a norm of its own is silent by that.
    if row.shared.norm is None
    # What several rows are made of is tried in the first of them.
    if not any(row.shared is other.shared for other in list(NATIVE.values())[:i])
]
FIRST = ("gate_proj.weight", "up_proj.weight", "input_linear.weight")
DOWN = ("down_proj.weight", "output_linear.weight")


def converted(make_dense: MakeDense, target: str, moe: Path, **settings: Any) -> Path:  # noqa: ANN401
    model_type = next(name for name, row in DENSE.items() if target in row.targets)
    dense, able = make_dense(model_type), NATIVE[target].routings
    routing = able[-1] if able[0] is Routing.SOFTMAX_TOPK else able[0]
    wanted = Recipe(expansion=2, granularity=2, top_k=2, routing=routing, **settings)
    convert(dense, moe, wanted, target=target)
    return dense


def shared_of(tensors: Mapping[str, torch.Tensor], ends: tuple[str, ...]) -> list[torch.Tensor]:
    return [held for name, held in tensors.items() if ".shared_" in name and name.endswith(ends)]


def test_which_targets_insist_on_one() -> None:
    assert {*TARGETS} >= {"qwen2_moe", "glm4_moe", "hy_v3", "granitemoehybrid", "nemotron_h"}


@pytest.mark.parametrize("target", TARGETS)
def test_only_its_down_matrix_is_zero(make_dense: MakeDense, tmp_path: Path, target: str) -> None:
    dense = converted(make_dense, target, tmp_path / "moe")
    tensors, original = read_tensors(tmp_path / "moe"), read_tensors(dense)
    std = torch.stack(
        [held.std() for name, held in original.items() if name.endswith(FIRST)]
    ).mean()
    assert len(shared_of(tensors, FIRST)) >= 2
    for held in shared_of(tensors, FIRST):
        # What is drawn is as large as what the dense MLP has, and of mean zero.
        assert held.std().item() == pytest.approx(std.item(), rel=0.2)
        assert abs(held.mean().item()) < 0.2 * held.std().item()
        assert len({*held.flatten().tolist()}) > 0.99 * held.numel()
    assert len(shared_of(tensors, DOWN)) == 2
    assert all(not held.any() for held in shared_of(tensors, DOWN))


@pytest.mark.parametrize("target", TARGETS)
def test_no_two_of_its_matrices_are_the_same(
    make_dense: MakeDense, tmp_path: Path, target: str
) -> None:
    for name, seed in (("moe", 0), ("again", 0), ("other", 1)):
        converted(make_dense, target, tmp_path / name, seed=seed)
    one, again, other = (
        shared_of(tensors, FIRST)
        for tensors in (read_tensors(tmp_path / name) for name in ("moe", "again", "other"))
    )
    assert one
    assert all(map(torch.equal, one, again))
    assert not any(map(torch.equal, one, other))
    assert not any(torch.equal(a, b) for i, a in enumerate(one) for b in one[:i])


@pytest.mark.parametrize("target", TARGETS)
def test_the_function_is_the_dense_one(make_dense: MakeDense, tmp_path: Path, target: str) -> None:
    dense, ids = converted(make_dense, target, tmp_path / "moe"), random_ids()
    wanted, found = (logits(path, ids, torch.float32) for path in (dense, tmp_path / "moe"))
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5
    assert verify(dense, tmp_path / "moe", checks=["weights"]).accepted


@pytest.mark.parametrize("target", TARGETS)
def test_it_learns_down_first_and_then_all_of_it(
    make_dense: MakeDense, tmp_path: Path, target: str
) -> None:
    """An expert of zeros alone never learns: every gradient is exactly zero."""
    from transformers import AutoModelForCausalLM

    converted(make_dense, target, tmp_path / "moe")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "moe", dtype=torch.float32, experts_implementation="eager"
    ).train()
    shared = {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".shared_" in name and name.endswith(FIRST + DOWN)
    }
    assert shared
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = random_ids()

    def largest_gradients() -> dict[str, float]:
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: float(parameter.grad.abs().max()) for name, parameter in shared.items()}

    for name, size in largest_gradients().items():
        assert (size > 0) == name.endswith(DOWN), name
    optimizer.step()
    assert all(size > 0 for size in largest_gradients().values())
