"""System calls that only some systems or file systems have, each with what happens without it.

Linux has all of them, but not on every file system; macOS lacks some.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile

UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}
"""Error codes by which a system or file system says that it lacks a call."""
BLOCK_BYTES = 4096
"""Offsets and lengths of shared extents are multiples of this on the usual systems."""
_FICLONERANGE = 0x4020940D
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


def num_processors() -> int:
    """Return how many processors this process may use, or how many the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def reuse_freed_memory() -> None:
    """Have glibc keep up to 128 MB of what this process frees, where that is the C library.

    Layers that run one after the other take blocks of the same sizes. Each block that goes back to
    the system comes again page by page, which took a tenth of the time of `verify`.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, 64 << 20)
        mallopt(_M_TRIM_THRESHOLD, 128 << 20)


def start_writeback(descriptor: int) -> None:
    """Write what a file has so far to the disk."""
    getattr(os, "fdatasync", os.fsync)(descriptor)


def make_durable(descriptor: int) -> None:
    """Return once a file, or the entries of a directory, will survive a loss of power."""
    full = getattr(fcntl, "F_FULLFSYNC", None)  # on macOS, fsync ends in the disk's cache
    if full is not None:
        with suppress(OSError):  # network file systems
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable, where its file system can."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        make_durable(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Make a directory and everything in it durable."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            with Path(folder, name).open("rb") as file:
                make_durable(file.fileno())
        sync_directory(Path(folder))


def lock(descriptor: int) -> bool:
    """Lock a file until it is closed; False when another process holds the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:  # no process can hold a lock there
            raise
    return True


def share(source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> bool:
    """Let a range of `target` share the extents of `source`; return False where it cannot.

    XFS, Btrfs and others share whole blocks, which the disk then holds once. Raises OSError.
    """
    if source_offset % BLOCK_BYTES or target_offset % BLOCK_BYTES or nbytes % BLOCK_BYTES:
        return False
    request = struct.pack("qQQQ", source, source_offset, nbytes, target_offset)
    try:
        fcntl.ioctl(target, _FICLONERANGE, request)
    except OSError as error:
        if error.errno in UNSUPPORTED | {errno.EXDEV}:
            return False
        raise
    return True


def can_share(directory: Path) -> bool:
    """Try whether files in a directory can share extents."""
    try:
        with TemporaryFile(dir=directory, buffering=0) as file:
            file.write(os.urandom(BLOCK_BYTES))
            return share(file.fileno(), 0, file.fileno(), BLOCK_BYTES, BLOCK_BYTES)
    except OSError:
        return False  # a directory that cannot be written is reported when it is written
