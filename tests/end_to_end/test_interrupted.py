"""A conversion that is cut short leaves nothing under OUTPUT, and the same command resumes it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine_fixtures as engine
import forked
import pytest
from adapters import edit_adapter_config, make_adapter
from conftest import MakeDense, clone, others, snapshot, spoil, write_json
from quantised import save_fp8
from safetensors.torch import load_file, save_file

from upcycle_cli import Options, Recipe, UpcycleError, build_plan, convert, open_checkpoint, verify
from upcycle_cli.hub.remote_checkpoint import open_source
from upcycle_cli.verification.result import Report
from upcycle_cli.write.staging import NOTE_SUFFIX, TEMPORARY_SUFFIX, new_of, partial_of
from upcycle_cli.write.writer import WriteOptions

NUM_SHARDS = 24
SHARDED = ("--max-shard-size", "5MB")
RECIPE = Recipe("E2G2T2")


@dataclass(frozen=True)
class Job:
    """A conversion into many files, and its output when nobody disturbs it."""

    dense: Path
    reference: dict[str, str]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    path = tmp_path_factory.mktemp("job")
    dense = engine.make_dense(path / "dense", hidden=512, inner=1024, layers=4, vocab=256)
    process = engine.start(engine.convert_command(dense, path / "moe", *SHARDED))
    _, said = process.communicate(timeout=engine.SUBPROCESS_SECONDS)
    assert process.returncode == 0, said
    reference = engine.contents(path / "moe")
    assert sum(name.endswith(".safetensors") for name in reference) >= NUM_SHARDS
    return Job(dense, reference)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine.make_dense(tmp_path_factory.mktemp("small") / "dense")


def notes(output: Path) -> list[Path]:
    return sorted(partial_of(output).glob(f"*{NOTE_SUFFIX}"))


# Kills and signals --------------------------------------------------------------------------------


@pytest.mark.parametrize("replacing", [False, True], ids=["free name", "overwrite"])
@pytest.mark.long
def test_a_kill_at_every_step(small: Path, tmp_path: Path, *, replacing: bool) -> None:
    engine.execute(engine.plan_of(small, "E2G2T2", max_shard_bytes=60_000), tmp_path / "reference")
    engine.execute(engine.plan_of(small, "E4G1T2"), tmp_path / "before")
    reference, before = (
        engine.contents(tmp_path / "reference"),
        engine.contents(tmp_path / "before"),
    )
    arguments = [small, tmp_path / "work" / "moe", *[tmp_path / "before"] * replacing]
    done = subprocess.run(
        [engine.PYTHON, Path(__file__).parents[1] / "kill_points.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=engine.environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"),
        timeout=engine.SUBPROCESS_SECONDS,
    )
    steps = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"after {steps[-1]['before'] if steps else 'none'}: {done.stderr}"
    assert len(steps) > 30
    assert any(step["before"].startswith("os.remove") for step in steps)
    published = 0
    for step in steps:
        killed, where = step["killed"], step["before"]
        assert killed in (before if replacing else None, reference, None), where
        if killed is None and replacing:  # between two renames: the old one is complete, elsewhere
            assert step["places"]["moe.replaced"] == before, where
        assert step["resumed"] == reference, where
        assert step["names"] == ["moe"], where
        published += killed == reference
    assert published


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_finished_shards_survive_a_signal(job: Job, tmp_path: Path, number: int) -> None:
    output = tmp_path / "moe"
    process = engine.start(engine.convert_command(job.dense, output, *SHARDED))
    assert engine.wait_until(lambda: notes(output), process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=engine.SUBPROCESS_SECONDS)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert stdout.startswith("model ")  # the plan, and no result
        assert "Wrote" not in stdout + stderr
        assert len(stderr.splitlines()) == 2  # what happened, and what to do
        assert "same command" in stderr
    assert not output.exists()
    complete = {note.name.removesuffix(NOTE_SUFFIX) for note in notes(output)}
    before = {name: (new_of(output) / name).stat().st_ino for name in complete}
    done = engine.run(engine.convert_command(job.dense, output, *SHARDED, "--json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reused_bytes"] > 0
    assert {name: (output / name).stat().st_ino for name in complete} == before
    assert engine.contents(output) == job.reference


def test_a_signal_stops_inside_a_large_part(tmp_path: Path) -> None:
    # Each part has 32 places of 128 MiB: whoever finished one would write 4 GiB.
    dense = engine.make_dense(tmp_path / "dense", hidden=4096, inner=16384, layers=1, hollow=True)
    output = tmp_path / "moe"
    options = ("--no-fsync", "--workers", "1", "--max-shard-size", "1TB")

    def written_bytes() -> int:
        return sum(f.stat().st_blocks * 512 for f in new_of(output).glob("*.writing"))

    process = engine.start(engine.convert_command(dense, output, *options, recipe="E32G1T2"))
    engine.wait_until(lambda: written_bytes() > 1 << 28, process)  # attention comes first, 128 MiB
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=engine.SUBPROCESS_SECONDS)
    assert process.returncode == 130
    assert written_bytes() < 2 << 30


# Failures -----------------------------------------------------------------------------------------

# Converts as the command line does, but meets an accident at the 20th write.
ACCIDENT = """
import os, sys
real, calls = os.pwrite, 0
def pwrite(*arguments):
    global calls
    calls += 1
    if calls == 20:
        {accident}
    return real(*arguments)
