"""A conversion that is cut short leaves nothing under OUTPUT, and the next run goes on from it.

`UPCYCLE_KILLS=100 pytest tests/test_engine_kill.py -k random` is the full measure; the default is
a few kills, so that the tests stay quick.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from engine_fixtures import (
    PYTHON,
    SUBPROCESS_SECONDS,
    Advance,
    contents,
    convert_command,
    environment,
    kill_all,
    make_dense,
    plan_of,
    run,
    set_value,
    start,
    system,
    torchrun_command,
    traced_calls,
    wait_until,
)

from upcycle_cli import UpcycleError
from upcycle_cli.api import Conversion, execute
from upcycle_cli.write import swap
from upcycle_cli.write.staging import MARKER, NOTE_SUFFIX, SEAL, TEMPORARY_SUFFIX, partial_of
from upcycle_cli.write.transaction import clean
from upcycle_cli.write.writer import WriteOptions

KILLS = int(os.environ.get("UPCYCLE_KILLS", "6"))
NUM_SHARDS = 24
SHARDED = ("--max-shard-size", "5MB")


@dataclass(frozen=True)
class Job:
    """A conversion into many files, and what it gives when nobody disturbs it."""

    dense: Path
    reference: dict[str, str]
    seconds: float


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    path = tmp_path_factory.mktemp("job")
    dense = make_dense(path / "dense", hidden=512, inner=1024, layers=4, vocab=256)
    started = time.monotonic()
    process = start(convert_command(dense, path / "moe", *SHARDED))  # as those that are killed
    _, said = process.communicate(timeout=SUBPROCESS_SECONDS)
    seconds = time.monotonic() - started
    assert process.returncode == 0, said
    reference = contents(path / "moe")
    assert sum(name.endswith(".safetensors") for name in reference) >= NUM_SHARDS
    shutil.rmtree(path / "moe")
    return Job(dense, reference, seconds)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("small") / "dense")


# Kills ---------------------------------------------------------------------------------------


def kill_and_resume(job: Job, output: Path, command: list[str], number: int) -> None:
    """Kill one run at a moment of chance; see that the next ends as if nothing had been."""
    chance = random.Random(number)  # noqa: S311 - not for secrets
    process = start(command)
    delay = chance.uniform(0, job.seconds)
    if number % 2:
        # Python's start takes most of the time: every other kill comes while there is writing.
        wait_until(partial_of(output).is_dir, process)
        delay = chance.uniform(0, job.seconds / 4)
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        kill_all(process)
    else:
        process.communicate()
    if output.exists():
        assert contents(output) == job.reference, f"kill {number}: OUTPUT is not complete"
    done = run(convert_command(job.dense, output, *SHARDED))
    assert done.returncode == 0, f"kill {number}: {done.stderr}"
    assert contents(output) == job.reference, f"kill {number}"
    assert not partial_of(output).exists()
    shutil.rmtree(output)


@pytest.mark.long
def test_random_kills(job: Job, tmp_path: Path) -> None:
    for number in range(KILLS):
        output = tmp_path / "moe"
        kill_and_resume(job, output, convert_command(job.dense, output, *SHARDED), number)


@pytest.mark.long
def test_random_kills_under_torchrun(job: Job, tmp_path: Path) -> None:
    for number in range(max(2, KILLS // 3)):
        output = tmp_path / "moe"
        command = torchrun_command(2, convert_command(job.dense, output, *SHARDED))
        kill_and_resume(job, output, command, number)


@pytest.mark.parametrize("replacing", [[], ["before"], ["before", "plain"]], ids=str)
@pytest.mark.long
def test_a_kill_at_every_step(small: Path, tmp_path: Path, replacing: list[str]) -> None:
    execute(plan_of(small, "E2G2T2", max_shard_bytes=40_000), tmp_path / "reference")
    execute(plan_of(small, "E4G1T2"), tmp_path / "before")
    reference, before = contents(tmp_path / "reference"), contents(tmp_path / "before")
    arguments = [small, tmp_path / "work" / "moe", *(tmp_path / name for name in replacing)]
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name("kill_points.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"),
        timeout=SUBPROCESS_SECONDS,
    )
    steps = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"after {steps[-1]['before'] if steps else 'none'}: {done.stderr}"
    assert len(steps) > 30
    assert any(step["before"].startswith("os.remove") for step in steps)
    published = 0
    for step in steps:
        killed, where = step["killed"], step["before"]
        if killed is not None and killed.pop(SEAL, None):
            assert killed == reference, where  # only the new one has a seal
        assert killed in (before if replacing else None, reference, None), where
        if killed is None and replacing:  # between two renames: the old one is whole, elsewhere
            assert "plain" in replacing, where
            assert step["places"]["moe.replaced"] == before, where
        assert step["resumed"] == reference, where
        assert step["names"] == ["moe"], where
        # Only what was replaced may be left over, when the new one is there already.
        assert not step["left"] or (replacing and killed == reference), where
        published += killed == reference
    assert published


def test_shards_that_are_complete_are_not_written_again(job: Job, tmp_path: Path) -> None:
    output = tmp_path / "moe"
    process = start(convert_command(job.dense, output, *SHARDED))
    assert wait_until(lambda: list(partial_of(output).glob(f"*{NOTE_SUFFIX}")), process)
    kill_all(process)
    assert not output.exists()
    complete = {note.name.removesuffix(NOTE_SUFFIX) for note in notes(output)}
    before = {name: (partial_of(output) / name).stat() for name in complete}
    done = run(convert_command(job.dense, output, *SHARDED, "--json"))
    assert done.returncode == 0, done.stderr
    reused = json.loads(done.stdout)["reused_bytes"]
    assert 0 < reused <= sum(status.st_size for status in before.values())
    after = {name: (output / name).stat() for name in complete}
    assert {n: (s.st_ino, s.st_mtime_ns) for n, s in before.items()} == {
        n: (s.st_ino, s.st_mtime_ns) for n, s in after.items()
    }
    assert contents(output) == job.reference


def notes(output: Path) -> list[Path]:
    return sorted(partial_of(output).glob(f"*{NOTE_SUFFIX}"))


# What a resume may use -----------------------------------------------------------------------

RECIPE = "E4G1T2"
SMALL_SHARDS = 40_000


class StopHereError(OSError):
    """Stands for whatever ends a run."""


def interrupted(dense: Path, output: Path, num_shards: int = 3, recipe: str = RECIPE) -> None:
    """Leave the partial of a run that ended after so many shards, and a bit of the next."""
    plan = plan_of(dense, recipe, max_shard_bytes=SMALL_SHARDS)
    limit = sum(shard.nbytes for shard in plan.shards[:num_shards])
    written = 0

    def stop(num_bytes: int) -> None:
        nonlocal written
        written += num_bytes
        if written > limit:
            raise StopHereError(5, "stopped by the test")

    with pytest.raises(UpcycleError, match="stopped by the test"):
        execute(plan, output, hooks=Advance(stop), writing=WriteOptions(workers=1))
    assert len(notes(output)) == num_shards
    assert not output.exists()


def finish(
    dense: Path, output: Path, progress: Callable[[int], None] = lambda _: None
) -> Conversion:
    """Run it to the end; the directory must be that of an undisturbed run."""
    plan = plan_of(dense, RECIPE, max_shard_bytes=SMALL_SHARDS)
    done = execute(plan, output, hooks=Advance(progress))
    reference = output.with_name("reference")
    execute(plan, reference)
    assert contents(output) == contents(reference)
    assert not partial_of(output).exists()
    return done


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "moe"


def shard_bytes(dense: Path, *numbers: int) -> int:
    plan = plan_of(dense, RECIPE, max_shard_bytes=SMALL_SHARDS)
    return sum(plan.shards[number].nbytes for number in numbers)


def test_a_resume_uses_what_is_complete(small: Path, output: Path) -> None:
    interrupted(small, output)
    assert finish(small, output).reused_bytes == shard_bytes(small, 0, 1, 2)


@pytest.mark.parametrize("change", ["recipe", "source", "companion", "shard size"])
def test_another_plan_does_not_use_it(
    small: Path, tmp_path: Path, output: Path, change: str
) -> None:
    dense = shutil.copytree(small, tmp_path / "dense")
    interrupted(dense, output)
    left = contents(partial_of(output))
    recipe, options = RECIPE, {"max_shard_bytes": SMALL_SHARDS}
    if change == "recipe":
        recipe = "E4G1T3"
    elif change == "source":
        set_value(dense, "model.layers.0.mlp.up_proj.weight", 0x3F00)
    elif change == "companion":
        (dense / "LICENSE").write_text("Do as we like.\n")
    else:
        options["max_shard_bytes"] = SMALL_SHARDS + 1000
    plan = plan_of(dense, recipe, **options)
    with pytest.raises(UpcycleError, match="another recipe or source") as refused:
        execute(plan, output)
    assert "--overwrite" in str(refused.value)
    assert "upcycle clean" in str(refused.value)
    assert contents(partial_of(output)) == left
    assert not output.exists()
    done = execute(plan, output, overwrite=True)
    assert done.reused_bytes == 0
    execute(plan, tmp_path / "reference")
    assert contents(output) == contents(tmp_path / "reference")


def flip(position: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "shorter": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "no length": lambda data: b"\xff" * 8 + data[8:],
    "header": flip(20),
    "first copy": flip(4096),
    # Every block of the data: each copy of each part, and the router.
    **{f"byte {at}": flip(at) for at in range(4096 + 1234, 29_000, 4096)},
    "last byte": flip(-1),
    "zeros": lambda data: data[:4096] + bytes(len(data) - 4096),
    "gone": lambda _: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_shard_that_was_tampered_with_is_written_again(
    small: Path, output: Path, damage: str
) -> None:
    """Neither its size nor its time tells, as with a disk that forgets."""
    interrupted(small, output)
    shard = partial_of(output) / notes(output)[1].name.removesuffix(NOTE_SUFFIX)
    status = shard.stat()
    data = DAMAGES[damage](shard.read_bytes())
    if data is None:
        shard.unlink()
    else:
        shard.write_bytes(data)
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    told: list[int] = []
    plan = plan_of(small, RECIPE, max_shard_bytes=SMALL_SHARDS)
    assert finish(small, output, told.append).reused_bytes == shard_bytes(small, 0, 2)
    assert sum(told) == plan.nbytes  # what was told of while it was checked is not told of twice


def test_a_shard_whose_time_alone_has_changed_is_used(small: Path, output: Path) -> None:
    """A partial that was copied to another disk, say."""
    interrupted(small, output)
    os.utime(partial_of(output) / notes(output)[1].name.removesuffix(NOTE_SUFFIX))
    assert finish(small, output).reused_bytes == shard_bytes(small, 0, 1, 2)


@pytest.mark.parametrize("text", ["", '{"plan_sha', "[]", "null", "7", "\0\0\0\0"])
def test_a_note_that_was_cut_short_counts_for_nothing(small: Path, output: Path, text: str) -> None:
    interrupted(small, output)
    notes(output)[0].write_text(text)
    assert finish(small, output).reused_bytes == shard_bytes(small, 1, 2)


@pytest.mark.parametrize("text", ["", '{"plan_sha', "[]", "\0\0\0\0"])
def test_a_marker_that_was_cut_short_costs_time_only(small: Path, output: Path, text: str) -> None:
    interrupted(small, output)
    (partial_of(output) / MARKER).write_text(text)
    finish(small, output)


def test_what_is_no_part_of_the_output_does_not_get_into_it(small: Path, output: Path) -> None:
    interrupted(small, output)
    partial = partial_of(output)
    assert list(partial.glob(f"*{TEMPORARY_SUFFIX}"))
    (partial / f"model-99999.safetensors{TEMPORARY_SUFFIX}").write_text("left over")
    (partial / "stray.safetensors").write_text("left over")
    (partial / "directory").mkdir()
    (partial / "directory" / "file").write_text("left over")
    (partial / ".upcycle-00.new").write_text("left over")
    finish(small, output)  # compares all files with those of an undisturbed run


def test_what_was_sealed_but_not_published_is_recovered(
    small: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = sealed(small, output, monkeypatch)
    assert not (partial / MARKER).exists()
    assert not notes(output)
    with pytest.raises(UpcycleError, match="another recipe or source"):
        execute(plan_of(small, "E2G1T2"), output)
    plan = plan_of(small, RECIPE, max_shard_bytes=SMALL_SHARDS)
    assert finish(small, output).reused_bytes == plan.nbytes


def sealed(dense: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Leave a partial as a kill between its sealing and its renaming would."""

    def die(*_: object) -> None:
        raise StopHereError(5, "stopped by the test")

    with monkeypatch.context() as patched:
        plan = plan_of(dense, RECIPE, max_shard_bytes=SMALL_SHARDS)
        patched.setattr(swap, "_give_name", die)
        with pytest.raises(UpcycleError, match="stopped by the test"):
            execute(plan, output)
    return partial_of(output)


