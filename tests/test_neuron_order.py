"""Virtual groups whose neurons are in an order of their own: exact, and found by verification."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeDense, RunCli, contents, logits, random_ids
from safetensors.torch import load_file, save_file

from upcycle_cli import Options, Recipe, UpcycleError, WriteOptions, convert, inspect, verify
from upcycle_cli.inspection.neuron_matching import match, neuron_hashes
from upcycle_cli.plan.expressions import Gather, Permutation
from upcycle_cli.plan.permutation_file import read_permutation_file
from upcycle_cli.recipe.recipe import NeuronOrder, Routing
from upcycle_cli.verification.result import Report, Status
from upcycle_cli.write import evaluate as arithmetic

QUICKLY = WriteOptions(workers=1, fsync=False)
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
INNER = 48  # of the dense models here

Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors], object]


def recipe(**changes: Any) -> Recipe:  # noqa: ANN401 - of several types
    settings: dict[str, Any] = {"expansion": 3, "granularity": 2, "top_k": 4}
    return Recipe(**settings | {"neuron_order": NeuronOrder.SHUFFLED} | changes)


def failures(report: Report) -> str:
    return "\n".join(text for check in report.checks for text in (check.detail, *check.failures))


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense) -> Path:
    return make_dense("llama", intermediate_size=INNER)


@pytest.fixture(scope="module")
def shuffled(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    moe = tmp_path_factory.mktemp("moe") / "moe"
    convert(dense, moe, recipe(), writing=QUICKLY)
    return moe


@pytest.fixture
def moe(shuffled: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(shuffled, tmp_path / "moe"))


def order_file(path: Path, orders: Mapping[str, np.ndarray[Any, Any]]) -> Path:
    tensors = {name: torch.from_numpy(order.copy()) for name, order in orders.items()}
    save_file(tensors, path)
    return path


def drawn(*shape: int) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(0)
    return generator.permuted(
        np.tile(np.arange(INNER), (*shape, 1)) if shape else np.arange(INNER), axis=-1
    )


# What is made ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["shuffled", "one for all", "one for each"])
@pytest.mark.parametrize(
    ("target", "routing"),
    [
        ("mixtral", Routing.TOPK_SOFTMAX),
        ("qwen2_moe", Routing.SOFTMAX_TOPK),
        ("qwen2_moe", Routing.TOPK_SOFTMAX),
        ("glm4_moe", Routing.SIGMOID_TOPK),
    ],
)
def test_any_order_is_exact(
    dense: Path, tmp_path: Path, target: str, routing: Routing, order: str
) -> None:
    options, wanted = Options(), recipe(routing=routing, top_k=6)  # all, so any routing is exact
    if order != "shuffled":
        shape = (3,) if order == "one for each" else ()
        orders = {f"layers.{layer}.neuron_order": drawn(*shape) for layer in range(2)}
        options = Options(neuron_orders=read_permutation_file(order_file(tmp_path / "o", orders)))
        wanted = recipe(routing=routing, top_k=6, neuron_order="file")
    convert(dense, tmp_path / "moe", wanted, target=target, options=options, writing=QUICKLY)
    ids = random_ids()
    torch.testing.assert_close(logits(tmp_path / "moe", ids), logits(dense, ids), atol=1e-5, rtol=0)
    report = verify(dense, tmp_path / "moe", checks=["weights", "claims"])
    assert report.passed, failures(report)
    found = next(check for check in report.checks if check.name == "weights").metrics
    assert found["reordered_groups"] == (4 if order == "shuffled" else 6)


@pytest.mark.parametrize(
    ("model_type", "config", "target"),
    [
        ("phi3", {}, "mixtral"),
        ("nemotron", {"mlp_bias": True}, "upcycled"),
        ("granite", {}, "granitemoe"),
        ("gpt2", {}, "upcycled"),
    ],
)
@pytest.mark.parametrize("scaling", ["exact", "paper", 3.0])
def test_every_form_of_an_mlp_can_be_shuffled(
    make_dense: MakeDense,
    tmp_path: Path,
    model_type: str,
    config: Mapping[str, Any],
    target: str,
    scaling: str | float,
) -> None:
    """Parts in one tensor, transposed, with biases; any factor, lossless or not; another dtype."""
    dense = make_dense(model_type, **config)
    options = Options(dtype="bfloat16")
    wanted = recipe(scaling=scaling)
    convert(dense, tmp_path / "moe", wanted, target=target, options=options, writing=QUICKLY)
    report = verify(dense, tmp_path / "moe", checks=["weights"], allow_inexact=True)
    assert report.checks[0].status is Status.PASSED, failures(report)
    assert report.checks[0].metrics["reordered_groups"] == 4


def test_all_experts_differ_and_hold_every_neuron_once(dense: Path, shuffled: Path) -> None:
    tensors, whole = (
        load_file(shuffled / "model.safetensors"),
        load_file(dense / "model.safetensors"),
    )
    for layer in range(2):
        gate, down = (whole[f"model.layers.{layer}.mlp.{m}_proj.weight"] for m in ("gate", "down"))
        orders = set()
        for group in range(3):
            experts = [
                (tensors[EXPERT.format(layer, e, "w1")], tensors[EXPERT.format(layer, e, "w2")])
                for e in (2 * group, 2 * group + 1)
            ]
            rows = torch.cat([w1 for w1, _ in experts])
            columns = torch.cat([w2 for _, w2 in experts], dim=1)
            order = [int((gate == row).all(1).nonzero()) for row in rows]
            assert sorted(order) == list(range(INNER))
            assert torch.equal(columns, down[:, order])
            orders.add(tuple(order))
        assert len(orders) == 3
        assert tuple(range(INNER)) in orders  # the first group's


def test_a_permutation_is_a_function_of_seed_and_place(
    dense: Path, shuffled: Path, tmp_path: Path
) -> None:
    options = Options(max_shard_bytes=30_000)
    convert(dense, tmp_path / "a", recipe(), options=options, writing=WriteOptions(workers=3))
    parts: Tensors = {}
    for file in (tmp_path / "a").glob("*.safetensors"):
        parts |= load_file(file)
    whole = load_file(shuffled / "model.safetensors")
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    convert(dense, tmp_path / "b", recipe(seed=1), writing=QUICKLY)
    other = load_file(tmp_path / "b" / "model.safetensors")
    name = EXPERT.format(1, 2, "w1")
    assert not torch.equal(whole[name], other[name])
    assert torch.equal(whole[EXPERT.format(1, 1, "w1")], other[EXPERT.format(1, 1, "w1")])


def test_columns_are_gathered_a_few_rows_at_a_time(
    dense: Path, shuffled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arithmetic, "_TOGETHER_ITEMS", 7 * INNER)
    convert(dense, tmp_path / "moe", recipe(), writing=QUICKLY)
    name = "model.safetensors"
    assert contents(tmp_path / "moe")[name] == contents(shuffled)[name]


def test_what_does_not_fit_is_said_of_gathered_columns_too(dense: Path, tmp_path: Path) -> None:
    large = Path(shutil.copytree(dense, tmp_path / "dense"))
    tensors = load_file(large / "model.safetensors")
    down = tensors["model.layers.1.mlp.down_proj.weight"]
    tensors["model.layers.1.mlp.down_proj.weight"] = down * (1e5 / down.abs().max())
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UpcycleError, match=r"w2.weight: a finite value .* becomes infinite"):
        convert(large, tmp_path / "moe", recipe(), options=Options(dtype="float16"))


def test_sliced_stays_what_it_was(dense: Path, tmp_path: Path) -> None:
    """The first group's experts are those of a conversion without an order."""
    convert(dense, tmp_path / "a", recipe(neuron_order="sliced"), writing=QUICKLY)
    orders = {f"layers.{layer}.neuron_order": np.arange(INNER) for layer in range(2)}
    given = Options(neuron_orders=read_permutation_file(order_file(tmp_path / "o", orders)))
    convert(dense, tmp_path / "b", recipe(neuron_order="file"), options=given, writing=QUICKLY)
    one, other = (contents(tmp_path / name)["model.safetensors"] for name in ("a", "b"))
    assert one == other


