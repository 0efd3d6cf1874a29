"""OUTPUT.partial, the staging directory of a conversion, and the state that is kept in it.

The directory is real, ours, and private (mode 0700), or it is refused; so plain paths are safe
inside it. Its folder `output` becomes OUTPUT. Beside that folder, a marker names the plan, and a
note on each finished shard has its digest, which a later run compares with the bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from upcycle_cli.checkpoint.storage import CARD_NAME, RECORD_NAME
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.platform import lock, sync_tree
from upcycle_cli.core.safe_files import (
    CHECKSUMS_NAME,
    MOST_LISTING_BYTES,
    is_temporary,
    read_small,
    write_whole,
)
from upcycle_cli.core.text import shell_line
from upcycle_cli.plan.plan import Plan

MARKER = ".upcycle-partial"
CALIBRATION = ".upcycle-calibration"
NOTE_SUFFIX = ".upcycle-note"
TEMPORARY_SUFFIX = ".writing"
_OTHERS_WRITE = 0o022


def partial_of(output: Path) -> Path:
    """Return the staging directory of OUTPUT."""
    return output.parent / (output.name + ".partial")


def aside_of(output: Path) -> Path:
    """Return where the old output is between two renames."""
    return output.parent / (output.name + ".replaced")


def new_of(output: Path) -> Path:
    """Return the folder that becomes OUTPUT."""
    return partial_of(output) / "output"


@dataclass(frozen=True, kw_only=True)
class Staging:
    """The staging directory of one conversion, as one of its processes sees it."""

    output: Path
    plan: Plan
    durable: bool

    @cached_property
    def plan_digest(self) -> str:
        """The digest of the plan."""
        return self.plan.digest

    @property
    def directory(self) -> Path:
        """The staging directory, which holds the state."""
        return partial_of(self.output)

    @property
    def path(self) -> Path:
        """The folder that becomes OUTPUT."""
        return new_of(self.output)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file of the output, which appears complete."""
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        write_whole(path, data)

    def note(self, name: str, facts: dict[str, Any]) -> None:
        """Note that a shard is complete, so that a later run need not write it again."""
        self._save(name + NOTE_SUFFIX, facts)

    def noted(self, name: str) -> dict[str, Any]:
        """Return the note on a shard of this plan; empty without one."""
        found = read_state(self.directory / (name + NOTE_SUFFIX))
        return found if found.get("plan_sha256") == self.plan_digest else {}

    def take_over(self, *, restart: bool) -> None:
        """Keep what an earlier run of this plan completed, and remove everything else.

        Raises UpcycleError if the directory belongs to another plan, unless `restart`.
        """
        digest = read_state(self.directory / MARKER).get("plan_sha256")
        if digest not in (None, self.plan_digest) and not restart:
            clean = ["upcycle", "clean", "--yes", str(self.output)]
            raise UpcycleError(
                f"{self.directory} holds an unfinished conversion of another recipe or source.",
                f"Pass `overwrite=True` to start over, or remove it with `{shell_line(clean)}`.",
            )
        calibration = [CALIBRATION] if digest == self.plan_digest else []
        # The marker is written before any removal, so a kill leaves a directory known as ours. It
        # is not rewritten: a full disk may have no room for it.
        if digest != self.plan_digest:
            self._save(MARKER, {})
        noted = [shard.name for shard in self.plan.shards if self.noted(shard.name)]
        notes = [name + NOTE_SUFFIX for name in noted]
        _keep_only(self.directory, {MARKER, self.path.name, *calibration, *notes})
        self.path.mkdir(exist_ok=True)
        _keep_only(self.path, noted)

    def seal(self, *, replaces: str | None) -> None:
        """Leave only the files of the output, make them durable, and mark them as complete.

        `replaces` is the record digest of the old output that the new one will replace.
        """
        names = (*self.plan.file_names, RECORD_NAME, CARD_NAME, CHECKSUMS_NAME)
        _keep_only(self.path, {name.split("/")[0] for name in names})
        self._save(MARKER, {"replaces": replaces})
        if self.durable:
            sync_tree(self.directory)  # cheap: the weights are durable already

    def _save(self, name: str, value: dict[str, Any]) -> None:
        data = json.dumps({"plan_sha256": self.plan_digest} | value).encode()
        write_whole(self.directory / name, data, durable=self.durable)


def _keep_only(directory: Path, names: Collection[str]) -> None:
    for path in directory.iterdir():
        if path.name not in names:
            remove(path)


def discard(partial: Path) -> None:
    """Remove a staging directory, and last the marker that says that it is one of ours."""
    _keep_only(partial, {MARKER})
    shutil.rmtree(partial)


def read_state(path: Path) -> dict[str, Any]:
    """Return what a marker or a note says; empty if it is missing or damaged."""
    with suppress(OSError, UpcycleError, ValueError, RecursionError):
        value = json.loads(read_small(path, MOST_LISTING_BYTES))
        if isinstance(value, dict):
            return value
    return {}


def remove(path: Path) -> None:
    """Remove a file, a link, or a directory with everything in it."""
    if is_directory(path):
        shutil.rmtree(path)
    else:
        path.unlink()


def is_directory(path: Path) -> bool:
    """Whether this is a directory and no link to one."""
    return path.is_dir() and not path.is_symlink()


def disk_bytes(path: Path) -> int:
    """Return the bytes that the files of a directory take on the disk."""
    return sum(inner.lstat().st_blocks * 512 for inner in path.rglob("*"))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Check that a directory is a staging directory of ours, and hold its lock; UpcycleError."""
    if not is_directory(path):
        raise UpcycleError(f"{path} is a symbolic link or a file, not a directory.", "Remove it.")
    check_private(path)
    try:
        names = [inner.name for inner in path.iterdir()]
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise UpcycleError(f"cannot write {path}: {error.strerror}.") from error
    try:
        # A kill can come before there is a marker.
        if MARKER not in names and not all(map(is_temporary, names)):
            raise UpcycleError(
                f"{path} exists and is not an unfinished conversion of upcycle.",
                "Move it elsewhere, or choose another OUTPUT.",
            )
        # The process that held the lock may have removed the directory meanwhile.
        if not lock(descriptor) or not _is_at(path, descriptor):
            raise UpcycleError(
                f"another upcycle process is writing {path}.", "Wait for it, or stop it."
            )
        yield
    finally:
        os.close(descriptor)  # which releases the lock


def check_private(path: Path) -> None:
    """Raise UpcycleError if other users own a staging directory or can write in it."""
    status = path.lstat()
    if status.st_uid == os.geteuid() and not status.st_mode & _OTHERS_WRITE:
        return
    # Some file systems have one owner and one mode for everything: a new directory shows it.
    with suppress(PermissionError), TemporaryDirectory(dir=path) as fresh:
        own = Path(fresh).lstat()
        if own.st_uid == status.st_uid and own.st_mode & _OTHERS_WRITE:
            return
    raise UpcycleError(
        f"{path} belongs to another user, or other users may write in it.",
        f"If it is yours: chmod go-w {path}. If not, choose another OUTPUT.",
    )


def _is_at(path: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    return False
