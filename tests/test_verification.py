"""Verification: good conversions pass all checks, and each kind of damage fails the right one."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYOUTS
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from upcycle_cli import Options, Recipe, UpcycleError, convert, open_checkpoint
from upcycle_cli.hooks import Watch
from upcycle_cli.recipe import ExpertLayout, Routing, ScaleSplit, Scaling
from upcycle_cli.running import models as _models
from upcycle_cli.running.texts import read_texts
from upcycle_cli.verification import CHECK_NAMES, CheckResult, Report, Status, TextOptions, verify
from upcycle_cli.verification import prompts as _prompts

Tensors = dict[str, torch.Tensor]

SIZES: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 600,
    "initializer_range": 0.3,  # large enough for damage to show in the logits
}
MIXTRAL_EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"


def save_dense(
    config: Any,  # noqa: ANN401 - transformers has no types to name
    model_class: Any,  # noqa: ANN401
    path: Path,
    *,
    seed: int = 0,
) -> Path:
    torch.manual_seed(seed)
    model_class(config).to(torch.bfloat16).save_pretrained(path)
    return path


def save_tokenizer(path: Path) -> None:
    """Save a tokenizer that has a token for each byte and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{{ messages[0]['content'] }}",
    ).save_pretrained(path)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "llama"
    save_dense(LlamaConfig(**SIZES), LlamaForCausalLM, path)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def mixtral(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe") / "mixtral"
    convert(dense, path, Recipe(expansion=2, granularity=2, top_k=2))
    return path


@pytest.fixture(scope="module")
def qwen2_moe(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe") / "qwen2_moe"
    recipe = Recipe(expansion=4, granularity=2, top_k=2, routing=Routing.SOFTMAX_TOPK)
    convert(dense, path, recipe, target="qwen2_moe")
    return path


@pytest.fixture
def moe(mixtral: Path, tmp_path: Path) -> Path:
    """A copy of the mixtral to damage."""
    return Path(shutil.copytree(mixtral, tmp_path / "moe"))


@pytest.fixture
def qwen(qwen2_moe: Path, tmp_path: Path) -> Path:
    """A copy of the qwen2_moe to damage."""
    return Path(shutil.copytree(qwen2_moe, tmp_path / "qwen"))


def edit_tensors(path: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    contiguous = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def flip_byte(path: Path, name: str) -> None:
    """Flip the lowest bit of a byte in the middle of a tensor."""
    entry = open_checkpoint(path).tensors[name]
    with (path / entry.shard).open("r+b") as file:
        position = entry.offset + entry.nbytes // 4 * 2
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def result(report: Report, check: str) -> tuple[Status, str]:
    """Return a check's status and all its text."""
    found = next(item for item in report.checks if item.name == check)
    return found.status, "\n".join((found.detail, *found.failures))


def assert_fails(report: Report, check: str, *words: str) -> None:
    status, text = result(report, check)
    assert status is Status.FAILED, text
    assert report.status is Status.FAILED
    for word in words:
        assert word in text


def assert_passes(report: Report, *names: str) -> None:
    """All checks passed, or those that are named."""
    for check in report.checks:
        if not names or check.name in names:
            assert check.status is Status.PASSED, (check.name, check.detail, check.failures)


def assert_measured(report: Report) -> None:
    """Nothing is wrong, and nothing is proven."""
    for check in report.checks:
        wanted = Status.MEASURED if check.name == "outputs" else Status.PASSED
        assert check.status is wanted, (check.name, check.detail, check.failures)
    assert report.status is Status.MEASURED
    assert not report.passed


def check(report: Report, name: str) -> CheckResult:
    return next(item for item in report.checks if item.name == name)


class Heard(Watch):
    def __init__(self) -> None:
        self.names: list[str] = []
        self.done: dict[str, list[tuple[int, int, str]]] = {}

    def checking(self, name: str) -> None:
        self.names.append(name)

    def checked(self, done: int, total: int, unit: str) -> None:
        self.done.setdefault(self.names[-1], []).append((done, total, unit))


# Good conversions


def test_exact_conversion_passes(dense: Path, mixtral: Path) -> None:
    heard = Heard()
    report = verify(dense, mixtral, watch=heard)
    assert_passes(report)
    assert heard.names == list(CHECK_NAMES)
    assert heard.done["outputs"] == [(1, 2, "layers"), (2, 2, "layers")]
    weights, outputs = check(report, "weights").metrics, check(report, "outputs").metrics
    assert (weights["gate_factor"], weights["up_factor"], weights["down_factor"]) == (1, 2, 1)
    assert weights["lossless"] is True
    assert weights["groups_checked"] == 4
    assert float(outputs["kl_mean"]) < 1e-10
    assert outputs["text_tokens"] == 1792
    assert outputs["split_token_layers"] == 0
    assert report.promise == "exact"


def test_approximate_conversion_passes(dense: Path, qwen2_moe: Path) -> None:
    report = verify(dense, qwen2_moe)
    assert_passes(report)
    assert "error of the order of the router's logits" in check(report, "outputs").detail
    assert report.promise == "approximate"


def test_report_is_json(dense: Path, mixtral: Path) -> None:
    report = verify(dense, mixtral).to_json()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["status"] == "passed"
    assert [check["name"] for check in report["checks"]] == list(CHECK_NAMES)
    outputs = next(item for item in report["checks"] if item["name"] == "outputs")
    assert {"kl_mean", "kl_max", "max_abs_logit_diff", "top1_agreement"} <= set(outputs["metrics"])
    assert report["promise"] == "exact"


def test_screen_stays_empty(dense: Path, moe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit_tensors(moe, lambda tensors: tensors.pop("model.norm.weight"))
    verify(dense, moe)
    assert capfd.readouterr() == ("", "")


G2 = partial(Recipe, expansion=2, granularity=2, top_k=2)


@pytest.mark.parametrize(
    ("kind", "target", "recipe", "options"),
    [
        ("llama", "mixtral", G2(), {"expert_layout": ExpertLayout.FUSED}),
        ("llama", "mixtral", G2(scaling=1.7), {"dtype": "float16"}),
        ("llama", "mixtral", G2(scale_split=ScaleSplit.DOWN), {"dtype": "float32"}),
        ("llama", "mixtral", G2(scaling=Scaling.NONE), {}),
        ("llama", "mixtral", G2(virtual_groups=False), {}),
        ("llama", "mixtral", Recipe(expansion=1, granularity=2, top_k=2), {}),
        ("llama", "mixtral", Recipe(expansion=2, granularity=2, top_k=3, allow_inexact=True), {}),
        ("llama", "qwen2_moe", Recipe(expansion=3, granularity=1, top_k=2), {}),
        ("llama", "qwen2_moe", Recipe(expansion=1, granularity=4, top_k=4), {}),
        ("mistral", "mixtral", G2(), {}),
        ("mistral", "qwen2_moe", G2(), {"untie_embeddings": False}),
        ("qwen2", "qwen2_moe", G2(scaling=Scaling.PAPER), {"untie_embeddings": True}),
        ("qwen3", "qwen3_moe", G2(), {"expert_layout": ExpertLayout.FUSED}),
        ("qwen3", "qwen3_moe", G2(routing=Routing.SOFTMAX_TOPK), {"dtype": "float32"}),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_every_kind_of_conversion_passes(
    kind: str,
    target: str,
    recipe: Recipe,
    options: dict[str, Any],
    recorded: bool,  # noqa: FBT001
    tmp_path: Path,
) -> None:
    kinds = {
        "llama": (LlamaConfig(**SIZES), LlamaForCausalLM),
        "mistral": (MistralConfig(**SIZES, sliding_window=16), MistralForCausalLM),
        "qwen2": (Qwen2Config(**SIZES, tie_word_embeddings=True), Qwen2ForCausalLM),
        "qwen3": (Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True), Qwen3ForCausalLM),
    }
    source = save_dense(*kinds[kind], tmp_path / "dense")
    convert(source, tmp_path / "moe", recipe, target=target, options=Options(**options))
    promised = recipe.virtual_groups and recipe.scaling is Scaling.EXACT and recipe.top_k != 3
    if not recorded:
        (tmp_path / "moe" / "upcycle.json").unlink()
    report = verify(source, tmp_path / "moe", allow_inexact=not promised)
    assert report.accepted
    assert report.promise == ("none" if not promised else report.promise)
    if recorded:
        (assert_passes if promised else assert_measured)(report)
        return
    assert result(report, "claims")[0] is Status.SKIPPED
    assert_passes(report, "structure", "files", "weights")
    assert result(report, "outputs")[0] is (Status.PASSED if promised else Status.MEASURED)


def test_tensors_that_no_model_reads_are_ignored(dense: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(dense, tmp_path / "dense"))
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(source, lambda tensors: tensors.update({frequencies: torch.ones(4)}))
    convert(source, tmp_path / "moe", Recipe(expansion=2, granularity=1, top_k=1))
    assert_passes(verify(source, tmp_path / "moe"))


def test_nothing_promised_says_why(dense: Path, tmp_path: Path) -> None:
    recipe = Recipe(expansion=2, granularity=4, top_k=4, scaling=Scaling.PAPER)
    convert(dense, tmp_path / "moe", recipe)
    report = verify(dense, tmp_path / "moe")
    assert_measured(report)
    assert not report.accepted
    assert verify(dense, tmp_path / "moe", allow_inexact=True).accepted
    detail = check(report, "outputs").detail
    assert "does not promise equality" in detail
    assert "gate of SwiGLU" in detail


# Damaged values


@pytest.mark.parametrize(
    "name",
    [
        MIXTRAL_EXPERT.format(1, 3, "w2"),
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "lm_head.weight",
    ],
)
def test_flipped_byte(dense: Path, moe: Path, name: str) -> None:
    flip_byte(moe, name)
    assert_fails(verify(dense, moe, checks=["weights"]), "weights", name, "in 1 of")


def test_flipped_byte_in_the_expert_that_is_measured_first(dense: Path, moe: Path) -> None:
    name = MIXTRAL_EXPERT.format(0, 0, "w1")
    flip_byte(moe, name)
    report = verify(dense, moe, checks=["weights"])
    assert_fails(report, "weights", name, "1 problem found")


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_nan_stays_nan(dense: Path, tmp_path: Path, dtype: str | None) -> None:
    """Which of them comes out of a cast or a product depends on who computes."""
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]
    damaged = Path(shutil.copytree(dense, tmp_path / "dense"))

    def spoil(tensors: Tensors) -> None:
        for name in names:
            tensors[name].view(torch.int16)[0, :3] = torch.tensor([0x7FC0, 0x7F81, -1])

    edit_tensors(damaged, spoil)
    moe = tmp_path / "moe"
    convert(damaged, moe, Recipe(expansion=2, granularity=2, top_k=2), options=Options(dtype=dtype))
    assert_passes(verify(damaged, moe, checks=["weights"]))
    edit_tensors(moe, lambda tensors: tensors[names[0]][0].fill_(1))
    report = verify(damaged, moe, checks=["weights"])
    assert_fails(report, "weights", names[0], "first at [0, 0]: 1 instead of nan")


def test_flipped_byte_in_router(dense: Path, moe: Path) -> None:
    flip_byte(moe, ROUTER)
    report = verify(dense, moe, checks=["weights", "claims"])
    assert_fails(report, "weights", ROUTER, "virtual group")
    assert_fails(report, "claims", ROUTER, "SHA-256")


def test_experts_swapped_across_shards(dense: Path, tmp_path: Path) -> None:
    moe = tmp_path / "moe"
    convert(
        dense,
        moe,
        Recipe(expansion=2, granularity=2, top_k=2),
        options=Options(max_shard_bytes=20_000),
    )
    first, second = (MIXTRAL_EXPERT.format(0, expert, "w1") for expert in (0, 3))
    entries = open_checkpoint(moe).tensors
    assert entries[first].shard != entries[second].shard
    swapped = [
        (entries[name], (moe / entries[name].shard).read_bytes()) for name in (first, second)
    ]
    values = [data[entry.offset : entry.offset + entry.nbytes] for entry, data in swapped]
    for (entry, data), value in zip(swapped, reversed(values), strict=True):
        end = entry.offset + entry.nbytes
        (moe / entry.shard).write_bytes(data[: entry.offset] + value + data[end:])
    report = verify(dense, moe, checks=["weights", "outputs"])
    assert_fails(report, "weights", f"{first} holds shard 1 where shard 0 belongs", second)
    assert_fails(report, "outputs", "kl_mean")


def test_wrong_shard(dense: Path, moe: Path) -> None:
    wrong, right = (MIXTRAL_EXPERT.format(1, expert, "w2") for expert in (2, 3))
    edit_tensors(moe, lambda tensors: tensors.update({wrong: tensors[right]}))
    report = verify(dense, moe, checks=["weights"])
    assert_fails(report, "weights", f"{wrong} holds shard 1 where shard 0 belongs")


def test_router_row_changed_in_group(dense: Path, qwen: Path) -> None:
    name = "model.layers.0.mlp.gate.weight"

    def edit(tensors: Tensors) -> None:
        tensors[name][3] *= -1

    edit_tensors(qwen, edit)
    report = verify(dense, qwen, checks=["weights", "outputs"])
    assert_fails(report, "weights", f"{name}: row 3 differs", "virtual group 1")
    assert_fails(report, "outputs", "split_token_layers")


def test_groups_with_equal_rows(dense: Path, moe: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[ROUTER] = tensors[ROUTER][:1].repeat(4, 1)

    edit_tensors(moe, edit)
    report = verify(dense, moe, checks=["weights"])
    assert_fails(report, "weights", ROUTER, "rows 0 and 1 of its groups are the same")


def test_router_not_finite(dense: Path, moe: Path) -> None:
    edit_tensors(moe, lambda tensors: tensors[ROUTER].fill_(torch.nan))
    report = verify(dense, moe, checks=["weights", "outputs"])
    assert_fails(report, "weights", ROUTER, "not finite")
    assert result(report, "outputs")[0] is Status.FAILED


def test_logits_not_finite_fail_even_when_nothing_is_promised(dense: Path, tmp_path: Path) -> None:
    recipe = Recipe(expansion=2, granularity=2, top_k=2, scaling=Scaling.NONE)
    convert(dense, tmp_path / "moe", recipe)

    def edit(tensors: Tensors) -> None:
        tensors["lm_head.weight"][7] = torch.inf

    edit_tensors(tmp_path / "moe", edit)
    assert_fails(verify(dense, tmp_path / "moe"), "outputs", "not finite", "MoE")


def test_another_valid_router(dense: Path, moe: Path) -> None:
    def edit(tensors: Tensors) -> None:
        rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
        tensors[ROUTER] = rows.repeat_interleave(2, 0).to(torch.bfloat16)

    edit_tensors(moe, edit)
    report = verify(dense, moe)
    assert_passes(report, "structure", "files", "weights", "outputs")
    assert_fails(report, "claims", ROUTER)


def test_another_valid_top_k(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "moe", Recipe(expansion=4, granularity=1, top_k=2))
    edit_json(tmp_path / "moe" / "config.json", lambda config: config.update(num_experts_per_tok=1))
    report = verify(dense, tmp_path / "moe")
    assert_passes(report, "structure", "files", "weights", "outputs")
    assert_fails(report, "claims", "num_experts_per_tok", "top-k")


def multiply(layers: range, matrices: dict[str, float]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for layer in layers:
            for expert in range(4):
                for matrix, factor in matrices.items():
                    tensors[MIXTRAL_EXPERT.format(layer, expert, matrix)] *= factor

    return edit


def test_scale_applied_twice(dense: Path, moe: Path) -> None:
    edit_tensors(moe, multiply(range(2), {"w3": 2}))
    report = verify(dense, moe)
    assert_fails(report, "weights", "up × down = 4, but config.json", "needs c = 2")
    assert_fails(report, "outputs", "kl_mean")
    assert_fails(report, "claims", "factors.up")


def test_scale_applied_twice_in_one_layer(dense: Path, moe: Path) -> None:
    edit_tensors(moe, multiply(range(1, 2), {"w3": 2}))
    report = verify(dense, moe, checks=["weights"])
    name = MIXTRAL_EXPERT.format(1, 0, "w3")
    assert_fails(report, "weights", f"{name} is its shard multiplied by a further 2")


def test_scale_on_the_gate(dense: Path, moe: Path) -> None:
    edit_tensors(moe, multiply(range(2), {"w1": 2, "w3": 0.5}))
    report = verify(dense, moe)
    assert_fails(report, "weights", "the factor of gate is 2")
    assert_fails(report, "outputs", "kl_mean")
    assert_fails(report, "claims", "factors.gate")


def test_scale_that_no_rule_makes(dense: Path, moe: Path) -> None:
    edit_tensors(moe, multiply(range(2), {"w3": 0.9}))
    report = verify(dense, moe, checks=["weights", "claims"])
    assert_fails(report, "weights", "up × down")
    assert_fails(report, "claims", "factors.up is 2")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model.layers.1.self_attn.q_proj.bias", 1.0, "instead of 0"),
        ("model.layers.0.mlp.shared_expert.down_proj.weight", 0.5, "instead of 0"),
        ("model.layers.1.mlp.shared_expert_gate.weight", 0.0, "not all zero"),
    ],
)
def test_inert_tensor_that_is_not(
    dense: Path, qwen: Path, name: str, value: float, words: str
) -> None:
    edit_tensors(qwen, lambda tensors: tensors[name].fill_(value))
    assert_fails(verify(dense, qwen, checks=["weights"]), "weights", name, words)


def test_untied_head_is_not_the_embedding(tmp_path: Path) -> None:
    config = Qwen2Config(**SIZES, tie_word_embeddings=True)
    source = save_dense(config, Qwen2ForCausalLM, tmp_path / "dense")
    recipe = Recipe(expansion=2, granularity=2, top_k=2)
    convert(source, tmp_path / "moe", recipe, options=Options(untie_embeddings=True))
    flip_byte(tmp_path / "moe", "lm_head.weight")
    assert_fails(verify(source, tmp_path / "moe"), "weights", "lm_head.weight")


# Damaged structure


EXPERT = MIXTRAL_EXPERT.format(1, 2, "w1")
ATTENTION = "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize("name", [EXPERT, ATTENTION, ROUTER, "model.norm.weight"])
def test_tensor_missing(dense: Path, moe: Path, name: str) -> None:
    edit_tensors(moe, lambda tensors: tensors.pop(name))
    report = verify(dense, moe)
    assert_fails(report, "structure", f"{name} is missing")
    assert_fails(report, "weights", f"{name} is missing")
    assert result(report, "outputs")[0] is Status.FAILED


@pytest.mark.parametrize("name", [EXPERT, ATTENTION])
def test_tensor_renamed(dense: Path, moe: Path, name: str) -> None:
    edit_tensors(moe, lambda tensors: tensors.update({f"{name}s": tensors.pop(name)}))
    report = verify(dense, moe, checks=["structure", "weights"])
    for check in ("structure", "weights"):
        assert_fails(report, check, f"{name} is missing", f"{name}s ")


def test_tensor_extra(dense: Path, moe: Path) -> None:
    name = MIXTRAL_EXPERT.format(0, 4, "w1")
    edit_tensors(moe, lambda tensors: tensors.update({name: torch.zeros(32, 32)}))
    report = verify(dense, moe, checks=["structure", "weights"])
    for check in ("structure", "weights"):
        assert_fails(report, check, name)


@pytest.mark.parametrize("name", [EXPERT, ATTENTION, ROUTER])
def test_tensor_of_another_shape(dense: Path, moe: Path, name: str) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[name] = tensors[name][:-1]

    edit_tensors(moe, edit)
    report = verify(dense, moe)
    assert_fails(report, "structure", f"{name} has shape")
    assert_fails(report, "weights", f"{name} has shape")
    assert result(report, "outputs")[0] is Status.FAILED


def test_head_missing_although_tied_by_config(dense: Path, moe: Path) -> None:
    edit_tensors(moe, lambda tensors: tensors.pop("lm_head.weight"))
    edit_json(moe / "config.json", lambda config: config.update(tie_word_embeddings=True))
    report = verify(dense, moe)
    assert_fails(report, "structure", "tie_word_embeddings")
    assert_fails(report, "weights", "lm_head.weight is missing")
    assert_fails(report, "outputs", "kl_mean")


@pytest.mark.parametrize("name", [EXPERT, ATTENTION])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_tensor_of_another_dtype(dense: Path, moe: Path, name: str, dtype: torch.dtype) -> None:
    edit_tensors(moe, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    report = verify(dense, moe)
    assert_fails(report, "structure", f"{name} is ")
    if dtype is torch.int8 or name == ATTENTION:
        assert_fails(report, "weights", f"{name} is ")


def test_recorded_dtype_is_held(dense: Path, tmp_path: Path) -> None:
    recipe = Recipe(expansion=2, granularity=2, top_k=2)
    convert(dense, tmp_path / "moe", recipe, options=Options(dtype="float32"))

    def edit(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.bfloat16()

    edit_tensors(tmp_path / "moe", edit)
    report = verify(dense, tmp_path / "moe", checks=["weights", "claims"])
    assert_fails(report, "weights", "records float32")
    assert_fails(report, "claims", "records float32")


@pytest.fixture
def sharded(dense: Path, tmp_path: Path) -> Path:
    convert(
        dense,
        tmp_path / "sharded",
        Recipe(expansion=2, granularity=2, top_k=2),
        options=Options(max_shard_bytes=20_000),
    )
    return tmp_path / "sharded"


def test_sharded_passes(dense: Path, sharded: Path) -> None:
    assert_passes(verify(dense, sharded))


def test_index_points_to_the_wrong_file(dense: Path, sharded: Path) -> None:
    def edit(index: dict[str, Any]) -> None:
        files = index["weight_map"]
        files[EXPERT] = next(file for file in files.values() if file != files[EXPERT])

    edit_json(sharded / "model.safetensors.index.json", edit)
    report = verify(dense, sharded)
    assert_fails(report, "structure", EXPERT)
    for check in CHECK_NAMES[1:]:
        status, text = result(report, check)
        assert status is Status.SKIPPED
        assert "cannot be read" in text


def test_index_with_wrong_total(dense: Path, sharded: Path) -> None:
    edit_json(
        sharded / "model.safetensors.index.json",
        lambda index: index["metadata"].update(total_size=5),
    )
    report = verify(dense, sharded, checks=["structure"])
    assert_fails(report, "structure", "metadata.total_size is 5")


def test_truncated_weights_fail_whatever_is_asked(dense: Path, moe: Path) -> None:
    data = (moe / "model.safetensors").read_bytes()
    (moe / "model.safetensors").write_bytes(data[:-10])
    report = verify(dense, moe, checks=["claims", "outputs"])
    assert_fails(report, "claims", "truncated")
    assert result(report, "outputs")[0] is Status.SKIPPED


# Damaged config


@pytest.mark.parametrize(
    ("changes", "check", "words"),
    [
        ({"num_experts_per_tok": 1}, "claims", ["num_experts_per_tok", "records 2"]),
        ({"num_experts_per_tok": 9}, "structure", ["num_experts_per_tok 9"]),
        ({"num_local_experts": 6}, "structure", [MIXTRAL_EXPERT.format(0, 5, "w1")]),
        ({"num_local_experts": 2}, "structure", [MIXTRAL_EXPERT.format(0, 2, "w1")]),
        ({"num_local_experts": 5}, "structure", ["num_local_experts 5"]),
        ({"num_local_experts": "4"}, "structure", ["num_local_experts"]),
        ({"intermediate_size": 64}, "structure", ["has shape"]),
        ({"intermediate_size": 31}, "structure", ["intermediate_size 31"]),
        ({"rms_norm_eps": 1e-2}, "structure", ["rms_norm_eps is 0.01"]),
        ({"hidden_act": "gelu"}, "structure", ["hidden_act is gelu"]),
        ({"num_attention_heads": 8, "head_dim": 4}, "structure", ["num_attention_heads is 8"]),
        ({"sliding_window": 16}, "structure", ["sliding_window of each layer is [16, 16]"]),
        ({"tie_word_embeddings": True}, "structure", ["tie_word_embeddings is true"]),
        ({"dtype": "float16"}, "structure", ["dtype is 'float16'"]),
        ({"eos_token_id": 7}, "structure", ["eos_token_id is 7"]),
        ({"hidden_size": -32}, "structure", ["transformers"]),
        ({"num_attention_heads": 0}, "structure", ["num_attention_heads is 0"]),
    ],
)
def test_config_damaged(
    dense: Path, moe: Path, changes: dict[str, Any], check: str, words: list[str]
) -> None:
    edit_json(moe / "config.json", lambda config: config.update(changes))
    assert_fails(verify(dense, moe), check, *words)


def test_config_with_another_rope(dense: Path, moe: Path) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["rope_theta"] = 1e6
        if "rope_parameters" in config:
            config["rope_parameters"]["rope_theta"] = 1e6

    edit_json(moe / "config.json", edit)
    report = verify(dense, moe)
    assert_fails(report, "structure", "rope_parameters is", "1000000")
    assert_fails(report, "outputs", "kl_mean")


def test_config_with_the_other_routing(dense: Path, qwen: Path) -> None:
    edit_json(qwen / "config.json", lambda config: config.update(norm_topk_prob=True))
    report = verify(dense, qwen)
    assert_fails(report, "weights", "up × down = 8", "topk-softmax", "needs c = 2")
    assert_fails(report, "outputs", "kl_mean_conversion")
    assert_fails(report, "claims", "norm_topk_prob")


# False claims


def test_another_dense_model(mixtral: Path, tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES | {"rms_norm_eps": 1e-3})
    other = save_dense(config, LlamaForCausalLM, tmp_path / "other", seed=1)
    report = verify(other, mixtral)
    assert_fails(report, "structure", "rms_norm_eps")
    assert_fails(report, "weights", "more")
    assert_fails(report, "outputs", "kl_mean")
    assert_fails(report, "claims", "this MoE was made from another checkpoint")
    assert len(report.checks[1].failures) <= 9


def test_tokenizer_changed(dense: Path, moe: Path) -> None:
    def edit(tokenizer: dict[str, Any]) -> None:
        vocab = tokenizer["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    edit_json(moe / "tokenizer.json", edit)
    assert_fails(verify(dense, moe, checks=["files"]), "files", "model.vocab.a is 67")


def test_tokenizer_missing(dense: Path, moe: Path) -> None:
    for file in (*moe.glob("tokenizer*"), *moe.glob("chat_template*")):
        file.unlink()
    assert_fails(verify(dense, moe, checks=["files"]), "files", "tokenizer is missing")


def test_chat_template_changed(dense: Path, moe: Path) -> None:
    (moe / "chat_template.jinja").write_text("{{ messages }}")
    assert_fails(verify(dense, moe, checks=["files"]), "files", "chat template")


def test_tokenizer_broken(dense: Path, moe: Path) -> None:
    (moe / "tokenizer.json").write_text("{}")
    assert_fails(verify(dense, moe, checks=["files"]), "files", "tokenizer.json", "Model missing")


@pytest.mark.parametrize(
    "text",
    ["", "not json", "[]", "{}", "[" * 100_000, '{"format": 1}', '{"format": 2, "recipe": 3}'],
)
def test_record_corrupt(dense: Path, moe: Path, text: str) -> None:
    (moe / "upcycle.json").write_text(text)
    report = verify(dense, moe, checks=["weights", "claims"])
    assert_fails(report, "claims", "upcycle.json")
    assert result(report, "weights")[0] is Status.PASSED


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("format",), 7),
        (("source_type",), "mistral"),
        (("target_type",), None),
        (("expert_layout",), "fused"),
        (("dtype",), "float8"),
        (("recipe",), None),
        (("recipe", "expansion"), 4),
        (("recipe", "expansion"), [2]),
        (("recipe", "granularity"), 0),
        (("recipe", "granularity"), 1),
        (("recipe", "top_k"), 10**400),
        (("recipe", "top_k"), 4),
        (("recipe", "routing"), "softmax-topk"),
        (("recipe", "routing"), {}),
        (("recipe", "scaling"), "paper"),
        (("recipe", "scaling"), -1),
        (("recipe", "scaling"), 3),
        (("recipe", "scale_split"), "down"),
        (("recipe", "virtual_groups"), "yes"),
        (("recipe", "router_logit_std"), 0),
        (("recipe", "name"), "E8G8T8"),
        (("factors",), "x"),
        (("factors", "c"), 4),
        (("factors", "up"), 4),
        (("factors", "gate"), True),
        (("factors", "down"), None),
        (("routers",), []),
        (("routers", ROUTER), "0" * 64),
        (("routers", "model.layers.9.gate"), "0" * 64),
        (("source",), None),
        (("source", "config_sha256"), "0" * 64),
        (("source", "files"), {}),
    ],
)
def test_record_lies(dense: Path, moe: Path, keys: tuple[str, ...], value: object) -> None:
    def edit(record: dict[str, Any]) -> None:
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = value

    edit_json(moe / "upcycle.json", edit)
    assert_fails(verify(dense, moe, checks=["claims"]), "claims")


# Usage and limits


def test_prompts(dense: Path, mixtral: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A short text.")
    report = verify(dense, mixtral, checks=["outputs"], texts=TextOptions(prompts=prompts))
    assert_passes(report)
    assert "the text of prompts.txt and " in report.checks[0].detail
    prompts.write_text(" \n")
    for bad in (prompts, tmp_path / "none.txt"):
        with pytest.raises(UpcycleError, match="prompts"):
            verify(dense, mixtral, texts=TextOptions(prompts=bad))


def test_usage(dense: Path, mixtral: Path, tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match="'weight' is not a check"):
        verify(dense, mixtral, checks=["weight"])
    with pytest.raises(UpcycleError, match="no check"):
        verify(dense, mixtral, checks=[])
    with pytest.raises(UpcycleError, match="dense model comes first"):
        verify(mixtral, dense)
    with pytest.raises(UpcycleError, match="dense model comes first"):
        verify(mixtral, mixtral)
    for paths in ((tmp_path / "none", mixtral), (dense, tmp_path / "none"), (dense, tmp_path)):
        with pytest.raises(UpcycleError):
            verify(*paths)


def test_dense_without_tokenizer(tmp_path: Path) -> None:
    source = save_dense(LlamaConfig(**SIZES), LlamaForCausalLM, tmp_path / "dense")
    convert(source, tmp_path / "moe", Recipe(expansion=2, granularity=2, top_k=2))
    report = verify(source, tmp_path / "moe")
    assert_passes(report)
    assert "512 random tokens" in check(report, "outputs").detail
    assert "Neither model has a tokenizer" in check(report, "files").detail


# Nothing ran


def test_nothing_that_ran_is_not_a_pass(dense: Path, moe: Path) -> None:
    (moe / "upcycle.json").unlink()
    report = verify(dense, moe, checks=["claims"])
    assert report.status is Status.SKIPPED
    assert not report.passed
    assert report.to_json()["status"] == "skipped"
    assert verify(dense, moe, checks=["weights", "claims"]).passed


# What loaders obey beside names and shapes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, ["architectures is ['LlamaForCausalLM']"]),
        ({"architectures": None}, ["architectures is None"]),
        ({"auto_map": {"AutoConfig": "evil.Config"}}, ["auto_map is", "code of its own"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config is", "quantised"]),
        ({"attention_dropout": 0.5}, ["attention_dropout is 0.5"]),
        ({"router_jitter_noise": 0.1}, ["router_jitter_noise is 0.1"]),
    ],
)
def test_config_that_misleads(
    dense: Path, moe: Path, changes: dict[str, Any], words: list[str]
) -> None:
    edit_json(moe / "config.json", lambda config: config.update(changes))
    assert_fails(verify(dense, moe, checks=["structure"]), "structure", *words)


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "pytorch_model.bin", "old.pt", "consolidated.pth"]
)
def test_stray_weight_file(dense: Path, moe: Path, sharded: Path, name: str) -> None:
    for path in (moe, sharded):
        stray = path / f"x{name}"
        stray.write_bytes(b"")
        assert_fails(verify(dense, path, checks=["structure"]), "structure", stray.name)


def test_generation_config_is_the_dense_one(dense: Path, moe: Path) -> None:
    edit_json(moe / "generation_config.json", lambda config: config.update(temperature=9.0))
    report = verify(dense, moe, checks=["files"])
    assert_fails(report, "files", "generation_config.json: temperature is 9.0", "no such thing")
    (moe / "generation_config.json").unlink()
    report = verify(dense, moe, checks=["files"])
    assert_fails(report, "files", "generation_config.json is missing")


@pytest.mark.parametrize("key", ["total", "active", "dense"])
def test_recorded_parameters_are_counted(dense: Path, moe: Path, key: str) -> None:
    edit_json(moe / "upcycle.json", lambda record: record["parameters"].update({key: 1}))
    report = verify(dense, moe, checks=["claims"])
    assert_fails(report, "claims", f"parameters.{key} is 1")
    edit_json(moe / "upcycle.json", lambda record: record.pop("parameters"))
    assert_fails(verify(dense, moe, checks=["claims"]), "claims", "parameters is missing")


# Several dtypes


def save_mixed(path: Path) -> Path:
    source = save_dense(LlamaConfig(**SIZES), LlamaForCausalLM, path)

    def edit(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if ".layers.1." in name:
                tensors[name] = tensor.half()
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].float()

    edit_tensors(source, edit)
    return source


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe"])
def test_dense_model_of_several_dtypes(tmp_path: Path, target: str) -> None:
    source = save_mixed(tmp_path / "dense")
    recipe = Recipe(expansion=2, granularity=2, top_k=2)
    convert(source, tmp_path / "moe", recipe, target=target)
    dtypes = {entry.dtype for entry in open_checkpoint(tmp_path / "moe").tensors.values()}
    assert dtypes == {"BF16", "F16", "F32"}
    assert_passes(verify(source, tmp_path / "moe"))


@pytest.mark.parametrize("name", [MIXTRAL_EXPERT.format(1, 3, "w3"), ATTENTION, ROUTER])
def test_one_dtype_among_several_is_wrong(tmp_path: Path, name: str) -> None:
    source = save_mixed(tmp_path / "dense")
    convert(source, tmp_path / "moe", Recipe(expansion=2, granularity=2, top_k=2))
    edit_tensors(tmp_path / "moe", lambda tensors: tensors.update({name: tensors[name].float()}))
    report = verify(source, tmp_path / "moe", checks=["structure"])
    assert_fails(report, "structure", f"{name} is F32", "1 problem found")


@pytest.mark.parametrize("name", ["q_proj.bias", "mlp.shared_expert.down_proj.weight"])
def test_inert_tensor_of_another_dtype(dense: Path, qwen: Path, name: str) -> None:
    full = f"model.layers.0.{'' if 'mlp' in name else 'self_attn.'}{name}"
    edit_tensors(qwen, lambda tensors: tensors.update({full: tensors[full].half()}))
    report = verify(dense, qwen, checks=["structure"])
    assert_fails(report, "structure", f"{full} is F16", "1 problem found")


# Routers with large logits


def convert_large(dense: Path, path: Path, std: float) -> Path:
    recipe = Recipe(
        expansion=4,
        granularity=2,
        top_k=2,
        routing=Routing.SOFTMAX_TOPK,
        router_logit_std=std,
    )
    convert(dense, path, recipe, target="qwen2_moe")
    promise = "approximate" if std <= 0.05 else "none"
    edit_json(path / "upcycle.json", lambda record: record.update(promise=promise))
    return path


def test_large_router_logits_promise_nothing(dense: Path, tmp_path: Path) -> None:
    moe = convert_large(dense, tmp_path / "moe", 2.0)
    report = verify(dense, moe)
    assert_measured(report)
    assert "router's logits are too large" in check(report, "outputs").detail
    (moe / "upcycle.json").unlink()
    report = verify(dense, moe, checks=["outputs"])
    assert_measured(report)
    assert "router's logits are too large" in check(report, "outputs").detail
    promise = {"promise": "approximate"}
    convert_large(dense, tmp_path / "lie", 2.0)
    edit_json(tmp_path / "lie" / "upcycle.json", lambda record: record.update(promise))
    assert_fails(verify(dense, tmp_path / "lie", checks=["claims"]), "claims", "promise is")


@pytest.mark.parametrize(("std", "recorded"), [(0.001, 0.004), (0.03, 0.01), (2.0, 0.01)])
def test_recorded_logit_std_is_measured(
    dense: Path, tmp_path: Path, std: float, recorded: float
) -> None:
    moe = convert_large(dense, tmp_path / "moe", std)

    def edit(record: dict[str, Any]) -> None:
        record["recipe"]["router_logit_std"] = recorded
        record["promise"] = "approximate"

    edit_json(moe / "upcycle.json", edit)
    report = verify(dense, moe, checks=["outputs", "claims"])
    assert_fails(report, "claims", "recipe.router_logit_std is", "2 problems found")
    if std == 2.0:
        assert check(report, "outputs").status is Status.MEASURED


def test_approximation_is_held_to_the_measured_router(dense: Path, qwen: Path) -> None:
    # A recorded deviation of 0.05 would let this error pass, the routers' own 0.001 does not.
    def edit(tensors: Tensors) -> None:
        tensors["lm_head.weight"] *= 1.04

    edit_tensors(qwen, edit)
    edit_json(qwen / "upcycle.json", lambda record: record["recipe"].update(router_logit_std=0.05))
    report = verify(dense, qwen, checks=["outputs"])
    assert_fails(report, "outputs", "kl_mean_whole")
    assert float(report.checks[0].metrics["kl_mean_whole"]) < 30 * 0.05**2


# Float16, memory, prompts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_expert_output_that_overflows_float16(
    tmp_path: Path, layout: ExpertLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_prompts, "_generator", lambda _: torch.Generator().manual_seed(0))
    source = save_dense(LlamaConfig(**SIZES), LlamaForCausalLM, tmp_path / "dense")

    def edit(tensors: Tensors) -> None:
        for name, factor in (("up", 200), ("down", 100)):
            tensors[f"model.layers.1.mlp.{name}_proj.weight"] *= factor

    edit_tensors(source, edit)
    recipe = Recipe(expansion=2, granularity=4, top_k=4)
    options = Options(dtype="float16", expert_layout=layout)
    convert(source, tmp_path / "moe", recipe, options=options)
    report = verify(source, tmp_path / "moe", checks=["outputs"])
    assert_fails(report, "outputs", "max_expert_output", "65504", "run in float16, as it is stored")

    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    mlp = model.model.layers[1].mlp
    mlp.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0][0]))
    with torch.no_grad():
        model(_random_ids())
        hidden = mlp.act_fn(mlp.gate_proj(seen[0])) * mlp.up_proj(seen[0])
        expected = max(
            float((hidden[:, part] @ mlp.down_proj.weight[:, part].T).abs().max()) * 4
            for part in (slice(begin, begin + 16) for begin in range(0, 64, 16))
        )
    assert report.checks[0].metrics["max_expert_output"] == pytest.approx(expected, rel=1e-2)