# What is given -----------------------------------------------------------------------------------


def refused(dense: Path, path: Path) -> str:
    given = Options(neuron_orders=read_permutation_file(path))
    with pytest.raises(UpcycleError) as caught:
        convert(dense, path.parent / "moe", recipe(neuron_order="file"), options=given)
    return str(caught.value)


BAD_ORDERS: Mapping[str, tuple[np.ndarray[Any, Any], str]] = {
    "twice": (np.r_[0, 0, np.arange(2, INNER)], "no permutation"),
    "too far": (np.arange(1, INNER + 1), "no permutation"),
    "negative": (np.r_[-1, np.arange(1, INNER)], "no permutation"),
    "one group twice": (np.stack([np.arange(INNER), np.zeros(INNER, int)]), "group 1 is no perm"),
    "numbers": (np.arange(INNER, dtype="f4"), "is F32 of shape"),
    "empty": (np.arange(0), "is I64 of shape [0]"),
}


@pytest.mark.parametrize("name", BAD_ORDERS)
def test_what_is_no_permutation_is_refused(tmp_path: Path, name: str) -> None:
    order, words = BAD_ORDERS[name]
    path = order_file(tmp_path / "o", {"layers.0.neuron_order": order})
    with pytest.raises(UpcycleError) as caught:
        read_permutation_file(path)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("orders", "words"),
    [
        ({"layers.0.neuron_order": drawn()}, "lacks layers.1.neuron_order"),
        ({f"layers.{n}.neuron_order": drawn() for n in range(3)}, "belongs to no layer"),
        ({f"layers.{n}.neuron_order": drawn(2) for n in range(2)}, "has shape [2, 48]; [48]"),
        ({f"layers.{n}.neuron_order": np.arange(9) for n in range(2)}, "has shape [9]; [48]"),
    ],
)
def test_orders_that_do_not_fit_are_refused(
    dense: Path, tmp_path: Path, orders: Mapping[str, np.ndarray[Any, Any]], words: str
) -> None:
    assert words in refused(dense, order_file(tmp_path / "o", orders))
    assert not (tmp_path / "moe").exists()


