"""The output as a transaction: complete under its name, or not there at all.

Everything is written to OUTPUT.partial, made durable, and renamed to OUTPUT. An old output is
renamed to OUTPUT.replaced first and removed last, so a kill at any moment leaves it complete under
one of these names; the sealed marker in the new directory tells the next run what to do. A run that
is cut short leaves OUTPUT.partial, and the same plan resumes from there.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from upcycle_cli.checkpoint.storage import CARD_NAME, RECORD_NAME
from upcycle_cli.core.errors import ResumableError, UpcycleError
from upcycle_cli.core.platform import sync_directory
from upcycle_cli.core.safe_files import CHECKSUMS_NAME
from upcycle_cli.plan.plan import Plan
from upcycle_cli.write.ownership import check_ownership, record_digest, remove_output
from upcycle_cli.write.preflight import check_kind
from upcycle_cli.write.staging import (
    ASIDE,
    MARKER,
    Staging,
    check_private,
    disk_bytes,
    is_directory,
    is_staging,
    locked,
    partial_of,
    read_state,
    remove,
)

_PROBE = ".upcycle-mode"


@dataclass
class Transaction:
    """A conversion that will become OUTPUT."""

    staging: Staging
    output: Path
    overwrite: bool
    published: bool = False

    def publish(self) -> str | None:
        """Rename the staging directory to OUTPUT; return a warning if the old output is left.

        Raises ResumableError or OSError; the old output is then as it was.
        """
        try:
            check_kind(self.output)
            return self._publish()
        except UpcycleError as error:
            hint = f"{error.hint or ''} The finished output stays in {self.staging.path}: "
            hint += "the same command publishes it."
            raise ResumableError(error.message, hint.strip()) from error

    def _publish(self) -> str | None:
        output, new, durable = self.output, self.staging.path, self.staging.durable
        occupied = self.overwrite and is_directory(output) and any(output.iterdir())
        replaces = record_digest(output) if occupied else None
        mode = _usual_mode(new)  # before the last moment: a full disk has no room for a directory
        self.staging.seal(replaces=replaces)
        # Check again: somebody may have used the old output in the hours since the first check.
        if occupied and check_ownership(output) != replaces:
            raise UpcycleError(f"{output} was replaced meanwhile; nothing was published.")
        if occupied:
            output.rename(aside_of(output))
        try:
            new.rename(output)  # also onto an empty directory
        except BaseException:
            if occupied:
                aside_of(output).rename(output)
            raise
        self.published = True
        _set_mode(output, mode)
        if durable:
            sync_directory(output.parent)
        return _finish(output, replaces, durable=durable)

    def discard(self) -> None:
        """Remove the staging directory, unless it was published."""
        if not self.published:
            with suppress(OSError):
                _discard(self.staging.path)


@contextmanager
def transaction(
    output: Path, plan: Plan, *, overwrite: bool, durable: bool
) -> Iterator[Transaction]:
    """Yield a transaction with a staging directory to fill; UpcycleError if it cannot be made.

    The directory is removed if an UpcycleError shows that its content is useless, or if it is not
    published. It stays if a signal or the system (a full disk) ends the run: the same plan resumes.
    """
    with ExitStack() as entered:
        try:
            made = [parent for parent in output.parents if not parent.exists()]
            output.parent.mkdir(parents=True, exist_ok=True)
            for parent in made if durable else ():
                sync_directory(parent.parent)
            entered.enter_context(_claimed(output))
        except OSError as error:
            raise UpcycleError(f"cannot write {partial_of(output)}: {error.strerror}.") from error
        staging = _staging(output, plan, durable=durable)
        running = Transaction(staging, output, overwrite)
        try:
            staging.take_over(restart=overwrite)
            try:
                yield running
            except UpcycleError as error:
                if not isinstance(error, ResumableError):
                    running.discard()
                raise
        except OSError as error:
            where = staging.path / str(error.filename2 or error.filename or output)
            raise ResumableError(
                f"writing {where} failed: {error.strerror}.",
                f"Finished files stay in {staging.path}: the same command resumes from there.",
            ) from error
        running.discard()


def join(output: Path, plan: Plan, *, durable: bool) -> Staging:
    """Return the staging directory that rank 0 has made; UpcycleError if it is another one."""
    path = partial_of(output)
    if not is_directory(path) or read_state(path / MARKER).get("plan_sha256") != plan.digest:
        raise UpcycleError(
            f"{path} is not the directory that rank 0 writes to.",
            "Run all ranks on one shared file system.",
        )
    check_private(path)
    return _staging(output, plan, durable=durable)


def aside_of(output: Path) -> Path:
    """Return where the old output is between two renames."""
    return output.parent / (output.name + ASIDE)


def _staging(output: Path, plan: Plan, *, durable: bool) -> Staging:
    return Staging(
        path=partial_of(output),
        output=output.name,
        plan_digest=plan.digest,
        files=(*plan.file_names, RECORD_NAME, CARD_NAME, CHECKSUMS_NAME),
        durable=durable,
    )


@contextmanager
def _claimed(output: Path) -> Iterator[None]:
    """Make the staging directory if need be, and hold its lock."""
    path = partial_of(output)
    with suppress(FileExistsError):
        path.mkdir(0o700)
    if not is_directory(path):
        raise UpcycleError(f"{path} is a symbolic link or a file, not a directory.", "Remove it.")
    if not is_staging(path, output.name):
        raise UpcycleError(
            f"{path} is in the way: it is not an unfinished conversion of upcycle.",
            "Move it elsewhere, or choose another OUTPUT.",
        )
    check_private(path)
    with locked(path):
        _set_mode(path, 0o700)
        yield


def _usual_mode(directory: Path) -> int:
    """Return the mode that a new directory gets by the umask."""
    fresh = directory / _PROBE
    fresh.mkdir(exist_ok=True)
    mode = stat.S_IMODE(fresh.lstat().st_mode)
    fresh.rmdir()
    return mode


def _set_mode(path: Path, mode: int) -> None:
    # A directory that was published in spite of an error, or a file system with one mode for all.
    with suppress(FileNotFoundError, PermissionError):
        path.chmod(mode)


def _finish(output: Path, replaces: str | None, *, durable: bool) -> str | None:
    """Remove the old output and then the marker; return a warning if the old output is left."""
    left, aside = None, aside_of(output)
    if replaces is not None and is_directory(aside):
        try:
            if record_digest(aside) == replaces:
                remove_output(aside)
            elif not any(aside.iterdir()):
                aside.rmdir()  # a kill came after the record had gone
        except (OSError, UpcycleError) as error:
            reason = error.message if isinstance(error, UpcycleError) else error.strerror
            left = f"{aside} is what {output.name} was before, and is left: {reason}"
    (output / MARKER).unlink(missing_ok=True)
    if durable:
        sync_directory(output)
    return left


def _discard(path: Path) -> None:
    """Remove a staging directory, and last the marker that says that it is one."""
    for inner in path.iterdir():
        if inner.name != MARKER:
            remove(inner)
    (path / MARKER).unlink(missing_ok=True)
    path.rmdir()


# After a kill ---------------------------------------------------------------------------------


def recover(output: Path) -> str | None:
    """Finish or undo the publication that a kill cut short; return a warning or a note.

    Raises UpcycleError if another process still publishes.
    """
    new, replaces = _find_interrupted(output)
    if new is None:
        return None
    with locked(new):
        if new == output:
            _set_mode(output, _usual_mode(output))
            return _finish(output, replaces, durable=True)
        aside_of(output).rename(output)
    return (
        f"{output} had been set aside as {aside_of(output).name} by a run that was killed, and is "
        "back."
    )


def _find_interrupted(output: Path) -> tuple[Path | None, str | None]:
    """Return the new directory of an interrupted publication, and what it replaces.

    The new directory is OUTPUT if it was renamed already, OUTPUT.partial if OUTPUT is missing.
    """
    for new in (output, partial_of(output)):
        state = read_state(new / MARKER) if is_directory(new) else {}
        if state.get("output") != output.name or "replaces" not in state:
            continue
        replaces = state["replaces"] if isinstance(state["replaces"], str) else None
        missing = replaces and not output.exists() and record_digest(aside_of(output)) == replaces
        if new == output or missing:
            return new, replaces
    return None, None


@dataclass(frozen=True)
class Leftover:
    """What an interrupted run left."""

    path: Path
    nbytes: int
    what: str  # in words
    note: str | None = None  # what else was done when it was removed


def clean(output: Path, *, remove: bool) -> Leftover:
    """Return what an interrupted run left of OUTPUT, and remove it when asked; UpcycleError."""
    partial, aside = partial_of(output), aside_of(output)
    new, _ = _find_interrupted(output)
    if new == output and is_directory(aside):
        found = Leftover(aside, disk_bytes(aside), f"what {output} was before")
        if remove and (left := recover(output)):
            raise UpcycleError(left)
        return found
    if not is_directory(partial):
        raise UpcycleError(f"there is no {partial}.", "Nothing to clean.")
    if not is_staging(partial, output.name):
        raise UpcycleError(f"{partial} is not an unfinished conversion of upcycle.", "Remove it.")
    check_private(partial)
    nbytes = disk_bytes(partial)
    note = recover(output) if remove and new == partial else None
    with locked(partial):
        if remove:
            _discard(partial)
    return Leftover(partial, nbytes, "an unfinished conversion", note)
