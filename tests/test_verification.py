"""Verification: good conversions pass all checks, and what cannot be checked says so."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYOUTS
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from verified import (
    ATTENTION,
    MIXTRAL_EXPERT,
    ROUTER,
    SIZES,
    Heard,
    Tensors,
    assert_fails,
    assert_measured,
    assert_passes,
    check,
    edit_json,
    edit_tensors,
    result,
    save_dense,
)

from upcycle_cli import Options, Recipe, UpcycleError, convert, open_checkpoint, verify
from upcycle_cli.old_verification import prompts as _prompts
from upcycle_cli.plan.texts import read_texts
from upcycle_cli.recipe.recipe import ExpertLayout, Routing, ScaleSplit, Scaling
from upcycle_cli.run import models as _models
from upcycle_cli.verification.prompts import TextOptions
from upcycle_cli.verification.result import CHECK_NAMES, Status

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
    detail = check(report, "outputs").detail
    assert "512 random tokens" in detail
    assert "NLL" not in detail
    assert "Neither model has a tokenizer" in check(report, "files").detail


# Nothing ran


def test_nothing_that_ran_is_not_a_pass(dense: Path, moe: Path) -> None:
    (moe / "upcycle.json").unlink()
    report = verify(dense, moe, checks=["claims"])
    assert report.status is Status.SKIPPED
    assert not report.passed
    assert report.to_json()["status"] == "skipped"
    assert verify(dense, moe, checks=["weights", "claims"]).passed


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
        "upcycle_cli.checkpoint.checkpoint",
        "upcycle_cli.core.errors",
        "upcycle_cli.models",
        "upcycle_cli.models.dense",
        "upcycle_cli.models.dense_rows",
        "upcycle_cli.models.layers",
        "upcycle_cli.models.mlp",
        "upcycle_cli.models.moe",
        "upcycle_cli.models.moe_rows",
        "upcycle_cli.models.tensor_pieces",
        "upcycle_cli.models.shipped",
        "upcycle_cli.models.defaults",
        "upcycle_cli.models.wrappers",
        "upcycle_cli.core.safe_files",
        "upcycle_cli.checkpoint.header",
        "upcycle_cli.core.callbacks",
        "upcycle_cli.hub.remote_checkpoint",
        "upcycle_cli.inspection.neuron_matching",
        "upcycle_cli.core.text",
        "upcycle_cli.checkpoint.unsafe_settings",
        "upcycle_cli.plan.router_file",  # reads what a user gives
        "upcycle_cli.run.mixtures",
        "upcycle_cli.run.models",
        "upcycle_cli.run.layerwise",
        "upcycle_cli.run.shipped",
        "upcycle_cli.run.steps",
        "upcycle_cli.run.lazy_weights",
        "upcycle_cli.run.texts",
        "upcycle_cli.plan.texts",
        "upcycle_cli.checkpoint.storage",
        "upcycle_cli.write.staging",
    }
    # Rows and what reads their names; no plan, no expression, no recipe, no config that is written.
    names = {
        *("DENSE", "NATIVE", "DenseFamily", "Target", "Layout", "Weight", "Place", "Added"),
        *("is_moe", "is_target", "target_of", "holder", "parts_of", "place", "present"),
        *("BLOCK_KEYS", "OLD_BLOCKS", "unread", "block_types", "defaults_of"),
        *("Piece", "pieces_of"),
        *("dense_family", "upcycled_family", "is_known", "Inside", "LOADED", "WRAPPERS"),
        *("inner", "parts", "wrapper_of"),
        *("auto_map", "CODE_NAME", "UPCYCLED_PREFIX", "modeling_code", "is_note"),
    }
    package = Path(__file__).parent.parent / "upcycle_cli"
    for path in (*package.glob("old_verification/*.py"), *package.glob("run/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("upcycle_cli"):
                if path.parent.name == "verification" and "verification" in str(node.module):
                    continue
                assert node.module in allowed, path
                if str(node.module).startswith(("upcycle_cli.models", "upcycle_cli.write.staging")):
                    assert {alias.name for alias in node.names} <= names, path


def test_importing_costs_no_torch() -> None:
    code = (
        "import sys, upcycle_cli.verification; "
        "assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
