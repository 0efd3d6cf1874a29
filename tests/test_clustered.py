"""Neurons that are active together are cut into one shard: exact, and found by a calibration."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeDense, contents, logits, random_ids, read_json, read_tensors, write_json
from refusals import invoke
from safetensors.torch import save_file

from upcycle_cli import Options, Recipe, UpcycleError, convert, inspect, verify
from upcycle_cli.api import Request, carry_out
from upcycle_cli.calibrate import collect as passing
from upcycle_cli.calibrate.neuron_clusters import clustered_order
from upcycle_cli.core.callbacks import Hooks
from upcycle_cli.plan.calibration import Calibration
from upcycle_cli.verification.prompts import TextOptions
from upcycle_cli.verification.result import Status
from upcycle_cli.write.rng import standard_normal

Array = np.ndarray[Any, Any]
FEW = TextOptions(tokens=512)
GATE = "model.layers.{}.block_sparse_moe.experts.{}.w1.weight"


def recipe(**changes: Any) -> Recipe:  # noqa: ANN401 - of several types
    settings: dict[str, Any] = {"expansion": 3, "granularity": 4, "top_k": 8}
    return Recipe(**settings | {"neuron_order": "clustered"} | changes)


def draw(stream: str, shape: tuple[int, int]) -> Array:
    return standard_normal(0, stream, shape)


# Which neurons belong together -------------------------------------------------------------------


def planted() -> tuple[Array, Array, Array]:
    """Inputs of four kinds, and neurons of which each is three times as active on one of them."""
    generator = np.random.RandomState(0)
    kind_P, kind_I = generator.randint(4, size=800), generator.permutation(np.arange(48) % 4)
    centres = 3 * generator.standard_normal((4, 32))
    inputs_PH = 5 + centres[kind_P] + generator.standard_normal((800, 32))
    level_PI = np.where(kind_P[:, None] == kind_I, 3.0, 1.0)
    activity_PI = level_PI * generator.uniform(0.5, 1.5, (800, 48))
    return inputs_PH, activity_PI.astype(np.float32), kind_I


def test_neurons_that_act_together_share_a_shard() -> None:
    inputs_PH, activity_PI, kind_I = planted()
    order = clustered_order(inputs_PH, activity_PI, 4, "layers.0.neuron_order", draw)
    assert sorted(order) == list(range(48))
    shards = order.reshape(4, 12)
    assert all(len({*kind_I[shard]}) == 1 for shard in shards)
    assert (np.diff(shards) > 0).all()


def test_the_most_active_shard_comes_first() -> None:
    inputs_PH, activity_PI, kind_I = planted()
    activity_PI[:, kind_I == 2] *= 1.4
    shards = clustered_order(inputs_PH, activity_PI, 4, "o", draw).reshape(4, 12)
    assert {*kind_I[shards[0]]} == {2}
    assert (np.diff(activity_PI.mean(0)[shards].mean(1)) <= 0).all()


@pytest.mark.parametrize("silent", [20, 48])
@pytest.mark.parametrize("granularity", [1, 3, 48])
def test_silent_and_equal_neurons_are_dealt_out_as_well(granularity: int, silent: int) -> None:
    inputs_PH, activity_PI, _ = planted()
    activity_PI[:, 20:30] = 1
    activity_PI[:, :silent] = 0
    order = clustered_order(inputs_PH, activity_PI, granularity, "o", draw)
    assert sorted(order) == list(range(48))
    if granularity == 1:
        assert (order == np.arange(48)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_activity_that_is_not_finite_is_refused(value: float) -> None:
    inputs_PH, activity_PI, _ = planted()
    activity_PI[3, 7] = value
    with pytest.raises(UpcycleError, match="not finite"):
        clustered_order(inputs_PH, activity_PI, 4, "o", draw)


# What is made ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "config", "target", "routing", "top_k"),
    [
        ("llama", {}, "mixtral", "topk-softmax", 8),
        ("llama", {}, "qwen2_moe", "softmax-topk", 12),  # all, so that it is exact
        ("llama", {}, "glm4_moe", "sigmoid-topk", 4),
        ("phi3", {}, "mixtral", "topk-softmax", 4),
        ("nemotron", {"mlp_bias": True}, "upcycled", "topk-softmax", 8),
        ("granite", {}, "granitemoe", "topk-softmax", 8),
        ("gpt2", {}, "upcycled", "sigmoid-topk", 8),
    ],
)
def test_it_is_exact(
    make_dense: MakeDense,
    tmp_path: Path,
    model_type: str,
    config: dict[str, Any],
    target: str,
    routing: str,
    top_k: int,
) -> None:
    dense = make_dense(model_type, **config)
    done = convert(dense, tmp_path / "moe", recipe(routing=routing, top_k=top_k), target=target)
    ids = random_ids()
    if target != "upcycled":
        torch.testing.assert_close(
            logits(done.output, ids), logits(dense, ids), atol=1e-5, rtol=1e-5
        )
    report = verify(dense, done.output, texts=FEW)
    assert report.passed, report.to_json()
    assert report.promise == "exact"
    weights = next(check for check in report.checks if check.name == "weights")
    layers = len(done.plan.layers)
    assert weights.metrics["reordered_groups"] == 3 * layers


def test_all_groups_have_the_order_that_was_found(llama: Path, tmp_path: Path) -> None:
    done = convert(llama, tmp_path / "moe", recipe(), options=Options(dtype="float32"))
    found, size = done.plan.calibration, done.plan.expert_size
    assert found is not None
    dense, made = read_tensors(llama), read_tensors(done.output)
    for layer, of in found.layers.items():
        assert of.order is not None
        order = torch.from_numpy(np.frombuffer(of.order, "<u4").astype(np.int64))
        gate = dense[f"model.layers.{layer}.mlp.gate_proj.weight"].float()[order]
        for expert in range(12):
            shard = expert % 4
            wanted = gate[shard * size : (shard + 1) * size]
            assert torch.equal(made[GATE.format(layer, expert)], wanted)
    assert inspect(done.output, weights=True).weights.distinct_experts == 4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("target", "shared", "routing", "words"),
    [
        # Its shared expert has other factors, so that no neuron of it is one of theirs.
        ("qwen2_moe", "mlp.shared_expert", "topk-softmax", "differs in"),
        ("glm4_moe", "mlp.shared_experts", "sigmoid-topk", "which the shared expert has"),
    ],
)
def test_the_most_active_shards_are_shared(
    llama: Path, tmp_path: Path, target: str, shared: str, routing: str, words: str
) -> None:
    wanted = recipe(top_k=4, shared_experts=2, routing=routing)
    done = convert(llama, tmp_path / "moe", wanted, target=target)
    found, moe = done.plan.calibration, done.output
    assert found is not None
    dense, made = read_tensors(llama), read_tensors(moe)
    for layer, of in found.layers.items():
        assert of.order is not None
        order = np.frombuffer(of.order, "<u4").astype(np.int64)
        activity_G = of.activity[order].reshape(4, -1).mean(1)
        assert activity_G[:2].min() >= activity_G[2:].max()
        gate = dense[f"model.layers.{layer}.mlp.gate_proj.weight"][order[:24]]
        assert torch.equal(made[f"model.layers.{layer}.{shared}.gate_proj.weight"], gate)
    ids = random_ids()
    torch.testing.assert_close(logits(moe, ids), logits(llama, ids), atol=1e-5, rtol=1e-5)
    report = verify(llama, moe, texts=FEW)
    assert report.passed, report.to_json()
    # One neuron of the shared expert for one of a routed expert, in all matrices.
    for part in ("gate", "up", "down"):
        one, other = (
            made[f"model.layers.1.mlp.{holder}.{part}_proj.weight"]
            for holder in (shared.removeprefix("mlp."), "experts.0")
        )
        rows = (one.T, other.T) if part == "down" else (one, other)
        rows[0][3], rows[1][5] = rows[1][5].clone(), rows[0][3].clone()
    save_file(made, moe / "model.safetensors", {"format": "pt"})
    (weights,) = verify(llama, moe, checks=["weights"]).checks
    assert all("layer 1" in text or "layers.1" in text for text in weights.failures)
    assert any(words in text for text in weights.failures), weights.failures


def test_it_is_a_function_of_model_and_text(llama: Path, tmp_path: Path) -> None:
    """Two models in one process, one after the other, have orders of their own."""
    other = Path(shutil.copytree(llama, tmp_path / "dense"))
    tensors = read_tensors(llama)
    turned = {n: t.flip(0) if "gate_proj" in n or "up_proj" in n else t for n, t in tensors.items()}
    save_file(turned, other / "model.safetensors", metadata={"format": "pt"})
    one = convert(llama, tmp_path / "one", recipe())
    assert contents(convert(llama, tmp_path / "two", recipe()).output) == contents(one.output)
    made = convert(other, tmp_path / "other", recipe())
    assert verify(other, made.output, checks=["directory", "weights"]).accepted
    found = [done.plan.calibration for done in (one, made)]
    orders = [of.layers[1].order for of in found if of is not None]
    assert orders[0] != orders[1]
    again = convert(llama, tmp_path / "three", recipe(), calibration=Path(__file__))
    assert again.plan.digest != one.plan.digest


def test_nothing_is_imported_for_it_where_it_is_not_asked_for(llama: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from upcycle_cli.cli.app import app\n"
        f"try: app(['convert', {str(llama)!r}, {str(tmp_path / 'moe')!r}, '-r', 'E4G2T4', '-q'])\n"
        "except SystemExit as done: assert not done.code\n"
        "unwanted = [f'upcycle_cli.calibrate.{name}' for name in ('neuron_clusters', 'collect')]\n"
        "print({'torch', *unwanted} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("set()")


# What goes on ------------------------------------------------------------------------------------


class _Killed(BaseException):
    pass


class _Kill(Hooks[Any, Any]):
    def advance(self, num_bytes: int) -> None:
        raise _Killed(num_bytes)


def _as_it_is(data: bytes) -> bytes:
    return data


def _without_orders(data: bytes) -> bytes:
    found = Calibration.from_bytes(data)
    layers = {n: dataclasses.replace(of, order=None) for n, of in found.layers.items()}
    return dataclasses.replace(found, layers=layers).to_bytes()


@pytest.mark.parametrize(("spoil", "runs"), [(_as_it_is, 0), (_without_orders, 1)])
def test_a_killed_run_goes_on_with_the_order_that_was_found(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[bytes], bytes],
    runs: int,
) -> None:
    undisturbed = convert(llama, tmp_path / "undisturbed", recipe())
    request = Request(source=llama, output=tmp_path / "moe", recipe=recipe())
    with pytest.raises(_Killed):
        carry_out(request, hooks=_Kill())
    kept = tmp_path / "moe.partial" / ".upcycle-calibration"
    kept.write_bytes(spoil(kept.read_bytes()))
    found, calibrate = [], passing.calibrate

    def counted(*arguments: Any) -> Calibration:  # noqa: ANN401
        found.append(1)
        return calibrate(*arguments)

    monkeypatch.setattr(passing, "calibrate", counted)
    done = carry_out(request)
    assert len(found) == runs
    assert contents(done.output) == contents(undisturbed.output)
    assert carry_out(request).already_done
    assert len(found) == runs


# What is said ------------------------------------------------------------------------------------


def test_record_card_recipe_file_and_screens(llama: Path, tmp_path: Path) -> None:
    saved = tmp_path / "recipe.toml"
    options: list[str | Path] = [
        "-r",
        "E3G4T8",
        "--neuron-order",
        "clustered",
        "--save-config",
        saved,
    ]
    made = invoke("convert", llama, tmp_path / "one", *options)
    assert made.exit_code == 0, made.stderr
    assert "active together" in " ".join(made.stdout.split())
    record = read_json(tmp_path / "one" / "upcycle.json")
    assert record["recipe"]["neuron_order"] == "clustered"
    assert record["calibration"]["text"] == "builtin"
    card = (tmp_path / "one" / "README.md").read_text()
    assert "active together" in card
    assert "its experts are copies and specialize" in card
    assert invoke("convert", llama, tmp_path / "two", "--config", saved).exit_code == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    shown = invoke("inspect", llama, *options[:4], "--tensors")
    assert "layers.1.neuron_order[" in shown.stdout


@pytest.mark.parametrize(
    ("order", "claimed", "words"),
    [
        ("shuffled", "clustered", "recipe.neuron_order is clustered"),
        ("clustered", "sliced", "recipe.neuron_order is sliced"),
        ("clustered", "shuffled", "recipe.neuron_order is shuffled"),
        ("clustered", "sorted", "neuron_order"),
        ("sliced", "clustered", "calibration"),
    ],
)
def test_the_record_is_held_to_it(
    llama: Path, tmp_path: Path, order: str, claimed: str, words: str
) -> None:
    done = convert(llama, tmp_path / "moe", recipe(neuron_order=order))
    record = read_json(done.output / "upcycle.json")
    record["recipe"]["neuron_order"] = claimed
    write_json(done.output / "upcycle.json", record)
    report = verify(llama, done.output, checks=["directory"])
    assert report.checks[0].status is Status.FAILED
    assert any(words in failure for failure in report.checks[0].failures)