os.pwrite = pwrite
from upcycle_cli.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("accident", "said"),
    [
        ("raise OSError(28, os.strerror(28))", "No space left on device"),
        ("os.truncate(sys.argv[2] + '/model.safetensors', 4096)", None),
    ],
    ids=["full disk", "truncated source"],
)
@pytest.mark.parametrize("recipe", ["E2G1T2", "E2G2T2"], ids=["copied", "computed"])
def test_the_same_command_completes_it_after_an_accident(
    llama: Path, tmp_path: Path, accident: str, said: str | None, recipe: str
) -> None:
    dense = clone(llama, tmp_path / "dense")
    weights = dense / "model.safetensors"
    good, status = weights.read_bytes(), weights.stat()
    options = ("--max-shard-size", "50KB", "--workers", "1")
    command = engine.convert_command(dense, tmp_path / "moe", *options, recipe=recipe)
    failed = forked.run(command[3:], program=ACCIDENT.format(accident=accident))
    assert failed.returncode not in (0, 1)
    assert "Traceback" not in failed.stderr
    if said is not None:
        assert failed.returncode == 2
        assert said in failed.stderr
        assert "same command" in failed.stderr
    assert not (tmp_path / "moe").exists()
    weights.write_bytes(good)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = engine.run(command)
    assert again.returncode == 0, again.stderr
    reference = engine.convert_command(dense, tmp_path / "reference", *options, recipe=recipe)
    assert engine.run(reference).returncode == 0
    assert engine.contents(tmp_path / "moe") == engine.contents(tmp_path / "reference")


def replace_weights(dense: Path) -> None:
    """Put another file in its place, of the same size and time."""
    weights = dense / "model.safetensors"
    status = weights.stat()
    shutil.copyfile(weights, dense / "other")
    os.utime(dense / "other", ns=(status.st_atime_ns, status.st_mtime_ns))
    (dense / "other").replace(weights)


def rewrite_config(dense: Path) -> None:
    path = dense / "config.json"
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"llama", b"LLAMA"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace_companion(dense: Path) -> None:
    (dense / "LICENSE").unlink()
    (dense / "LICENSE").symlink_to("/etc/hostname")


def redirect(name: str) -> Callable[[Path], None]:
    """Make a file a link to an equal one, of the same time."""

    def change(dense: Path) -> None:
        other = dense / "other"
        shutil.copy2(dense / name, other)
        (dense / name).unlink()
        (dense / name).symlink_to(other)

    return change


CHANGES: dict[str, Callable[[Path], None]] = {
    "redirected weights": redirect("model.safetensors"),
    "redirected tokenizer": redirect("tokenizer.json"),
    "replaced weights": replace_weights,
    "changed weights": lambda dense: spoil(dense / "model.safetensors"),
    "touched weights": lambda dense: os.utime(dense / "model.safetensors", ns=(0, 0)),
    "changed config": rewrite_config,
    "replaced companion": replace_companion,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_publishes_nothing(llama: Path, tmp_path: Path, change: str) -> None:
    dense = clone(llama, tmp_path / "dense")
    plan = build_plan(RECIPE, open_checkpoint(dense), options=Options(max_shard_bytes=50_000))
    told: list[int] = []

    def act_once(num_bytes: int) -> None:
        if not told:
            CHANGES[change](dense)
        told.append(num_bytes)

    with pytest.raises(UpcycleError, match=r"changed while it was being read|is not followed"):
        engine.execute(
            plan, tmp_path / "moe", hooks=engine.Advance(act_once), writing=WriteOptions(workers=1)
        )
    # Writing ends early where the weights have changed, not at the last check.
    assert (sum(told) < plan.nbytes) == ("weights" in change)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def move_scales(dense: Path) -> None:
    """Put the scales into a weight file of their own."""
    held = load_file(dense / "model.safetensors")
    scales = {name: held.pop(name) for name in [*held] if name.endswith("_scale_inv")}
    (dense / "model.safetensors").unlink()
    files = {"weights.safetensors": held, "scales.safetensors": scales}
    for name, tensors in files.items():
        save_file(tensors, dense / name)
    places = {name: file for file, tensors in files.items() for name in tensors}
    write_json(dense / "model.safetensors.index.json", {"weight_map": places})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("dense/scales.safetensors", spoil),
        ("dense/scales.safetensors", Path.unlink),
        ("lora/adapter_model.safetensors", spoil),
        ("lora/adapter_model.safetensors", lambda path: redirect(path.name)(path.parent)),
        ("lora/adapter_config.json", lambda path: edit_adapter_config(path.parent, lora_alpha=9)),
    ],
)
def test_a_part_of_a_source_that_changes_publishes_nothing(
    make_dense: MakeDense, tmp_path: Path, name: str, change: Callable[[Path], object]
) -> None:
    """The scales of FP8 weights, or an adapter."""
    base = make_dense("llama")
    make_adapter(base, tmp_path / "lora")
    move_scales(save_fp8(base, tmp_path / "dense", (16, 16)))
    plan = build_plan(RECIPE, open_source(f"{tmp_path / 'dense'}+{tmp_path / 'lora'}"))
    told: list[int] = []

    def act_once(num_bytes: int) -> None:
        if not told:
            change(tmp_path / name)
        told.append(num_bytes)

    with pytest.raises(UpcycleError, match=r"changed while it was being read|is missing"):
        engine.execute(
            plan, tmp_path / "moe", hooks=engine.Advance(act_once), writing=WriteOptions(workers=1)
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "lora"]


