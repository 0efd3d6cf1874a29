"""The output directory as a transaction: whole under its name, or not there at all.

Everything is written to `OUTPUT.partial`, made durable, and turned into OUTPUT by one rename. A run
that is cut short leaves only the partial, with a marker that says which plan it belongs to and
which files are complete; the same plan goes on from there.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from upcycle_cli.checkpoint import (
    CARD_NAME,
    COMPANIONS,
    CONFIG_NAME,
    INDEX_NAME,
    RECORD_NAME,
    Checkpoint,
)
from upcycle_cli.errors import ResumableError, UpcycleError
from upcycle_cli.printable import printable, shell_line
from upcycle_cli.reflink import can_share

MARKER = ".upcycle-partial"
SUFFIX = ".partial"
NOTE_SUFFIX = ".upcycle-note"
_ASIDE = ".replaced"
_NEW = ".new"
CHECKSUMS_NAME = "SHA256SUMS"
_OWN_FILES = (
    CONFIG_NAME,
    RECORD_NAME,
    CARD_NAME,
    CHECKSUMS_NAME,
    INDEX_NAME,
    "model*.safetensors",
    MARKER,
    *COMPANIONS,
)
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def check_name(output: Path) -> None:
    """Raise UpcycleError when OUTPUT's name leaves no room for those that stand beside it."""
    try:
        longest = os.pathconf(_existing_parent(output), "PC_NAME_MAX")
    except (OSError, RuntimeError):
        return  # what is wrong with the place itself is found in a moment
    size = len(os.fsencode(output.name)) + max(map(len, (SUFFIX, _ASIDE)))
    if size > longest:
        raise UpcycleError(
            f"the name of {output} is too long: it is made under the name with {SUFFIX} behind "
            f"it, and no name there has more than {longest} bytes.",
            "Choose a shorter one.",
        )


def check_output(output: Path, source: Checkpoint, *, overwrite: bool) -> None:
    """Raise UpcycleError when OUTPUT cannot be written without harm."""
    check_name(output)
    try:
        target, origin = output.resolve(), source.path.resolve()
        files = [(source.path / name).resolve() for name in source.files]
        occupied = output.is_dir() and any(output.iterdir())
    except (OSError, RuntimeError) as error:  # a name that is too long, links in a circle
        reason = getattr(error, "strerror", None) or str(error)
        raise UpcycleError(f"{output} cannot be made: {reason}.") from error
    if target == origin:
        raise UpcycleError("OUTPUT is the source itself.", "Choose another directory.")
    if target.is_relative_to(origin):
        raise UpcycleError(
            f"{output} is inside the source, which is never modified.", "Choose another directory."
        )
    if any(path.is_relative_to(target) for path in (origin, *files)):
        raise UpcycleError(f"{output} contains the source.", "Choose another directory.")
    if Path.cwd().is_relative_to(target):
        raise UpcycleError(
            f"{output} is the current directory, or contains it.", "Choose another directory."
        )
    _check_kind(output)
    if occupied and not overwrite:
        raise UpcycleError(
            f"{output} exists and is not empty.",
            "Choose another name, or pass --overwrite to replace it.",
        )
    if occupied:
        _check_replaceable(output)


def _check_kind(output: Path) -> None:
    """Raise UpcycleError for what a rename cannot replace."""
    if os.path.ismount(output):
        raise UpcycleError(
            f"{output} is a mount point, which cannot be replaced by a rename.",
            f"Write to a directory inside it, such as {output / 'moe'}.",
        )
    if output.is_symlink():
        raise UpcycleError(
            f"{output} is a symbolic link, which cannot be replaced by a directory.",
            f"Write to {printable(str(output.resolve()))}, or remove the link.",
        )
    if output.exists() and not output.is_dir():
        raise UpcycleError(f"{output} exists and is not a directory.", "Choose another name.")


def _check_replaceable(output: Path) -> None:
    """Raise UpcycleError unless everything in a directory is something that upcycle writes."""
    hint = "Move or remove it yourself if it is not needed."
    if not (output / RECORD_NAME).is_file():
        raise UpcycleError(
            f"{output} was not made by upcycle (no {RECORD_NAME}); not replaced.", hint
        )
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if not path.is_dir() and not _is_own(name):
            raise UpcycleError(
                f"{output} holds {name}, which upcycle did not write; not replaced.", hint
            )


