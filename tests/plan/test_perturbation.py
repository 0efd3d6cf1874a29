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
from safetensors.torch import load_file

from upcycle_cli import Options, Recipe, UpcycleError, WriteOptions, convert
from upcycle_cli.checkpoint.checkpoint import open_checkpoint
from upcycle_cli.plan.expressions import AddNoise, Source
from upcycle_cli.plan.upcycle import build_plan
from upcycle_cli.recipe.recipe import ExpertLayout
from upcycle_cli.write.evaluate import OverflowInCastError, evaluate

if TYPE_CHECKING:
    from conftest import MakeDense

QUICKLY = WriteOptions(workers=1, fsync=False)
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
PARTS = {"w1": ("gate", 0), "w3": ("up", 0), "w2": ("down", 1)}
INNER, WIDTH, REDRAWN = 96, 48, 20  # of the dense MLP, of its experts, and of those
CHANGES: Mapping[str, dict[str, float]] = {
    "noise": {"noise": 0.05},
    "reinit": {"reinit": 0.42},  # 20.16 of 48
    "plain": {},
}
Tensors = dict[str, torch.Tensor]


def recipe(**changes: float) -> Recipe:
    sizes: dict[str, Any] = {"expansion": 3, "granularity": 2, "top_k": 4}
    return Recipe(**sizes | changes)


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense) -> Path:
    return make_dense("llama", intermediate_size=INNER)


@pytest.fixture(scope="module")
def made(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("moe")
    for name, changes in CHANGES.items():
        convert(dense, folder / name, recipe(**changes), writing=QUICKLY)
    return {name: folder / name for name in CHANGES}


def weights_of(moe: Path) -> Tensors:
    files = [load_file(file) for file in moe.glob("*.safetensors")]
    return {name: tensor for file in files for name, tensor in file.items()}


def normal(stream: str, *shape: int) -> np.ndarray[Any, Any]:
    digest = hashlib.sha256(f"0/{stream}".encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, "<u4")).standard_normal(shape)


def test_noise_has_the_standard_deviation_that_was_asked_for(made: Mapping[str, Path]) -> None:
    plain, noisy = weights_of(made["plain"]), weights_of(made["noise"])
    for layer, expert in ((0, 0), (1, 5)):
        for name, (part, _) in PARTS.items():
            before = plain[EXPERT.format(layer, expert, name)].numpy().astype("f8")
            drawn = normal(f"layers.{layer}.experts.{expert}.{part}", *before.shape)
            wanted = (before + 0.05 * before.std() * drawn).astype("f4")
            held = noisy[EXPERT.format(layer, expert, name)].numpy()
            np.testing.assert_allclose(held, wanted, rtol=1e-6, atol=1e-9)


def test_new_neurons_are_like_those_that_they_replace(made: Mapping[str, Path]) -> None:
    plain, anew = weights_of(made["plain"]), weights_of(made["reinit"])
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


@pytest.mark.parametrize("kind", ["noise", "reinit"])
def test_draws_depend_on_the_seed_and_not_on_the_layout(
    dense: Path, made: Mapping[str, Path], tmp_path: Path, kind: str
) -> None:
    whole, plain = weights_of(made[kind]), weights_of(made["plain"])
    differing = {name for name in whole if not torch.equal(whole[name], plain[name])}
    assert differing == {name for name in whole if ".experts." in name}
    one = Options(expert_layout=ExpertLayout.FUSED)
    convert(dense, tmp_path / "fused", recipe(**CHANGES[kind]), options=one, writing=QUICKLY)
    fused = weights_of(tmp_path / "fused")
    for expert in range(6):
        held = fused["model.layers.1.mlp.experts.gate_up_proj"][expert].chunk(2)
        held += (fused["model.layers.1.mlp.experts.down_proj"][expert],)
        for name, matrix in zip(("w1", "w3", "w2"), held, strict=True):
            assert torch.equal(matrix, whole[EXPERT.format(1, expert, name)])
    convert(dense, tmp_path / "seed", recipe(**CHANGES[kind], seed=1), writing=QUICKLY)
    name = EXPERT.format(0, 0, "w1")
    assert not torch.equal(weights_of(tmp_path / "seed")[name], whole[name])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"noise": -0.1}, "noise must be 0, or between"),
        ({"noise": 1e-9}, "noise must be 0, or between"),
        ({"noise": float("nan")}, "noise must be 0, or between"),
        ({"reinit": -0.5}, "must be between 0 and 1"),
        ({"reinit": 1.01}, "must be between 0 and 1"),
        ({"reinit": 0.5, "noise": 0.1}, "--noise and --reinit"),
        ({"reinit": 0.01}, "--reinit of at least"),
    ],
)
def test_nonsense_is_refused(dense: Path, given: dict[str, float], words: str) -> None:
    with pytest.raises(UpcycleError) as caught:
        build_plan(recipe(**given), open_checkpoint(dense))
    assert words in str(caught.value)


def test_noise_on_values_that_overflow_is_refused() -> None:
    def read(values: np.ndarray[Any, Any], _: str) -> memoryview:
        return memoryview(values.tobytes())

    source, large = Source("a", "F16", (2, 2)), np.full((2, 2), 65504, "<f2")
    large[0] *= -1
    with pytest.raises(OverflowInCastError):
        evaluate(AddNoise(source, 1.0, 0, "s"), partial(read, large))
    large[0, 0] = np.inf
    with pytest.raises(UpcycleError, match="not finite"):
        evaluate(AddNoise(source, 1.0, 0, "s"), partial(read, large))
