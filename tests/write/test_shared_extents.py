"""Extent sharing on XFS and Btrfs: the same bytes in less space.

The file systems lie in files on loop devices, which needs root; without it, the tests are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import engine_fixtures as engine
import pytest
from file_systems import MAKE, UnavailableError, file_system, used_bytes

from upcycle_cli import open_checkpoint
from upcycle_cli.core.callbacks import Progress
from upcycle_cli.verification.result import Status
from upcycle_cli.verification.weights import check_weights

MIB = 1 << 20
IMAGE_BYTES = 400 * MIB  # XFS wants 300 MiB at least


@pytest.fixture(params=MAKE)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    # New for every test: these systems take their time to give freed space back.
    try:
        with file_system(request.param, tmp_path, IMAGE_BYTES) as path:
            yield path
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 9 MiB in the MLPs, which become 72, and 2 elsewhere; a quarter of a matrix is whole blocks.
    path = tmp_path_factory.mktemp("dense") / "dense"
    return engine.make_dense(path, hidden=256, inner=1536, layers=4, vocab=256)


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
    plan, output = engine.plan_of(dense, recipe, **options), disk / "moe"
    assert plan.nbytes > 4 * plan.source.nbytes
    empty = used_bytes(disk)
    engine.stopped_after(plan, output, plan.nbytes // 2)
    done = engine.execute(plan, output)  # which shares with the files of the first run
    assert used_bytes(disk) - empty <= 1.15 * engine.unique_bytes(plan)
    assert done.shared_bytes == plan.nbytes - engine.unique_bytes(plan)
    assert engine.execute(plan, tmp_path / "plain").shared_bytes in (0, done.shared_bytes)
    assert engine.contents(output) == engine.contents(tmp_path / "plain")


def test_verify_reads_copies_once(disk: Path, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, output, read = engine.plan_of(dense, "E8G1T2"), disk / "moe", list[int]()
    engine.execute(plan, output)
    populate = "upcycle_cli.verification.weights._populate"
    monkeypatch.setattr(populate, lambda _address, nbytes: read.append(nbytes))
    found = check_weights(plan, open_checkpoint(output), Progress())
    assert found.status is Status.PASSED
    assert sum(read) <= 1.15 * engine.unique_bytes(plan)
    with (output / "model.safetensors").open("r+b") as file:
        file.seek(plan.nbytes // 2)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    found = check_weights(plan, open_checkpoint(output), Progress())
    assert found.status is Status.FAILED
