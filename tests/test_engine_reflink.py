"""Extent sharing on XFS and Btrfs: the same bytes in less space.

The file systems lie in files on loop devices, which needs root; without, these tests are skipped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import stops_after
from engine_fixtures import (
    Advance,
    CannotMountError,
    contents,
    convert_command,
    make_dense,
    mounted,
    plan_of,
    run,
    system,
    torchrun_command,
    used_bytes,
)

from upcycle_cli import UpcycleError
from upcycle_cli.api import Conversion, execute
from upcycle_cli.core.dir_handle import Folder
from upcycle_cli.core.platform import BLOCK_BYTES, share
from upcycle_cli.plan.plan import Plan
from upcycle_cli.write.file_layout import unique_bytes
from upcycle_cli.write.staging import partial_of
from upcycle_cli.write.writer import WriteOptions

KINDS = ["xfs", "btrfs"]
IMAGE_BYTES = 400 << 20  # XFS wants 300 MiB at least
MIB = 1 << 20


@dataclass(frozen=True)
class FileSystem:
    kind: str
    path: Path


@pytest.fixture(params=KINDS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FileSystem]:
    # New for every test: these systems take their time to give freed space back.
    try:
        with mounted(request.param, tmp_path / "fs", IMAGE_BYTES) as path:
            yield FileSystem(request.param, path)
    except CannotMountError as error:
        pytest.skip(str(error))


@pytest.fixture
def output(disk: FileSystem) -> Path:
    return disk.path / "moe"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 9 MiB in the MLPs, which become 72, and 2 elsewhere; a quarter of a matrix is whole blocks.
    path = tmp_path_factory.mktemp("dense") / "dense"
    return make_dense(path, hidden=256, inner=1536, layers=4, vocab=256)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where outputs on an ordinary file system go."""
    return tmp_path_factory.mktemp("plain")


def reference(plan: Plan, plain: Path) -> dict[str, str]:
    output = plain / plan.digest
    if not output.exists():
        execute(plan, output, writing=WriteOptions(fsync=False, reflink=False))
    return contents(output)


def most_bytes(plan: Plan) -> float:
    """What the issue allows: 1.15 × the dense checkpoint, plus the routers."""
    routers = sum(tensor.nbytes for tensor in plan.tensors if tensor.role == "router")
    return 1.15 * plan.source.nbytes + routers


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("E8G1T2", {}),
        ("E8G1T2", {"max_shard_bytes": 4 * MIB}),
        ("E8G1T2", {"expert_layout": "fused"}),
        ("E8G4T8", {"max_shard_bytes": 4 * MIB}),
        ("E8G4T8", {"expert_layout": "fused"}),
    ],
    ids=str,
)
def test_the_copies_take_no_space(
    disk: FileSystem, output: Path, dense: Path, plain: Path, recipe: str, options: dict[str, int]
) -> None:
    plan = plan_of(dense, recipe, **options)
    assert plan.nbytes > 4 * plan.source.nbytes
    empty = used_bytes(disk.path)
    done = execute(plan, output)
    assert used_bytes(disk.path) - empty <= most_bytes(plan)
    assert done.shared_bytes == plan.nbytes - unique_bytes(plan.shards)
    assert contents(output) == reference(plan, plain)


def test_no_reflink_writes_everything(
    disk: FileSystem, output: Path, dense: Path, plain: Path
) -> None:
    plan = plan_of(dense)
    empty = used_bytes(disk.path)
    done = execute(plan, output, writing=WriteOptions(reflink=False))
    assert used_bytes(disk.path) - empty >= plan.nbytes
    assert done.shared_bytes == 0
    assert contents(output) == reference(plan, plain)


def test_the_command_says_how_much_is_shared(output: Path, dense: Path) -> None:
    plan = plan_of(dense)
    said = run(convert_command(dense, output))
    assert said.returncode == 0, said.stderr
    assert "share extents with equal bytes" in said.stderr
    shutil.rmtree(output)
    done = run(convert_command(dense, output, "--json"))
    assert json.loads(done.stdout)["shared_bytes"] == plan.nbytes - unique_bytes(plan.shards)
    shutil.rmtree(output)
    without = run(convert_command(dense, output, "--json", "--no-reflink"))
    assert json.loads(without.stdout)["shared_bytes"] == 0
    shutil.rmtree(output)
    silent = run(convert_command(dense, output, "--no-reflink"))
    assert "share extents" not in silent.stderr


