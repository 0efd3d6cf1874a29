"""Digests by which a complete shard is known again, whatever its size and time say.

Each unique part of a file is digested once, while it is written, so it costs next to nothing; the
file's own digest is that of its parts' digests. To check a file all of it is read, each copy of a
part too. XXH3 is as fast as memory and finds what disks, copies and other programs do to bytes; it
is no defence against somebody who wants to deceive.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from io import BufferedReader

from xxhash import xxh3_128

from upcycle_cli.expr import Expr
from upcycle_cli.layout import Layout
from upcycle_cli.tensors import Role

_PIECE_BYTES = 1 << 20


def file_digest(layout: Layout, parts: Mapping[Expr, bytes]) -> str:
    """Return the digest of a file's data, from those of its parts; its header is in the plan."""
    return xxh3_128(b"".join(parts[part.expr] for part in layout.parts)).hexdigest()


def read_back(
    file: BufferedReader, layout: Layout, advance: Callable[[int], None]
) -> tuple[dict[Expr, bytes], dict[str, str]] | None:
    """Return each part's digest and each router's SHA-256; None for a file that is not laid out so.

    `advance` hears of bytes as they are read. Raises OSError when the system refuses.
    """
    buffer = memoryview(bytearray(max(_PIECE_BYTES, len(layout.header))))
    header = buffer[: len(layout.header)]
    if os.fstat(file.fileno()).st_size != layout.nbytes:
        return None
    if file.readinto(header) < len(header) or header != layout.header:
        return None
    parts: dict[Expr, bytes] = {}
    routers: dict[str, str] = {}
    places = [(offset, part) for part in layout.parts for offset in part.offsets]
    for _, part in sorted(places, key=lambda place: place[0]):
        digest, router = xxh3_128(), hashlib.sha256()
        is_router = part.tensor.role is Role.ROUTER
        for start in range(0, part.nbytes, _PIECE_BYTES):
            piece = buffer[: min(_PIECE_BYTES, part.nbytes - start)]
            if file.readinto(piece) < len(piece):
                return None
            digest.update(piece)
            if is_router:
                router.update(piece)
            advance(len(piece))
        if parts.setdefault(part.expr, digest.digest()) != digest.digest():
            return None
        if is_router:
            routers[part.tensor.name] = router.hexdigest()
    return parts, routers
