"""Everything works on systems that lack what only Linux, or only some file systems have."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import contents, execute, make_dense, plan_of, stopped_after

from upcycle_cli.core import platform

Patch = pytest.MonkeyPatch


def refuse(code: int) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


def refuse_sync_of_directories(patch: Patch) -> None:
    fsync = os.fsync

    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refuse(errno.EINVAL)()
        fsync(descriptor)

    patch.setattr(os, "fsync", sync)


def no_modes(patch: Patch) -> None:
    """As on a file system with one mode for all: what others may write is private enough."""
    patch.setattr(Path, "chmod", refuse(errno.EPERM))
    real = os.mkdir

    def make(path: str | Path, mode: int = 0o777) -> None:
        real(path, mode)
        os.chmod(path, 0o777)  # noqa: PTH101, S103

    patch.setattr(os, "mkdir", make)


LACKS: dict[str, Callable[[Patch], object]] = {
    "fdatasync": lambda patch: patch.delattr(os, "fdatasync"),
    "sched_getaffinity": lambda patch: patch.delattr(os, "sched_getaffinity"),
    "FICLONERANGE": lambda patch: patch.setattr(fcntl, "ioctl", refuse(errno.ENOTTY)),
    "flock": lambda patch: patch.setattr(fcntl, "flock", refuse(errno.ENOSYS)),
    "modes": no_modes,
    "fsync of directories": refuse_sync_of_directories,
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("systems") / "dense")


@pytest.mark.parametrize("lacks", [*([name] for name in LACKS), [*LACKS]], ids=str)
def test_a_system_that_lacks_something_converts_all_the_same(
    dense: Path, tmp_path: Path, monkeypatch: Patch, lacks: list[str]
) -> None:
    plan = plan_of(dense, "E4G1T2", max_shard_bytes=40_000)
    execute(plan, tmp_path / "reference")
    output = tmp_path / "work" / "moe"
    with monkeypatch.context() as patch:
        for name in lacks:
            LACKS[name](patch)
        execute(plan_of(dense, "E2G2T2"), output)
        stopped_after(plan, tmp_path / "work" / "other", plan.nbytes // 2)
        assert execute(plan, tmp_path / "work" / "other").reused_bytes > 0
        execute(plan, output, overwrite=True)
    for name in ("moe", "other"):
        assert contents(tmp_path / "work" / name) == contents(tmp_path / "reference")
    assert sorted(path.name for path in output.parent.iterdir()) == ["moe", "other"]


def test_macos_syncs_the_disk_itself(tmp_path: Path, monkeypatch: Patch) -> None:
    """Its fsync ends in the disk's cache."""
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("that is not enough"))
    with (tmp_path / "file").open("w") as file:
        platform.make_durable(file.fileno())
        assert calls == [(file.fileno(), 51)]


def test_other_c_libraries_keep_memory_as_they_do(monkeypatch: Patch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    platform.reuse_freed_memory.__wrapped__()
