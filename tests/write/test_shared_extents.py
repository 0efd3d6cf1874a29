"""Extent sharing on XFS and Btrfs: the same bytes in less space.

The file systems lie in files on loop devices, which needs root; without it, the tests are skipped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_fixtures import (
    CannotMountError,
    contents,
    convert_command,
    execute,
    make_dense,
    mounted,
    plan_of,
    run,
    stopped_after,
    system,
    torchrun_command,
    unique_bytes,
    used_bytes,
)

from upcycle_cli.core.platform import BLOCK_BYTES, can_share, share

MIB = 1 << 20
IMAGE_BYTES = 400 * MIB  # XFS wants 300 MiB at least


@pytest.fixture(params=["xfs", "btrfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    # New for every test: these systems take their time to give freed space back.
    try:
        with mounted(request.param, tmp_path / "fs", IMAGE_BYTES) as path:
            yield path
    except CannotMountError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 9 MiB in the MLPs, which become 72, and 2 elsewhere; a quarter of a matrix is whole blocks.
    path = tmp_path_factory.mktemp("dense") / "dense"
    return make_dense(path, hidden=256, inner=1536, layers=4, vocab=256)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("E8G1T2", {"max_shard_bytes": 4 * MIB}),
        ("E8G1T2", {"expert_layout": "fused"}),
        ("E8G4T8", {"max_shard_bytes": 4 * MIB}),
    ],
    ids=str,
)
def test_copies_take_no_space(
    disk: Path, dense: Path, tmp_path: Path, recipe: str, options: dict[str, int]
) -> None:
    plan, output = plan_of(dense, recipe, **options), disk / "moe"
    assert plan.nbytes > 4 * plan.source.nbytes
    empty = used_bytes(disk)
    stopped_after(plan, output, plan.nbytes // 2)
    done = execute(plan, output)  # which shares with the files of the first run
    assert used_bytes(disk) - empty <= 1.15 * unique_bytes(plan)
    assert done.shared_bytes == plan.nbytes - unique_bytes(plan)
    assert execute(plan, tmp_path / "plain").shared_bytes in (0, done.shared_bytes)
    assert contents(output) == contents(tmp_path / "plain")


def test_two_ranks_share_within_their_files(disk: Path, dense: Path) -> None:
    plan, output = plan_of(dense, max_shard_bytes=4_000_000), disk / "moe"
    empty = used_bytes(disk)
    command = convert_command(dense, output, "--max-shard-size", "4MB", "--json")
    done = run(torchrun_command(2, command))
    assert done.returncode == 0, done.stderr
    assert used_bytes(disk) - empty <= 2 * 1.15 * unique_bytes(plan)
    assert json.loads(done.stdout)["shared_bytes"] >= plan.nbytes - 2 * unique_bytes(plan)


def test_an_output_fits_that_shares_its_copies(disk: Path, dense: Path) -> None:
    plan, output = plan_of(dense), disk / "moe"
    size = shutil.disk_usage(disk).free - (unique_bytes(plan) + plan.nbytes) // 2
    system("fallocate", "-l", str(size), disk / "filler").check_returncode()
    assert execute(plan, output).published


def test_share_makes_two_places_one(disk: Path) -> None:
    assert can_share(disk)
    data = bytes(range(256)) * (BLOCK_BYTES // 256)
    with (disk / "one").open("w+b") as one, (disk / "other").open("w+b") as other:
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
        with mounted("tmpfs", tmp_path / "fs", MIB) as path:
            assert not can_share(path)
    except CannotMountError as error:
        pytest.skip(str(error))
