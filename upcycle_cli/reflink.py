"""Sharing extents: two places of a file system that hold the same bytes on disk once.

XFS, Btrfs and others do it through `ioctl(FICLONERANGE)`, for whole blocks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from upcycle_cli.folder import Folder
from upcycle_cli.system import UNSUPPORTED

BLOCK_BYTES = 4096
"""What offsets and lengths must be multiples of, on the usual systems."""

_FICLONERANGE = 0x4020940D
_CANNOT = UNSUPPORTED | {errno.EXDEV}


def share(source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> bool:
    """Let a range of `target` share the extents of `source`; False where it cannot, or OSError."""
    if source_offset % BLOCK_BYTES or target_offset % BLOCK_BYTES or nbytes % BLOCK_BYTES:
        return False
    request = struct.pack("qQQQ", source, source_offset, nbytes, target_offset)
    try:
        fcntl.ioctl(target, _FICLONERANGE, request)
    except OSError as error:
        if error.errno in _CANNOT:
            return False
        raise
    return True


def can_share(folder: Folder) -> bool:
    """Find out by trying whether files in a directory can share extents."""
    try:
        with folder.scratch() as descriptor:
            os.write(descriptor, os.urandom(BLOCK_BYTES))
            return share(descriptor, 0, descriptor, BLOCK_BYTES, BLOCK_BYTES)
    except OSError:
        # A directory that cannot be written is found out, and reported, when it is written.
        return False
