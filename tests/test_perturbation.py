"""Experts that differ by noise or by neurons drawn anew: drawn as said, promised nothing, measured.

Legend: I the width of an expert, H hidden size.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeDense, RunCli, contents, stops_after, validate_json
from engine_fixtures import Advance
from safetensors.torch import load_file, save_file

from upcycle_cli import Options, Recipe, UpcycleError, WriteOptions, convert, inspect, verify
from upcycle_cli.api import execute
from upcycle_cli.checkpoint.checkpoint import open_checkpoint
from upcycle_cli.old_verification.statistics import Sample
from upcycle_cli.plan.expressions import AddNoise, Permutation, Reinit, Source
from upcycle_cli.plan.permutation_file import read_permutation_file
from upcycle_cli.plan.upcycle import build_plan
from upcycle_cli.recipe.recipe import ExpertLayout, Promise
from upcycle_cli.verification.result import CheckResult, Report, Status
from upcycle_cli.write.drawing import _PIECE_ITEMS
from upcycle_cli.write.evaluate import OverflowInCastError, evaluate
from upcycle_cli.write.running_stats import Moments, noted_moments

QUICKLY = WriteOptions(workers=1, fsync=False)
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
ROUTER = "model.layers.0.block_sparse_moe.gate.weight"
PARTS = {"w1": ("gate", 0), "w3": ("up", 0), "w2": ("down", 1)}
INNER, WIDTH, REDRAWN = 96, 48, 20  # of the dense models here, of their experts, and of those
NOISE, REINIT = {"noise": 0.05}, {"reinit": 0.42}  # 20.16 of 48

Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors, Tensors], object]


def recipe(**changes: Any) -> Recipe:  # noqa: ANN401 - of several types
    settings: dict[str, Any] = {"expansion": 3, "granularity": 2, "top_k": 4}
    return Recipe(**settings | changes)


def words(report: Report) -> str:
    return "\n".join(text for check in report.checks for text in (check.detail, *check.failures))


def only(report: Report, name: str) -> CheckResult:
    return next(check for check in report.checks if check.name == name)


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense) -> Path:
    return make_dense("llama", intermediate_size=INNER)


@pytest.fixture(scope="module")
def made(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """An MoE of each kind; read only."""
    folder = tmp_path_factory.mktemp("moe")
    for name, changes in (("noise", NOISE), ("reinit", REINIT), ("plain", {})):
        convert(dense, folder / name, recipe(**changes), writing=QUICKLY)
    return {name: folder / name for name in ("noise", "reinit", "plain")}


def weights_of(moe: Path) -> Tensors:
    found: Tensors = {}
    for file in moe.glob("*.safetensors"):
        found |= load_file(file)
    return found


# What is made ------------------------------------------------------------------------------------


def normal(stream: str, *shape: int) -> np.ndarray[Any, Any]:
    digest = hashlib.sha256(f"0/{stream}".encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, "<u4")).standard_normal(shape)


def test_noise_is_of_the_deviation_that_is_asked_for(made: Mapping[str, Path]) -> None:
    """By the letter: the stream, the matrix' own deviation, one rounding."""
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
            new = after.index_select(dim, changed[name]).numpy()
            np.testing.assert_allclose(
                new, (old.mean() + old.std() * drawn).astype("f4"), rtol=1e-5, atol=1e-7
            )
        assert len({tuple(each.tolist()) for each in changed.values()}) == 1
        assert len(changed["w1"]) == REDRAWN
        chosen.add(tuple(changed["w1"].tolist()))
    assert len(chosen) == 6