def check_space(output: Path, needed: int, *, shared: int | None = None) -> None:
    """Raise UpcycleError when the file system of OUTPUT has less than `needed` bytes free.

    `shared` is what is needed where equal parts can share extents, or None not to do so. What an
    unfinished run has left counts as free.
    """
    parent = _existing_parent(output)
    free = shutil.disk_usage(parent).free
    partial, left = partial_of(output), 0
    if partial.is_dir():
        left = sum(file.lstat().st_blocks * 512 for file in partial.rglob("*"))
    if shared is not None and needed > free and can_share(parent):
        # The system counts what several files share once for each of them.
        left = left * shared // needed
        needed = shared
    free += left
    if needed > free:
        raise UpcycleError(
            f"not enough disk space for {output}: {needed / 1e6:,.0f} MB needed, "
            f"{free / 1e6:,.0f} MB free.",
            "Free some, or write to another file system.",
        )


@dataclass(frozen=True)
class Workspace:
    """OUTPUT.partial while a conversion owns it, and the notes on what is complete in it.

    Each complete file has a note beside it, so that several processes can write side by side.
    """

    path: Path
    plan_digest: str
    durable: bool

    def note(self, name: str, facts: dict[str, Any]) -> None:
        """Remember that a file is complete, so that a later run need not write it again."""
        self._save(name + NOTE_SUFFIX, self._stamp(name) | facts)

    def reusable(self, name: str, size: int) -> dict[str, Any] | None:
        """Return what was noted about a file that is still as it was when it was completed."""
        noted = _read_json(self.path / (name + NOTE_SUFFIX))
        try:
            stamp = self._stamp(name)
        except OSError:
            return None
        same = all(noted.get(key) == value for key, value in stamp.items())
        return noted if same and stamp["size"] == size else None

    def _stamp(self, name: str) -> dict[str, Any]:
        status = (self.path / name).stat()
        with (self.path / name).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, status.st_size))  # a damaged length may be anything
        return {
            "plan_sha256": self.plan_digest,
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "header_sha256": hashlib.sha256(header).hexdigest(),
        }

    def _save(self, name: str, value: object) -> None:
        temporary = self.path / (name + _NEW)
        temporary.write_text(json.dumps(value), encoding="utf-8")
        if self.durable:
            sync(temporary)
        temporary.replace(self.path / name)

    def take_over(self, *, restart: bool) -> None:
        """Keep what an unfinished run of this very plan completed, and drop everything else.

        Raises UpcycleError when the directory belongs to another plan, and not `restart`.
        """
        digest = None
        for name in (MARKER, RECORD_NAME):  # what was sealed has the record only
            digest = digest or _read_json(self.path / name).get("plan_sha256")
        if digest not in (None, self.plan_digest) and not restart:
            clean = ["upcycle", "clean", "--yes", str(self.path).removesuffix(SUFFIX)]
            raise UpcycleError(
                f"{self.path} holds an unfinished conversion of another recipe or source.",
                f"Pass --overwrite to start over, or remove it with `{shell_line(clean)}`.",
            )
        # Before anything goes, so that whatever is left is known to be ours; and not again, since
        # there may be no room before the rest has gone.
        if _read_json(self.path / MARKER).get("plan_sha256") != self.plan_digest:
            self._save(MARKER, {"plan_sha256": self.plan_digest})
        keep = {MARKER}
        for note in self._notes():
            if _read_json(note).get("plan_sha256") == self.plan_digest:
                keep |= {note.name, note.name.removesuffix(NOTE_SUFFIX)}
        for entry in self.path.iterdir():
            if entry.name not in keep:
                _remove(entry)

    def seal(self) -> None:
        """Remove what is not part of the output, and make the rest durable."""
        for note in self._notes():
            note.unlink()
        (self.path / MARKER).unlink()
        if self.durable:
            # The weights are durable already, so this costs little.
            for path in sorted(self.path.rglob("*")):
                sync(path)
            sync(self.path)

    def _notes(self) -> list[Path]:
        return list(self.path.glob(f"*{NOTE_SUFFIX}"))


def output_files(directory: Path) -> list[Path]:
    """Return the files of an output, finished or not, without what upcycle keeps for itself."""
    found = (path for path in directory.rglob("*") if path.is_file())
    return sorted(
        path for path in found if path.name != MARKER and not path.name.endswith(NOTE_SUFFIX)
    )


def split_files(directory: Path) -> tuple[list[str], list[str]]:
    """Return the names of the files that upcycle writes, and those of all others."""
    own: list[str] = []
    others: list[str] = []
    for path in output_files(directory):
        name = path.relative_to(directory).as_posix()
        (own if _is_own(name) else others).append(name)
    return own, others


def _is_own(name: str) -> bool:
    # In a pattern, * stands for slashes too.
    return any(
        fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
        for pattern in _OWN_FILES
    )