def test_a_resume_shares_with_what_was_there(
    disk: FileSystem, output: Path, dense: Path, plain: Path
) -> None:
    plan = plan_of(dense, max_shard_bytes=4 * MIB)
    empty = used_bytes(disk.path)

    stop = stops_after(plan.nbytes // 2)
    with pytest.raises(UpcycleError, match="stopped by the test"):
        execute(plan, output, hooks=Advance(stop))
    done = execute(plan, output)
    assert done.reused_bytes > 0
    assert done.shared_bytes == plan.nbytes - unique_bytes(plan.shards)
    assert used_bytes(disk.path) - empty <= most_bytes(plan)
    assert contents(output) == reference(plan, plain)


def test_two_ranks_share_within_their_files(
    disk: FileSystem, output: Path, dense: Path, plain: Path
) -> None:
    plan = plan_of(dense, max_shard_bytes=4_000_000)
    empty = used_bytes(disk.path)
    command = convert_command(dense, output, "--max-shard-size", "4MB", "--json")
    done = run(torchrun_command(2, command))
    assert done.returncode == 0, done.stderr
    assert used_bytes(disk.path) - empty <= 2 * most_bytes(plan)
    assert json.loads(done.stdout)["shared_bytes"] >= plan.nbytes - 2 * unique_bytes(plan.shards)
    assert contents(output) == reference(plan, plain)


def test_what_fits_only_when_shared(disk: FileSystem, output: Path, dense: Path) -> None:
    plan = plan_of(dense)
    fill(disk.path, leave=(unique_bytes(plan.shards) + plan.nbytes) // 2)
    with pytest.raises(UpcycleError, match="not enough disk space"):
        execute(plan, output, writing=WriteOptions(reflink=False))
    assert not partial_of(output).exists()
    execute(plan, output)
    assert output.is_dir()


def test_what_does_not_fit_even_when_shared(disk: FileSystem, output: Path, dense: Path) -> None:
    fill(disk.path, leave=10 * MIB)
    with pytest.raises(UpcycleError, match="not enough disk space"):
        execute(plan_of(dense), output)
    assert not partial_of(output).exists()


def fill(path: Path, leave: int) -> None:
    free = shutil.disk_usage(path).free
    system("fallocate", "-l", str(free - leave), path / "filler").check_returncode()
    assert shutil.disk_usage(path).free < leave + 10 * MIB


# The call itself -----------------------------------------------------------------------------


def test_share_makes_two_places_one(disk: FileSystem, output: Path) -> None:
    output.mkdir()
    with Folder.open(disk.path) as folder:
        assert folder.can_share()
    data = bytes(range(256)) * (BLOCK_BYTES // 256)
    with (output / "one").open("w+b") as one, (output / "other").open("w+b") as other:
        one.write(data)
        one.flush()
        assert share(one.fileno(), 0, other.fileno(), BLOCK_BYTES, BLOCK_BYTES)
        other.seek(0)
        assert other.read() == bytes(BLOCK_BYTES) + data
        # Not whole blocks: not tried.
        assert not share(one.fileno(), 0, other.fileno(), 100, BLOCK_BYTES)
        assert not share(one.fileno(), 0, other.fileno(), 0, 100)


def test_share_is_false_where_the_file_system_cannot(tmp_path: Path) -> None:
    try:
        with mounted("tmpfs", tmp_path / "fs", MIB) as path, Folder.open(path) as folder:
            assert not folder.can_share()
    except CannotMountError as error:
        pytest.skip(str(error))


# The size that people have -------------------------------------------------------------------


@pytest.mark.slow
def test_a_7b_model_becomes_94_gb_on_40(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    if free < 45e9:
        pytest.skip(f"needs 45 GB free, there are {free / 1e9:.0f}")
    dense = make_dense(
        tmp_path / "dense", hidden=4096, inner=14336, layers=32, vocab=32000, hollow=True
    )
    plan = plan_of(dense)
    try:
        with mounted("xfs", tmp_path / "fs", 40_000_000_000) as path:
            empty = used_bytes(path)
            done: Conversion = execute(plan, path / "moe")
            assert plan.nbytes > 90e9
            assert used_bytes(path) - empty <= most_bytes(plan)
            assert done.shared_bytes == plan.nbytes - unique_bytes(plan.shards)
    except CannotMountError as error:
        pytest.skip(str(error))
