"""The limit: as many bytes as the conversion writes, from a mapping of the source, and no more.

    python raw_pwrite.py SOURCE TARGET BYTES fsync|no-fsync

Run as a program of its own, in a Python that imports nothing else.
"""

from __future__ import annotations

import mmap
import os
import sys

CHUNK_BYTES = 1 << 19  # as upcycle


def main(source: str, target: str, nbytes: int, *, fsync: bool) -> None:
    """Write the source's bytes repeatedly, up to the wanted size."""
    with open(source, "rb") as file, open(target, "wb") as output:  # noqa: PTH123 - plain Python
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        done = 0
        while done < nbytes:
            begin = done % len(view)
            end = begin + min(CHUNK_BYTES, nbytes - done)
            done += os.pwrite(output.fileno(), view[begin:end], done)
        if fsync:
            os.fsync(output.fileno())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), fsync=sys.argv[4] == "fsync")
