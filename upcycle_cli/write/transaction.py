"""The output directory as a transaction: whole under its name, or not there at all.

Everything is written to `OUTPUT.partial`, made durable, and turned into OUTPUT by one rename. A run
that is cut short leaves only the partial, with a marker that says which plan it belongs to and
which files are complete; the same plan goes on from there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from upcycle_cli.checkpoint.storage import (
    CARD_NAME,
    COMPANIONS,
    CONFIG_NAME,
    INDEX_NAME,
    RECORD_NAME,
)
from upcycle_cli.core.dir_handle import Folder, is_temporary
from upcycle_cli.core.errors import ResumableError, UpcycleError
from upcycle_cli.core.platform import lock
from upcycle_cli.core.safe_files import CHECKSUMS_NAME, is_digest, matches
from upcycle_cli.models.shipped import CODE_NAME
from upcycle_cli.plan.plan import Plan
from upcycle_cli.write.preflight import check_kind
from upcycle_cli.write.staging import (
    MARKER,
    NOTE_SUFFIX,
    STATE,
    SUFFIX,
    TEMPORARY_SUFFIX,
    Workspace,
    partial_of,
    read_state,
)
from upcycle_cli.write.swap import Interrupted, busy, find_interrupted, moved, publish

__all__ = ["clean", "joined", "recover", "transaction"]

_OWN_FILES = (
    CONFIG_NAME,
    RECORD_NAME,
    CARD_NAME,
    CHECKSUMS_NAME,
    INDEX_NAME,
    CODE_NAME,
    "model*.safetensors",
    *STATE,
    *COMPANIONS,
)


@dataclass
class Transaction:
    """A conversion on its way to be OUTPUT."""

    parent: Folder
    workspace: Workspace
    output: Path
    overwrite: bool
    made: list[Path]  # the directories above it that had to be made for it
    published: bool = False

    def check_place(self) -> None:
        """Raise UpcycleError unless the directory is where it was made."""
        folder = self.workspace.folder
        try:
            here = os.path.samestat(self.parent.path.stat(), os.fstat(self.parent.descriptor))
        except OSError:
            here = False
        if not here or not self.parent.holds(folder.path.name, folder):
            raise moved(folder)

    def publish(self) -> str | None:
        """Turn it into OUTPUT; say what is left of what it replaced. ResumableError, OSError."""
        folder = self.workspace.folder
        try:
            self.check_place()
            check_kind(self.output)
            left = publish(self.parent, self.workspace, overwrite=self.overwrite)
        except UpcycleError as error:
            hint = f"{error.hint or ''} What was written is complete and stays in {folder.path}: "
            hint += "the same command publishes it."
            raise ResumableError(error.message, hint.strip()) from error
        self.published = True
        for directory in self.made if self.workspace.durable else ():
            with Folder.open(directory.parent) as above:
                above.sync()
        return left

    def discard(self) -> None:
        """Remove the directory, unless it was published."""
        if not self.published:
            with suppress(OSError):
                _discard(self.parent, self.workspace.folder)


@contextmanager
def transaction(
    output: Path, plan: Plan, *, overwrite: bool, durable: bool
) -> Iterator[Transaction]:
    """Yield the directory to fill and to publish; UpcycleError when it cannot be had.

    When the run is cut short by a signal or by the system (a full disk), the directory stays, and
    the same plan goes on from it; when its contents are no good, or not published, it is removed.
    """
    with ExitStack() as opened:
        try:
            made = [parent for parent in output.parents if not parent.exists()]
            output.parent.mkdir(parents=True, exist_ok=True)
            parent = opened.enter_context(Folder.open(output.parent))
            folder = _claim(parent, output.name, opened)
        except OSError as error:
            raise UpcycleError(f"cannot write {partial_of(output)}: {error.strerror}.") from error
        workspace = _workspace(folder, output, plan, durable=durable)
        running = Transaction(parent, workspace, output, overwrite, made)
        workspace.take_over(restart=overwrite)
        try:
            yield running
        except UpcycleError as error:
            if not isinstance(error, ResumableError):
                running.discard()
            raise
        running.discard()


@contextmanager
def joined(output: Path, plan: Plan, *, durable: bool) -> Iterator[Workspace]:
    """Yield the directory that another process of this conversion holds; UpcycleError if none."""
    with ExitStack() as opened:
        parent = opened.enter_context(Folder.open(output.parent))
        folder = parent.inner(partial_of(output).name, opened)
        if folder is None or read_state(folder, MARKER).get("plan_sha256") != plan.digest:
            raise UpcycleError(
                f"{partial_of(output)} is not the directory that rank 0 writes to.",
                "Run all ranks on one shared file system.",
            )
        _check_mine(folder)
        yield _workspace(folder, output, plan, durable=durable)


def _workspace(folder: Folder, output: Path, plan: Plan, *, durable: bool) -> Workspace:
    files = (*plan.file_names, RECORD_NAME, CARD_NAME, CHECKSUMS_NAME)
    name, digest = output.name, plan.digest
    return Workspace(folder=folder, output=name, plan_digest=digest, files=files, durable=durable)


def recover(output: Path) -> str | None:
    """Finish or undo the replacing that a killed run began; UpcycleError if it runs still."""
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
    what: str  # what it is, in words
    note: str | None = None  # what else was done when it was removed


def clean(output: Path, *, remove: bool) -> Leftover:
    """Return the abandoned OUTPUT.partial, removed when asked; UpcycleError if it is none."""
    partial = partial_of(output)
    nothing = UpcycleError(f"there is no {partial}.", "Nothing to clean.")
    with ExitStack() as opened:
        try:
            parent = opened.enter_context(Folder.open(output.parent))
        except FileNotFoundError:
            raise nothing from None
        interrupted = find_interrupted(parent, output.name, opened)
        if interrupted is not None and not interrupted.aside:
            if found := _clean_replaced(interrupted, opened, remove=remove):
                return found
            interrupted = None
        folder = interrupted.new if interrupted else parent.inner(partial.name, opened)
        if folder is None:
            raise nothing
        if not _is_ours(folder, output.name):
            raise UpcycleError(
                f"{partial} is no unfinished conversion of upcycle.", "Remove it yourself."
            )
        _check_mine(folder)
        _lock(parent, folder)
        nbytes = folder.nbytes()
        note = interrupted.end() if remove and interrupted is not None else None
        if remove:
            _discard(parent, folder)
        return Leftover(partial, nbytes, "an unfinished conversion", note)


def _clean_replaced(
    interrupted: Interrupted, opened: ExitStack, *, remove: bool
) -> Leftover | None:
    """Return what OUTPUT was before, if it is there still; remove it when asked."""
    found, old = None, interrupted.old
    if old is not None and (folder := interrupted.parent.inner(old, opened)):
        what = f"what {interrupted.new.path} was before"
        found = Leftover(folder.path, folder.nbytes(), what)
    if remove and (left := interrupted.end()):
        raise UpcycleError(left)
    return found


def _claim(parent: Folder, output: str, opened: ExitStack) -> Folder:
    """Make the directory if need be, and return it open and locked."""
    name = output + SUFFIX
    partial = parent.path / name
    with suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=parent.descriptor)
    folder = parent.inner(name, opened)
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
    _lock(parent, folder)
    folder.make_private()
    return folder


def _check_mine(folder: Folder) -> None:
    if not folder.is_mine():
        raise UpcycleError(
            f"{folder.path} belongs to another user, or others may write in it; it is not used.",
            f"If it is yours: chmod go-w {folder.path}. If not, choose another OUTPUT.",
        )


def _is_ours(folder: Folder, output: str) -> bool:
    """Whether a directory was left by a conversion into `output`, and is no finished model."""
    for state in (read_state(folder, name) for name in STATE):
        if state.get("output") == output and is_digest(state.get("plan_sha256")):
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