def _random_ids() -> torch.Tensor:
    """The tokens that are run where there is no tokenizer."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(258, (1, 512), generator=generator)


def test_expert_output_is_measured_for_float16_alone(dense: Path, tmp_path: Path) -> None:
    for dtype in ("float16", "bfloat16"):
        options = Options(dtype=dtype)
        convert(
            dense, tmp_path / dtype, Recipe(expansion=2, granularity=2, top_k=2), options=options
        )
        report = verify(dense, tmp_path / dtype, checks=["outputs"])
        assert_passes(report)
        assert ("max_expert_output" in report.checks[0].metrics) is (dtype == "float16")


def test_prompts_are_a_small_part_of_a_regular_file(
    dense: Path, mixtral: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for bad in (Path("/dev/urandom"), Path("/dev/zero"), tmp_path / "pipe", tmp_path):
        with pytest.raises(UpcycleError, match="not a regular file"):
            verify(dense, mixtral, texts=TextOptions(prompts=bad))
    large = tmp_path / "large.txt"
    large.write_text("x" + "ż" * 600_000, encoding="utf-8")
    assert len(read_texts(large, "the prompts")[0]) == 500_000  # 1 MB, less the half of a letter
    large.write_bytes(b"short, and half a letter \xc5")
    with pytest.raises(UpcycleError, match="not UTF-8"):
        read_texts(large, "the prompts")


def test_prompts_need_a_tokenizer(dense: Path, mixtral: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A short text.")
    source = Path(shutil.copytree(dense, tmp_path / "dense"))
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(UpcycleError, match="tokenizer cannot be used"):
        verify(source, mixtral, checks=["outputs"], texts=TextOptions(prompts=prompts))
    for file in (*source.glob("tokenizer*"), *source.glob("chat_template*")):
        file.unlink()
    with pytest.raises(UpcycleError, match="has no tokenizer"):
        verify(source, mixtral, checks=["outputs"], texts=TextOptions(prompts=prompts))


# What is neither damage nor a bug


def test_path_that_the_system_refuses(dense: Path, mixtral: Path) -> None:
    for paths in ((dense, Path("x" * 300)), (Path("x" * 300), mixtral)):
        with pytest.raises(UpcycleError, match="cannot read x"):
            verify(*paths)


def test_record_that_cannot_be_read(dense: Path, moe: Path) -> None:
    (moe / "upcycle.json").unlink()
    (moe / "upcycle.json").symlink_to(moe / "gone")
    report = verify(dense, moe, checks=["claims"])
    assert_fails(report, "claims", "upcycle.json is missing or unreadable: No such file")
    (moe / "upcycle.json").unlink()
    (moe / "upcycle.json").mkdir()
    assert_fails(verify(dense, moe, checks=["claims"]), "claims", "upcycle.json: it is a directory")


@pytest.mark.parametrize("which", ["dense", "moe"])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_file_that_may_not_be_read(
    dense: Path, moe: Path, which: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbidden = {"dense": dense, "moe": moe}[which] / name
    really_open = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:  # noqa: ANN401
        if path == forbidden:
            raise PermissionError(13, "Permission denied", str(path))
        return really_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UpcycleError, match=f"cannot read {forbidden}: Permission denied"):
        verify(dense, moe, checks=["claims"])


def test_directory_that_may_not_be_listed(
    dense: Path, moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its files would look as if they were missing.
    really_scan = os.scandir

    def refuse(path: Any) -> Any:  # noqa: ANN401
        if Path(path) == moe:
            raise PermissionError(13, "Permission denied", str(path))
        return really_scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UpcycleError, match=f"cannot read {moe}: Permission denied"):
        verify(dense, moe, checks=["weights"])


@pytest.mark.parametrize("module", [None, types.ModuleType("transformers")])
def test_broken_transformers_is_no_damage(
    dense: Path,
    mixtral: Path,
    module: types.ModuleType | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", module)
    for name in ("structure", "files", "outputs"):
        with pytest.raises(UpcycleError, match="transformers cannot be imported: "):
            verify(dense, mixtral, checks=[name])
    assert verify(dense, mixtral, checks=["weights"]).passed


def test_interrupts_and_refusals_are_no_findings() -> None:
    class Terminated(KeyboardInterrupt):
        pass

    for error in (Terminated(), PermissionError(13, "Permission denied"), MemoryError()):
        with pytest.raises(type(error)), _models.transformers_says():
            raise error
    with pytest.raises(_models.TransformersError), _models.transformers_says():
        raise OSError("does not appear to have a file named config.json")


def test_independence() -> None:
    """A check that reuses the converter's plan or formulas proves nothing about them."""
    allowed = {
        "upcycle_cli.checkpoint",
        "upcycle_cli.errors",
        "upcycle_cli.families",
        "upcycle_cli.families.dense",
        "upcycle_cli.families.dense_rows",
        "upcycle_cli.families.layers",
        "upcycle_cli.families.mlp",
        "upcycle_cli.families.moe",
        "upcycle_cli.families.moe_rows",
        "upcycle_cli.families.pieces",
        "upcycle_cli.families.shipped",
        "upcycle_cli.families.values",
        "upcycle_cli.families.wrappers",
        "upcycle_cli.files",
        "upcycle_cli.hooks",
        "upcycle_cli.hub.sources",
        "upcycle_cli.matching",
        "upcycle_cli.redirects",
        "upcycle_cli.running.mixtures",
        "upcycle_cli.running.models",
        "upcycle_cli.running.runs",
        "upcycle_cli.running.shipped",
        "upcycle_cli.running.steps",
        "upcycle_cli.running.stored",
        "upcycle_cli.running.texts",
        "upcycle_cli.workspace",
    }
    # Rows and what reads their names; no plan, no expression, no recipe, no config that is written.
    names = {
        *("DENSE", "NATIVE", "DenseFamily", "Target", "Layout", "Weight", "Place"),
        *("is_moe", "is_target", "target_of", "holder", "parts_of", "place", "present"),
        *("BLOCK_KEYS", "OLD_BLOCKS", "unread", "block_types", "defaults_of"),
        *("Piece", "pieces_of"),
        *("dense_family", "upcycled_family", "is_known", "Inside", "LOADED", "WRAPPERS"),
        *("inner", "parts", "wrapper_of"),
        *("auto_map", "CODE_NAME", "UPCYCLED_PREFIX", "modeling_code", "is_note"),
    }
    package = Path(__file__).parent.parent / "upcycle_cli"
    for path in (*package.glob("verification/*.py"), *package.glob("running/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("upcycle_cli"):
                if path.parent.name == "verification" and "verification" in str(node.module):
                    continue
                assert node.module in allowed, path
                if str(node.module).startswith(("upcycle_cli.families", "upcycle_cli.workspace")):
                    assert {alias.name for alias in node.names} <= names, path


def test_importing_costs_no_torch() -> None:
    code = (
        "import sys, upcycle_cli.verification; "
        "assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
