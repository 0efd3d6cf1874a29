"""Experts that differ by noise or by neurons drawn anew, by the letter of the method."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import read_tensors
from shapes import hollow_plan

from upcycle_cli import Recipe, UpcycleError, WriteOptions, convert
from upcycle_cli.checkpoint.header import OverflowInCastError
from upcycle_cli.plan.expressions import AddNoise, Source, leaves
from upcycle_cli.write.evaluate import evaluate

if TYPE_CHECKING:
    from conftest import MakeDense

QUICKLY = WriteOptions(workers=1, fsync=False)
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
PARTS = {"w1": ("gate", 0), "w3": ("up", 0), "w2": ("down", 1)}
INNER, WIDTH, REDRAWN = 96, 48, 20  # of the dense MLP, of its experts, and of those
REINIT = 0.42  # 20.16 of 48
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Tensors]:
    dense, folder = make_dense("llama", intermediate_size=INNER), tmp_path_factory.mktemp("moe")
    kinds = {"noise": {"noise": 0.05}, "reinit": {"reinit": REINIT}, "seed": {}}
    for name, settings in kinds.items():
        recipe = Recipe("E3G2T4", **settings)  # type: ignore[arg-type]
        convert(dense, folder / name, recipe, writing=QUICKLY)
    return {path.name: read_tensors(path) for path in folder.iterdir()}


def normal(stream: str, *shape: int) -> np.ndarray[Any, Any]:
    digest = hashlib.sha256(f"0/{stream}".encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, "<u4")).standard_normal(shape)


def test_noise_has_the_standard_deviation_that_was_asked_for(made: Mapping[str, Tensors]) -> None:
    plain, noisy = made["seed"], made["noise"]
    differing = {name for name in noisy if not torch.equal(noisy[name], plain[name])}
    assert differing == {name for name in noisy if ".experts." in name}
    for layer, expert in ((0, 0), (1, 5)):
        for name, (part, _) in PARTS.items():
            before = plain[EXPERT.format(layer, expert, name)].numpy().astype("f8")
            drawn = normal(f"layers.{layer}.experts.{expert}.{part}", *before.shape)
            wanted = (before + 0.05 * before.std() * drawn).astype("f4")
            held = noisy[EXPERT.format(layer, expert, name)].numpy()
            np.testing.assert_allclose(held, wanted, rtol=1e-6, atol=1e-9)


def test_new_neurons_are_like_those_that_they_replace(made: Mapping[str, Tensors]) -> None:
    plain, anew = made["seed"], made["reinit"]
    chosen = set()
    for expert in range(6):
        changed = {}
        for name, (part, dim) in PARTS.items():
            before, after = (side[EXPERT.format(1, expert, name)] for side in (plain, anew))
            changed[name] = (before != after).any(1 - dim).nonzero().flatten()
            old = before.index_select(dim, changed[name]).numpy().astype("f8")
            drawn = normal(f"layers.1.experts.{expert}.{part}", *old.shape)
            wanted = (old.mean() + old.std() * drawn).astype("f4")
            new = after.index_select(dim, changed[name]).numpy()
            np.testing.assert_allclose(new, wanted, rtol=1e-5, atol=1e-7)
        assert len({tuple(each.tolist()) for each in changed.values()}) == 1
        assert len(changed["w1"]) == REDRAWN
        chosen.add(tuple(changed["w1"].tolist()))
    assert len(chosen) == 6


def test_noise_on_values_that_overflow_is_refused() -> None:
    def read(values: np.ndarray[Any, Any], _: str) -> memoryview:
        return memoryview(values.tobytes())

    source, large = Source("a", "F16", (2, 2)), np.full((2, 2), 65504, "<f2")
    large[0] *= -1
    with pytest.raises(OverflowInCastError):
        evaluate(AddNoise(source, 1.0, 0, "s"), partial(read, large))
    large[0, 0] = np.inf
    with pytest.raises(UpcycleError, match="NaN or infinite"):
        evaluate(AddNoise(source, 1.0, 0, "s"), partial(read, large))


def test_biases_get_no_noise(tmp_path: Path) -> None:
    plan = hollow_plan(tmp_path, "E2G2T2", config={"mlp_bias": True}, noise=0.1)
    noisy = {
        part: any(isinstance(leaf, AddNoise) for leaf in leaves(tensor.expr))
        for tensor in plan.tensors
        for part in tensor.parts
    }
    assert len(noisy) == 6
    assert noisy == {part: not part.endswith("_bias") for part in noisy}
