"""Conversions that fail, or that are cut short: the output is there entirely or not at all."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import MakeDense, RunCli, clone, contents, snapshot, stops_after, validate_json
from engine_fixtures import Advance, execute
from test_conversion import RECIPE, TWICE, others, spoil

from upcycle_cli import Options, Recipe, UpcycleError, build_plan, convert, open_checkpoint, verify
from upcycle_cli.recipe.recipe import parse_recipe_name
from upcycle_cli.verification.result import Report
from upcycle_cli.write.staging import MARKER
from upcycle_cli.write.writer import WriteOptions


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk spoil what was written before it is verified."""

    def verify_spoilt(dense: Path, moe: Path, **options: Any) -> Report:  # noqa: ANN401
        spoil(moe / "model.safetensors")
        return verify(dense, moe, **options)

    monkeypatch.setattr("upcycle_cli.verification.verify.verify", verify_spoilt)


@pytest.mark.usefixtures("spoilt")
def test_a_failing_verification_publishes_nothing(llama: Path, tmp_path: Path) -> None:
    plan = build_plan(RECIPE, open_checkpoint(llama))
    done = execute(plan, tmp_path / "moe", verify=True)
    assert done.report is not None
    assert not done.report.passed
    assert not done.published
    assert list(tmp_path.iterdir()) == []


