"""A safetensors file: its header with the names, types, shapes and offsets of tensors; values.

Format: 8-byte little-endian header length, JSON header, data. Offsets are relative to the data, and
tensors follow one another without gaps. Unlike the safetensors library, this reads remote headers.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from upcycle_cli.checkpoint.storage import FileStamp, Storage, json_object
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.safe_files import MOST_LISTING_BYTES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
"""Bytes per element of each safetensors dtype."""

TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The dtypes of weights that can be converted, and torch's names for them."""

COUNTERS = {"I64": "int64"}
"""The dtypes of counters, which norms around a text model have: they are copied as they are."""

NUMPY_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8"}
"""numpy's dtype for each safetensors dtype; numpy has no bfloat16, so its bits are held."""

LARGEST = {"F32": (2 - 2**-23) * 2.0**127, "BF16": (2 - 2**-7) * 2.0**127, "F16": 65504.0}
"""The largest finite value of each of these dtypes."""

_HINT = "Download or copy it again."
_MAX_DIMENSIONS = 64  # torch's own limit


@dataclass(frozen=True, slots=True)
class Tensor:
    """The name of a tensor, its dtype in safetensors' notation, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self.num_elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class TensorEntry(Tensor):
    """A tensor in the file `shard`, `offset` bytes from its start."""

    shard: str
    offset: int


def read_shard_header(storage: Storage, shard_name: str) -> tuple[FileStamp, list[TensorEntry]]:
    """Return the stamp and the tensors of a weight file; UpcycleError when it is damaged."""
    file_path = storage.path / shard_name
    stamp = storage.stamp(shard_name)
    prefix = storage.read(shard_name, 0, 8)
    header_bytes = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or header_bytes > min(stamp.size - 8, MOST_LISTING_BYTES):
        raise UpcycleError(
            f"{file_path} is truncated or not a safetensors file: it has {stamp.size:,} bytes, and "
            f"its header would have {header_bytes:,}; at most {MOST_LISTING_BYTES:,} are allowed.",
            _HINT,
        )
    raw = storage.read(shard_name, 8, 8 + header_bytes)
    entries, metadata = parse_header(raw, file_path, shard_name)
    places = sorted((entry.offset, entry.offset + entry.nbytes) for entry in entries)
    ends = [8 + header_bytes, *(end for _, end in places)]
    if [*(begin for begin, _ in places), stamp.size] != ends:
        words = f"it has {stamp.size:,} bytes, and its tensors end at byte {ends[-1]:,}"
        raise UpcycleError(
            f"{file_path} is truncated or damaged: {words}, or do not follow one another.", _HINT
        )
    kind = metadata.get("format") if isinstance(metadata, dict) else None
    return replace(stamp, digest=hashlib.sha256(raw).hexdigest(), format=kind), entries


def parse_header(raw: bytes, file_path: Path, shard_name: str) -> tuple[list[TensorEntry], object]:
    """Return the tensors and the metadata of a weight file's header; raises UpcycleError."""
    header = json_object(raw, f"the header of {file_path}")
    metadata = header.pop("__metadata__", None)
    entries = []
    for name, info in header.items():
        dtype, shape, offsets = (
            info.get(key) if isinstance(info, dict) else None
            for key in ("dtype", "shape", "data_offsets")
        )
        if (
            isinstance(dtype, str)
            and dtype in ITEM_BYTES
            and _are_sizes(shape)
            and _are_sizes(offsets)
            and len(offsets) == 2
        ):
            begin, end = offsets
            entry = TensorEntry(name, dtype, tuple(shape), shard_name, 8 + len(raw) + begin)
            if end - begin == entry.nbytes:
                entries.append(entry)
                continue
        words = f"tensor {name} has an invalid dtype, shape or offsets: {shown(info)}"
        raise UpcycleError(f"{file_path}: {words}.", _HINT)
    return entries, metadata


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > _MAX_DIMENSIONS:
        return False
    return all(type(size) is int and 0 <= size < 1 << 63 for size in value)


class OverflowInCastError(ArithmeticError):
    """A finite value became infinite in the output dtype."""


def as_float32(data: bytes, dtype: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return a tensor's bytes as float32 values."""
    import numpy as np

    return to_float32(np.ndarray(shape, NUMPY_DTYPES[dtype], data), dtype)


def to_float32(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Return the values of an array of `NUMPY_DTYPES` as float32."""
    if dtype == "BF16":
        from ml_dtypes import bfloat16

        values = values.view(bfloat16)
    return values.astype("<f4", copy=False)


def rounded(values: NDArray[np.floating[Any]], dtype: str) -> NDArray[Any]:
    """Round to an array of `NUMPY_DTYPES`, ties to even; too large values become infinite."""
    if dtype != "BF16":
        return values.astype(NUMPY_DTYPES[dtype], copy=False)
    from ml_dtypes import bfloat16

    # By way of float32, as torch does.
    bits: NDArray[Any] = values.astype("<f4", copy=False).astype(bfloat16).view("<u2")
    return bits