@pytest.mark.parametrize("changes", [NOISE, REINIT, {"reinit": 1.0}])
@pytest.mark.parametrize("layout", [ExpertLayout.PER_EXPERT, ExpertLayout.FUSED])
def test_only_experts_change_and_all_differ(
    dense: Path, tmp_path: Path, changes: dict[str, float], layout: ExpertLayout
) -> None:
    options = Options(expert_layout=layout)
    convert(dense, tmp_path / "moe", recipe(**changes), options=options, writing=QUICKLY)
    convert(dense, tmp_path / "plain", recipe(), options=options, writing=QUICKLY)
    moe, plain = weights_of(tmp_path / "moe"), weights_of(tmp_path / "plain")
    assert moe.keys() == plain.keys()
    assert {name for name in moe if not torch.equal(moe[name], plain[name])} == {
        name for name in moe if ".experts." in name
    }
    found = inspect(tmp_path / "moe", weights=True).weights
    assert found is not None
    assert (found.distinct_experts, found.whole_groups) == (6, False)


@pytest.mark.parametrize("kind", ["noise", "reinit"])
def test_the_layout_is_no_matter(
    dense: Path, made: Mapping[str, Path], tmp_path: Path, kind: str
) -> None:
    wanted = recipe(**{"noise": NOISE, "reinit": REINIT}[kind])
    options = Options(expert_layout=ExpertLayout.FUSED)
    convert(dense, tmp_path / "moe", wanted, options=options, writing=QUICKLY)
    single, fused = weights_of(made[kind]), weights_of(tmp_path / "moe")
    for expert in range(6):
        held = fused["model.layers.1.mlp.experts.gate_up_proj"][expert].chunk(2)
        held += (fused["model.layers.1.mlp.experts.down_proj"][expert],)
        for name, matrix in zip(("w1", "w3", "w2"), held, strict=True):
            assert torch.equal(matrix, single[EXPERT.format(1, expert, name)])
    report = verify(dense, tmp_path / "moe", checks=["claims", "weights"])
    assert report.status is Status.MEASURED, words(report)


@pytest.mark.parametrize("changes", [NOISE, REINIT])
def test_it_depends_on_nothing_but_the_seed(
    dense: Path, made: Mapping[str, Path], tmp_path: Path, changes: dict[str, float]
) -> None:
    whole = weights_of(made[next(iter(changes))])
    options = Options(max_shard_bytes=30_000)
    wanted = recipe(**changes)
    convert(dense, tmp_path / "a", wanted, options=options, writing=WriteOptions(workers=3))
    parts = weights_of(tmp_path / "a")
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    convert(dense, tmp_path / "b", recipe(**changes, seed=1), writing=QUICKLY)
    other, name = weights_of(tmp_path / "b"), EXPERT.format(0, 0, "w1")
    assert not torch.equal(other[name], whole[name])

    plan = build_plan(wanted, open_checkpoint(dense), options=options)
    stop = stops_after(plan.nbytes - plan.shards[-1].nbytes)
    with pytest.raises(UpcycleError, match="stopped by the test"):
        execute(plan, tmp_path / "c", hooks=Advance(stop), writing=QUICKLY)
    done = execute(plan, tmp_path / "c")
    assert done.reused_bytes > plan.nbytes // 2
    assert contents(tmp_path / "c") == contents(tmp_path / "a")


@pytest.mark.parametrize("given", [{"noise": 0.0}, {"reinit": 0}, {"noise": 0, "reinit": 0.0}])
def test_none_is_the_plain_output(
    dense: Path, made: Mapping[str, Path], tmp_path: Path, given: dict[str, float]
) -> None:
    convert(dense, tmp_path / "moe", recipe(**given), writing=QUICKLY)
    assert contents(tmp_path / "moe") == contents(made["plain"])
    record = json.loads((tmp_path / "moe" / "upcycle.json").read_text(encoding="utf-8"))
    assert not {"noise", "reinit"} & record["recipe"].keys()
    assert "perturbation" not in record


MANY = 3 * _PIECE_ITEMS // 100 + 7


def bytes_of(values: np.ndarray[Any, Any], _: str) -> memoryview:
    return memoryview(values.tobytes())


