"""Executes a plan: writes its shards and index into a directory.

Each shard is laid out first, so that every unique part is computed once and written at all its
places; only one part is in memory at a time. Nothing is decided here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle_cli.checkpoint import INDEX_NAME, ITEM_BYTES, Reader, raw_bytes
from upcycle_cli.errors import UpcycleError
from upcycle_cli.expr import (
    Expr,
    OverflowInCastError,
    TensorType,
    evaluate,
    leaves,
    type_of,
)
from upcycle_cli.outputs import OutputTensor, Role
from upcycle_cli.plan import Plan, Shard

if TYPE_CHECKING:
    import torch

_WRITE_BYTES = 1 << 26  # small enough for the progress to move, large enough to cost nothing

Progress = Callable[[int], None]
"""Called with the number of bytes just written."""


@dataclass
class _Part:
    """A unique expression of one shard: the tensor it is first needed for, and its places."""

    tensor: OutputTensor
    offsets: list[int]


def write_weights(plan: Plan, directory: Path, progress: Progress) -> dict[str, str]:
    """Write every shard and the index; return the SHA-256 of each router's bytes by tensor name.

    Raises UpcycleError when a value overflows the output dtype, OSError when writing fails.
    """
    routers: dict[str, str] = {}
    with plan.source.reader() as reader:
        for shard in plan.shards:
            with (directory / shard.name).open("xb") as file:
                _write_shard(shard, file.fileno(), reader, routers, progress)
    if len(plan.shards) > 1:
        index = {
            "metadata": {"total_size": plan.nbytes, "total_parameters": plan.total_parameters},
            "weight_map": {
                tensor.name: shard.name for shard in plan.shards for tensor in shard.tensors
            },
        }
        write_json(directory / INDEX_NAME, index)
    return routers


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_shard(
    shard: Shard, descriptor: int, reader: Reader, routers: dict[str, str], progress: Progress
) -> None:
    header = _header(shard)
    _write_at(descriptor, memoryview(header), 0)
    for expr, part in _parts(shard, len(header)).items():
        # A call of its own, so that no part is still held while the next is computed.
        _write_part(expr, part, descriptor, reader, routers, progress)


def _write_part(
    expr: Expr,
    part: _Part,
    descriptor: int,
    reader: Reader,
    routers: dict[str, str],
    progress: Progress,
) -> None:
    data = raw_bytes(_compute(expr, part.tensor, reader))
    if part.tensor.role is Role.ROUTER:
        routers[part.tensor.name] = hashlib.sha256(data).hexdigest()
    for offset in part.offsets:
        _write_at(descriptor, data, offset, progress)


def _header(shard: Shard) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in shard.tensors:
        end = position + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the data aligned for whoever maps the file
    return len(text).to_bytes(8, "little") + text


def _parts(shard: Shard, data_start: int) -> dict[Expr, _Part]:
    """Return each unique leaf expression with the file offsets where its bytes belong."""
    parts: dict[Expr, _Part] = {}
    position = data_start
    for tensor in shard.tensors:
        for leaf in leaves(tensor.expr):
            parts.setdefault(leaf, _Part(tensor, [])).offsets.append(position)
            position += _nbytes(type_of(leaf))
    return parts


def _nbytes(kind: TensorType) -> int:
    size = ITEM_BYTES[kind.dtype]
    for length in kind.shape:
        size *= length
    return size


def _compute(expr: Expr, tensor: OutputTensor, reader: Reader) -> torch.Tensor:
    try:
        return evaluate(expr, reader.tensor).contiguous()
    except OverflowInCastError as error:
        raise UpcycleError(
            f"{tensor.name}: a finite value of the dense model becomes infinite "
            f"in {tensor.dtype.lower()}.",
            "Use --dtype bfloat16 or float32.",
        ) from error


def _write_at(
    descriptor: int, data: memoryview, offset: int, progress: Progress | None = None
) -> None:
    done = 0
    while done < len(data):
        # One call writes at most 2 GiB, and a signal can cut it short.
        written = os.pwrite(descriptor, data[done : done + _WRITE_BYTES], offset + done)
        done += written
        if progress is not None:
            progress(written)
