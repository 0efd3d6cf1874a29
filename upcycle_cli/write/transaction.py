"""The output as a transaction: complete under its name, or not there at all.

Everything is written to OUTPUT.partial, made durable, and renamed to OUTPUT. An old output is
renamed to OUTPUT.replaced first and removed last, so a kill at any moment leaves it complete under
one of these names; the marker in OUTPUT.partial, which is removed last, tells the next run what to
do. A run that is cut short leaves OUTPUT.partial, and the same plan resumes from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from upcycle_cli.core.errors import ResumableError, UpcycleError
from upcycle_cli.core.platform import sync_directory
from upcycle_cli.plan.plan import Plan
from upcycle_cli.write.ownership import check_ownership, record_digest, remove_output
from upcycle_cli.write.staging import (
    MARKER,
    Staging,
    aside_of,
    check_private,
    discard,
    disk_bytes,
    is_directory,
    locked,
    new_of,
    partial_of,
    read_state,
)


@contextmanager
def transaction(output: Path, plan: Plan, *, overwrite: bool, durable: bool) -> Iterator[Staging]:
    """Yield a staging directory to fill and to `publish`; UpcycleError if it cannot be made.

    The directory is removed if an UpcycleError shows that its content is useless, or if it is not
    published. It stays if a signal or the system (a full disk) ends the run: the same plan resumes.
    """
    staging = Staging(output=output, plan=plan, durable=durable)
    partial = staging.directory
    with ExitStack() as entered:
        try:
            made = [parent for parent in output.parents if not parent.exists()]
            output.parent.mkdir(parents=True, exist_ok=True)
            for parent in made if durable else ():
                sync_directory(parent.parent)
            with suppress(FileExistsError):
                partial.mkdir(0o700)
            entered.enter_context(locked(partial))
        except OSError as error:
            raise UpcycleError(f"cannot write {partial}: {error.strerror}.") from error
        try:
            staging.take_over(restart=overwrite)
            try:
                yield staging
            except UpcycleError as error:
                if not isinstance(error, ResumableError):
                    with suppress(OSError):
                        discard(partial)
                raise
        except OSError as error:
            where = staging.path / str(error.filename2 or error.filename or output)
            raise ResumableError(
                f"writing {where} failed: {error.strerror}.",
                f"Finished files stay in {partial}: the same command resumes from there.",
            ) from error
        with suppress(OSError):
            discard(partial)


def join(output: Path, plan: Plan, *, durable: bool) -> Staging:
    """Return the staging directory that rank 0 has made; UpcycleError if it is another one."""
    staging = Staging(output=output, plan=plan, durable=durable)
    path = staging.directory
    state = read_state(path / MARKER) if is_directory(path) else {}
    if state.get("plan_sha256") != staging.plan_digest:
        raise UpcycleError(
            f"{path} is not the directory that rank 0 writes to.",
            "Run all ranks on one shared file system.",
        )
    check_private(path)
    return staging


def publish(staging: Staging, *, overwrite: bool) -> str | None:
    """Rename the new folder to OUTPUT; return a warning if the old output was not removed.

    Raises ResumableError or OSError; the old output is then as it was.
    """
    output = staging.output
    try:
        replaces = _seal(staging, overwrite=overwrite)
    except UpcycleError as error:
        hint = f"{error.hint or ''} The finished output stays in {staging.directory}: "
        hint += "the same command publishes it."
        raise ResumableError(error.message, hint.strip()) from error
    if replaces is not None:
        output.rename(aside_of(output))
    try:
        staging.path.rename(output)  # also onto an empty directory
    except BaseException:
        if replaces is not None:
            aside_of(output).rename(output)
        raise
    if staging.durable:
        sync_directory(output.parent)
    return _finish(output, replaces)


def _seal(staging: Staging, *, overwrite: bool) -> str | None:
    """Make the new output ready; return the record digest of the old output, if there is one."""
    output = staging.output
    occupied = overwrite and is_directory(output) and any(output.iterdir())
    replaces = record_digest(output) if occupied else None
    staging.seal(replaces=replaces)
    # Check again: somebody may have used the old output in the hours since the first check.
    if occupied and check_ownership(output) != replaces:
        raise UpcycleError(f"{output} was replaced by another process; it is not replaced again.")
    return replaces


def _finish(output: Path, replaces: str | None) -> str | None:
    """Remove the old output and OUTPUT.partial; return a warning if the old one stays."""
    left, aside = None, aside_of(output)
    if replaces is not None and is_directory(aside):
        try:
            if record_digest(aside) == replaces:
                remove_output(aside)
            elif not any(aside.iterdir()):
                aside.rmdir()  # a kill came after the record had gone
        except (OSError, UpcycleError) as error:
            reason = error.message if isinstance(error, UpcycleError) else error.strerror
            left = f"the old output is now {aside} and could not be removed: {reason}"
    discard(partial_of(output))
    return left


# After a kill ---------------------------------------------------------------------------------


def recover(output: Path) -> str | None:
    """Finish or undo the publication that a kill cut short; return a warning or a note.

    Raises UpcycleError if another process still publishes.
    """
    partial, aside = partial_of(output), aside_of(output)
    state = read_state(partial / MARKER) if is_directory(partial) else {}
    if "replaces" not in state:
        return None
    with locked(partial):
        replaces = state["replaces"]
        if not new_of(output).exists():
            return _finish(output, replaces)
        if replaces is None or output.exists() or record_digest(aside) != replaces:
            return None
        aside.rename(output)
    return f"a killed run had renamed {output} to {aside.name}; it has its name again."


def clean(output: Path, *, remove: bool) -> tuple[int, str | None]:
    """Remove OUTPUT.partial, when asked; return its size on the disk, and a warning or a note.

    Raises UpcycleError if the directory does not exist or is not ours.
    """
    partial = partial_of(output)
    if not is_directory(partial):
        raise UpcycleError(f"{partial} does not exist.", "There is nothing to clean.")
    with locked(partial):
        nbytes = disk_bytes(partial)
    note = recover(output) if remove else None
    if remove and partial.exists():
        with locked(partial):
            discard(partial)
    return nbytes, note