def test_a_verification_that_cannot_run_keeps_what_was_written(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise UpcycleError("transformers cannot be imported.")

    with monkeypatch.context() as context:
        context.setattr("upcycle_cli.verification.verify.verify", broken)
        with pytest.raises(UpcycleError, match="The weights are kept"):
            convert(llama, tmp_path / "moe", RECIPE, verify=True)
    assert not (tmp_path / "moe").exists()
    done = execute(build_plan(RECIPE, open_checkpoint(llama)), tmp_path / "moe")
    assert done.reused_bytes == done.plan.nbytes


@pytest.mark.usefixtures("spoilt")
def test_a_failing_verification_keeps_the_output_that_was_there(
    llama: Path, tmp_path: Path
) -> None:
    convert(llama, tmp_path / "moe", TWICE)
    before = snapshot(tmp_path / "moe")
    plan = build_plan(RECIPE, open_checkpoint(llama))
    done = execute(plan, tmp_path / "moe", overwrite=True, verify=True)
    assert not done.published
    assert snapshot(tmp_path / "moe") == before
    assert others(tmp_path) == []


def test_a_passing_verification_is_in_the_card(llama: Path, tmp_path: Path) -> None:
    done = convert(llama, tmp_path / "moe", RECIPE, verify=True)
    assert done.published
    assert done.report is not None
    card = (tmp_path / "moe" / "README.md").read_text()
    for check in done.report.checks:
        assert f"| {check.name} | passed |" in card


def test_a_source_that_changes_meanwhile_is_noticed(llama: Path, tmp_path: Path) -> None:
    dense = clone(llama, tmp_path / "dense")
    plan = build_plan(RECIPE, open_checkpoint(dense))

    def touch(_num_bytes: int) -> None:
        os.utime(dense / "model.safetensors", ns=(0, 0))

    with pytest.raises(UpcycleError, match="changed while it was being read"):
        execute(plan, tmp_path / "moe", hooks=Advance(touch))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dense"]


# Converts as the command line does, but deals itself a blow at the 20th write.
BLOW = """
import os, signal, sys
real, calls = os.pwrite, 0
def pwrite(*arguments):
    global calls
    calls += 1
    if calls == 20:
        {blow}
    return real(*arguments)
os.pwrite = pwrite
from upcycle_cli.__main__ import main
main()
"""


def run_with_blow(blow: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOW.format(blow=blow), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_killed_run_leaves_a_partial_that_the_next_run_replaces(
    llama: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    command = ("convert", llama, tmp_path / "moe", "--recipe", RECIPE.name)
    killed = run_with_blow("os.kill(os.getpid(), signal.SIGKILL)", *command)
    assert killed.returncode == -signal.SIGKILL
    assert [entry.name for entry in tmp_path.iterdir()] == ["moe.partial"]
    (tmp_path / "moe.partial" / "leftover").mkdir()

    again = run_cli(*command)
    assert again.returncode == 0, again.stderr
    assert others(tmp_path) == []
    convert(llama, tmp_path / "reference", RECIPE)
    assert contents(tmp_path / "moe") == contents(tmp_path / "reference")


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_signal_leaves_what_the_same_command_completes(
    llama: Path, tmp_path: Path, name: str, code: int, *, overwrite: bool
) -> None:
    command = ["convert", str(llama), str(tmp_path / "moe"), "--recipe", RECIPE.name]
    if overwrite:
        convert(llama, tmp_path / "moe", TWICE)
        command.append("--overwrite")
    before = snapshot(tmp_path / "moe") if overwrite else None
    stopped = run_with_blow(f"os.kill(os.getpid(), signal.{name})", *command)
    assert stopped.returncode == code
    assert stopped.stdout == ""
    assert "Traceback" not in stopped.stderr
    assert "what was not complete was not published" in stopped.stderr
    assert "same command" in stopped.stderr
    assert others(tmp_path) == ["moe.partial"]
    if overwrite:
        assert snapshot(tmp_path / "moe") == before
    else:
        assert not (tmp_path / "moe").exists()
    assert_completes(llama, tmp_path, overwrite=overwrite)


def assert_completes(llama: Path, tmp_path: Path, *, overwrite: bool = False) -> None:
    convert(llama, tmp_path / "moe", RECIPE, overwrite=overwrite)
    assert others(tmp_path) == []
    convert(llama, tmp_path / "reference", RECIPE)
    assert contents(tmp_path / "moe") == contents(tmp_path / "reference")


def test_a_full_disk_leaves_what_the_same_command_completes(llama: Path, tmp_path: Path) -> None:
    full = "raise OSError(28, os.strerror(28))"
    command = ("convert", llama, tmp_path / "moe", "--recipe", RECIPE.name)
    failed = run_with_blow(full, *command)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert "No space left on device" in failed.stderr
    assert "same command" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["moe.partial"]
    assert_completes(llama, tmp_path)


def test_a_write_that_the_system_cuts_short_is_completed(llama: Path, tmp_path: Path) -> None:
    """POSIX lets a write do less than it was asked; the kernel does so near a limit or a signal."""
    short = "return real(arguments[0], arguments[1][:3], arguments[2])"
    done = run_with_blow(short, "convert", llama, tmp_path / "moe", "--recipe", RECIPE.name)
    assert done.returncode == 0, done.stderr
    convert(llama, tmp_path / "reference", RECIPE)
    assert contents(tmp_path / "moe") == contents(tmp_path / "reference")


def test_a_file_size_limit_is_an_error_that_can_be_resumed(llama: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UpcycleError, match=r"writing .* failed"):
            convert(llama, tmp_path / "moe", RECIPE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry.name for entry in tmp_path.iterdir()] == ["moe.partial"]
    assert_completes(llama, tmp_path)


def test_two_processes_cannot_write_the_same_output(
    llama: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    partial = tmp_path / "moe.partial"
    partial.mkdir()
    (partial / MARKER).touch()
    (partial / "model.safetensors").write_bytes(b"being written by the other one")
    before = contents(partial)
    lock = os.open(partial, os.O_RDONLY)
    command = ("convert", llama, tmp_path / "moe", "--recipe", RECIPE.name)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = run_cli(*command)
        assert refused.returncode == 2
        assert "another upcycle process" in refused.stderr
        assert contents(partial) == before
        assert not (tmp_path / "moe").exists()
    finally:
        os.close(lock)
    assert run_cli(*command).returncode == 0
    assert others(tmp_path) == []


def test_a_partial_of_somebody_else_is_left_alone(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "moe.partial").mkdir()
    (tmp_path / "moe.partial" / "thesis.tex").write_text("years of work")
    with pytest.raises(UpcycleError, match="no unfinished conversion of upcycle"):
        convert(llama, tmp_path / "moe", RECIPE)
    assert (tmp_path / "moe.partial" / "thesis.tex").read_text() == "years of work"


def test_a_partial_that_is_a_link_to_elsewhere_does_no_harm(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("years of work")
    (tmp_path / "moe.partial").symlink_to(tmp_path / "precious")
    with pytest.raises(UpcycleError):
        convert(llama, tmp_path / "moe", RECIPE)
    assert (tmp_path / "precious" / "thesis.tex").read_text() == "years of work"


# What changes under a run, and what it loses ------------------------------------------------------


def replace_weights(dense: Path) -> None:
    """Put another file in its place, of the same size and time."""
    weights = dense / "model.safetensors"
    status = weights.stat()
    shutil.copyfile(weights, dense / "other")
    os.utime(dense / "other", ns=(status.st_atime_ns, status.st_mtime_ns))
    (dense / "other").replace(weights)


def rewrite_weights(dense: Path) -> None:
    spoil(dense / "model.safetensors")


def rewrite_config(dense: Path) -> None:
    path = dense / "config.json"
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"llama", b"LLAMA"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace_companion(dense: Path) -> None:
    (dense / "LICENSE").unlink()
    (dense / "LICENSE").symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    "change", [replace_weights, rewrite_weights, rewrite_config, replace_companion]
)
def test_whatever_changes_in_the_source_meanwhile_is_noticed(
    llama: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    dense = clone(llama, tmp_path / "dense")
    plan = build_plan(RECIPE, open_checkpoint(dense), options=Options(max_shard_bytes=50_000))
    told: list[int] = []

    def act_once(num_bytes: int) -> None:
        if not told:
            change(dense)
        told.append(num_bytes)

    with pytest.raises(UpcycleError, match=r"changed while it was being read|is not followed"):
        execute(plan, tmp_path / "moe", hooks=Advance(act_once), writing=WriteOptions(workers=1))
    # What was read since is not the source's: writing ends early, not at the last check.
    weights = change in (replace_weights, rewrite_weights)
    assert (sum(told) < plan.nbytes) == weights
    assert others(tmp_path) == []
    assert not (tmp_path / "moe").exists()


# Converts as the command line does, but cuts its source off at the third write.
CUT = """
import os, sys
real, calls = os.pwrite, 0
def pwrite(*arguments):
    global calls
    calls += 1
    if calls == 3:
        os.truncate(os.path.join(sys.argv[2], "model.safetensors"), 4096)
    return real(*arguments)
os.pwrite = pwrite
from upcycle_cli.__main__ import main
main()
"""


@pytest.mark.parametrize("recipe", ["E2G1T2", "E2G2T2"], ids=["copied", "computed"])
def test_a_source_that_is_cut_off_publishes_nothing(
    llama: Path, tmp_path: Path, run_cli: RunCli, recipe: str
) -> None:
    """What is copied fails in a write, what is computed kills the process that touches it."""
    dense = clone(llama, tmp_path / "dense")
    weights = dense / "model.safetensors"
    good, status = weights.read_bytes(), weights.stat()
    command = ["convert", str(dense), str(tmp_path / "moe"), "--recipe", recipe]
    command += ["--max-shard-size", "50KB", "--workers", "1"]
    cut = forked.run(command, program=CUT)
    assert cut.returncode not in (0, 1)
    assert "Traceback" not in cut.stderr
    assert not (tmp_path / "moe").exists()
    weights.write_bytes(good)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = run_cli(*command)
    assert again.returncode == 0, again.stderr
    expansion, granularity, top_k = parse_recipe_name(recipe)
    recipe_again = Recipe(expansion=expansion, granularity=granularity, top_k=top_k)
    convert(dense, tmp_path / "reference", recipe_again, options=Options(max_shard_bytes=50_000))
    assert contents(tmp_path / "moe") == contents(tmp_path / "reference")


DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def faint(make_dense: MakeDense, tmp_path: Path) -> Path:
    """A model of which most of one matrix, and an eighth of another, is too small for float16."""
    from safetensors.torch import load_file, save_file

    dense = clone(make_dense("llama", dtype="bfloat16"), tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    tensors[DOWN].view(-1)[: round(0.93 * tensors[DOWN].numel())] = 1e-9
    up = tensors["model.layers.1.mlp.up_proj.weight"].view(-1)
    up[: up.numel() // 8] = -1e-9
    tensors["model.norm.weight"][0] = 0  # which is no loss
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()},
        dense / "model.safetensors",
        metadata={"format": "pt"},
    )
    return dense


SAID = (
    f"93 % of {DOWN} (and part of 1 other tensor) becomes zero in float16, which has nothing as "
    "small: use --dtype bfloat16 or float32."
)


@pytest.mark.parametrize("recipe", [RECIPE, TWICE, Recipe(expansion=2, granularity=1, top_k=2)])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_weights_that_vanish_are_told_of_once(
    faint: Path, tmp_path: Path, recipe: Recipe, shard_bytes: int
) -> None:
    """However many copies of a part there are, and in however many files."""
    options = Options(dtype="float16", max_shard_bytes=shard_bytes)
    done = convert(faint, tmp_path / "moe", recipe, options=options)
    assert done.warnings == (SAID,)
    for dtype in (None, "float32", "bfloat16"):
        options = Options(dtype=dtype, max_shard_bytes=shard_bytes)
        assert convert(faint, tmp_path / str(dtype), recipe, options=options).warnings == ()


def test_weights_that_vanished_in_a_run_that_was_cut_short_are_told_of(
    faint: Path, tmp_path: Path
) -> None:
    options = Options(dtype="float16", max_shard_bytes=20_000)
    plan = build_plan(RECIPE, open_checkpoint(faint), options=options)
    stop = stops_after(plan.nbytes - plan.shards[-1].nbytes)
    with pytest.raises(UpcycleError, match="stopped by the test"):
        execute(plan, tmp_path / "moe", hooks=Advance(stop), writing=WriteOptions(workers=1))
    done = execute(plan, tmp_path / "moe")
    assert done.reused_bytes > plan.nbytes // 2
    assert done.warnings == (SAID,)


def test_a_single_weight_that_vanishes_is_nothing(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    dense = clone(llama, tmp_path / "dense")
    tensors = {k: v.clone() for k, v in load_file(dense / "model.safetensors").items()}
    tensors[DOWN][0, 0] = 1e-9
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    done = convert(dense, tmp_path / "moe", RECIPE, options=Options(dtype="float16"))
    assert done.warnings == ()


def test_the_command_tells_of_them_too(faint: Path, tmp_path: Path, run_cli: RunCli) -> None:
    command = ("convert", faint, tmp_path / "moe", "--recipe", "E2G1T2", "--dtype", "float16")
    said = run_cli(*command)
    assert said.returncode == 0
    assert f"note: 93 % of {DOWN}" in said.stderr
    shutil.rmtree(tmp_path / "moe")
    found = validate_json("convert", run_cli(*command, "--json").stdout)
    assert SAID in found["warnings"]
