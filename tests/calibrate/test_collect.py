"""Calibrations collect what transformers computes, and conversions keep their promise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeDense, clone, contents, read_json, read_tensors
from refusals import assert_refused, invoke
from wrapped import FAMILIES, ROWS, save_wrapper

from upcycle_cli import Recipe, build_plan, convert, open_checkpoint, verify
from upcycle_cli.api import Request, carry_out
from upcycle_cli.calibrate import collect
from upcycle_cli.calibrate.collect import TOKENS, calibrate
from upcycle_cli.calibrate.fitting import loads
from upcycle_cli.core.callbacks import Hooks, Progress
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.lookup import targets_of
from upcycle_cli.plan.calibration import Calibration
from upcycle_cli.plan.inputs import Inputs
from upcycle_cli.recipe.recipe import Promise, RouterInit
from upcycle_cli.verification.prompts import TextOptions
from upcycle_cli.write.distributed import Team

FEW = TextOptions(tokens=512)
ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"


def recipe(name: tuple[int, int, int] = (4, 2, 4), **how: Any) -> Recipe:  # noqa: ANN401
    expansion, granularity, top_k = name
    return Recipe(expansion=expansion, granularity=granularity, top_k=top_k, **how)


def clustered(**how: Any) -> Recipe:  # noqa: ANN401
    return recipe((3, 4, how.pop("top_k", 8)), neuron_order="clustered", **how)


# The run ------------------------------------------------------------------------------------------


TYPES = [("", name) for name, row in DENSE.items() if targets_of(row)]


@pytest.mark.parametrize(("wrapper", "text_type"), TYPES + sorted({row[:2] for row in ROWS}))
def test_every_dense_type_can_be_calibrated_inside_a_wrapper_too(
    make_dense: MakeDense, tmp_path: Path, wrapper: str, text_type: str
) -> None:
    if wrapper:
        dense = save_wrapper(tmp_path / "dense", wrapper, text_type, {})
    else:
        dense = make_dense(text_type)
    target = targets_of(FAMILIES[wrapper][text_type] if wrapper else DENSE[text_type])[-1]
    text = tmp_path / "few.txt"
    text.write_text("More than enough. " * 20)
    wanted, inputs = recipe(router_init="balanced"), Inputs.read(calibration=text)
    plan = build_plan(wanted, open_checkpoint(dense), target=target, inputs=inputs)
    found = calibrate(plan, Progress())
    assert tuple(found.layers) == plan.family.layers
    for layer in found.layers.values():
        assert layer.statistics.logit_std == pytest.approx(1, rel=0.02)
        assert layer.activity.shape == (plan.family.dense.intermediate_size,)


def mlp_inputs(dense: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    """The input of each layer's MLP (P, H), by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    found: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, held: found.append(held[0].flatten(0, -2)))
    with torch.no_grad():
        model.model(ids, use_cache=False)
    return found


@pytest.mark.parametrize("init", [RouterInit.BALANCED, RouterInit.CENTROIDS])
def test_statistics_are_those_of_transformers_own_run(
    llama: Path, text: Path, tmp_path: Path, init: RouterInit
) -> None:
    wanted = recipe(router_init=init, router_logit_std=0.5)
    done = convert(llama, tmp_path / "moe", wanted, calibration=text)
    found = done.plan.calibration
    assert found is not None
    card = (done.output / "README.md").read_text()
    assert "words.txt" in card
    assert f"{init} rows" in card
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(llama)(text.read_text())["input_ids"][:TOKENS]
    tensors = read_tensors(done.output)
    for layer, inputs_PH in enumerate(mlp_inputs(llama, torch.tensor(ids).reshape(-1, 128))):
        of = found.layers[layer]
        mean_H, squares_H = inputs_PH.mean(0), inputs_PH.square().mean(0)
        share = float(mean_H.square().sum() / squares_H.sum())
        assert of.statistics.mean_share == pytest.approx(share, rel=1e-3)
        logits_PE = inputs_PH @ tensors[ROUTER.format(layer)][::2].T
        assert float(logits_PE.std(0).mean()) == pytest.approx(0.5, rel=1e-3)
        # No group is ahead of the others by what all tokens share.
        assert float(logits_PE.mean(0).abs().max()) < 1e-4
        load_E = loads(logits_PE.double().numpy(), 2)
        assert of.statistics.load_cv == pytest.approx(load_E.std() / load_E.mean(), abs=1e-3)