def test_a_file_and_the_recipe_must_agree(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match="there is none"):
        convert(dense, tmp_path / "moe", recipe(neuron_order="file"))
    orders = {f"layers.{n}.neuron_order": drawn() for n in range(2)}
    given = Options(neuron_orders=read_permutation_file(order_file(tmp_path / "o", orders)))
    with pytest.raises(UpcycleError, match="--neuron-order is shuffled"):
        convert(dense, tmp_path / "moe", recipe(), options=given)


def test_the_option(dense: Path, tmp_path: Path, run_cli: RunCli) -> None:
    orders = {f"layers.{n}.neuron_order": drawn(3) for n in range(2)}
    order_file(tmp_path / "orders", orders)
    command = ("convert", dense, tmp_path / "moe", "--recipe", "E3G2T4", "--neuron-order")
    done = run_cli(*command, tmp_path / "orders", "--json")
    assert done.returncode == 0, done.stderr
    assert '"neuron_order": "file"' in done.stdout
    missing = run_cli(*command, tmp_path / "none")
    assert missing.returncode == 2
    assert "sliced, shuffled, clustered, or a safetensors file" in missing.stderr


# What is found -----------------------------------------------------------------------------------


def edit(moe: Path, change: Edit) -> None:
    tensors = load_file(moe / "model.safetensors")
    change(tensors)
    save_file(tensors, moe / "model.safetensors", metadata={"format": "pt"})


def swap(matrix: torch.Tensor, dim: int, *places: int) -> None:
    index = torch.tensor(places)
    matrix.index_copy_(dim, index, matrix.index_select(dim, index.flip(0)))


