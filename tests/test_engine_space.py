"""Disks that fill up, files that may not grow, quotas: one message, and the next run goes on."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_fixtures import (
    CannotMountError,
    contents,
    convert_command,
    make_dense,
    mounted,
    plan_of,
    run,
    system,
    torchrun_command,
)

from upcycle_cli import UpcycleError
from upcycle_cli.api import execute
from upcycle_cli.core.dir_handle import Folder
from upcycle_cli.core.errors import ResumableError
from upcycle_cli.write.preflight import check_space
from upcycle_cli.write.staging import partial_of
from upcycle_cli.write.writer import WriteOptions

LEVELS = 20
MIB = 1 << 20
IMAGE_BYTES = {"tmpfs": 64 * MIB, "ext4": 64 * MIB, "xfs": 300 * MIB, "btrfs": 128 * MIB}
Usage = namedtuple("Usage", "total used free")  # noqa: PYI024 - what shutil returns


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("space") / "dense"
    return make_dense(path, hidden=128, inner=688, layers=4, vocab=128)


@pytest.fixture(scope="module")
def reference(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("reference") / "moe"
    execute(plan_of(dense, max_shard_bytes=MIB), output)
    return contents(output)


@pytest.fixture(scope="module", params=["tmpfs", "ext4", "xfs", "btrfs"])
def disk(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    kind: str = request.param
    try:
        directory = tmp_path_factory.mktemp("disk") / "fs"
        with mounted(kind, directory, IMAGE_BYTES[kind]) as path:
            yield path
    except CannotMountError as error:
        pytest.skip(str(error))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every disk look empty before writing, as one that others fill during the run."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 60, 0, 1 << 60))


def fill(disk: Path, leave: int) -> Path:
    """Fill a file system up to so many bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        block = bytes(MIB)
        try:
            while True:
                file.write(block)
        except OSError:
            pass
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
        file.truncate(max(0, file.tell() - leave))
    system("sync", "-f", disk).check_returncode()
    return filler


