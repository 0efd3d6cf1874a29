"""What only some systems and file systems can do, each with what is done without it.

Linux has all of it, but not on each of its file systems; macOS lacks some, and has its own name for
the rest.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from contextlib import suppress

UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}
"""How a system says that it, or this file system, cannot do something at all."""
_EXCHANGES = ("renameat2", "renameatx_np")
"""The same call on Linux and on macOS: RENAME_EXCHANGE and RENAME_SWAP are one number, too."""
_EXCHANGE_FLAG = 2
BLOCK_BYTES = 4096
"""What offsets and lengths of shared extents must be multiples of, on the usual systems."""
_FICLONERANGE = 0x4020940D


def num_processors() -> int:
    """Return how many processors this process may use, or how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_writeback(descriptor: int) -> None:
    """Have the disk take what was written to a file so far."""
    getattr(os, "fdatasync", os.fsync)(descriptor)


def make_durable(descriptor: int) -> None:
    """Return once a file, or a directory's entries, will survive a loss of power."""
    full = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: its fsync ends in the cache of the disk
    if full is not None:
        with suppress(OSError):  # a network's file system has no disk to ask
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def lock(descriptor: int) -> bool:
    """Lock a file until it is closed, if its system can; False when another process has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:  # without locks there is none to hold
            raise
    return True


def exchange(directory: int, one: str, other: str) -> bool:
    """Swap two names of an open directory in one step; False where that cannot be done."""
    libc = ctypes.CDLL(None, use_errno=True)
    call = next((getattr(libc, name) for name in _EXCHANGES if hasattr(libc, name)), None)
    if call is None:
        return False
    if call(directory, os.fsencode(one), directory, os.fsencode(other), _EXCHANGE_FLAG) == 0:
        return True
    code = ctypes.get_errno()
    # EXDEV: an overlay would have to copy a directory of a lower layer.
    if code in UNSUPPORTED | {errno.EXDEV}:
        return False
    raise OSError(code, os.strerror(code), other)


def share(source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> bool:
    """Let a range of `target` share the extents of `source`; False where it cannot, or OSError.

    The disk then holds these bytes once. XFS, Btrfs and others do it, for whole blocks.
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
