"""The output directory as a transaction: whole under its name, or not there at all.

Everything is written to `OUTPUT.partial`, which one rename turns into OUTPUT. A run that is killed
leaves only the partial, marked as such; a run that fails removes it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upcycle_cli.checkpoint import CONFIG_NAME
from upcycle_cli.errors import UpcycleError

MARKER = ".upcycle-partial"
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def check_output(output: Path, source: Path, *, overwrite: bool) -> None:
    """Raise UpcycleError when OUTPUT cannot be written without harm."""
    try:
        target, origin = output.resolve(), source.resolve()
        output.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, links in a circle
        raise UpcycleError(f"{output} cannot be made: {error}.") from error
    if target == origin:
        raise UpcycleError("OUTPUT is the source itself.", "Choose another directory.")
    if target.is_relative_to(origin):
        raise UpcycleError(
            f"{output} is inside the source, which is never modified.", "Choose another directory."
        )
    if origin.is_relative_to(target):
        raise UpcycleError(f"{output} contains the source.", "Choose another directory.")
    if os.path.ismount(output):
        raise UpcycleError(
            f"{output} is a mount point, which cannot be replaced by a rename.",
            f"Write to a directory inside it, such as {output / 'moe'}.",
        )
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UpcycleError(f"{output} exists and is not a directory.", "Choose another name.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise UpcycleError(
            f"{output} exists and is not empty.",
            "Choose another name, or pass --overwrite to replace it.",
        )
    if not (output / CONFIG_NAME).is_file():
        raise UpcycleError(
            f"{output} does not look like a model checkpoint (no {CONFIG_NAME}); not replaced.",
            "Remove it yourself if it is not needed.",
        )


def check_space(output: Path, needed: int) -> None:
    """Raise UpcycleError when the file system of OUTPUT has less than `needed` bytes free."""
    free = shutil.disk_usage(_existing_parent(output)).free
    if needed > free:
        raise UpcycleError(
            f"not enough disk space for {output}: {needed / 1e9:.2f} GB needed, "
            f"{free / 1e9:.2f} GB free.",
            "Free some, or write to another file system.",
        )


@contextmanager
def transaction(output: Path, *, overwrite: bool) -> Iterator[tuple[Path, list[bool]]]:
    """Yield a directory to fill and a one-element list; set that to True to publish on leaving.

    Whatever goes wrong, and whenever it stays False, the directory is removed.

    Raises UpcycleError when the directory cannot be made or another process is writing it.
    """
    partial = output.with_name(output.name + ".partial")
    lock = _claim(partial)
    publish = [False]
    try:
        yield partial, publish
        if publish[0]:
            (partial / MARKER).unlink()
            _publish(partial, output, overwrite=overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _claim(partial: Path) -> int:
    """Make an empty marked directory that this process holds locked; return the lock."""
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        if partial.is_dir():
            if any(partial.iterdir()) and not (partial / MARKER).exists():
                raise UpcycleError(
                    f"{partial} is in the way, and was not made by upcycle.", "Move it elsewhere."
                )
        else:
            partial.mkdir()
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UpcycleError(f"cannot write {partial}: {error.strerror}.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for leftover in partial.iterdir():  # of a run that was killed
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        (partial / MARKER).touch()
    except BlockingIOError as error:
        os.close(lock)
        raise UpcycleError(
            f"another upcycle process is writing {partial}.", "Wait for it, or stop it."
        ) from error
    except OSError as error:
        os.close(lock)
        raise UpcycleError(f"cannot write {partial}: {error.strerror}.") from error
    return lock


def _publish(partial: Path, output: Path, *, overwrite: bool) -> None:
    if not (overwrite and output.is_dir() and any(output.iterdir())):
        partial.rename(output)  # onto a free name or an empty directory
        return
    if not _exchange(partial, output):
        aside = output.with_name(output.name + ".replaced")
        output.rename(aside)
        try:
            partial.rename(output)
        except OSError:
            aside.rename(output)
            raise
        aside.rename(partial)  # the caller removes it


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


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())
