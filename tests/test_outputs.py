"""The check `outputs`: with the weights on disk, it measures what whole models do."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZES, TINY, MakeDense, logits, read_json, read_tensors, write_json
from engine_fixtures import assert_equal_peaks, peak_anonymous_bytes
from engine_fixtures import make_dense as make_hollow
from safetensors.torch import save_file
from transformers import AutoTokenizer

from upcycle_cli import Options, Recipe, UpcycleError, convert, open_checkpoint, verify
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.plan.texts import read_texts
from upcycle_cli.recipe.recipe import ExpertLayout
from upcycle_cli.run.layerwise import Steps
from upcycle_cli.verification.prompts import Prompt, TextOptions, make_prompt
from upcycle_cli.verification.result import CheckResult, Report, Status

EXACT = Recipe(expansion=2, granularity=2, top_k=2)


def outputs_of(dense: Path, moe: Path, **texts: Any) -> CheckResult:  # noqa: ANN401
    report = verify(dense, moe, checks=["outputs"], texts=TextOptions(**texts), allow_inexact=True)
    return report.checks[0]


def prompt_of(dense: Path, moe: Path, **texts: Any) -> Prompt:  # noqa: ANN401
    secret = open_checkpoint(moe).config_digest.encode()
    return make_prompt(open_checkpoint(dense), TextOptions(**texts), secret)


# What whole models say ----------------------------------------------------------------------------


INEXACT = Recipe(expansion=4, granularity=4, top_k=3, allow_inexact=True)


@pytest.mark.parametrize(
    ("model_type", "target", "recipe", "options"),
    [
        ("llama", "auto", EXACT, Options()),
        ("llama", "auto", EXACT, Options(dtype="bfloat16")),
        ("llama", "auto", INEXACT, Options()),
        ("qwen2", "auto", EXACT, Options(expert_layout=ExpertLayout.FUSED)),
        ("qwen3", "glm4_moe", EXACT, Options()),
        ("olmo2", "upcycled", EXACT, Options()),
        ("nemotron_h", "auto", EXACT, Options()),
    ],
)
def test_numbers_are_those_of_whole_models(
    make_dense: MakeDense,
    tmp_path: Path,
    model_type: str,
    target: str,
    recipe: Recipe,
    options: Options,
) -> None:
    """The oracle: transformers loads both models whole, and softmax is taken in float64."""
    dense, moe = make_dense(model_type), tmp_path / "moe"
    convert(dense, moe, recipe, target=target, options=options)
    found = outputs_of(dense, moe, tokens=200).metrics
    prompt = prompt_of(dense, moe, tokens=200)
    p, q = (
        logits(path, prompt.ids, torch.float32).flatten(0, 1).double().log_softmax(-1)
        for path in (dense, moe)
    )
    kl = (p.exp() * (p - q)).sum(-1)
    follows = prompt.targets >= 0
    targets = prompt.targets[follows, None]
    wanted = {
        "kl_mean": kl.mean(),
        "kl_max": kl.max(),
        "kl_median": kl.quantile(0.5),
        "dense_nll": -p[follows].gather(1, targets).mean(),
        "moe_nll": -q[follows].gather(1, targets).mean(),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double().mean(),
    }
    for key, value in wanted.items():
        assert found[key] == pytest.approx(float(value), abs=1e-6), key
    if recipe.allow_inexact:
        assert float(found["kl_mean"]) > 1e-4  # or nothing was compared


def test_a_vocabulary_in_blocks(
    make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is summed does not depend on where the vocabulary is cut, nor where a matrix is."""
    dense, moe = make_dense("llama"), tmp_path / "moe"
    convert(dense, moe, INEXACT)
    whole = outputs_of(dense, moe).metrics
    monkeypatch.setattr("upcycle_cli.verification.distributions._BLOCK_LOGITS", 1 << 13)
    monkeypatch.setattr("upcycle_cli.run.lazy_weights._BLOCK", 1000)
    cut = outputs_of(dense, moe).metrics
    assert cut.keys() == whole.keys()
    for key, value in whole.items():
        assert cut[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_copies_are_run_once(make_dense: MakeDense, tmp_path: Path) -> None:
    """After the weights check, and to the same result."""
    dense, moe = make_dense("llama"), tmp_path / "moe"
    convert(dense, moe, Recipe(expansion=4, granularity=2, top_k=4))
    alone = outputs_of(dense, moe)
    both = verify(dense, moe, checks=["weights", "outputs"]).checks[1]
    for one, other in zip(alone.layers, both.layers, strict=True):
        assert one.load == other.load  # of the router, which chooses among all
        assert one.hidden_rms == pytest.approx(other.hidden_rms, abs=1e-6)
    assert both.metrics["kl_mean"] == pytest.approx(alone.metrics["kl_mean"], abs=1e-9)


# Layers -------------------------------------------------------------------------------------------


def spoil(moe: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = read_tensors(moe)
    edit(tensors)
    held = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(held, moe / "model.safetensors", metadata={"format": "pt"})


def expert(layer: int, number: int, matrix: str) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{number}.{matrix}.weight"


def test_an_error_is_measured_where_it_is_added(make_dense: MakeDense, tmp_path: Path) -> None:
    dense, moe = make_dense("llama"), tmp_path / "moe"
    convert(dense, moe, Recipe(expansion=4, granularity=1, top_k=2))
    good = outputs_of(dense, moe)
    assert [layer.layer for layer in good.layers] == [0, 1]
    for layer in good.layers:
        assert layer.added_rms < 1e-6
        assert layer.hidden_rms < 1e-6
        assert layer.gain == pytest.approx(1, abs=1e-6)
        assert layer.whole_share == 1
        assert sum(layer.load) == 2 * int(good.metrics["tokens"])
        assert layer.idle_experts == layer.load.count(0)
        assert 0 < layer.router_margin < 1
        assert 0 < layer.router_entropy <= math.log(4)
    # Each expert of the second layer is 10 % too large.
    spoil(moe, lambda t: [t[expert(1, e, "w2")].mul_(1.1) for e in range(4)])
    first, second = outputs_of(dense, moe).layers
    assert first.added_rms < 1e-6
    assert second.added_rms == pytest.approx(0.1, abs=1e-4)
    assert second.gain == pytest.approx(1.1, abs=1e-4)
    assert first.hidden_rms < 1e-6
    assert second.hidden_rms > 1e-3


def test_all_of_it_is_in_the_json(make_dense: MakeDense, tmp_path: Path) -> None:
    dense, moe = make_dense("llama"), tmp_path / "moe"
    convert(dense, moe, EXACT)
    found = verify(dense, moe, checks=["outputs"]).to_json()
    found = json.loads(json.dumps(found, allow_nan=False))["checks"][0]
    assert len(found["layers"]) == 2
    assert len(found["layers"][0]["load"]) == 4
    for text in found["texts"]:
        assert len(text["tokens"]) == len(text["kl"])
    assert sum(len(text["tokens"]) for text in found["texts"]) == found["metrics"]["text_tokens"]


# Memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [[(4, 2), (16, 2)], [(4, 8), (4, 128)]],
    ids=["layers", "experts"],
)
@pytest.mark.long
def test_memory_does_not_grow(tmp_path: Path, sizes: list[tuple[int, int]]) -> None:
    """Whatever the number of layers (the first of a pair), and of experts (the second)."""
    measures = []
    for layers, expansion in sizes:
        dense, moe = tmp_path / f"dense{layers}x{expansion}", tmp_path / f"moe{layers}x{expansion}"
        make_hollow(dense, hidden=512, inner=2048, layers=layers)
        convert(dense, moe, Recipe(expansion=expansion, granularity=1, top_k=2))
        command = [sys.executable, "-m", "upcycle_cli", "verify", str(dense), str(moe)]
        command += ["--checks", "outputs", "--tokens", "256"]
        measures.append(partial(peak_anonymous_bytes, command))
    assert_equal_peaks(measures)


# Texts --------------------------------------------------------------------------------------------


def test_the_built_in_texts(llama: Path, tmp_path: Path) -> None:
    """English, other scripts, code, mathematics and a chat have a fair share each."""
    convert(llama, tmp_path / "moe", EXACT)
    prompt = prompt_of(llama, tmp_path / "moe")
    text = AutoTokenizer.from_pretrained(llama).decode(prompt.ids.flatten())
    for part in ("harbour", "港口", "def soundings", "convex", "625 g of flour"):
        assert part in text


def test_lines_of_json(llama: Path, tmp_path: Path) -> None:
    moe, file = tmp_path / "moe", tmp_path / "prompts.jsonl"
    convert(llama, moe, EXACT)
    chat = [{"role": "user", "content": "One."}, {"role": "assistant", "content": "Two."}]
    lines = [{"text": "Three."}, {"prompt": "Four."}, {"messages": chat}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert read_texts(file, "the prompts") == ["Three.", "Four.", chat]
    words = "".join("".join(row) for row in prompt_of(llama, moe, prompts=file).words)
    for word in ("One", "Two", "Three", "Four"):
        assert word in words
    assert "the text of prompts.jsonl" in outputs_of(llama, moe, prompts=file).detail
    for line, message in (
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 has neither text nor messages"),
        ('{"messages": [1]}', "line 2 has neither text nor messages"),
    ):
        file.write_text(f'{{"text": "a"}}\n{line}\n')
        with pytest.raises(UpcycleError, match=message):
            verify(llama, moe, texts=TextOptions(prompts=file))


def test_how_much_text(llama: Path, tmp_path: Path) -> None:
    moe = tmp_path / "moe"
    convert(llama, moe, EXACT)
    assert outputs_of(llama, moe, tokens=100).metrics["text_tokens"] == 100
    metrics = outputs_of(llama, moe, context=128).metrics
    assert metrics["text_tokens"] == metrics["tokens"] == 128
    with pytest.raises(UpcycleError, match=re.escape("the model takes 128")):
        outputs_of(llama, moe, context=129)
    for option in ("tokens", "context"):
        with pytest.raises(UpcycleError, match=f"--{option} must be 1 or more, not 0"):
            outputs_of(llama, moe, **{option: 0})


def test_a_long_context_shows_a_window(make_dense: MakeDense, tmp_path: Path) -> None:
    """A window that is one token short shows in the predictions beyond it, and nowhere before."""
    dense = make_dense("mistral", sliding_window=96)
    moe = tmp_path / "moe"
    convert(dense, moe, EXACT)
    config = read_json(moe / "config.json")
    write_json(moe / "config.json", config | {"sliding_window": 95})
    assert outputs_of(dense, moe, context=64).status is Status.PASSED
    found = outputs_of(dense, moe, context=128)
    assert found.status is Status.FAILED
    assert all(kl is not None and kl < 1e-9 for kl in found.texts[0].kl[:95])
    assert max(kl or 0 for kl in found.texts[0].kl[95:]) > 1e-7


# Early and honest ---------------------------------------------------------------------------------


def test_nothing_is_run_after_a_failure(llama: Path, tmp_path: Path) -> None:
    moe = tmp_path / "moe"
    convert(llama, moe, EXACT)
    spoil(moe, lambda t: t[expert(0, 1, "w1")].mul_(2))
    names = ("structure", "weights", "outputs")
    structure, weights, outputs = verify(llama, moe, checks=names, fail_fast=True).checks
    assert structure.status is Status.PASSED
    assert weights.status is Status.FAILED
    assert outputs.status is Status.SKIPPED
    assert outputs.detail == "Not run: weights failed."
    assert verify(llama, moe, checks=names).checks[-1].status is Status.FAILED


def test_steps_take_turns_and_end() -> None:
    heard: list[int] = []

    def work(pause: Callable[[], None]) -> None:
        for number in range(3):
            heard.append(number)
            pause()

    with Steps(work) as steps:
        assert heard == []
        steps.advance()
        assert heard == [0]
        steps.advance()
        assert heard == [0, 1]
    steps.advance()  # abandoned: there is nothing to go on with
    assert heard == [0, 1]
    assert steps.done


def test_what_a_step_raises_is_raised() -> None:
    def work(_pause: Callable[[], None]) -> None:
        raise ValueError("seven")

    with Steps(work) as steps, pytest.raises(ValueError, match="seven"):
        steps.advance()


# Twelve subtle damages ----------------------------------------------------------------------------

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}


def _swap_layers(tensors: dict[str, torch.Tensor]) -> None:
    one, other = expert(0, 1, "w1"), expert(1, 1, "w1")
    tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()


def _equal_groups(tensors: dict[str, torch.Tensor]) -> None:
    rows = tensors["model.layers.1.block_sparse_moe.gate.weight"]
    rows[2:4] = rows[0:2]


def _last_bits(tensors: dict[str, torch.Tensor]) -> None:
    rows = tensors["model.layers.1.block_sparse_moe.gate.weight"].view(torch.int32)
    rows[1] ^= 1


def _json(name: str, **changes: object) -> Callable[[Path], None]:
    def edit(moe: Path) -> None:
        write_json(moe / name, read_json(moe / name) | changes)

    return edit


def _rope(moe: Path) -> None:
    config = read_json(moe / "config.json")
    for key in ("rope_parameters", "rope_scaling"):
        if key in config:
            config[key]["original_max_position_embeddings"] = 33
    write_json(moe / "config.json", config)


def _template(moe: Path) -> None:
    file = moe / "chat_template.jinja"
    file.write_text(file.read_text().replace("<", "[", 1) + "<|end|>")


def _tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return lambda moe: spoil(moe, edit)


LAYER = "model.layers.1."
DAMAGES: dict[str, tuple[str, dict[str, Any], str | None, Callable[[Path], None], str, str]] = {
    "scale of an expert": (
        *("llama", {}, None),
        _tensors(lambda t: t[expert(1, 2, "w2")].mul_(1.001)),
        *("weights", expert(1, 2, "w2")),
    ),
    "bias of an expert": (
        *("nemotron", {"mlp_bias": True}, None),
        _tensors(lambda t: t[f"{LAYER}mlp.expert_mlps.up_proj_bias"][2].add_(1e-3)),
        *("weights", f"{LAYER}mlp.expert_mlps.up_proj_bias[2]"),
    ),
    "equal groups": ("llama", {}, None, _tensors(_equal_groups), "weights", LAYER),
    "last bits of a router row": ("llama", {}, None, _tensors(_last_bits), "weights", LAYER),
    "norm before the MLP": (
        *("llama", {}, None),
        _tensors(lambda t: t[f"{LAYER}post_attention_layernorm.weight"][3].add_(1e-3)),
        *("weights", f"{LAYER}post_attention_layernorm.weight"),
    ),
    "original length of rope scaling": (
        *("llama", {"rope_parameters": YARN}, None),
        _rope,
        *("structure", "rope_parameters"),
    ),
    "window": (
        *("mistral", {"sliding_window": 64}, None),
        _json("config.json", sliding_window=63),
        *("structure", "sliding_window"),
    ),
    "chat template": ("llama", {}, None, _template, "files", "the chat template is not"),
    "eos": (
        *("llama", {}, None),
        _json("generation_config.json", eos_token_id=5),
        *("files", "generation_config.json"),
    ),
    "correction bias": (
        *("llama", {}, "glm4_moe"),
        _tensors(lambda t: t[f"{LAYER}mlp.gate.e_score_correction_bias"][0].add_(1e-3)),
        *("weights", f"{LAYER}mlp.gate.e_score_correction_bias"),
    ),
    "routed scaling factor": (
        *("llama", {}, "glm4_moe"),
        _json("config.json", routed_scaling_factor=1.001),
        *("weights", "up × down = 1.001"),
    ),
    "expert of another layer": (
        *("llama", {}, None),
        _tensors(_swap_layers),
        *("weights", expert(0, 1, "w1")),
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_subtle_damages(make_dense: MakeDense, tmp_path: Path, name: str) -> None:
    model_type, config, target, damage, check, word = DAMAGES[name]
    dense, moe = make_dense(model_type, **config), tmp_path / "moe"
    convert(dense, moe, EXACT, target=target or "auto")
    (moe / "upcycle.json").unlink()
    assert verify(dense, moe, checks=[check]).passed
    damage(moe)
    report: Report = verify(dense, moe, checks=[check])
    assert report.status is Status.FAILED
    assert word in " ".join((report.checks[0].detail, *report.checks[0].failures))


def test_an_attention_multiplier(
    make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twelfth: of a family that has one, and that takes no more than a row."""
    row = replace(DENSE["llama"], model_type="granite", classes="Granite", targets=())
    monkeypatch.setitem(DENSE, "granite", row)
    monkeypatch.setitem(SIZES, "granite", {**TINY, "head_dim": 8, "attention_multiplier": 0.5})
    dense, moe = make_dense("granite"), tmp_path / "moe"
    convert(dense, moe, EXACT)
    assert verify(dense, moe).passed
    _json("config.json", attention_multiplier=0.51)(moe)
    report = verify(dense, moe, checks=["structure", "outputs"])
    structure, outputs = report.checks
    assert "attention_multiplier is 0.51" in structure.failures[0]
    assert outputs.status is Status.FAILED
