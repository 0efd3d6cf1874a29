"""The function `verify`: arguments, statuses, progress, and what is neither damage nor a bug."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from verified import Heard, Tensors, edit_json, edit_tensors, flip_bit, save_llama

from upcycle_cli import Recipe, UpcycleError, convert, open_checkpoint, verify
from upcycle_cli.run import models as run_models
from upcycle_cli.verification.result import CHECK_NAMES, CheckResult, Report, Status

G2: Callable[..., Recipe] = partial(Recipe, expansion=2, granularity=2, top_k=2)


def test_an_exact_conversion_passes(dense: Path, mixtral: Path) -> None:
    heard = Heard()
    report = verify(dense, mixtral, watch=heard)
    assert report.passed
    assert report.promise == "exact"
    assert heard.names == list(CHECK_NAMES)
    done, total, unit = heard.done["weights"][-1]
    assert (done, unit) == (total, "bytes")
    assert total == open_checkpoint(mixtral).nbytes
    assert heard.done["outputs"][-1] == (2, 2, "layers")
    found = report.to_json(full=True)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["status"], found["promise"]) == ("passed", "exact")
    assert [check["name"] for check in found["checks"]] == list(CHECK_NAMES)
    outputs = found["checks"][2]
    assert [len(layer["load"]) for layer in outputs["layers"]] == [4, 4]
    assert all(len(text["tokens"]) == len(text["kl"]) for text in outputs["texts"])
    slim = report.to_json()["checks"][2]
    assert slim.keys() == outputs.keys() - {"texts"}
    assert slim["layers"][0].keys() == outputs["layers"][0].keys() - {"load"}
    metrics = outputs["metrics"]
    assert sum(len(text["tokens"]) for text in outputs["texts"]) == metrics["text_tokens"]
    assert {"kl_mean", "kl_max", "max_abs_logit_diff", "top1_agreement"} <= metrics.keys()


def results(*statuses: str) -> tuple[CheckResult, ...]:
    names = zip(CHECK_NAMES, statuses, strict=False)
    return tuple(CheckResult(name=name, status=Status(s), detail="") for name, s in names)


@pytest.mark.parametrize(
    ("statuses", "promise", "status", "accepted", "accepted_inexact"),
    [
        (("passed", "passed", "passed"), "exact", "passed", True, True),
        (("passed", "passed"), "exact", "measured", True, True),  # of two, as asked
        (("passed", "passed"), "none", "measured", False, True),
        (("passed", "passed", "measured"), "none", "measured", False, True),
        (("passed", "measured", "passed"), "exact", "measured", False, True),
        (("skipped", "skipped", "measured"), "none", "measured", False, True),
        (("passed", "failed", "passed"), "exact", "failed", False, False),
        (("failed", "skipped", "skipped"), None, "failed", False, False),
        (("skipped", "skipped"), "none", "skipped", False, False),
    ],
)
def test_the_status_of_a_report(
    statuses: tuple[str, ...],
    promise: str | None,
    status: str,
    accepted: bool,  # noqa: FBT001
    accepted_inexact: bool,  # noqa: FBT001
) -> None:
    report = Report(checks=results(*statuses), promise=promise)
    assert (report.status, report.accepted) == (status, accepted)
    assert report.passed is (status == "passed")
    inexact = Report(checks=report.checks, promise=promise, allow_inexact=True)
    assert inexact.accepted is accepted_inexact


def test_usage(dense: Path, mixtral: Path, tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match="'weight' is not a check"):
        verify(dense, mixtral, checks=["weight"])
    with pytest.raises(UpcycleError, match="no check"):
        verify(dense, mixtral, checks=[])
    for paths in ((mixtral, dense), (mixtral, mixtral)):
        with pytest.raises(UpcycleError, match="dense model comes first"):
            verify(*paths)
    for paths in ((tmp_path / "none", mixtral), (dense, tmp_path / "none"), (dense, tmp_path)):
        with pytest.raises(UpcycleError):
            verify(*paths)
    with pytest.raises(UpcycleError, match="comes from"):
        verify(dense, mixtral, experts_from=[dense])


def test_fail_fast_and_a_silent_screen(
    dense: Path, moe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flip_bit(moe, "model.norm.weight")
    report = verify(dense, moe, fail_fast=True)
    assert [check.status for check in report.checks] == ["passed", "failed", "skipped"]
    assert report.checks[2].detail == "Not run: weights failed."
    assert capfd.readouterr() == ("", "")


def test_only_a_few_of_many_differences_are_shown(dense: Path, moe: Path) -> None:
    edit_tensors(moe, lambda held: [held.pop(name) for name in [*held] if "experts" in name])
    report = verify(dense, moe, checks=["weights"])
    assert report.checks[0].detail == "24 problems found."
    assert len(report.checks[0].failures) == 9
    assert report.checks[0].failures[-1] == "and 16 more"


def test_a_dense_model_without_a_tokenizer(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "dense")
    convert(source, tmp_path / "moe", G2())
    assert verify(source, tmp_path / "moe").passed


def test_a_dense_model_of_several_dtypes(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "dense")

    def mix(held: Tensors) -> None:
        held.update({name: each.half() for name, each in held.items() if ".layers.1." in name})
        held.update({name: each.float() for name, each in held.items() if "0.mlp.up" in name})

    edit_tensors(source, mix)
    convert(source, tmp_path / "moe", G2(), target="qwen2_moe")
    dtypes = {entry.dtype for entry in open_checkpoint(tmp_path / "moe").tensors.values()}
    assert dtypes == {"BF16", "F16", "F32"}
    assert verify(source, tmp_path / "moe").passed


# What is neither damage nor a bug -----------------------------------------------------------------


@pytest.mark.parametrize("which", ["dense", "moe"])
def test_a_file_that_may_not_be_read(
    dense: Path, moe: Path, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbidden = {"dense": dense, "moe": moe}[which] / "model.safetensors"
    really_open = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:  # noqa: ANN401
        if path == forbidden:
            raise PermissionError(13, "Permission denied", str(path))
        return really_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UpcycleError, match=f"cannot read {forbidden}: Permission denied"):
        verify(dense, moe, checks=["directory"])


def test_an_old_transformers_compares_the_weights(
    dense: Path, moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = types.SimpleNamespace(version="4.57.6")
    monkeypatch.setattr(run_models, "distributions", lambda **_: iter([old]))
    assert verify(dense, moe, checks="directory, weights").accepted
    with pytest.raises(UpcycleError, match="needs transformers 5 or newer"):
        verify(dense, moe)


@pytest.mark.parametrize("module", [None, types.ModuleType("transformers")])
def test_a_broken_transformers_is_no_damage(
    dense: Path, moe: Path, module: types.ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", module)
    assert verify(dense, moe, checks=["directory", "weights"]).accepted
    edit_json(moe / "config.json", lambda config: config.update(use_cache=False))
    for name in ("directory", "outputs"):
        with pytest.raises(UpcycleError, match="transformers cannot be imported: "):
            verify(dense, moe, checks=[name])


def test_interrupts_and_refusals_are_no_findings() -> None:
    class Terminated(KeyboardInterrupt):
        pass

    for error in (Terminated(), PermissionError(13, "Permission denied"), MemoryError()):
        with pytest.raises(type(error)), run_models.transformers_errors():
            raise error
    with pytest.raises(run_models.TransformersError), run_models.transformers_errors():
        raise OSError("does not appear to have a file named config.json")


def test_the_outputs_share_nothing_with_the_planner() -> None:
    """A check that reuses the planner proves nothing about it."""
    code = (
        "import sys, upcycle_cli.verification.outputs; "
        "made = [name for name in sys.modules if name.startswith(('upcycle_cli.plan.', "
        "'upcycle_cli.write')) and not name.endswith(('.texts', '.mergekit'))]; "
        "assert not made, made"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
