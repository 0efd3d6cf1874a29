"""Orders of neurons: drawn from the seed, or given in a file, which must fit the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeDense, contents
from safetensors.numpy import save_file
from safetensors.torch import load_file

from upcycle_cli import Options, Recipe, UpcycleError, WriteOptions, convert
from upcycle_cli.plan.expressions import Permutation
from upcycle_cli.write import evaluate as evaluation

QUICKLY = WriteOptions(workers=1, fsync=False)
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
INNER = 48
Orders = Mapping[str, "np.ndarray[Any, Any]"]


def recipe(order: str = "shuffled", seed: int = 0) -> Recipe:
    sizes: dict[str, Any] = {"expansion": 3, "granularity": 2, "top_k": 4}
    return Recipe(**sizes | {"neuron_order": order, "seed": seed})


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense) -> Path:
    return make_dense("llama", intermediate_size=INNER)


@pytest.fixture(scope="module")
def shuffled(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    moe = tmp_path_factory.mktemp("moe") / "moe"
    convert(dense, moe, recipe(), writing=QUICKLY)
    return moe


def write(path: Path, orders: Orders) -> Path:
    save_file({name: np.ascontiguousarray(order) for name, order in orders.items()}, path)
    return path


def test_each_group_holds_every_neuron_once(dense: Path, shuffled: Path) -> None:
    held, whole = (load_file(path / "model.safetensors") for path in (shuffled, dense))
    for layer in range(2):
        gate, down = (whole[f"model.layers.{layer}.mlp.{m}_proj.weight"] for m in ("gate", "down"))
        orders = set()
        for group in range(3):
            experts = [EXPERT.format(layer, 2 * group + shard, "{}") for shard in (0, 1)]
            rows = torch.cat([held[name.format("w1")] for name in experts])
            order = [int((gate == row).all(1).nonzero()) for row in rows]
            assert sorted(order) == list(range(INNER))
            columns = torch.cat([held[name.format("w2")] for name in experts], dim=1)
            assert torch.equal(columns, down[:, order])
            orders.add(tuple(order))
        assert len(orders) == 3
        assert tuple(range(INNER)) in orders  # the first group's


def test_an_order_depends_on_seed_layer_and_group_alone(
    dense: Path, shuffled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_file(shuffled / "model.safetensors")
    monkeypatch.setattr(evaluation, "_TOGETHER_ITEMS", 7 * INNER)  # a few rows at a time
    options = Options(max_shard_bytes=30_000)
    convert(dense, tmp_path / "a", recipe(), options=options, writing=WriteOptions(workers=3))
    for file in (tmp_path / "a").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor, whole[name]), name
    convert(dense, tmp_path / "b", recipe(seed=1), writing=QUICKLY)
    other = load_file(tmp_path / "b" / "model.safetensors")
    assert not torch.equal(whole[EXPERT.format(1, 2, "w1")], other[EXPERT.format(1, 2, "w1")])


def test_the_order_of_the_dense_model_given_in_a_file_changes_nothing(
    dense: Path, tmp_path: Path
) -> None:
    orders = {f"layers.{layer}.neuron_order": np.arange(INNER) for layer in range(2)}
    given = write(tmp_path / "o", orders)
    convert(dense, tmp_path / "a", recipe("sliced"), writing=QUICKLY)
    convert(dense, tmp_path / "b", recipe("file"), neuron_orders=given, writing=QUICKLY)
    one, other = (contents(tmp_path / name)["model.safetensors"] for name in ("a", "b"))
    assert one == other
    with pytest.raises(UpcycleError, match="shuffled"):
        convert(dense, tmp_path / "c", recipe(), neuron_orders=given)
    with pytest.raises(UpcycleError, match="--neuron-order"):
        convert(dense, tmp_path / "c", recipe("file"))


EVEN = np.arange(INNER)
BAD: Mapping[str, tuple[Orders, str]] = {
    "twice": ({"layers.0.neuron_order": np.r_[0, 0, 2:INNER]}, "no permutation"),
    "too far": ({"layers.0.neuron_order": EVEN + 1}, "no permutation"),
    "negative": ({"layers.0.neuron_order": np.r_[-1, 1:INNER]}, "no permutation"),
    "a group": ({"layers.0.neuron_order": np.stack([EVEN, EVEN * 0])}, "group 1"),
    "numbers": ({"layers.0.neuron_order": EVEN.astype("f4")}, "F32"),
    "empty": ({"layers.0.neuron_order": EVEN[:0]}, "shape [0]"),
    "a layer less": ({"layers.0.neuron_order": EVEN}, "lacks layers.1.neuron_order"),
    "a layer more": ({f"layers.{n}.neuron_order": EVEN for n in range(3)}, "layers.2.neuron_order"),
    "groups": ({f"layers.{n}.neuron_order": np.stack([EVEN] * 2) for n in (0, 1)}, "[2, 48]"),
    "size": ({f"layers.{n}.neuron_order": np.arange(9) for n in (0, 1)}, "shape [9]; [48]"),
}


@pytest.mark.parametrize("name", BAD)
def test_orders_that_do_not_fit_are_refused(dense: Path, tmp_path: Path, name: str) -> None:
    orders, words = BAD[name]
    path = write(tmp_path / "orders", orders)
    with pytest.raises(UpcycleError) as caught:
        convert(dense, tmp_path / "moe", recipe("file"), neuron_orders=path)
    assert words in str(caught.value)
    assert not (tmp_path / "moe").exists()


def test_orders_are_compared_without_their_indices() -> None:
    one, other = (Permutation(4, "a", origin="b", indices=data) for data in (b"", None))
    assert one == other
    assert repr(one) == repr(other)
    assert one != Permutation(4, "a", origin="c")
