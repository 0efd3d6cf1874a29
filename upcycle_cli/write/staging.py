"""The output as a transaction: complete under its name, or not there at all.

Everything is written to OUTPUT.partial, the staging directory, made durable, and renamed to OUTPUT.
An old output is renamed to OUTPUT.replaced first and removed last, so a kill at any moment leaves
it complete under one of these names. A run that is cut short leaves OUTPUT.partial, and the same
plan resumes from there.

OUTPUT.partial is real, ours, and private (mode 0700), or it is refused; so plain paths are safe
inside it. Its folder `output` becomes OUTPUT. Beside that folder, a marker names the plan and tells
the next run what to do; it is removed last. A note on each finished shard has its digest, which a
later run compares with the bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from upcycle_cli.checkpoint.storage import CARD_NAME, RECORD_NAME, read_json
from upcycle_cli.core import safe_files
from upcycle_cli.core.errors import ResumableError, UpcycleError
from upcycle_cli.core.platform import lock, sync_directory, sync_tree
from upcycle_cli.core.text import shell_line
from upcycle_cli.plan.plan import Plan
from upcycle_cli.write.ownership import check_ownership, record_digest, remove_output

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
        safe_files.write_whole(path, data)

    def noted(self, name: str) -> dict[str, Any]:
        """Return the note on a shard of this plan; empty without one."""
        found = read_state(self.directory / (name + NOTE_SUFFIX))
        return found if found.get("plan_sha256") == self.plan.digest else {}

    def check_plan(self, *, restart: bool) -> str | None:
        """Return the digest of the plan that left the directory; UpcycleError as `take_over`."""
        digest: str | None = read_state(self.directory / MARKER).get("plan_sha256")
        if digest not in (None, self.plan.digest) and not restart:
            clean = ["upcycle", "clean", "--yes", str(self.output)]
            raise UpcycleError(
                f"{self.directory} holds an unfinished conversion of another recipe or source.",
                f"Pass `overwrite=True` to start over, or remove it with `{shell_line(clean)}`.",
            )
        return digest

    def take_over(self, *, restart: bool) -> None:
        """Keep what an earlier run of this plan completed, and remove everything else.

        Raises UpcycleError if the directory belongs to another plan, unless `restart`.
        """
        digest = self.check_plan(restart=restart)
        calibration = [CALIBRATION] if digest == self.plan.digest else []
        # The marker is written before any removal, so a kill leaves a directory known as ours. It
        # is not rewritten: a full disk may have no room for it.
        if digest != self.plan.digest:
            self.save(MARKER, {})
        noted = [shard.name for shard in self.plan.shards if self.noted(shard.name)]
        notes = [name + NOTE_SUFFIX for name in noted]
        _keep_only(self.directory, {MARKER, self.path.name, *calibration, *notes})
        self.path.mkdir(exist_ok=True)
        _keep_only(self.path, noted)

    def seal(self, *, replaces: str | None) -> None:
        """Leave only the files of the output, make them durable, and mark them as complete.

        `replaces` is the record digest of the old output that the new one will replace.
        """
        names = (*self.plan.file_names, RECORD_NAME, CARD_NAME, safe_files.CHECKSUMS_NAME)
        _keep_only(self.path, {name.split("/")[0] for name in names})
        self.save(MARKER, {"replaces": replaces})
        if self.durable:
            sync_tree(self.directory)  # cheap: the weights are durable already

    def save(self, name: str, value: dict[str, Any]) -> None:
        """Write the marker, or the note by which a later run knows a complete shard."""
        data = json.dumps({"plan_sha256": self.plan.digest} | value).encode()
        safe_files.write_whole(self.directory / name, data, durable=self.durable)


def _keep_only(directory: Path, names: Collection[str]) -> None:
    for path in directory.iterdir():
        if path.name not in names:
            safe_files.remove(path)


def discard(partial: Path) -> None:
    """Remove a staging directory, and last the marker that says that it is one of ours."""
    _keep_only(partial, {MARKER})
    safe_files.remove(partial)


def read_state(path: Path) -> dict[str, Any]:
    """Return what a marker or a note says; empty if it is missing or damaged."""
    with suppress(UpcycleError):
        return read_json(path, safe_files.MOST_LISTING_BYTES)
    return {}


def disk_bytes(path: Path) -> int:
    """Return the bytes that the files of a directory take on the disk."""
    return sum(inner.lstat().st_blocks * 512 for inner in path.rglob("*"))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Check that a directory is a staging directory of ours, and hold its lock; UpcycleError."""
    foreign = UpcycleError(
        f"{path} exists and is not an unfinished conversion of upcycle.",
        "Move it elsewhere, or choose another OUTPUT.",
    )
    if not safe_files.is_directory(path):
        raise foreign
    check_private(path)
    try:
        names = [inner.name for inner in path.iterdir()]
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise UpcycleError(f"cannot write {path}: {error.strerror}.") from error
    try:
        # A kill can come before there is a marker.
        if MARKER not in names and not all(map(safe_files.is_temporary, names)):
            raise foreign
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
    words = f"{path} belongs to another user, or other users may write in it."
    raise UpcycleError(words, f"If it is yours: chmod go-w {path}. If not, choose another OUTPUT.")


def _is_at(path: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    return False


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
    state = read_state(path / MARKER) if safe_files.is_directory(path) else {}
    if state.get("plan_sha256") != plan.digest:
        words = f"{path} is not the directory that rank 0 writes to."
        raise UpcycleError(words, "Run all ranks on one shared file system.")
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
    occupied = overwrite and safe_files.is_directory(output) and any(output.iterdir())
    replaces = record_digest(output) if occupied else None
    staging.seal(replaces=replaces)
    # Check again: somebody may have used the old output in the hours since the first check.
    if occupied and check_ownership(output) != replaces:
        raise UpcycleError(f"{output} was replaced by another process; it is not replaced again.")
    return replaces


def _finish(output: Path, replaces: str | None) -> str | None:
    """Remove the old output and OUTPUT.partial; return a warning if the old one stays."""
    left, aside = None, aside_of(output)
    if replaces is not None and safe_files.is_directory(aside):
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
    state = read_state(partial / MARKER) if safe_files.is_directory(partial) else {}
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
    if not safe_files.is_directory(partial):
        raise UpcycleError(f"{partial} does not exist.", "There is nothing to clean.")
    with locked(partial):
        nbytes = disk_bytes(partial)
    note = recover(output) if remove else None
    if remove and partial.exists():
        with locked(partial):
            discard(partial)
    return nbytes, note
