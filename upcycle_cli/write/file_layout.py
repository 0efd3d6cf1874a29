"""Where every byte of an output file goes, and the digests by which a finished file is recognised.

The data starts on a block boundary and tensors of whole blocks come first, so that file systems
that can share extents (XFS, Btrfs) can share the copies of a shard. The files are the same on every
file system.

Each unique part is hashed once, while it is written; a file's digest is computed from these hashes.
XXH3 is as fast as memory and finds accidental damage, not deliberate changes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader

from xxhash import xxh3_128

from upcycle_cli.core.platform import BLOCK_BYTES
from upcycle_cli.plan.expressions import Expr, gather_input, leaves, num_bytes
from upcycle_cli.plan.output import OutputTensor, Shard

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Part:
    """A unique expression of one file, the first tensor that it makes, and its offsets."""

    expr: Expr
    tensor: OutputTensor
    nbytes: int
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class ShardLayout:
    """A whole file: its header (length prefix included), its parts in order, and its size."""

    header: bytes
    parts: tuple[Part, ...]
    nbytes: int


def lay_out(shard: Shard) -> ShardLayout:
    """Return the layout of a file of the output."""
    tensors = sorted(shard.tensors, key=lambda tensor: tensor.nbytes % BLOCK_BYTES != 0)
    header = _header(tensors)
    first: dict[Expr, tuple[OutputTensor, int, list[int]]] = {}
    position = len(header)
    for tensor in tensors:
        for leaf in leaves(tensor.expr):
            if leaf not in first:
                first[leaf] = tensor, num_bytes(leaf), []
            _, nbytes, offsets = first[leaf]
            offsets.append(position)
            position += nbytes
    found = first.items()
    parts = tuple(Part(leaf, tensor, nbytes, tuple(at)) for leaf, (tensor, nbytes, at) in found)
    return ShardLayout(header, parts, position)


def bundles(exprs: Sequence[Expr]) -> list[list[Expr]]:
    """Group expressions that gather columns of the same rows, to be evaluated together."""
    found: dict[tuple[Expr, bool], list[Expr]] = {}
    for expr in exprs:
        rows = gather_input(expr)
        # The rows can be a part, too.
        found.setdefault((rows or expr, rows is None), []).append(expr)
    return [*found.values()]


def file_digest(layout: ShardLayout, parts: Mapping[Expr, bytes]) -> str:
    """Return the digest of a file's data from its parts' digests; the plan implies the header."""
    return xxh3_128(b"".join(parts[part.expr] for part in layout.parts)).hexdigest()


def read_back(
    file: BufferedReader, layout: ShardLayout, check_running: Callable[[], None]
) -> dict[Expr, bytes] | None:
    """Return the digest of each part; None for another layout. Raises OSError.

    `check_running` is called before each piece, and may raise to stop.
    """
    buffer = memoryview(bytearray(max(_PIECE_BYTES, len(layout.header))))
    header = buffer[: len(layout.header)]
    if os.fstat(file.fileno()).st_size != layout.nbytes:
        return None
    if file.readinto(header) < len(header) or header != layout.header:
        return None
    parts: dict[Expr, bytes] = {}
    places = [(offset, part) for part in layout.parts for offset in part.offsets]
    for _, part in sorted(places, key=lambda place: place[0]):
        digest = xxh3_128()
        for start in range(0, part.nbytes, _PIECE_BYTES):
            check_running()
            piece = buffer[: min(_PIECE_BYTES, part.nbytes - start)]
            if file.readinto(piece) < len(piece):
                return None
            digest.update(piece)
        if parts.setdefault(part.expr, digest.digest()) != digest.digest():
            return None
    return parts


def _header(tensors: list[OutputTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        offsets = [position, position + tensor.nbytes]
        entry = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        entries[tensor.name] = entry
        position = offsets[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % BLOCK_BYTES)
    return len(text).to_bytes(8, "little") + text