@pytest.mark.parametrize("dim", [0, 1])
def test_pieces_are_no_matter(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (MANY, 100) if dim == 0 else (100, MANY)
    values = np.random.RandomState(0).standard_normal(shape).astype("<f4")
    source = Source("a", "F32", shape)
    redrawn = Reinit(source, dim, Permutation(MANY, "o", 3), MANY - 5, 3, "s")
    for expr in (AddNoise(source, 0.5, 3, "s"), redrawn):
        found: dict[str, Moments] = {}
        read = partial(bytes_of, values)
        made = [evaluate(expr, read, drawn=found.__setitem__)]
        with monkeypatch.context() as context:
            context.setattr("upcycle_cli.write.drawing._PIECE_ITEMS", 1000)
            made += [evaluate(expr, read)]
        kept = np.ndarray(shape, "<f4", made[0])
        assert np.count_nonzero((kept == values).all(1 - dim)) == (5 if expr is redrawn else 0)
        # The mean may differ in its last bit; the draws do not.
        np.testing.assert_allclose(np.ndarray(shape, "<f4", made[1]), kept, rtol=1e-6, atol=1e-7)
        assert found["s"].count == (100 * (MANY - 5) if expr is redrawn else values.size)
        assert abs(found["s"].mean - values.mean()) < 1e-3
        assert abs(found["s"].std - 1) < 1e-2


def test_what_is_not_finite_draws_nothing() -> None:
    source = Source("a", "F16", (2, 2))
    large = np.full((2, 2), 65504, "<f2")
    large[0] *= -1
    with pytest.raises(OverflowInCastError):
        evaluate(AddNoise(source, 1.0, 0, "s"), partial(bytes_of, large))
    large[0, 0] = np.inf
    with pytest.raises(UpcycleError, match="is not finite"):
        evaluate(AddNoise(source, 1.0, 0, "s"), partial(bytes_of, large))


def test_moments_are_read_back_or_written_again() -> None:
    noted = {"a": [2, 1.0, 1.0], "b": [1, 1.0]}
    assert noted_moments(noted, ["a"]) == {"a": Moments(2, 1.0, 1.0)}
    assert Moments.pooled([Moments(2, 1.0, 1.0)] * 2) == Moments(4, 2.0, 2.0)
    for name, held in (("b", noted), ("c", noted), ("a", None), ("a", {"a": [0, 1.0, 1.0]})):
        assert noted_moments(held, [name]) is None
    assert noted_moments({"a": [2, "1", 1.0]}, ["a"]) is None
    assert noted_moments(None, []) == {}


# What is asked for -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"noise": -0.1}, "noise must be 0, or between"),
        ({"noise": 1.5}, "noise must be 0, or between"),
        ({"noise": 1e-9}, "noise must be 0, or between"),
        ({"noise": float("nan")}, "noise must be 0, or between"),
        ({"reinit": -0.5}, "reinit must be between"),
        ({"reinit": 1.01}, "reinit must be between"),
        ({"reinit": 0.5, "noise": 0.1}, "nothing shows which neurons"),
    ],
)
def test_nonsense_is_refused(given: dict[str, float], said: str) -> None:
    with pytest.raises(UpcycleError, match=said):
        recipe(**given)


def test_a_share_of_no_neuron_is_refused(dense: Path) -> None:
    with pytest.raises(UpcycleError, match="no neuron at all"):
        build_plan(recipe(reinit=0.01), open_checkpoint(dense))
    assert build_plan(recipe(reinit=0.0105), open_checkpoint(dense)).recipe.reinit_count(WIDTH) == 1


@pytest.mark.parametrize("option", [("--noise", "0.05"), ("--reinit", "0.42")])
def test_the_options(dense: Path, tmp_path: Path, run_cli: RunCli, option: tuple[str, str]) -> None:
    command = (dense, "--recipe", "E3G2T4", *option)
    planned = run_cli("inspect", *command, "--json")
    assert json.loads(planned.stdout)["plan"]["promise"] == "none"
    done = run_cli("convert", dense, tmp_path / "moe", *command[1:], "--verify", "--json")
    assert done.returncode == 0, done.stderr
    found = validate_json("convert", done.stdout)
    assert (found["promise"], found["lossless"]) == ("none", False)
    assert found[option[0][2:]] == float(option[1])
    assert found["verification"]["status"] == "measured"
    assert any("promises no equality" in each for each in found["warnings"])
    card = (tmp_path / "moe" / "README.md").read_text(encoding="utf-8")
    assert "It does not compute what the dense model computes: the experts differ" in card
    assert "| weights | passed |" in card
    assert run_cli("verify", dense, tmp_path / "moe").returncode == 1
    assert run_cli("verify", dense, tmp_path / "moe", "--allow-inexact").returncode == 0


