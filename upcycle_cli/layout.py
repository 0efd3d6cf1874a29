"""Where every byte of an output file goes.

The data starts on a block boundary and tensors of whole blocks come first, so that file systems
that can share extents between two places (XFS, Btrfs) can share the copies of a shard. The layout
depends on the plan alone: the files are the same on every file system.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from upcycle_cli.expr import Expr, leaves, num_bytes
from upcycle_cli.outputs import OutputTensor
from upcycle_cli.plan import Shard
from upcycle_cli.reflink import BLOCK_BYTES


@dataclass(frozen=True)
class Part:
    """A unique expression of one file: its bytes, the tensor it is first for, and its places."""

    expr: Expr
    tensor: OutputTensor
    nbytes: int
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A whole file: its header (length prefix included), its parts in order, and its size."""

    header: bytes
    parts: tuple[Part, ...]
    nbytes: int


def lay_out(shard: Shard) -> Layout:
    """Return the layout of a file of the output."""
    tensors = sorted(shard.tensors, key=lambda tensor: tensor.nbytes % BLOCK_BYTES != 0)
    header = _header(tensors)
    first: dict[Expr, OutputTensor] = {}
    offsets: dict[Expr, list[int]] = {}
    sizes: dict[Expr, int] = {}
    position = len(header)
    for tensor in tensors:
        for leaf in leaves(tensor.expr):
            if leaf not in first:
                first[leaf], offsets[leaf], sizes[leaf] = tensor, [], num_bytes(leaf)
            offsets[leaf].append(position)
            position += sizes[leaf]
    parts = tuple(
        Part(leaf, tensor, sizes[leaf], tuple(offsets[leaf])) for leaf, tensor in first.items()
    )
    return Layout(header, parts, position)


def unique_bytes(shards: Iterable[Shard]) -> int:
    """Return the bytes that files take where equal parts of whole blocks share extents."""
    shared: dict[Expr, int] = {}
    unshared = 0
    for tensor in (tensor for shard in shards for tensor in shard.tensors):
        for leaf in leaves(tensor.expr):
            nbytes = num_bytes(leaf)
            if tensor.nbytes % BLOCK_BYTES == 0 and nbytes % BLOCK_BYTES == 0:
                shared[leaf] = nbytes
            else:
                unshared += nbytes
    return unshared + sum(shared.values())


def _header(tensors: list[OutputTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % BLOCK_BYTES)
    return len(text).to_bytes(8, "little") + text
