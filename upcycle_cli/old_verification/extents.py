"""Which bytes of files are the same because the disk holds them once: extents that are shared.

XFS and Btrfs tell by FIEMAP where on the disk a range of a file lies. What two files have at one
place need not be read twice. Where a system cannot tell, or is not sure, nothing counts as shared.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import sys
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

_FS_IOC_FIEMAP = 0xC020660B
_SYNC = 1  # what is still to be written gets its place first
_REQUEST = struct.Struct("=QQLLLL")
_EXTENT = struct.Struct("=QQQ16xL12x")
_MOST_EXTENTS = 1024  # a call
_LAST, _MERGED, _SHARED = 0x1, 0x1000, 0x2000
_FILE_SYSTEMS = {0x58465342, 0x9123683E}
"""XFS and Btrfs. An overlay passes the question on, and its files can lie on several disks."""


@dataclass(frozen=True)
class Layout:
    """Where on a disk the shared extents of a file lie; `device` says which disk."""

    device: int
    extents: tuple[tuple[int, int, int], ...] = ()
    """Start and end in the file, in order, and the start on the disk; all in bytes."""

    def within(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield the parts of extents that lie in a range of the file, relative to its start."""
        first = bisect_right(self.extents, start, key=lambda extent: extent[1])
        for begin, end, physical in self.extents[first:]:
            if begin >= stop:
                return
            cut = max(begin, start)
            yield cut - start, min(end, stop) - start, physical + cut - begin


def layout_of(descriptor: int) -> Layout:
    """Return the shared extents of an open file, none where its system cannot tell."""
    device = os.fstat(descriptor).st_dev
    try:
        found = tuple(_extents(descriptor)) if _tells(descriptor) else ()
    except OSError:  # ENOTTY, EOPNOTSUPP, and whatever else: then all is read
        found = ()
    return Layout(device, found)


@dataclass
class Known:
    """Where on disks the bytes lie that one value is compared with, or comes from."""

    _runs: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)
    """Disjoint parts of the value, in bytes, by disk and by where its first byte would lie."""

    def new(self, layout: Layout, offset: int, nbytes: int) -> list[tuple[int, int]]:
        """Return the parts of a range of a file that lie at no known place, and know them now.

        The range is one more copy of the value; parts are relative to its start, in bytes.
        """
        found, position = [], 0
        for start, stop, physical in layout.within(offset, offset + nbytes):
            if position < start:
                found.append((position, start))
            runs = self._runs.setdefault((layout.device, physical - start), [])
            gaps = list(_gaps(start, stop, runs))
            found += gaps
            runs += gaps
            runs.sort()
            position = stop
        if position < nbytes:
            found.append((position, nbytes))
        return found


def _gaps(start: int, stop: int, runs: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for begin, end in runs:
        if end > start and begin < stop:
            if begin > start:
                yield start, begin
            start = end
    if start < stop:
        yield start, stop


def _tells(descriptor: int) -> bool:
    if sys.platform != "linux":
        return False
    status = (ctypes.c_ulong * 64)()  # statfs is 120 bytes, and its first word the kind
    libc = ctypes.CDLL(None)
    return libc.fstatfs(descriptor, ctypes.byref(status)) == 0 and status[0] in _FILE_SYSTEMS


def _extents(descriptor: int) -> Iterator[tuple[int, int, int]]:
    """Yield the extents that are surely shared and surely where they are said to be."""
    position, flags = 0, 0
    while not flags & _LAST:
        answer = bytearray(_REQUEST.size + _MOST_EXTENTS * _EXTENT.size)
        _REQUEST.pack_into(
            answer, 0, position, (1 << 64) - 1 - position, _SYNC, 0, _MOST_EXTENTS, 0
        )
        fcntl.ioctl(descriptor, _FS_IOC_FIEMAP, answer)
        count = _REQUEST.unpack_from(answer)[3]
        if not count:
            return
        used = memoryview(answer)[_REQUEST.size :][: count * _EXTENT.size]
        for logical, physical, length, flags in _EXTENT.iter_unpack(used):
            # Any other flag says that it is compressed, not written yet, or not known.
            if flags & ~(_LAST | _MERGED) == _SHARED:
                yield logical, logical + length, physical
            position = logical + length
