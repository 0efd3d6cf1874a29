"""The check `outputs`: both models run with their weights on disk, and are compared."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense, clone, logits
from engine_fixtures import assert_equal_peaks, peak_anonymous_bytes
from engine_fixtures import make_dense as make_hollow
from verified import EXPERT, MIXTRAL_EXPERT, Tensors, edit_json, edit_tensors

from upcycle_cli import Options, Recipe, UpcycleError, convert, open_checkpoint
from upcycle_cli.plan.plan import Plan
from upcycle_cli.recipe.options import ExpertLayout, Promise
from upcycle_cli.verification import outputs
from upcycle_cli.verification.logit_divergence import Divergence, Softmax
from upcycle_cli.verification.outputs import Expectation, check_outputs
from upcycle_cli.verification.prompts import Prompt, TextOptions, make_prompt
from upcycle_cli.verification.rebuild import expectation
from upcycle_cli.verification.result import CheckResult, Status

PAIRS = Recipe("E2G2T2")
SPLITS = Recipe("E4G4T3", allow_inexact=True)
EXACT = Expectation(promise=Promise.EXACT, group_size=2)
MEASURED = Expectation(promise=Promise.NONE, reason="of a test")


def outputs_of(
    dense: Path,
    moe: Path,
    expected: Expectation = EXACT,
    **texts: Any,  # noqa: ANN401
) -> CheckResult:
    options = TextOptions(**{"tokens": 200, **texts})
    return check_outputs(open_checkpoint(dense), open_checkpoint(moe), expected, options)


def prompt_of(monkeypatch: pytest.MonkeyPatch) -> list[Prompt]:
    """Return a list that gets the prompt of each check."""
    found: list[Prompt] = []

    def noted(*arguments: Any) -> Prompt:  # noqa: ANN401
        found.append(make_prompt(*arguments))
        return found[-1]

    monkeypatch.setattr(outputs, "make_prompt", noted)
    return found


# The numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "target", "recipe", "options"),
    [
        ("llama", "auto", PAIRS, Options()),
        ("llama", "auto", PAIRS, Options(dtype="bfloat16")),
        ("llama", "auto", SPLITS, Options()),
        ("qwen2", "auto", PAIRS, Options(expert_layout=ExpertLayout.FUSED)),
        ("qwen3", "glm4_moe", PAIRS, Options()),
        ("olmo2", "upcycled", PAIRS, Options()),
        ("nemotron_h", "auto", PAIRS, Options()),
        ("gemma4_text", "auto", PAIRS, Options()),  # its experts lie beside the MLP
    ],
)
def test_metrics_are_those_of_whole_models(
    make_dense: MakeDense,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    target: str,
    recipe: Recipe,
    options: Options,
) -> None:
    """The oracle: transformers loads both models whole, and softmax is taken in float64."""
    dense, prompts = make_dense(model_type), prompt_of(monkeypatch)
    moe = convert(dense, tmp_path / "moe", recipe, target=target, options=options).output
    if recipe.allow_inexact:  # nor do they depend on the sizes of blocks
        monkeypatch.setattr("upcycle_cli.verification.logit_divergence._BLOCK_LOGITS", 1 << 13)
        monkeypatch.setattr("upcycle_cli.run.lazy_weights._BLOCK", 1000)
    found = outputs_of(dense, moe, replace(MEASURED, group_size=recipe.group_size)).metrics
    ids, targets = prompts[0].ids, prompts[0].targets
    p, q = (
        logits(path, ids, torch.float32).flatten(0, 1).double().log_softmax(-1)
        for path in (dense, moe)
    )
    kl, follows = (p.exp() * (p - q)).sum(-1), targets >= 0
    wanted = {
        "kl_mean": kl.mean(),
        "kl_max": kl.max(),
        "dense_nll": -p[follows].gather(1, targets[follows, None]).mean(),
        "moe_nll": -q[follows].gather(1, targets[follows, None]).mean(),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double().mean(),
    }
    for key, value in wanted.items():
        assert found[key] == pytest.approx(float(value), abs=1e-6), key
    if recipe.allow_inexact:
        assert float(found["kl_mean"]) > 1e-4  # or nothing was compared


@pytest.mark.parametrize("size", [1e-6, 1e-2, 3.0])
def test_divergences_are_those_of_float64(size: float) -> None:
    """Small, larger and large differences of logits go three different ways."""
    generator = torch.Generator().manual_seed(0)
    p_PV = 3 * torch.randn(64, 500, generator=generator)
    q_PV = p_PV + size * torch.randn(64, 500, generator=generator)
    p, q = (Softmax(torch.zeros(64, dtype=torch.long)) for _ in range(2))
    divergence = Divergence(p, q)
    divergence.add(p_PV, q_PV, p.add(p_PV, 0))
    q.add(q_PV, 0)
    one, other = (held.double().log_softmax(-1) for held in (p_PV, q_PV))
    wanted_P = (one.exp() * (one - other)).sum(-1)
    assert torch.allclose(divergence.kl, wanted_P, rtol=2e-3, atol=1e-14)


def test_copies_of_an_expert_run_once_with_the_same_result(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from upcycle_cli.run.lazy_models import MergeCopies

    recipe = Recipe("E4G2T4")
    moe = convert(llama, tmp_path / "moe", recipe).output
    merged = outputs_of(llama, moe)
    found: list[list[int]] = []
    find = MergeCopies._find  # noqa: SLF001

    def noted(hook: Any) -> list[int]:  # noqa: ANN401
        found.append(find(hook))
        return [*range(8)]

    monkeypatch.setattr(MergeCopies, "_find", noted)
    alone = outputs_of(llama, moe)
    assert found == [[0, 1] * 4] * 2
    for one, other in zip(alone.layers, merged.layers, strict=True):
        assert one.load == other.load  # of the router, which chooses among all experts
        assert one.hidden_rms == pytest.approx(other.hidden_rms, abs=1e-6)
    assert merged.metrics["kl_mean"] == pytest.approx(alone.metrics["kl_mean"], abs=1e-9)


SECOND_DOWN = {
    "llama": [MIXTRAL_EXPERT.format(1, expert, "w2") for expert in range(4)],
    # Its MLP adds the residual.
    "bloom": [f"transformer.h.1.mlp.expert_mlps.down_proj{part}" for part in ("", "_bias")],
    # Its layer runs the MLP.
    "opt": [f"model.decoder.layers.1.fc1.expert_mlps.down_proj{part}" for part in ("", "_bias")],
}


@pytest.mark.parametrize("model_type", SECOND_DOWN)
def test_an_error_is_measured_in_the_layer_that_adds_it(
    make_dense: MakeDense, tmp_path: Path, model_type: str
) -> None:
    dense = make_dense(model_type)
    moe = convert(dense, tmp_path / "moe", Recipe("E4G1T2")).output
    one = replace(EXACT, group_size=1)
    good = outputs_of(dense, moe, one)
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
    edit_tensors(moe, lambda t: [t[name].mul_(1.1) for name in SECOND_DOWN[model_type]])
    bad = outputs_of(dense, moe, one)
    first, second = bad.layers
    assert bad.status is Status.FAILED
    assert first.added_rms < 1e-6
    assert second.added_rms == pytest.approx(0.1, abs=1e-4)
    assert second.gain == pytest.approx(1.1, abs=1e-4)
    assert first.hidden_rms < 1e-6
    assert second.hidden_rms > 1e-3


# The promise --------------------------------------------------------------------------------------

SOUND = {
    "kl_mean_conversion": 1e-12,
    "kl_mean_rounding": 0.0,
    "kl_mean_whole": 1e-12,
    "top1_agreement_conversion": 1.0,
    "split_token_layers": 0.0,
    "tokens": 2048,
}
NEARLY = replace(EXACT, promise=Promise.APPROXIMATE, logit_std=0.001)


@pytest.mark.parametrize(
    ("expected", "bound", "changes", "failing"),
    [
        (EXACT, 1e-8, {}, None),
        (EXACT, 1e-8, {"kl_mean_conversion": 6e-5}, None),  # of a group that a tie has split
        (EXACT, 1e-8, {"kl_mean_whole": 2e-8}, "mean KL to the dense model is 2e-08"),
        (EXACT, 1e-8, {"kl_mean_whole": math.nan}, "no token got whole groups"),
        (EXACT, 1e-8, {"kl_mean_picture": 2e-8}, "on a picture is 2e-08"),
        (EXACT, 1e-8, {"top1_agreement_conversion": 0.99}, "top-1 agreement"),
        (EXACT, 1e-8, {"top1_agreement_conversion": 0.99, "tokens": 100}, None),  # one near-tie
        (EXACT, 1e-8, {"split_token_layers": 0.002}, "0.20% of tokens"),
        (EXACT, 1e-8, {"kl_mean_rounding": 0.02}, "costs a mean KL of 0.02"),
        (replace(EXACT, group_size=1), 1e-8, {"split_token_layers": 0.002}, None),
        (replace(EXACT, is_lossless=False), 1e-3, {"kl_mean_whole": 9e-4}, None),
        (replace(EXACT, is_lossless=False), 1e-3, {"kl_mean_whole": 2e-3}, "allows 0.001"),
        (NEARLY, 1e-8, {"kl_mean_whole": 1e-4, "kl_mean_conversion": 1.0}, None),
        (NEARLY, 1e-8, {"kl_mean_whole": 2e-4}, "allows 0.00013"),
        (NEARLY, 1e-8, {"kl_mean_whole": math.nan}, "no token got"),
        (NEARLY, 1e-8, {"split_token_layers": 0.02}, "2.00% of tokens"),
    ],
)
def test_metrics_are_held_to_the_promise(
    expected: Expectation, bound: float, changes: dict[str, float], failing: str | None
) -> None:
    _, failures = outputs._judge(expected, SOUND | changes, bound)  # noqa: SLF001
    assert len(failures) == (failing is not None), failures
    assert failing is None or failing in failures[0]


# Rows that an earlier version failed --------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "stored", "recipe", "target", "dtype"),
    [
        ("gpt2", "float32", PAIRS, "upcycled", "float16"),  # matrices lie the other way
        ("apertus", "float32", PAIRS, "upcycled", "float16"),  # a small constant is rounded
        ("cohere2", "float32", replace(PAIRS, expansion=4), "cohere2_moe", None),  # ties
        *(
            (name, "bfloat16", Recipe("E2G3T3"), "upcycled", None)
            for name in ("phi", "starcoder2", "gpt_neo")  # a bias times 1/3 is rounded
        ),
    ],
)
def test_it_passes(
    make_dense: MakeDense,
    tmp_path: Path,
    model_type: str,
    stored: str,
    recipe: Recipe,
    target: str,
    dtype: str | None,
) -> None:
    sizes: Any = {"intermediate_size": 96, "n_inner": 96} if recipe.granularity == 3 else {}
    dense = make_dense(model_type, dtype=stored, **sizes)
    options = Options(dtype=dtype)
    done = convert(dense, tmp_path / "moe", recipe, target=target, options=options)
    assert done.plan.promise is Promise.EXACT
    assert isinstance(done.plan, Plan)
    found = outputs_of(dense, done.output, expectation(done.plan), tokens=768)
    assert found.status is Status.PASSED, found.failures


# Damage -------------------------------------------------------------------------------------------

NORM, DOWN = "model.norm.weight", MIXTRAL_EXPERT.format(0, 0, "w2")
SHARED = "model.layers.1.mlp.shared_expert.{}_proj.weight"
FLOAT16 = "float16, which ends at 65504"


def config(**changes: object) -> Callable[[Path], object]:
    return lambda moe: edit_json(moe / "config.json", lambda value: value.update(changes))


def tensors(edit: Callable[[Tensors], object]) -> Callable[[Path], object]:
    return lambda moe: edit_tensors(moe, edit)


def _large_experts(held: Tensors) -> None:
    """Scale one expert and its copy so that their output is large, but each weight is small."""
    for number in range(4):
        for matrix in ("w2", "w3"):
            held[MIXTRAL_EXPERT.format(1, number, matrix)].mul_(1500)


def _large_shared_expert(held: Tensors) -> None:
    """Zero times infinity is nan, so an expert that does nothing can do harm."""
    for part in ("gate", "up"):
        held[SHARED.format(part)].fill_(300.0)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (tensors(lambda t: t.pop(NORM)), "norm.weight is in no file"),
        (tensors(lambda t: t.pop(EXPERT)), f"lacks {EXPERT}"),
        (tensors(lambda t: t.update({NORM: torch.ones(31)})), "but config.json implies [32]"),
        (tensors(lambda t: t.update({DOWN: torch.ones(32, 30)})), "has shape [32, 30], but"),
        (tensors(lambda t: t.update({NORM: t[NORM].int()})), f"{NORM} is stored as I32"),
        (tensors(lambda t: t[NORM].fill_(math.nan)), "logits of the MoE are not"),
        (config(num_local_experts="four"), "num_local_experts must be a positive integer"),
        (config(num_hidden_layers=10**9), "1000000000 layers of 4 experts are more"),
        (config(num_local_experts=10**9), "2 layers of 1000000000 experts are more"),
        (config(num_local_experts=3), "transformers could not run the MoE"),
        (config(hidden_act="no such thing"), "transformers could not run the MoE"),
        (tensors(_large_experts), f"layers.1.mlp.experts.down_proj|{FLOAT16}"),
        (tensors(_large_shared_expert), f"layers.1.mlp.shared_expert.down_proj|{FLOAT16}"),
    ],
)
def test_damage_is_a_failure_in_words(
    make_dense: MakeDense, tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    dense = make_dense("llama", dtype="float16" if FLOAT16 in words else "float32")
    target = "qwen2_moe" if "shared_expert" in words else "mixtral"
    moe = convert(dense, tmp_path / "moe", PAIRS, target=target).output
    damage(moe)
    found = outputs_of(dense, moe, replace(MEASURED, group_size=2))
    assert found.status is Status.FAILED
    assert all(word in " ".join(found.failures) for word in words.split("|")), found.failures


def test_a_long_context_shows_a_window(make_dense: MakeDense, tmp_path: Path) -> None:
    """A window that is one token short shows in the predictions beyond it, and nowhere before."""
    dense = make_dense("mistral", sliding_window=96)
    moe = convert(dense, tmp_path / "moe", PAIRS).output
    config(sliding_window=95)(moe)
    assert outputs_of(dense, moe, context=64).status is Status.PASSED
    found = outputs_of(dense, moe, context=128)
    assert found.status is Status.FAILED
    assert all(kl is not None and kl < 1e-9 for kl in found.texts[0].kl[:95])
    assert max(kl or 0 for kl in found.texts[0].kl[95:]) > 1e-7


# Texts --------------------------------------------------------------------------------------------


def prompt_for(dense: Path, seed: bytes = b"", **options: Any) -> Prompt:  # noqa: ANN401
    texts = TextOptions(**options)
    texts.check()
    return make_prompt(open_checkpoint(dense), texts, seed)


def test_every_built_in_text_has_its_share(llama: Path) -> None:
    prompt, other = prompt_for(llama), prompt_for(llama, b"another router")
    text = "".join(word for row in prompt.words for word in row)
    for part in ("harbour", "港口", "def soundings", "nabla", "Sonnenlicht", "for ten?"):
        assert part in text
    assert not torch.equal(prompt.ids, other.ids)
    assert prompt.words == other.words
    assert sum(map(len, prompt_for(llama, tokens=100).words)) == 100
    row = prompt_for(llama, context=128)
    assert row.ids.shape == (1, 128)
    assert [len(words) for words in row.words] == [128]


def test_prompts_of_a_file(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "One."}, {"role": "assistant", "content": "Two."}]
    lines = [{"text": "Three."}, {"prompt": "Four."}, {"messages": chat}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    prompt = prompt_for(llama, prompts=file)
    words = "".join("".join(row) for row in prompt.words)
    assert all(word in words for word in ("One", "Two", "Three", "Four"))
    assert "the text of prompts.jsonl" in prompt.origin
    bare = clone(llama, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    with pytest.raises(UpcycleError, match="cannot be used: the dense model"):
        prompt_for(bare, prompts=file)
    assert "random tokens, since" in prompt_for(bare).origin


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": 129}, "the model takes 128"),
        ({"context": 0}, "`context` must be 1 or more, not 0"),
        ({"tokens": 0}, "`tokens` must be 1 or more, not 0"),
    ],
)
def test_impossible_numbers_of_tokens_are_refused(
    llama: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UpcycleError, match=words):
        prompt_for(llama, **options)


def test_the_longest_text_is_what_the_model_takes(make_dense: MakeDense) -> None:
    mpt, bloom = (
        make_dense("mpt", max_seq_len=64),
        make_dense("bloom", max_position_embeddings=None),
    )
    assert prompt_for(mpt).ids.shape[1] == 64
    with pytest.raises(UpcycleError, match="the model takes 64"):
        prompt_for(mpt, context=65)
    assert prompt_for(bloom, context=600).ids.shape == (1, 600)


# Memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[(4, 2), (16, 2)], [(4, 8), (4, 128)]], ids=str)
@pytest.mark.long
def test_memory_does_not_grow(tmp_path: Path, sizes: list[tuple[int, int]]) -> None:
    """Not with the number of layers (the first of a pair), nor of experts (the second)."""
    measures = []
    for layers, expansion in sizes:
        dense, moe = tmp_path / f"dense{layers}x{expansion}", tmp_path / f"moe{layers}x{expansion}"
        make_hollow(dense, hidden=512, inner=2048, layers=layers)
        convert(dense, moe, Recipe(expansion=expansion, granularity=1, top_k=2))
        command = [sys.executable, "-m", "upcycle_cli", "verify", str(dense), str(moe)]
        command += ["--checks", "outputs", "--tokens", "256"]
        measures.append(partial(peak_anonymous_bytes, command))
    assert_equal_peaks(measures)