def test_no_reflink_and_no_fsync_go_on_with_the_same_files(small: Path, output: Path) -> None:
    interrupted(small, output)
    plan = plan_of(small, RECIPE, max_shard_bytes=SMALL_SHARDS)
    done = execute(plan, output, writing=WriteOptions(reflink=False, fsync=False, workers=3))
    assert done.reused_bytes == shard_bytes(small, 0, 1, 2)


# Signals and locks ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
def test_a_signal_stops_inside_a_part_and_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    # Each part has 32 places of 128 MiB: whoever finished one would write 4 GiB.
    dense = make_dense(tmp_path / "dense", hidden=4096, inner=16384, layers=1, hollow=True)
    output = tmp_path / "moe"
    options = ("--no-fsync", "--no-reflink", "--workers", "1", "--max-shard-size", "1TB")
    command = convert_command(dense, output, *options, recipe="E32G1T2")
    process = start(command)
    # Attention comes first, 128 MiB in all.
    wait_until(lambda: written_bytes(output) > 1 << 28, process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=SUBPROCESS_SECONDS)
    assert process.returncode == code
    assert stdout == ""
    assert stderr.count("error:") == 1
    assert len(stderr.splitlines()) == 2  # what happened, and what to do
    assert "same command" in stderr
    assert written_bytes(output) < 2 << 30
    assert not output.exists()
    assert clean(output, remove=True).path == partial_of(output)