# Conversions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "target", "how"),
    [
        ("llama", "mixtral", recipe(router_init="balanced")),
        ("llama", "mixtral", recipe((2, 2, 2), router_init="centroids")),  # in one direction
        ("llama", "qwen2_moe", recipe(router_init="balanced", routing="softmax-topk")),
        ("llama", "qwen2_moe", recipe(router_init="balanced", layers="1")),
        ("qwen3", "glm4_moe", recipe(router_init="centroids", neuron_order="shuffled")),
        ("nemotron", "upcycled", recipe(router_init="balanced", routing="sigmoid-topk")),
        ("olmo2", "upcycled", recipe(router_init="balanced")),  # no norm before the MLP
        ("llama", "mixtral", clustered()),
        ("llama", "qwen2_moe", clustered(routing="softmax-topk", top_k=12)),  # all: exact
        ("llama", "glm4_moe", clustered(routing="sigmoid-topk", top_k=4, shared_experts=2)),
        ("granite", "granitemoe", clustered()),
        ("gpt2", "upcycled", clustered(routing="sigmoid-topk")),
    ],
    ids=str,
)
def test_calibrated_conversions_keep_the_promise(
    make_dense: MakeDense, tmp_path: Path, model_type: str, target: str, how: Recipe
) -> None:
    dense = make_dense(model_type, dtype="bfloat16")
    done = convert(dense, tmp_path / "moe", how, target=target)
    assert done.plan.promise is not Promise.NONE
    report = verify(dense, done.output, texts=FEW)
    assert report.passed, report.to_json()
    found = done.plan.calibration
    assert found is not None
    assert found.tokens == TOKENS
    assert tuple(found.layers) == done.plan.family.layers
    if how.router_init is not RouterInit.NORMAL:
        for layer in found.layers.values():
            std = done.plan.recipe.router_logit_std
            assert layer.statistics.logit_std == pytest.approx(std, rel=0.02)


def test_the_most_active_shards_are_shared(llama: Path, tmp_path: Path) -> None:
    wanted = clustered(top_k=4, shared_experts=2, routing="sigmoid-topk")
    done = convert(llama, tmp_path / "moe", wanted, target="glm4_moe")
    found = done.plan.calibration
    assert found is not None
    dense, made = read_tensors(llama), read_tensors(done.output)
    for layer, of in found.layers.items():
        assert of.order is not None
        order = np.frombuffer(of.order, "<u4").astype(np.int64)
        activity_G = of.activity[order].reshape(4, -1).mean(1)
        assert activity_G[:2].min() >= activity_G[2:].max()
        gate, prefix = dense[f"model.layers.{layer}.mlp.gate_proj.weight"], f"model.layers.{layer}"
        assert torch.equal(made[f"{prefix}.mlp.shared_experts.gate_proj.weight"], gate[order[:24]])


