"""Files in memory maps, and where their bytes lie on the disk."""

from __future__ import annotations

import ctypes
import mmap
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from upcycle_cli.checkpoint.storage import FileStamp, Storage, file_changed
from upcycle_cli.core import safe_files
from upcycle_cli.core.platform import shared_extents

DiskRanges = tuple[int | tuple[int, int], ...]
"""A device number; then, for each range, its offset and the distance from there to the disk's."""


@dataclass(frozen=True, eq=False)
class MappedFiles:
    """Maps files on first use."""

    maps: dict[Path, mmap.mmap] = field(default_factory=dict)
    _extents: dict[Path, tuple[int, int, list[tuple[int, int, int]]]] = field(default_factory=dict)

    def map(self, storage: Storage, stamp: FileStamp) -> mmap.mmap:
        """Return the map of a file; UpcycleError if it changed since it got the stamp."""
        path = storage.path / stamp.name
        if path not in self.maps:
            with safe_files.open_regular(storage.locate(stamp.name)) as file:
                if not stamp.fits(os.fstat(file.fileno())):
                    raise file_changed(path)
                # A private mapping: torch needs a writable buffer, and the file must not change.
                self.maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self.maps[path]

    def on_disk(self, data: memoryview) -> DiskRanges:
        """Return where mapped bytes lie on the disk; empty unless all are in shared extents.

        Bytes at the same place are equal, and need not be read to be compared.
        """
        address = _address(data)
        for path, mapped in [*self.maps.items()]:  # other threads add maps
            if path not in self._extents:
                self._extents[path] = _address(mapped), path.stat().st_dev, shared_extents(path)
            base, device, extents = self._extents[path]
            if extents and base <= address < base + len(mapped):
                ranges = _ranges(extents, address - base, len(data))
                return (device, *ranges) if ranges else ()
        return ()

    def release(self) -> None:
        """Free the pages that were read so far; a later access reads them again."""
        for mapped in [*self.maps.values()]:
            mapped.madvise(mmap.MADV_DONTNEED)


def _address(data: memoryview | mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data))


def _ranges(
    extents: Sequence[tuple[int, int, int]], begin: int, nbytes: int
) -> list[tuple[int, int]]:
    position, found = begin, list[tuple[int, int]]()
    first = bisect_right(extents, begin, key=lambda extent: extent[1])
    for low, high, physical in extents[first:]:
        if low > position or position >= begin + nbytes:
            break
        # The distance tells adjacent extents from one: files may cut one range differently.
        distance = physical - low + begin
        if not found or found[-1][1] != distance:
            found.append((position - begin, distance))
        position = high
    return found if position >= begin + nbytes else []
