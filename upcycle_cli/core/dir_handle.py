"""A directory that is held open: whatever becomes of its name, it stays the same directory.

In a place that others can write to, such as /tmp, a name may come to mean something else between
two looks at it: a link to somebody's file, another directory. So the names in a `Folder` are looked
up in the open directory, no link is ever followed, and what is written is a file that did not exist
before.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from errno import EINVAL, ELOOP, ENOENT, ENOTDIR, ENOTSUP
from io import BufferedReader
from pathlib import Path
from typing import Self

from upcycle_cli.core.errors import ResumableError
from upcycle_cli.core.platform import BLOCK_BYTES, make_durable, share
from upcycle_cli.core.safe_files import read_open, regular

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_ABSENT = {ENOENT, ENOTDIR, ELOOP}
"""Nothing there, or nothing that can be reached without following a link."""
_MODE = 0o666
"""Of a new file, before the umask; `os.open` would have it be a program."""
_OTHERS = 0o077
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_TEMPORARY_PREFIX, _TEMPORARY_SUFFIX = ".upcycle-", ".new"


class Folder:
    """An open directory, and the path at which it was found; a context that closes it.

    Names are relative to it and may have slashes. Unless said otherwise, methods raise OSError.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        self.descriptor = descriptor
        self.path = path

    @classmethod
    def open(cls, path: Path) -> Folder:
        """Open a directory, through a link if the path is one."""
        return cls(os.open(path, _DIRECTORY), path)

    def inner(self, name: str, opened: ExitStack) -> Folder | None:
        """Open a directory in it until the stack is closed; None where there is none, or a link."""
        try:
            descriptor = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=self.descriptor)
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise
        return opened.enter_context(Folder(descriptor, self.path / name))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)  # which lets go of its lock, too

    # What is in it --------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Return what is directly in it, sorted."""
        return sorted(os.listdir(self.descriptor))  # noqa: PTH208 - no path

    def walk(self) -> Iterator[tuple[str, bool]]:
        """Yield everything below it, and whether that is a directory: first what is inside."""
        for path, directories, files, _ in os.fwalk(".", topdown=False, dir_fd=self.descriptor):
            for name in sorted(directories + files):
                inner = os.path.normpath(os.path.join(path, name))  # noqa: PTH118 - a name, no path
                status = self.status(inner)
                yield inner, status is not None and stat.S_ISDIR(status.st_mode)

    def status(self, name: str) -> os.stat_result | None:
        """Return what a name stands for, which may be a link; None when it is not there."""
        try:
            with self._at(name) as (directory, base):
                return os.stat(base, dir_fd=directory, follow_symlinks=False)
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise

    def holds(self, name: str, other: Folder) -> bool:
        """Whether a name still stands for another open directory."""
        status = self.status(name)
        return status is not None and os.path.samestat(status, os.fstat(other.descriptor))

    def nbytes(self) -> int:
        """Return what the files below it take on the disk."""
        statuses = (self.status(name) for name, _ in self.walk())
        return sum(status.st_blocks * 512 for status in statuses if status is not None)

    def is_mine(self, *, private: bool = True) -> bool:
        """Whether it belongs to this user and, if `private`, nobody else may write in it."""
        forbidden = _OTHERS_WRITE if private else 0
        status = os.fstat(self.descriptor)
        if status.st_uid == os.geteuid() and not status.st_mode & forbidden:
            return True
        # Some file systems have one owner and one mode for all: then a new file looks the same.
        with suppress(PermissionError), self.scratch() as descriptor:
            own = os.fstat(descriptor)
            same_owner = status.st_uid == own.st_uid
            return same_owner and status.st_mode & forbidden == own.st_mode & forbidden
        return False

    def can_share(self) -> bool:
        """Find out by trying whether files in it can share extents."""
        try:
            with self.scratch() as descriptor:
                os.write(descriptor, os.urandom(BLOCK_BYTES))
                return share(descriptor, 0, descriptor, BLOCK_BYTES, BLOCK_BYTES)
        except OSError:
            # A directory that cannot be written is found out, and reported, when it is written.
            return False

    # What is allowed with it ----------------------------------------------------------------------

    def usual_mode(self) -> int:
        """Return the mode that a new directory gets in it, by the umask and the like."""
        name = _temporary_name()
        os.mkdir(name, dir_fd=self.descriptor)
        try:
            status = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
            return stat.S_IMODE(status.st_mode)
        finally:
            self.remove_empty(name)

    def make_private(self) -> None:
        """Let nobody else look into it: a umask may let others write the files in it."""
        self.set_mode(stat.S_IMODE(os.fstat(self.descriptor).st_mode) & ~_OTHERS)

    def set_mode(self, mode: int) -> None:
        """Set what is allowed with it, where its file system knows of that."""
        if stat.S_IMODE(os.fstat(self.descriptor).st_mode) != mode:
            with suppress(PermissionError):  # a file system that has one mode for all
                os.fchmod(self.descriptor, mode)

    # Reading --------------------------------------------------------------------------------------

    def read(self, name: str) -> BufferedReader:
        """Open a file for reading, which is no link; UpcycleError for what is no regular file."""
        with self._at(name) as (directory, base):
            return regular(os.open(base, _READ, dir_fd=directory), self.path / name)

    def read_own(self, name: str) -> BufferedReader:
        """Open a file that the directory's owner has made in it; ResumableError for another's."""
        file = self.read(name)
        status = os.fstat(file.fileno())
        if status.st_nlink > 1 or status.st_uid != os.fstat(self.descriptor).st_uid:
            file.close()
            raise ResumableError(
                f"{self.path / name} is not our own file: it has another owner, or other names.",
                "The same command writes it again.",
            )
        return file

    def read_small(self, name: str, most: int) -> bytes:
        """Return the contents of a file of at most `most` bytes; UpcycleError for any other."""
        with self.read(name) as file:
            return read_open(file, self.path / name, most)

    # Writing --------------------------------------------------------------------------------------

    def create(self, name: str) -> int:
        """Return the descriptor of a new file, which takes the place of what has its name."""
        self.remove(name)
        with self._at(name, make=True) as (directory, base):
            return os.open(base, _CREATE, _MODE, dir_fd=directory)

    def write(self, name: str, data: bytes, *, durable: bool = False) -> None:
        """Write a small file that appears whole, or stays what it was."""
        with self._at(name, make=True) as (directory, base):
            temporary = _temporary_name()
            descriptor = os.open(temporary, _CREATE, _MODE, dir_fd=directory)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                    file.flush()
                    if durable:
                        make_durable(file.fileno())
                os.replace(temporary, base, src_dir_fd=directory, dst_dir_fd=directory)
            except BaseException:
                with suppress(FileNotFoundError):  # a signal can come after the new name
                    os.unlink(temporary, dir_fd=directory)
                raise

    @contextmanager
    def scratch(self) -> Iterator[int]:
        """Yield the descriptor of a file that is private and gone already."""
        name = _temporary_name()
        descriptor = os.open(name, _CREATE, 0o600, dir_fd=self.descriptor)
        try:
            os.unlink(name, dir_fd=self.descriptor)
            yield descriptor
        finally:
            os.close(descriptor)

    def rename(self, old: str, new: str) -> None:
        """Give something directly in it another name there."""
        os.rename(old, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def remove(self, name: str) -> None:
        """Remove a file, a link, or a directory with all that is in it; or nothing."""
        status = self.status(name)
        if status is not None:
            with self._at(name) as (directory, base):
                remove = shutil.rmtree if stat.S_ISDIR(status.st_mode) else os.unlink
                remove(base, dir_fd=directory)

    def remove_empty(self, name: str) -> None:
        """Remove a directory in which there is nothing."""
        with self._at(name) as (directory, base):
            os.rmdir(base, dir_fd=directory)

    def sync(self) -> None:
        """Make its entries durable, where its file system does that."""
        try:
            make_durable(self.descriptor)
        except OSError as error:
            if error.errno not in {EINVAL, ENOTSUP}:
                raise

    def sync_all(self) -> None:
        """Make durable what is below it, and it."""
        for path, _, files, descriptor in os.fwalk(".", topdown=False, dir_fd=self.descriptor):
            with Folder(os.dup(descriptor), self.path / path) as folder:
                for name in files:
                    with folder.read(name) as file:
                        make_durable(file.fileno())
                folder.sync()

    @contextmanager
    def _at(self, name: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """Yield the directory that holds a name, and the name there."""
        *directories, base = name.split("/")
        directory = self.descriptor
        with ExitStack() as opened:
            for inner in directories:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(inner, dir_fd=directory)
                directory = os.open(inner, _DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
                opened.callback(os.close, directory)
            yield directory, base


def is_temporary(name: str) -> bool:
    """Whether this is the name of a file that `Folder.write` had not finished."""
    return name.startswith(_TEMPORARY_PREFIX) and name.endswith(_TEMPORARY_SUFFIX)


def _temporary_name() -> str:
    return _TEMPORARY_PREFIX + os.urandom(8).hex() + _TEMPORARY_SUFFIX
