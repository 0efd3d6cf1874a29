"""OUTPUT.partial, the staging directory of a conversion, and the state that is kept in it.

The directory is real, ours, and private (mode 0700), or it is refused; so plain paths are safe
inside it. Its marker says which plan it belongs to and which OUTPUT it will become. A note beside
each finished shard says how to recognise the shard. Before publication the notes move into the
marker: that is the sealed marker, which also says which old output is replaced. It is removed last.

State is never trusted further than the bytes of the weights confirm it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from upcycle_cli.checkpoint.storage import RECORD_NAME
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.platform import lock, sync_tree
from upcycle_cli.core.safe_files import (
    MOST_LISTING_BYTES,
    is_digest,
    is_temporary,
    read_small,
    write_whole,
)
from upcycle_cli.core.text import shell_line

MARKER = ".upcycle-partial"
CALIBRATION = ".upcycle-calibration"
SUFFIX = ".partial"
ASIDE = ".replaced"  # behind the name of the old output between two renames
NOTE_SUFFIX = ".upcycle-note"
TEMPORARY_SUFFIX = ".writing"
_OTHERS_WRITE = 0o022


def is_note(name: str) -> bool:
    """Whether a file holds the state of a conversion, and does not belong to the model."""
    return name in {MARKER, CALIBRATION} or name.endswith(NOTE_SUFFIX)


def partial_of(output: Path) -> Path:
    """Return the staging directory of OUTPUT."""
    return output.parent / (output.name + SUFFIX)


@dataclass(frozen=True, kw_only=True)
class Staging:
    """The staging directory of one conversion, as one of its processes sees it."""

    path: Path
    output: str  # the name that the directory will get
    plan_digest: str
    files: tuple[str, ...]  # the names of all files of the output
    durable: bool

    @property
    def shards(self) -> list[str]:
        """The names of the weight files."""
        return [name for name in self.files if name.endswith(".safetensors")]

    def write(self, name: str, data: bytes) -> None:
        """Write a small file of the output, which appears complete."""
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        write_whole(path, data)

    def note(self, name: str, facts: dict[str, Any]) -> None:
        """Note that a shard is complete, so that a later run need not write it again."""
        self._save(name + NOTE_SUFFIX, {"plan_sha256": self.plan_digest} | facts)

    def noted(self, name: str) -> dict[str, Any]:
        """Return the note on a shard of this plan; empty without one."""
        found = read_state(self.path / (name + NOTE_SUFFIX))
        return found if found.get("plan_sha256") == self.plan_digest else {}

    def take_over(self, *, restart: bool) -> None:
        """Keep what an earlier run of this plan completed, and remove everything else.

        Raises UpcycleError if the directory belongs to another plan, unless `restart`.
        """
        state = read_state(self.path / MARKER)
        digest = state.get("plan_sha256")
        if digest not in (None, self.plan_digest) and not restart:
            clean = ["upcycle", "clean", "--yes", str(self.path.with_name(self.output))]
            raise UpcycleError(
                f"{self.path} holds an unfinished conversion of another recipe or source.",
                f"Pass --overwrite to start over, or remove it with `{shell_line(clean)}`.",
            )
        for name, note in state.get("notes", {}).items() if digest == self.plan_digest else ():
            self.note(name, note)
        # The marker comes before any removal, so that a kill leaves a directory known as ours. It
        # is not rewritten: a full disk may have no room for it.
        if state != self._marker:
            self._save(MARKER, self._marker)
        noted = [name for name in self.shards if self.noted(name)]
        found = [CALIBRATION] if digest == self.plan_digest else []
        self._keep_only({MARKER, *found, *noted, *(name + NOTE_SUFFIX for name in noted)})

    def seal(self, *, replaces: str | None) -> None:
        """Make everything durable; leave only the output and the sealed marker.

        `replaces` is the record digest of the old output that the new one will replace.
        """
        notes = {name: note for name in self.shards if (note := self.noted(name))}
        kept = {name.split("/")[0] for name in self.files}
        self._keep_only(kept | {MARKER, *(name + NOTE_SUFFIX for name in notes)})
        self._save(MARKER, self._marker | {"replaces": replaces, "notes": notes})
        self._keep_only(kept | {MARKER})
        if self.durable:
            sync_tree(self.path)  # cheap: the weights are durable already

    @property
    def _marker(self) -> dict[str, str]:
        return {"plan_sha256": self.plan_digest, "output": self.output}

    def _keep_only(self, names: Collection[str]) -> None:
        for path in self.path.iterdir():
            if path.name not in names:
                remove(path)

    def _save(self, name: str, value: object) -> None:
        write_whole(self.path / name, json.dumps(value).encode(), durable=self.durable)


def read_state(path: Path) -> dict[str, Any]:
    """Return what a marker or a note says; empty if it is missing or damaged."""
    with suppress(OSError, UpcycleError, ValueError, RecursionError):
        value = json.loads(read_small(path, MOST_LISTING_BYTES))
        if isinstance(value, dict):
            return value
    return {}


def remove(path: Path) -> None:
    """Remove a file, a link, or a directory with everything in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def is_directory(path: Path) -> bool:
    """Whether this is a directory and no link to one."""
    return path.is_dir() and not path.is_symlink()


def disk_bytes(path: Path) -> int:
    """Return the bytes that the files of a directory take on the disk."""
    return sum(inner.lstat().st_blocks * 512 for inner in path.rglob("*"))


def is_staging(path: Path, output: str) -> bool:
    """Whether a directory is what a conversion into `output` left unfinished."""
    state = read_state(path / MARKER)
    if is_digest(state.get("plan_sha256")):
        return state.get("output") == output
    # A loss of power can damage the marker; a kill can come before there is one.
    names = [inner.name for inner in path.iterdir()]
    return RECORD_NAME not in names and (MARKER in names or all(map(is_temporary, names)))


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
        f"{path} belongs to another user, or others may write in it; it is not used.",
        f"If it is yours: chmod go-w {path}. If not, choose another OUTPUT.",
    )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a directory; UpcycleError if another process writes it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise UpcycleError(f"cannot write {path}: {error.strerror}.") from error
    try:
        # The process that held the lock may have published or removed the directory meanwhile.
        if not lock(descriptor) or not _is_at(path, descriptor):
            raise UpcycleError(
                f"another upcycle process is writing {path}.", "Wait for it, or stop it."
            )
        yield
    finally:
        os.close(descriptor)  # which releases the lock


def _is_at(path: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    return False
