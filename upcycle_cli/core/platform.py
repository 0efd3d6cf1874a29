"""System calls that only some systems or file systems have, each with what happens without it.

Linux has all of them, but not on every file system; macOS lacks some.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile

UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}
"""Error codes by which a system or file system says that it lacks a call."""
BLOCK_BYTES = 4096
"""Offsets and lengths of shared extents are multiples of this on the usual systems."""
_FICLONERANGE = 0x4020940D
_FIEMAP = 0xC020660B
_REQUEST, _EXTENT = struct.Struct("=QQLLLL"), struct.Struct("=QQQ16xL12x")
_MOST_EXTENTS = 1024  # a call
_LAST, _MERGED, _SHARED = 0x1, 0x1000, 0x2000
_TELLING = {0x58465342, 0x9123683E}
"""XFS and Btrfs. An overlay passes the question on, and its files can lie on several disks."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


def num_processors() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def reuse_freed_memory() -> None:
    """Let glibc keep up to 128 MB of freed memory; do nothing with another C library.

    Layers that run one after another need blocks of the same sizes. Returning a block to the system
    and getting it back page by page took a tenth of the time of `verify`.
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


def shared_extents(path: Path) -> list[tuple[int, int, int]]:
    """Return the start and end of each shared extent of a file, and its start on the disk.

    All in bytes. Two files with an extent at the same place on the disk hold the same data there.
    Empty if the file system cannot tell.
    """
    if sys.platform != "linux":
        return []
    status = (ctypes.c_ulong * 64)()  # statfs is 120 bytes, and its first word the kind
    with path.open("rb") as file:
        if ctypes.CDLL(None).fstatfs(file.fileno(), status) or status[0] not in _TELLING:
            return []
        try:
            return [*_shared_extents(file.fileno())]
        except OSError:
            return []


def _shared_extents(descriptor: int) -> Iterator[tuple[int, int, int]]:
    position, flags = 0, 0
    while not flags & _LAST:
        answer = bytearray(_REQUEST.size + _MOST_EXTENTS * _EXTENT.size)
        sync = 1  # what is still to be written gets its place first
        _REQUEST.pack_into(answer, 0, position, (1 << 64) - 1 - position, sync, 0, _MOST_EXTENTS, 0)
        fcntl.ioctl(descriptor, _FIEMAP, answer)
        count = _REQUEST.unpack_from(answer)[3]
        if not count:
            return
        found = memoryview(answer)[_REQUEST.size :][: count * _EXTENT.size]
        for logical, physical, length, flags in _EXTENT.iter_unpack(found):
            # Any other flag says that it is compressed, not written yet, or not known.
            if flags & ~(_LAST | _MERGED) == _SHARED:
                yield logical, logical + length, physical
            position = logical + length