def flip(layer: int, expert: int, matrix: str, place: int) -> Edit:
    def change(tensors: Tensors) -> None:
        flat = tensors[EXPERT.format(layer, expert, matrix)].view(torch.uint8).reshape(-1)
        flat[place] ^= 1

    return change


def duplicate(tensors: Tensors) -> None:
    """The eighth neuron of an expert becomes one that the other expert of its group has."""
    for matrix, dim in (("w1", 0), ("w3", 0), ("w2", 1)):
        held, other = (tensors[EXPERT.format(1, expert, matrix)] for expert in (4, 5))
        held.select(dim, 7).copy_(other.select(dim, 3))


def two_experts(tensors: Tensors) -> None:
    for matrix in ("w1", "w2", "w3"):
        one, other = (EXPERT.format(0, expert, matrix) for expert in (1, 2))
        tensors[one], tensors[other] = tensors[other], tensors[one]


DAMAGE: Mapping[str, tuple[Edit, str]] = {
    "first byte of a gate": (flip(0, 3, "w1", 0), "experts.3.w1.weight differs in 1 of"),
    "last byte of an up": (flip(1, 2, "w3", -1), "experts.2.w3.weight differs in 1 of"),
    "middle of a down": (flip(1, 5, "w2", 500), "experts.5.w2.weight differs in 1 of"),
    "first group": (flip(1, 1, "w2", 0), "experts.1.w2.weight differs in 1 of"),
    "two rows of gate": (
        lambda tensors: swap(tensors[EXPERT.format(0, 2, "w1")], 0, 3, 11),
        "experts.2.w1.weight has neuron",
    ),
    "two columns of down": (
        lambda tensors: swap(tensors[EXPERT.format(1, 3, "w2")], 1, 0, 20),
        "experts.3.w2.weight has neuron",
    ),
    "a neuron twice": (duplicate, "twice, in expert 4 at 7 and in expert 5 at 3; it lacks neuron"),
    "experts of two groups": (two_experts, "layer 0"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(dense: Path, moe: Path, name: str) -> None:
    change, words = DAMAGE[name]
    edit(moe, change)
    report = verify(dense, moe, checks=["weights"])
    assert report.checks[0].status is Status.FAILED
    assert words in failures(report)


def test_what_has_an_order_is_compared_once(
    dense: Path, moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what differs is looked at again, at many times the cost, to be put in words."""

    def nothing_differs(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("upcycle_cli.old_verification.weights.order_failures", nothing_differs)
    assert verify(dense, moe, checks=["weights"]).passed


def test_experts_of_a_group_may_change_places(dense: Path, moe: Path) -> None:
    """Another order, and the same function, whatever the record says."""

    def change(tensors: Tensors) -> None:
        for matrix in ("w1", "w2", "w3"):
            one, other = (EXPERT.format(0, expert, matrix) for expert in (0, 1))
            tensors[one], tensors[other] = tensors[other], tensors[one]

    edit(moe, change)
    assert verify(dense, moe, checks=["weights", "outputs"]).passed
    report = verify(dense, moe, checks=["claims"])
    assert "in layer 0 3 of 3 groups have an order of their own" in failures(report)


def test_two_neurons_out_of_order(dense: Path, tmp_path: Path) -> None:
    """So few that the experts begin as slices do: the rest shows it."""
    order = np.arange(INNER)
    order[[20, 47]] = 47, 20
    orders = {f"layers.{layer}.neuron_order": order for layer in range(2)}
    options = Options(neuron_orders=read_permutation_file(order_file(tmp_path / "o", orders)))
    wanted = recipe(neuron_order="file")
    convert(dense, tmp_path / "moe", wanted, options=options, writing=QUICKLY)
    report = verify(dense, tmp_path / "moe", checks=["weights", "outputs"])
    assert report.passed, failures(report)


def test_the_record_is_held_to_the_order(dense: Path, moe: Path) -> None:
    record = moe / "upcycle.json"
    text = record.read_text(encoding="utf-8")
    record.write_text(text.replace('"neuron_order": "shuffled"', '"neuron_order": "sliced"'))
    report = verify(dense, moe, checks=["weights", "claims"])
    assert report.checks[0].name != "weights" or report.checks[0].status is Status.PASSED
    assert "recipe.neuron_order is sliced" in failures(report)


def test_equal_neurons_are_no_matter(make_dense: MakeDense, tmp_path: Path) -> None:
    """Twins, dead neurons, and such as differ in their last entry only, or in no more than down."""
    dense = Path(shutil.copytree(make_dense("llama", intermediate_size=INNER), tmp_path / "dense"))
    tensors = load_file(dense / "model.safetensors")
    for layer in range(2):
        for matrix, dim in (("gate", 0), ("up", 0), ("down", 1)):
            weight = tensors[f"model.layers.{layer}.mlp.{matrix}_proj.weight"]
            for twin, other in ((3, 30), (4, 31), (5, 32)):
                weight.select(dim, other).copy_(weight.select(dim, twin))
            weight.narrow(dim, 8, 6).zero_()
            if matrix == "gate":
                weight[30, -1] += 1
            elif matrix == "down":
                weight[-1, 31] += 1
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    convert(dense, tmp_path / "moe", recipe(), writing=QUICKLY)
    report = verify(dense, tmp_path / "moe", checks=["weights", "outputs"])
    assert report.passed, failures(report)


def test_inspect_finds_whole_groups(moe: Path) -> None:
    found = inspect(moe, weights=True).weights
    assert found is not None
    assert (found.distinct_experts, found.whole_groups, found.reordered_groups) == (6, True, 4)
    edit(moe, duplicate)
    found = inspect(moe, weights=True).weights
    assert found is not None
    assert not found.whole_groups
    assert found.differing == ("model.layers.1, expert 4", "model.layers.1, expert 5")


def test_inspect_measures_how_far_each_neuron_has_come(dense: Path, moe: Path) -> None:
    before = inspect(moe, weights=True, dense=dense).weights
    assert before is not None
    assert before.movement is not None
    assert all(not any(layer.moved) and not layer.apart for layer in before.movement)
    generator, moved = torch.Generator().manual_seed(0), EXPERT.format(1, 3, "w1")

    def train(tensors: Tensors) -> None:
        held = tensors[moved]
        held += 0.1 * held.std() * torch.randn(held.shape, generator=generator)

    edit(moe, train)
    after = inspect(moe, weights=True, dense=dense).weights
    assert after is not None
    assert after.movement is not None
    distances = after.movement[1].moved
    assert 0.01 < distances[3] < 0.1
    assert not any(distance for expert, distance in enumerate(distances) if expert != 3)
    assert not any(after.movement[0].moved)


# The pieces --------------------------------------------------------------------------------------


def test_match_asks_for_more_where_neurons_are_alike() -> None:
    held, wanted = np.array([7, 5, 5, 9], "u8"), np.array([5, 9, 5, 7], "u8")
    more = np.array([0, 2, 1, 0], "u8"), np.array([1, 0, 2, 0], "u8")
    order = match(held, wanted, lambda some, others: (more[0][some], more[1][others]))
    assert order is not None
    assert order.tolist() == [3, 2, 0, 1]
    assert match(held, np.array([5, 9, 7, 7], "u8"), lambda *_: (held, held)) is None


def test_hashes_of_rows_and_columns_are_the_same() -> None:
    matrix = np.arange(60, dtype="u2").reshape(12, 5)
    rows = neuron_hashes(matrix, 0, "gate")
    assert (neuron_hashes(np.ascontiguousarray(matrix.T), 1, "gate") == rows).all()
    assert len({*rows.tolist()}) == 12
    assert not (neuron_hashes(matrix, 0, "up") == rows).any()


def test_orders_are_compared_without_their_indices() -> None:
    one, other = (Permutation(4, "a", origin="b", indices=data) for data in (b"", None))
    assert one == other
    assert repr(one) == repr(other)
    assert one != Permutation(4, "a", origin="c")
    assert Gather.__dataclass_params__.frozen  # type: ignore[attr-defined]