def test_a_text_that_nothing_is_fitted_to_changes_no_weight(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    plain = convert(llama, tmp_path / "plain", recipe())
    done = convert(llama, tmp_path / "moe", recipe(), calibration=text)
    assert done.plan.digest != plain.plan.digest
    for name in ("model.safetensors", "config.json"):
        assert (done.output / name).read_bytes() == (plain.output / name).read_bytes()
    record = read_json(done.output / "upcycle.json")["calibration"]
    assert record["text"] == "words.txt"
    assert [layer["layer"] for layer in record["layers"]] == [0, 1]
    assert read_json(plain.output / "upcycle.json")["calibration"] is None
    assert verify(llama, done.output, texts=FEW).passed


@pytest.mark.parametrize(("std", "promise"), [(1.0, Promise.NONE), (0.001, Promise.APPROXIMATE)])
def test_a_measured_scale_makes_the_mean_gain_one(
    llama: Path, tmp_path: Path, std: float, promise: Promise
) -> None:
    how: dict[str, Any] = {"routing": "softmax-topk", "router_logit_std": std}
    gains = {}
    for scaling in ("exact", "measured"):
        wanted = recipe((8, 2, 4), scaling=scaling, router_init="balanced", **how)
        done = convert(llama, tmp_path / scaling, wanted, target="qwen2_moe")
        assert done.plan.promise is promise
        report = verify(llama, done.output, allow_inexact=promise is Promise.NONE)
        assert report.accepted, report.to_json()
        layers = report.checks[-1].layers
        gains[scaling] = sum(layer.gain for layer in layers) / len(layers)
    assert abs(gains["measured"] - 1) < 0.05
    found = done.plan.calibration
    assert found is not None
    assert done.plan.factors.c == pytest.approx(2 / found.gates)
    if promise is Promise.NONE:
        assert gains["exact"] > 1.2
    again = convert(llama, done.output, wanted, target="qwen2_moe")
    assert again.already_done
    assert again.plan.factors == done.plan.factors


def test_a_resumed_conversion_runs_its_calibration_again_only_if_damaged(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    class Kill(Hooks):
        def advance(self, num_bytes: int) -> None:
            raise KilledError(num_bytes)

    def counted(*arguments: Any) -> Calibration:  # noqa: ANN401
        runs.append(1)
        return calibrate(*arguments)

    monkeypatch.setattr(collect, "calibrate", counted)
    runs: list[int] = []
    wanted = clustered(router_init="balanced")
    undisturbed = contents(convert(llama, tmp_path / "whole", wanted, verify=True).output)
    for number, damage in enumerate((b"", b"not what was written")):
        request = Request(source=llama, output=tmp_path / str(number), recipe=wanted, verify=True)
        with pytest.raises(KilledError):
            carry_out(request, Kill(), Team())
        cached = tmp_path / f"{number}.partial" / ".upcycle-calibration"
        cached.write_bytes(damage or cached.read_bytes())
        runs.clear()
        done = carry_out(request, Hooks(), Team())
        # Verification takes the calibration that convert has run, and runs none of its own.
        assert len(runs) == number
        assert done.report is not None
        assert done.report.passed
        assert contents(done.output) == undisturbed


# What the user reads ------------------------------------------------------------------------------


def _text(content: bytes, name: str = "text.txt") -> Callable[[Path], list[str | Path]]:
    def make(dense: Path) -> list[str | Path]:
        (dense.parent / name).write_bytes(content)
        return ["--calibration", dense.parent / name]

    return make


def _no_tokenizer(dense: Path) -> list[str | Path]:
    for file in dense.glob("*token*"):
        file.unlink()
    return ["--router-init", "balanced"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (_text(b" \n\n"), ["text.txt", "is empty"]),
        (_text(b"\x00\xff\xfe\x81"), ["text.txt", "not UTF-8"]),
        (_text(b"Too short."), ["text.txt", "too short", "256"]),
        (_text(b"{\n", "text.jsonl"), ["text.jsonl", "line 1 has neither text"]),
        (_text(b'{"text": 1}\n', "text.jsonl"), ["line 1 has neither text nor messages"]),
        (lambda _: ["--calibration", "nowhere.txt"], ["nowhere.txt", "No such file"]),
        (_no_tokenizer, ["needs a tokenizer", "--router-init normal"]),
    ],
)
def test_refuse_texts_that_cannot_be_used(
    llama: Path,
    tmp_path: Path,
    options: Callable[[Path], list[str | Path]],
    words: list[str],
) -> None:
    dense = clone(llama, tmp_path / "dense")
    result = invoke("convert", dense, tmp_path / "moe", "-r", "E4G2T4", *options(dense))
    assert_refused(result, *words)
    assert not list(tmp_path.glob("moe*"))