# Verification -------------------------------------------------------------------------------------


def test_a_failed_verification_keeps_the_old_output(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify_spoilt(dense: Path, moe: Path, **options: Any) -> Report:  # noqa: ANN401
        spoil(moe / "model.safetensors")
        return verify(dense, moe, **options)

    convert(llama, tmp_path / "moe", Recipe("E4G2T4"))
    before = snapshot(tmp_path)
    monkeypatch.setattr("upcycle_cli.verification.verify.verify", verify_spoilt)
    done = convert(llama, tmp_path / "moe", RECIPE, overwrite=True, verify=True)
    assert done.report is not None
    assert not done.report.passed
    assert not done.published
    assert snapshot(tmp_path) == before


def test_a_verification_that_cannot_run_keeps_the_weights(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise UpcycleError("transformers cannot be imported.")

    with monkeypatch.context() as context:
        context.setattr("upcycle_cli.verification.verify.verify", broken)
        with pytest.raises(UpcycleError, match="The weights are kept"):
            convert(llama, tmp_path / "moe", RECIPE, verify=True)
    assert others(tmp_path) == ["moe.partial"]
    done = convert(llama, tmp_path / "moe", RECIPE)
    assert done.reused_bytes == done.plan.nbytes


# Durability ---------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Each call that makes something durable or changes a name, with the path it was about."""
    found: list[tuple[str, str]] = []

    def watch(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
            place = arguments[name in {"rename", "replace"}]  # the new name
            if isinstance(place, int):
                place = Path(f"/proc/self/fd/{place}").readlink()
            result = real(*arguments, **options)
            found.append((name, str(place)))
            return result

        monkeypatch.setattr(os, name, call)

    for name in ("pwrite", "fsync", "fdatasync", "rename", "replace", "unlink"):
        watch(name)
    return found


def test_everything_is_durable_before_it_is_published(
    small: Path, tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    output = tmp_path / "moe"
    engine.execute(engine.plan_of(small, "E2G1T2"), output)
    calls.clear()
    engine.execute(engine.plan_of(small, "E4G1T2", max_shard_bytes=40_000), output, overwrite=True)
    partial = new_of(output)
    published = calls.index(("rename", str(output)))
    shards = [name for name in engine.contents(output) if name.endswith(".safetensors")]
    assert len(shards) > 3
    for name in shards:
        temporary = str(partial / (name + TEMPORARY_SUFFIX))
        named = calls.index(("rename", str(partial / name)))
        written = max(i for i, call in enumerate(calls) if call == ("pwrite", temporary))
        assert written < calls.index(("fsync", temporary), written) < named
    for name in engine.contents(output).keys() - {*shards}:
        path = str(partial / name)  # flushed under its name, or before it gets the name
        named = calls.index(("replace", path)) if ("replace", path) in calls else -1
        assert ("fsync", path) in calls[:published] or calls[named - 1][0] == "fsync", name
    before, after = calls[:published], calls[published:]
    changed = max(
        i
        for i, (name, path) in enumerate(before)
        if name in {"rename", "replace", "unlink"} and Path(path).parent == partial
    )
    assert ("fsync", str(partial)) in before[changed:]
    # The old one goes only once it is certain that the new one stays.
    removed = next(i for i, (name, _) in enumerate(after) if name == "unlink")
    assert after.index(("fsync", str(output.parent))) < removed


def test_new_parents_are_durable(small: Path, tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    engine.execute(engine.plan_of(small, "E2G1T2"), tmp_path / "new" / "and deeper" / "moe")
    for parent in (tmp_path, tmp_path / "new", tmp_path / "new" / "and deeper"):
        assert ("fsync", str(parent)) in calls


def test_no_fsync_is_no_fsync(small: Path, tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    engine.execute(
        engine.plan_of(small, "E4G1T2"), tmp_path / "moe", writing=WriteOptions(fsync=False)
    )
    assert "pwrite" in {name for name, _ in calls}
    assert not [name for name, _ in calls if "sync" in name]
