"""The output directory as a transaction: whole under its name, or not there at all.

Everything is written to `OUTPUT.partial`, made durable, and turned into OUTPUT by one rename. A run
that is cut short leaves only the partial, with a marker that says which plan it belongs to and
which files are complete; the same plan goes on from there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from upcycle_cli.checkpoint import (
    CARD_NAME,
    COMPANIONS,
    CONFIG_NAME,
    INDEX_NAME,
    RECORD_NAME,
)
from upcycle_cli.errors import ResumableError, UpcycleError
from upcycle_cli.files import CHECKSUMS_NAME, is_digest, matches
from upcycle_cli.folder import Folder, is_temporary
from upcycle_cli.place import check_kind
from upcycle_cli.swap import Interrupted, busy, find_interrupted, moved, publish
from upcycle_cli.system import lock
from upcycle_cli.workspace import (
    MARKER,
    NOTE_SUFFIX,
    STATE,
    SUFFIX,
    TEMPORARY_SUFFIX,
    Workspace,
    make_private,
    open_inner,
    partial_of,
    read_state,
)

__all__ = ["clean", "joined", "recover", "transaction"]

_OWN_FILES = (
    CONFIG_NAME,
    RECORD_NAME,
    CARD_NAME,
    CHECKSUMS_NAME,
    INDEX_NAME,
    "model*.safetensors",
    *STATE,
    *COMPANIONS,
)


@dataclass
class Transaction:
    """A conversion on its way to be OUTPUT."""

    parent: Folder
    workspace: Workspace
    publish: bool = False
    """Whether to publish it in the end."""
    left: str | None = None
    """What could not be removed of what it replaced, in words."""

    def check_place(self) -> None:
        """Raise UpcycleError unless the directory is where it was made."""
        folder = self.workspace.folder
        try:
            here = os.path.samestat(self.parent.path.stat(), os.fstat(self.parent.descriptor))
        except OSError:
            here = False
        if not here or not self.parent.holds(folder.path.name, folder):
            raise moved(folder)


@contextmanager
def transaction(
    output: Path, *, plan_digest: str, files: tuple[str, ...], overwrite: bool, durable: bool
) -> Iterator[Transaction]:
    """Yield the directory to fill, which is published on leaving if `publish` says so then.

    When the run is cut short by a signal or by the system (a full disk), the directory stays, and
    the same plan goes on from it; when its contents are no good, it is removed.

    Raises UpcycleError when the directory cannot be made, belongs to another plan (and not
    `overwrite`), is another user's, or another process is writing it.
    """
    with ExitStack() as opened:
        parent, made = _make_parent(output, opened)
        folder = _claim(parent, output.name, opened)
        workspace = Workspace(
            folder=folder,
            output=output.name,
            plan_digest=plan_digest,
            files=files,
            durable=durable,
        )
        running = Transaction(parent, workspace)
        workspace.take_over(restart=overwrite)
        try:
            yield running
        except ResumableError:
            raise
        except UpcycleError:
            with suppress(OSError):
                _discard(parent, folder)
            raise
        if not running.publish:
            with suppress(OSError):
                _discard(parent, folder)
            return
        try:
            running.check_place()
            check_kind(output)
            running.left = publish(parent, workspace, overwrite=overwrite)
        except UpcycleError as error:
            hint = f"What was written is complete and stays in {folder.path}: the same command "
            hint += "publishes it."
            raise ResumableError(
                error.message, " ".join(filter(None, [error.hint, hint]))
            ) from error
        if durable:
            for directory in made:
                with Folder.open(directory.parent) as above:
                    above.sync()


@contextmanager
def joined(
    output: Path, *, plan_digest: str, files: tuple[str, ...], durable: bool
) -> Iterator[Workspace]:
    """Yield the directory that another process of this conversion holds; UpcycleError if none."""
    with ExitStack() as opened:
        parent = opened.enter_context(Folder.open(output.parent))
        folder = open_inner(parent, partial_of(output).name, opened)
        if folder is None or read_state(folder, MARKER).get("plan_sha256") != plan_digest:
            raise UpcycleError(
                f"{partial_of(output)} is not the directory that rank 0 writes to.",
                "Run all ranks on one shared file system.",
            )
        _check_mine(folder)
        yield Workspace(
            folder=folder,
            output=output.name,
            plan_digest=plan_digest,
            files=files,
            durable=durable,
        )


def recover(output: Path) -> str | None:
    """End the replacing of OUTPUT that a killed run was in the middle of; say what was done.

    Raises UpcycleError when the process that replaces it is still at work.
    """
    with ExitStack() as opened:
        found = None
        with suppress(OSError):  # what cannot be looked at is told of once it is checked
            parent = opened.enter_context(Folder.open(output.parent))
            found = find_interrupted(parent, output.name, opened)
        return None if found is None else found.end()


@dataclass(frozen=True)
class Leftover:
    """What a run that did not come to its end has left."""

    path: Path
    nbytes: int
    what: str
    """What it is, in words."""
    note: str | None = None
    """What else was done when it was removed."""


def clean(output: Path, *, remove: bool) -> Leftover:
    """Return the abandoned OUTPUT.partial; remove it when asked.

    Raises UpcycleError when there is none, when upcycle did not make it, or when a process is
    still writing it.
    """
    partial = partial_of(output)
    with ExitStack() as opened:
        try:
            parent = opened.enter_context(Folder.open(output.parent))
        except FileNotFoundError:
            raise _nothing(partial) from None
        interrupted = find_interrupted(parent, output.name, opened)
        if interrupted is not None and not interrupted.aside:
            found = _clean_replaced(interrupted, opened, remove=remove)
            if found is not None:
                return found
            interrupted = None
        folder = interrupted.new if interrupted else open_inner(parent, partial.name, opened)
        if folder is None:
            raise _nothing(partial)
        if not _is_ours(folder, output.name):
            raise UpcycleError(
                f"{partial} is no unfinished conversion of upcycle.", "Remove it yourself."
            )
        _check_mine(folder)
        _lock(parent, folder)
        found = Leftover(partial, folder.nbytes(), "an unfinished conversion")
        if remove:
            note = None if interrupted is None else interrupted.end()
            _discard(parent, folder)
            return replace(found, note=note)
        return found


def _clean_replaced(
    interrupted: Interrupted, opened: ExitStack, *, remove: bool
) -> Leftover | None:
    """Return what OUTPUT was before, if it is there still; remove it when asked."""
    parent, old = interrupted.parent, interrupted.old
    folder = None if old is None else open_inner(parent, old, opened)
    what = f"what {interrupted.new.path} was before"
    found = None if folder is None else Leftover(folder.path, folder.nbytes(), what)
    left = interrupted.end() if remove else None
    if left is not None:
        raise UpcycleError(left)
    return found


def _nothing(partial: Path) -> UpcycleError:
    return UpcycleError(f"there is no {partial}.", "Nothing to clean.")


def _make_parent(output: Path, opened: ExitStack) -> tuple[Folder, list[Path]]:
    """Open the directory that is to hold OUTPUT, and return which ones had to be made for it."""
    made = [parent for parent in output.parents if not parent.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return opened.enter_context(Folder.open(output.parent)), made
    except OSError as error:
        raise UpcycleError(f"cannot write {partial_of(output)}: {error.strerror}.") from error


def _claim(parent: Folder, output: str, opened: ExitStack) -> Folder:
    """Make the directory if need be, and return it open and locked."""
    name = output + SUFFIX
    partial = parent.path / name
    try:
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent.descriptor)
        folder = open_inner(parent, name, opened)
        if folder is None:
            raise UpcycleError(
                f"{partial} is a symbolic link or a file, not a directory.", "Remove it."
            )
        if not _is_ours(folder, output):
            raise UpcycleError(
                f"{partial} is in the way, and is no unfinished conversion of upcycle.",
                "Move it elsewhere, or choose another OUTPUT.",
            )
        _check_mine(folder)
    except OSError as error:
        raise UpcycleError(f"cannot write {partial}: {error.strerror}.") from error
    _lock(parent, folder)
    make_private(folder)
    return folder


def _check_mine(folder: Folder) -> None:
    if not folder.is_mine():
        raise UpcycleError(
            f"{folder.path} belongs to another user, or others may write in it; it is not used.",
            f"If it is yours: chmod go-w {folder.path}. If not, choose another OUTPUT.",
        )


def _is_ours(folder: Folder, output: str) -> bool:
    """Whether a directory is what an unfinished conversion into `output` has left.

    A finished model that somebody has named so is not, whatever lies in it besides.
    """
    states = [read_state(folder, name) for name in STATE]
    if any(
        state.get("output") == output and is_digest(state.get("plan_sha256")) for state in states
    ):
        return True
    names = folder.names()
    if RECORD_NAME in names:
        return False
    # A marker that the loss of power has cut short, or an earlier version's; and before there is
    # one, nothing but the file that was to be it.
    return all(map(is_temporary, names)) or (MARKER in names and all(map(_is_expected, names)))


def _is_expected(name: str) -> bool:
    if name.endswith((NOTE_SUFFIX, TEMPORARY_SUFFIX, f"{NOTE_SUFFIX}.new")) or is_temporary(name):
        return True
    return matches(name, _OWN_FILES) or any(
        pattern.startswith(f"{name}/") for pattern in _OWN_FILES
    )


def _lock(parent: Folder, folder: Folder) -> None:
    # Its owner may have published or removed it meanwhile.
    try:
        held = lock(folder.descriptor)
    except OSError as error:
        raise UpcycleError(f"cannot write {folder.path}: {error.strerror}.") from error
    if not held or not parent.holds(folder.path.name, folder):
        raise busy(folder)


def _discard(parent: Folder, folder: Folder) -> None:
    """Remove a directory of ours, and last the files that tell that it is."""
    for name in [name for name in folder.names() if name not in STATE] + list(STATE):
        folder.remove(name)
    if parent.holds(folder.path.name, folder):
        parent.remove_empty(folder.path.name)