@contextmanager
def transaction(
    output: Path, *, plan_digest: str, overwrite: bool, durable: bool
) -> Iterator[tuple[Workspace, list[bool]]]:
    """Yield the directory to fill and a one-element list; set that to True to publish on leaving.

    When the run is cut short by a signal or by the system (a full disk), the directory stays, and
    the same plan goes on from it; when its contents are no good, it is removed.

    Raises UpcycleError when the directory cannot be made, belongs to another plan (and not
    `overwrite`), or another process is writing it.
    """
    partial = partial_of(output)
    made = _missing_parents(output)
    lock = _claim(partial)
    workspace = Workspace(partial, plan_digest, durable)
    publish = [False]
    try:
        workspace.take_over(restart=overwrite)
        try:
            yield workspace, publish
        except ResumableError:
            raise
        except UpcycleError:
            with suppress(OSError):
                _discard(partial)
            raise
        replaced = False
        if publish[0]:
            workspace.seal()
            replaced = _publish(partial, output, overwrite=overwrite)
            if durable:
                for directory in (output.parent, *(parent.parent for parent in made)):
                    sync(directory)
        if replaced or not publish[0]:
            with suppress(OSError):
                _discard(partial)
    finally:
        os.close(lock)


def partial_of(output: Path) -> Path:
    """Return the directory in which OUTPUT is made."""
    return output.with_name(output.name + SUFFIX)


def clean(output: Path, *, remove: bool) -> tuple[Path, int]:
    """Return the abandoned OUTPUT.partial and its bytes; remove it when asked.

    Raises UpcycleError when there is none, when upcycle did not make it, or when a process is
    still writing it.
    """
    partial = partial_of(output)
    if not partial.is_dir() or partial.is_symlink():
        raise UpcycleError(f"there is no {partial}.", "Nothing to clean.")
    if not _is_ours(partial):
        raise UpcycleError(f"{partial} was not made by upcycle.", "Remove it yourself.")
    lock = _lock(partial)
    try:
        size = sum(file.lstat().st_blocks * 512 for file in partial.rglob("*") if file.is_file())
        if remove:
            _discard(partial)
    finally:
        os.close(lock)
    return partial, size


def _claim(partial: Path) -> int:
    """Make the directory if need be, and hold it locked; return the lock."""
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        if partial.is_symlink():
            raise UpcycleError(f"{partial} is a symbolic link.", "Remove it.")
        if partial.is_dir():
            if not _is_ours(partial):
                raise UpcycleError(
                    f"{partial} is in the way, and was not made by upcycle.", "Move it elsewhere."
                )
        else:
            partial.mkdir()
    except OSError as error:
        raise UpcycleError(f"cannot write {partial}: {error.strerror}.") from error
    return _lock(partial)


def _is_ours(partial: Path) -> bool:
    # A run that was killed between removing the marker and the rename leaves the record, one that
    # was killed before it had written the marker leaves nothing else.
    if (partial / MARKER).is_file() or (partial / RECORD_NAME).is_file():
        return True
    return {entry.name for entry in partial.iterdir()} <= {MARKER + _NEW}


def _lock(partial: Path) -> int:
    lock = None
    try:
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), partial.stat()):
            raise BlockingIOError  # its owner has published or removed it meanwhile
    except OSError as error:
        if lock is not None:
            os.close(lock)
        if isinstance(error, BlockingIOError | FileNotFoundError):
            raise UpcycleError(
                f"another upcycle process is writing {partial}.", "Wait for it, or stop it."
            ) from error
        raise UpcycleError(f"cannot write {partial}: {error.strerror}.") from error
    return lock


def _read_json(path: Path) -> dict[str, Any]:
    """Return what a marker or note says; nothing when it is missing or was cut short."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _discard(partial: Path) -> None:
    """Remove a directory of ours, and last the files that tell that it is."""
    last = (partial / RECORD_NAME, partial / MARKER)
    for entry in partial.iterdir():
        if entry not in last:
            _remove(entry)
    for path in last:
        path.unlink(missing_ok=True)
    partial.rmdir()


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def replace_text(path: Path, text: str) -> None:
    """Write a small file that appears whole, or stays what it was."""
    temporary = path.with_name(f".{path.name}{_NEW}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def sync(path: Path) -> None:
    """Make a file's contents, or a directory's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(partial: Path, output: Path, *, overwrite: bool) -> bool:
    """Give the directory its name; return whether PARTIAL is now what OUTPUT was before."""
    if not (overwrite and output.is_dir() and any(output.iterdir())):
        partial.rename(output)  # onto a free name or an empty directory
        return False
    _check_replaceable(output)  # once more: the conversion may have taken hours
    # Whatever happens from here on, the old contents can be told to be abandoned.
    (output / MARKER).touch()
    if not _exchange(partial, output):
        aside = output.with_name(output.name + _ASIDE)
        output.rename(aside)
        try:
            partial.rename(output)
        except BaseException:
            aside.rename(output)
            raise
        aside.rename(partial)
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step; False where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    result = libc.renameat2(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE
    )
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _missing_parents(path: Path) -> list[Path]:
    return [parent for parent in path.absolute().parents if not parent.exists()]


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())