def test_what_a_dtype_does_not_hold_is_said(dense: Path, run_cli: RunCli) -> None:
    command = ("inspect", dense, "--recipe", "E3G2T4", "--noise", "0.0001", "--json")
    for dtype, told in (("bfloat16", True), ("float32", False)):
        found = json.loads(run_cli(*command, "--dtype", dtype).stdout)["plan"]["warnings"]
        assert any("rounds most of it away" in each for each in found) == told


# What is found -----------------------------------------------------------------------------------


CASES: Mapping[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "one tensor for gate and up": ("phi3", {}, "mixtral", {}),
    "biases": ("nemotron", {"mlp_bias": True}, "upcycled", {}),
    "stacked": ("granite", {}, "granitemoe", {"scaling": 3.0}),
    "columns": ("gpt2", {}, "upcycled", {"scaling": "paper"}),
    "factor in the config": ("llama", {"intermediate_size": INNER}, "glm4_moe", {}),
    "pieces, a shared expert": ("qwen2", {}, "qwen2_moe", {"routing": "softmax-topk"}),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("changes", [{"noise": 0.01}, {"noise": 1.0}, {"reinit": 0.5}])
@pytest.mark.parametrize("order", ["sliced", "shuffled"])
@pytest.mark.parametrize("case", CASES)
def test_honest_ones_are_measured(
    make_dense: MakeDense,
    tmp_path: Path,
    case: str,
    order: str,
    changes: dict[str, float],
    dtype: str,
) -> None:
    model_type, config, target, settings = CASES[case]
    dense = make_dense(model_type, **config)
    wanted = recipe(neuron_order=order, **settings | changes)
    options = Options(dtype=dtype)
    convert(dense, tmp_path / "moe", wanted, target=target, options=options, writing=QUICKLY)
    report = verify(dense, tmp_path / "moe", checks=["claims", "weights"], allow_inexact=True)
    assert report.status is Status.MEASURED, words(report)
    assert report.accepted
    found = {key: float(value) for key, value in only(report, "weights").metrics.items()}
    assert not found["lossless"]
    if "noise" in changes:
        assert abs(found["noise"] / changes["noise"] - 1) <= found["noise_bound"] < 0.2
    else:
        assert found["redrawn_share"] == 0.5
        assert abs(found["redrawn_std"] - 1) <= found["redrawn_std_bound"] < 0.2


@pytest.mark.parametrize("changes", [NOISE, REINIT, {"reinit": 1.0}])
def test_orders_of_a_file(dense: Path, tmp_path: Path, changes: dict[str, float]) -> None:
    orders = {
        f"layers.{layer}.neuron_order": torch.stack(
            [torch.randperm(INNER, generator=torch.Generator().manual_seed(g)) for g in range(3)]
        )
        for layer in range(2)
    }
    save_file(orders, tmp_path / "o")
    options = Options(neuron_orders=read_permutation_file(tmp_path / "o"))
    wanted = recipe(neuron_order="file", **changes)
    convert(dense, tmp_path / "moe", wanted, options=options, writing=QUICKLY)
    report = verify(dense, tmp_path / "moe", checks=["claims", "weights"])
    assert report.status is Status.MEASURED, words(report)


def test_the_outputs_are_measured(dense: Path, made: Mapping[str, Path]) -> None:
    for name, said in (("noise", "noise of 0.05 ×"), ("reinit", "0.42 of each expert's neurons")):
        report = verify(dense, made[name], allow_inexact=True)
        assert report.accepted, words(report)
        assert report.promise == "none"
        outputs = only(report, "outputs")
        assert outputs.status is Status.MEASURED
        assert said in outputs.detail
        assert float(outputs.metrics["kl_mean"]) > 1e-6
        assert {check.status for check in report.checks if check is not outputs} == {Status.PASSED}
        assert recipe(**{"noise": NOISE, "reinit": REINIT}[name], routing="topk-softmax").promise(
        ) is Promise.NONE  # fmt: skip


def base(dense: Tensors, layer: int, expert: int, name: str) -> torch.Tensor:
    """What an expert holds before it draws; G = 2 puts a factor of 2 on up."""
    part, dim = PARTS[name]
    whole = dense[f"model.layers.{layer}.mlp.{part}_proj.weight"]
    factor = 2.0 if part == "up" else 1.0
    return whole.narrow(dim, expert % 2 * WIDTH, WIDTH) * factor


def redrawn_of(moe: Tensors, dense: Tensors, layer: int, expert: int) -> torch.Tensor:
    held = moe[EXPERT.format(layer, expert, "w1")]
    return (held != base(dense, layer, expert, "w1")).any(1)


def on_noise(change: Callable[[torch.Tensor], torch.Tensor], layer: int, expert: int) -> Edit:
    """Change the noise of one matrix."""

    def edit(moe: Tensors, dense: Tensors) -> None:
        for name in PARTS:
            before, held = base(dense, layer, expert, name), moe[EXPERT.format(layer, expert, name)]
            held.copy_(before + change(held - before))
            return

    return edit


def on_new(change: Callable[[torch.Tensor], torch.Tensor], name: str) -> Edit:
    """Change the new neurons of one matrix."""

    def edit(moe: Tensors, dense: Tensors) -> None:
        held, dim = moe[EXPERT.format(1, 3, name)], PARTS[name][1]
        places = redrawn_of(moe, dense, 1, 3).nonzero().flatten()
        held.index_copy_(dim, places, change(held.index_select(dim, places)))

    return edit


def one_more(moe: Tensors, dense: Tensors) -> None:
    neuron = int((~redrawn_of(moe, dense, 0, 2)).nonzero()[7])
    for name, (_, dim) in PARTS.items():
        row = moe[EXPERT.format(0, 2, name)].select(dim, neuron)
        row.copy_(row.flip(0))


def one_less(moe: Tensors, dense: Tensors) -> None:
    neuron = int(redrawn_of(moe, dense, 0, 2).nonzero()[7])
    for name, (_, dim) in PARTS.items():
        before = base(dense, 0, 2, name).select(dim, neuron)
        moe[EXPERT.format(0, 2, name)].select(dim, neuron).copy_(before)


def apart(*names: str) -> Edit:
    """As many neurons, but not the same ones, are drawn anew in some matrices."""

    def edit(moe: Tensors, dense: Tensors) -> None:
        redrawn = redrawn_of(moe, dense, 1, 4)
        new, kept = int(redrawn.nonzero()[0]), int((~redrawn).nonzero()[0])
        for name in names:
            held, dim = moe[EXPERT.format(1, 4, name)], PARTS[name][1]
            held.select(dim, kept).copy_(held.select(dim, new))
            held.select(dim, new).copy_(base(dense, 1, 4, name).select(dim, new))

    return edit


def same_draws(moe: Tensors, _: Tensors) -> None:
    """Two copies of a shard have the same noise, or new neurons."""
    for name in PARTS:
        moe[EXPERT.format(0, 4, name)].copy_(moe[EXPERT.format(0, 0, name)])


def same_noise(moe: Tensors, dense: Tensors) -> None:
    """Experts of two shards have."""
    difference = moe[EXPERT.format(0, 0, "w1")] - base(dense, 0, 0, "w1")
    std, other = base(dense, 0, 0, "w1").std(), base(dense, 0, 5, "w1")
    moe[EXPERT.format(0, 5, "w1")].copy_(other + difference / std * other.std())


def flip(name: str, place: int = 0) -> Edit:
    def edit(moe: Tensors, _: Tensors) -> None:
        moe[name].view(torch.uint8).reshape(-1)[place] ^= 1

    return edit


def put(name: str, value: float) -> Edit:
    def edit(moe: Tensors, _: Tensors) -> None:
        moe[name][0, 0] = value

    return edit


NAME = EXPERT.format(0, 3, "w1")
DAMAGE: Mapping[str, tuple[str, Edit, str]] = {
    "noise twice as strong": (
        "noise", on_noise(lambda d: 2 * d, 0, 3), "times the standard deviation they should",
    ),
    "noise a third stronger": (
        "noise", on_noise(lambda d: 1.33 * d, 0, 3), "has draws of 1.",
    ),
    "no noise": ("noise", on_noise(torch.zeros_like, 0, 3), "has draws of 0 times"),
    "a constant": (
        "noise",
        on_noise(lambda d: torch.full_like(d, float(d.square().mean().sqrt())), 0, 3),
        "whose mean is off by",
    ),
    "up or down by the same": (
        "noise", on_noise(lambda d: d.sign() * d.square().mean().sqrt(), 0, 3), "not normal",
    ),
    "a mean": ("noise", on_noise(lambda d: d + 0.3 * d.std(), 0, 3), "mean is off by"),
    "one value far off": ("noise", put(NAME, 1.0), "no such draw gives"),
    "no number": ("noise", put(NAME, float("nan")), "not finite"),
    "the same noise twice": ("noise", same_draws, "has the same draws as"),
    "the same noise on other shards": ("noise", same_noise, "has the same draws as"),
    "a copied tensor, noise": (
        "noise", flip("model.layers.1.self_attn.q_proj.weight"), "q_proj.weight differs in 1 of",
    ),
    "a router, noise": ("noise", flip(ROUTER), "differs from the other rows of its virtual group"),
    "another factor": (
        "noise",
        lambda moe, dense: moe[NAME].add_(base(dense, 0, 3, "w1"), alpha=0.015),
        "another factor",
    ),
    "one neuron more": ("reinit", one_more, f"expert 2: {REDRAWN + 1} of 48 neurons are not"),
    "one neuron less": ("reinit", one_less, f"expert 2: {REDRAWN - 1} of 48 neurons are not"),
    "drawn for each matrix": ("reinit", apart("w1"), "in the expert's other matrices"),
    "drawn for down by itself": ("reinit", apart("w2"), "in the expert's other matrices"),
    "drawn for two of three": ("reinit", apart("w3", "w2"), "in the expert's other matrices"),
    "a bit of a neuron that was kept": (
        "reinit",
        lambda moe, dense: flip(
            NAME, int((~redrawn_of(moe, dense, 0, 3)).nonzero()[0]) * 32 * 4
        )(moe, dense),
        "in the expert's other matrices",
    ),
    "new neurons that are too large": (
        "reinit", on_new(lambda d: 1.5 * d, "w2"), "has draws of 1.",
    ),
    "new neurons with a mean": (
        "reinit", on_new(lambda d: d + d.std(), "w1"), "whose mean is off",
    ),
    "new neurons of two values": (
        "reinit", on_new(lambda d: d.sign() * d.square().mean().sqrt(), "w3"), "not normal",
    ),
    "new neurons of one value": ("reinit", on_new(torch.zeros_like, "w3"), "draws of 0"),
    "the same new neurons twice": ("reinit", same_draws, "the same neurons drawn anew as"),
    "a copied tensor, reinit": (
        "reinit", flip("model.norm.weight"), "model.norm.weight differs in 1 of",
    ),
    "a router, reinit": ("reinit", flip(ROUTER), "differs from the other rows of its virtual"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(dense: Path, made: Mapping[str, Path], tmp_path: Path, name: str) -> None:
    kind, change, said = DAMAGE[name]
    moe = Path(shutil.copytree(made[kind], tmp_path / "moe"))
    tensors = load_file(moe / "model.safetensors")
    change(tensors, load_file(dense / "model.safetensors"))
    save_file(tensors, moe / "model.safetensors", metadata={"format": "pt"})
    report = verify(dense, moe, checks=["weights"], allow_inexact=True)
    assert report.status is Status.FAILED
    assert said in words(report)


CLAIMS: Mapping[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "less noise": ("noise", lambda r: r["recipe"].update(noise=0.04), "has draws of 1."),
    "a smaller share": ("reinit", lambda r: r["recipe"].update(reinit=0.4), "by upcycle.json 19"),
    "noise for new neurons": (
        "reinit", lambda r: r["recipe"].update(reinit=0.0, noise=0.05), "no such draw gives",
    ),
    "both": ("reinit", lambda r: r["recipe"].update(noise=0.05), "recipe.noise missing or invalid"),
    "no number": ("noise", lambda r: r["recipe"].update(noise=True), "recipe.noise missing or"),
    "nothing": ("noise", lambda r: r["recipe"].pop("noise"), "differs in"),
    "nothing of what it went by": ("noise", lambda r: r.pop("perturbation"), "lacks the mean"),
    "of one layer": ("reinit", lambda r: r["perturbation"].pop(), "of gate, layer 1"),
    "another deviation": (
        "reinit", lambda r: r["perturbation"][0]["up"].update(std=0.03), "for up, layer 0",
    ),
    "another mean": (
        "noise", lambda r: r["perturbation"][1]["down"].update(mean=0.001), "for down, layer 1",
    ),
    "shuffled": (
        "noise", lambda r: r["recipe"].update(neuron_order="shuffled"),
        "0 of 3 groups have an order of their own",
    ),
    "what was not done": ("plain", lambda r: r.update(perturbation=[]), "perturbs nothing"),
    "another promise": ("noise", lambda r: r.update(promise="exact"), "promise is"),
    "another factor": ("noise", lambda r: r["factors"].update(up=2.2), "factors.up is 2.2"),
}  # fmt: skip


@pytest.mark.parametrize("name", CLAIMS)
def test_the_record_is_held_to_the_weights(
    dense: Path, made: Mapping[str, Path], tmp_path: Path, name: str
) -> None:
    kind, change, said = CLAIMS[name]
    moe = Path(shutil.copytree(made[kind], tmp_path / "moe"))
    record = json.loads((moe / "upcycle.json").read_text(encoding="utf-8"))
    change(record)
    (moe / "upcycle.json").write_text(json.dumps(record), encoding="utf-8")
    report = verify(dense, moe, checks=["claims", "weights"], allow_inexact=True)
    assert report.status is Status.FAILED
    assert said in words(report)


@pytest.mark.parametrize("kind", ["noise", "reinit"])
def test_small_experts_are_compared_in_one_thread(
    dense: Path, made: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Several would wait for one another at each of many steps, at many times the cost."""
    before, threads, add = torch.get_num_threads(), set[int](), Sample.add

    def counted(*arguments: Any) -> torch.Tensor:  # noqa: ANN401
        threads.add(torch.get_num_threads())
        return add(*arguments)

    monkeypatch.setattr(Sample, "add", counted)
    torch.set_num_threads(2)
    try:
        verify(dense, made[kind], checks=["weights"], allow_inexact=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == {1}


def test_the_record_says_what_it_went_by(dense: Path, made: Mapping[str, Path]) -> None:
    whole = load_file(dense / "model.safetensors")
    record = json.loads((made["noise"] / "upcycle.json").read_text(encoding="utf-8"))
    assert record["recipe"]["noise"] == 0.05
    assert record["promise"] == "none"
    for layer, found in enumerate(record["perturbation"]):
        assert found["layer"] == layer
        for part, factor in (("gate", 1), ("up", 2), ("down", 1)):
            values = whole[f"model.layers.{layer}.mlp.{part}_proj.weight"].double() * factor
            assert found[part]["mean"] == pytest.approx(float(values.mean()), rel=1e-9)
            std = float(values.std(correction=0))
            assert found[part]["std"] == pytest.approx(std, rel=1e-9)