@pytest.mark.usefixtures("unchecked")
def test_a_disk_that_fills_up(disk: Path, dense: Path, reference: dict[str, str]) -> None:
    plan = plan_of(dense, max_shard_bytes=MIB)
    writing = WriteOptions(reflink=False)  # else it would fit
    output = disk / "moe"
    failed = 0
    for level in range(LEVELS):
        filler = fill(disk, leave=plan.nbytes * level // LEVELS)
        for _ in range(2):  # a second run in the same place must not make it worse
            try:
                execute(plan, output, writing=writing)
            except UpcycleError as error:
                failed += 1
                assert "No space left on device" in error.message  # noqa: PT017
                # There may not even be room for the directory.
                assert "same command" in str(error) or not partial_of(output).exists()  # noqa: PT017
                assert not output.exists()
            else:
                # Btrfs and XFS have some reserve.
                assert level > LEVELS * 3 // 4
        filler.unlink()
        system("sync", "-f", disk).check_returncode()  # the space is there once that is written
        done = execute(plan, output, writing=writing)
        assert contents(output) == reference
        assert not partial_of(output).exists()
        if level > LEVELS // 2 and not done.already_done:
            assert done.reused_bytes > 0
        shutil.rmtree(output)
    assert failed >= 2 * (LEVELS - 4)


def test_the_command_ends_in_one_message(
    tmp_path: Path, dense: Path, reference: dict[str, str]
) -> None:
    plan = plan_of(dense, max_shard_bytes=MIB)
    try:
        with mounted("tmpfs", tmp_path / "fs", plan.nbytes // 2) as disk:
            output = disk / "moe"
            # A program that believes that there is room, as when another fills the disk meanwhile.
            lie = "import shutil, collections; U = collections.namedtuple('U', 'free'); "
            lie += "shutil.disk_usage = lambda _: U(1 << 60); "
            lie += "from upcycle_cli.cli.app import main; main()"
            command = convert_command(dense, output, "--max-shard-size", "1MiB", "--json")
            done = run([command[0], "-c", lie, *command[3:]])
            assert done.returncode == 2
            assert json.loads(done.stdout)["status"] == "error"
            assert done.stderr.count("error:") == 1
            assert "Traceback" not in done.stderr
            assert "No space left on device" in done.stderr
            assert f"{partial_of(output)}" in done.stderr
            assert not output.exists()
            system("mount", "-o", f"remount,size={300 * MIB}", disk).check_returncode()
            done = run(command)
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["reused_bytes"] > 0
            assert contents(output) == reference
    except CannotMountError as error:
        pytest.skip(str(error))


def test_two_ranks_end_in_one_message(
    tmp_path: Path, dense: Path, reference: dict[str, str]
) -> None:
    if shutil.which("prlimit") is None:
        pytest.skip("prlimit is not installed")
    output = tmp_path / "moe"
    command = convert_command(dense, output, "--max-shard-size", "1MiB")
    done = run(["prlimit", "--fsize=500000", *torchrun_command(2, command)])
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "File too large" in done.stderr
    assert not output.exists()
    assert partial_of(output).is_dir()
    done = run(torchrun_command(2, command))
    assert done.returncode == 0, done.stderr
    assert contents(output) == reference


def test_a_limit_on_the_size_of_files(
    tmp_path: Path, dense: Path, reference: dict[str, str]
) -> None:
    if shutil.which("prlimit") is None:
        pytest.skip("prlimit is not installed")
    output = tmp_path / "moe"
    command = convert_command(dense, output, "--max-shard-size", "1MiB", "--json")
    done = run(["prlimit", "--fsize=500000", *command])
    assert done.returncode == 2
    assert json.loads(done.stdout)["status"] == "error"
    assert done.stderr.count("error:") == 1
    assert "File too large" in done.stderr
    assert "same command" in done.stderr
    assert not output.exists()
    assert partial_of(output).is_dir()
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert contents(output) == reference


@pytest.mark.usefixtures("unchecked")
def test_a_quota(tmp_path: Path, dense: Path, reference: dict[str, str]) -> None:
    # Btrfs holds root to its quotas too.
    plan = plan_of(dense, max_shard_bytes=MIB)
    try:
        with mounted("btrfs", tmp_path / "fs", 300 * MIB) as disk:
            enabled = system("btrfs", "quota", "enable", disk)
            limited = system("btrfs", "qgroup", "limit", str(plan.nbytes // 2), disk)
            if enabled.returncode or limited.returncode:
                pytest.skip(f"no quotas: {enabled.stderr}{limited.stderr}")
            with pytest.raises(ResumableError, match=r"[Qq]uota"):
                execute(plan, disk / "moe", writing=WriteOptions(reflink=False))
            assert not (disk / "moe").exists()
            system("btrfs", "qgroup", "limit", "none", disk).check_returncode()
            done = execute(plan, disk / "moe", writing=WriteOptions(reflink=False))
            assert done.reused_bytes > 0
            assert contents(disk / "moe") == reference
    except CannotMountError as error:
        pytest.skip(str(error))


# What is checked before writing --------------------------------------------------------------


def disk_with(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 60, 0, free))


def test_what_cannot_fit_is_refused_before_writing(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(dense)
    disk_with(monkeypatch, plan.nbytes - 1)
    with pytest.raises(UpcycleError, match="not enough disk space") as refused:
        execute(plan, tmp_path / "moe", writing=WriteOptions(reflink=False))
    assert not isinstance(refused.value, ResumableError)
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_of_an_earlier_run_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = partial_of(tmp_path / "moe")
    partial.mkdir()
    disk_with(monkeypatch, 500_000)
    with pytest.raises(UpcycleError, match="not enough disk space"):
        check_space(tmp_path / "moe", 1_000_000)
    (partial / "shard").write_bytes(bytes(600_000))
    check_space(tmp_path / "moe", 1_000_000)


def test_what_is_left_counts_once_where_extents_are_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the system reports of files that share extents is far more than they take."""
    partial = partial_of(tmp_path / "moe")
    partial.mkdir()
    (partial / "shard").write_bytes(bytes(600_000))
    monkeypatch.setattr(Folder, "can_share", lambda _: True)
    disk_with(monkeypatch, 100_000)
    check_space(tmp_path / "moe", 1_000_000, shared=150_000)
    with pytest.raises(UpcycleError, match="not enough disk space"):
        check_space(tmp_path / "moe", 1_000_000, shared=300_000)