def written_bytes(output: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in partial_of(output).glob("*.writing"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_after_a_signal_the_same_command_goes_on(
    job: Job, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "moe"
    process = start(convert_command(job.dense, output, *SHARDED))
    assert wait_until(lambda: notes(output), process)
    process.send_signal(number)
    process.communicate(timeout=SUBPROCESS_SECONDS)
    assert process.returncode == 128 + number
    assert not output.exists()
    done = run(convert_command(job.dense, output, *SHARDED, "--json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reused_bytes"] > 0
    assert contents(output) == job.reference


def test_the_second_process_is_refused(small: Path, output: Path) -> None:
    interrupted(small, output)
    left = contents(partial_of(output))
    lock = os.open(partial_of(output), os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run(convert_command(small, output, "--max-shard-size", "40KB", recipe=RECIPE))
        assert done.returncode == 2
        assert "another upcycle process is writing" in done.stderr
        for remove in (False, True):
            with pytest.raises(UpcycleError, match="another upcycle process is writing"):
                clean(output, remove=remove)
    finally:
        os.close(lock)
    assert contents(partial_of(output)) == left
    finish(small, output)


def test_a_running_conversion_holds_the_lock(job: Job, tmp_path: Path) -> None:
    output = tmp_path / "moe"
    first = start(convert_command(job.dense, output, *SHARDED))
    assert wait_until(lambda: notes(output), first)
    first.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(UpcycleError, match="another upcycle process is writing"):
            execute(plan_of(job.dense, max_shard_bytes=5_000_000), output)
    finally:
        first.send_signal(signal.SIGCONT)
    _, stderr = first.communicate(timeout=SUBPROCESS_SECONDS)
    assert first.returncode == 0, stderr
    assert contents(output) == job.reference


def test_whoever_locks_a_directory_that_has_been_published_meanwhile_is_refused(
    small: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(small, output)
    flock = fcntl.flock

    def published_first(descriptor: int, operation: int) -> None:
        partial_of(output).rename(output.with_name("published"))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", published_first)
    with pytest.raises(UpcycleError, match="another upcycle process"):
        execute(plan_of(small, RECIPE, max_shard_bytes=SMALL_SHARDS), output)


# upcycle clean -------------------------------------------------------------------------------


def clean_command(output: Path, *options: str) -> list[str]:
    return [PYTHON, "-m", "upcycle_cli", "clean", str(output), *options]


def test_clean_shows_first_and_removes_when_told(small: Path, output: Path) -> None:
    interrupted(small, output)
    shown = run(clean_command(output))
    assert shown.returncode == 0, shown.stderr
    assert "of an unfinished conversion" in "".join(shown.stdout.split("\n"))
    assert "upcycle clean --yes" in shown.stderr
    assert partial_of(output).is_dir()
    removed = run(clean_command(output, "--yes"))
    assert removed.returncode == 0, removed.stderr
    assert removed.stdout == ""
    assert not partial_of(output).exists()
    again = run(clean_command(output, "--yes"))
    assert again.returncode == 2
    assert "Nothing to clean" in again.stderr


def test_clean_takes_what_was_sealed_too(
    small: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed(small, output, monkeypatch)
    clean(output, remove=True)
    assert not partial_of(output).exists()


def test_clean_and_convert_leave_alone_what_is_not_ours(small: Path, output: Path) -> None:
    theirs = partial_of(output)
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("precious")
    with pytest.raises(UpcycleError, match="no unfinished conversion of upcycle"):
        clean(output, remove=True)
    for overwrite in (False, True):
        with pytest.raises(UpcycleError, match="no unfinished conversion of upcycle"):
            execute(plan_of(small, RECIPE), output, overwrite=overwrite)
    assert contents(theirs).keys() == {"thesis.tex"}


def test_clean_does_not_follow_a_link(small: Path, tmp_path: Path, output: Path) -> None:
    interrupted(small, tmp_path / "other")
    partial_of(output).symlink_to(partial_of(tmp_path / "other"))
    with pytest.raises(UpcycleError):
        clean(output, remove=True)
    with pytest.raises(UpcycleError, match="symbolic link"):
        execute(plan_of(small, RECIPE), output)
    assert partial_of(tmp_path / "other").is_dir()


# The order of things -------------------------------------------------------------------------

CALLS = (
    "write,pwrite64,pwritev,writev,sendfile,copy_file_range,ioctl,ftruncate,"
    "fsync,fdatasync,sync,syncfs,rename,renameat,renameat2,unlink,unlinkat"
)
WRITES = {
    "write",
    "pwrite64",
    "pwritev",
    "writev",
    "sendfile",
    "copy_file_range",
    "ioctl",
    "ftruncate",
}


def trace(command: list[str], tmp_path: Path) -> list[tuple[str, list[str]]]:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    probe = system("strace", "-f", "true")
    if probe.returncode:
        pytest.skip(f"strace cannot trace here: {probe.stderr.strip()}")
    log = tmp_path / "trace"
    done = run(
        ["strace", "-f", "-y", "-s", "4096", "-e", f"trace={CALLS}", "-o", str(log), *command]
    )
    assert done.returncode == 0, done.stderr
    return traced_calls(log)


@pytest.mark.parametrize("replacing", [False, True], ids=["free name", "overwrite"])
def test_everything_is_durable_before_it_is_published(
    small: Path, tmp_path: Path, output: Path, *, replacing: bool
) -> None:
    options = ["--max-shard-size", "40KB", "--checksums"]
    if replacing:
        execute(plan_of(small, "E2G1T2"), output)
        options.append("--overwrite")
    else:
        output = tmp_path / "new" / "and deeper" / "moe"
    calls = trace(convert_command(small, output, *options, recipe=RECIPE), tmp_path)
    partial = partial_of(output)
    published = next(
        i for i, (name, paths) in enumerate(calls)
        if name.startswith("rename") and paths == [str(partial), str(output)]
    )  # fmt: skip

    def last(names: set[str], path: Path, before: int = published) -> int:
        """The last call on a path before another, −1 for none; a copy's target comes last."""
        return max(
            (i for i, (name, paths) in enumerate(calls[:before])
             if name in names and str(path) in (paths[:1] if name != "copy_file_range" else paths)),
            default=-1,
        )  # fmt: skip

    shards = [name for name in contents(output) if name.endswith(".safetensors")]
    assert len(shards) > 3
    for name in shards:
        temporary = partial / (name + TEMPORARY_SUFFIX)
        named = next(i for i, call in enumerate(calls)
                     if call == ("renameat", [str(temporary), str(partial / name)]))  # fmt: skip
        assert 0 <= last(WRITES, temporary) < last({"fsync"}, temporary, named) < named
    for name in contents(output):
        assert last({"fsync"}, partial / name) > last(WRITES, partial / name), name
    entries_changed = max(
        i for i, (name, paths) in enumerate(calls[:published])
        if name.startswith(("rename", "unlink")) and paths and Path(paths[-1]).parent == partial
    )  # fmt: skip
    assert last({"fsync"}, partial) > entries_changed
    assert ("fsync", [str(output.parent)]) in calls[published:]
    if not replacing:
        for parent in output.parent.parents[:2]:
            assert ("fsync", [str(parent)]) in calls[published:]
    else:
        # The old one goes only once it is certain that the new one stays.
        removed = next(i for i, (name, paths) in enumerate(calls)
                       if i > published and name.startswith("unlink") and paths)  # fmt: skip
        assert calls.index(("fsync", [str(output.parent)]), published) < removed


def test_no_fsync_is_no_fsync(small: Path, tmp_path: Path, output: Path) -> None:
    options = ("--max-shard-size", "40KB", "--no-fsync")
    calls = trace(convert_command(small, output, *options, recipe=RECIPE), tmp_path)
    assert any(name == "pwrite64" for name, _ in calls)
    assert not [name for name, _ in calls if "sync" in name]
