"""A file of router rows: one safetensors file, with a tensor `layers.3.router` for each layer.

Each is (E, H), a row for each virtual group, or (E·G, H) without virtual groups, in float32,
bfloat16 or float16. Layers are counted from 0, and those that stay dense have no rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from upcycle_cli.errors import UpcycleError
from upcycle_cli.header import TORCH_DTYPES, Tensor, read_shard_header
from upcycle_cli.printable import counted, printable
from upcycle_cli.storage import Storage
from upcycle_cli.tensors import GivenRows, router_stream

_MOST_BYTES = 4_000_000_000


@dataclass(frozen=True, eq=False)
class RouterFile:
    """The tensors of a file, and their bytes."""

    path: Path
    tensors: Mapping[str, Tensor]
    data: Mapping[str, bytes]
    digest: str

    @property
    def record(self) -> dict[str, str]:
        """What `upcycle.json` says of it: its name, and the SHA-256 of the rows in it."""
        return {"name": printable(self.path.name), "sha256": self.digest}

    def given(self, layers: Collection[int], shape: tuple[int, int]) -> GivenRows:
        """Return the rows of these layers; UpcycleError unless they are there in this shape."""
        names = {router_stream(layer): layer for layer in layers}
        missing = [name for name in names if name not in self.tensors]
        if missing:
            held = ", ".join(list(self.tensors)[:3]) or "nothing"
            raise UpcycleError(
                f"{self.path} lacks {missing[0]}{_more(len(missing))}.",
                f"It holds {held}. Each layer that becomes a mixture of experts needs rows of "
                f"shape {list(shape)}, named as {missing[0]}.",
            )
        unknown = [name for name in self.tensors if name not in names]
        if unknown:
            raise UpcycleError(
                f"{self.path}: {unknown[0]}{_more(len(unknown))} belongs to no layer that becomes "
                f"a mixture of experts ({counted(len(names), 'layer')}).",
                "Take it out, or choose other --layers.",
            )
        for name in names:
            found = self.tensors[name].shape
            if found != shape:
                raise UpcycleError(
                    f"{self.path}: {name} has shape {list(found)}, and {list(shape)} is needed: "
                    "a row for each virtual group, or for each expert without virtual groups."
                )
        dtypes = {self.tensors[name].dtype for name in names}
        if len(dtypes) > 1:
            raise UpcycleError(f"{self.path} has rows of several dtypes: {', '.join(dtypes)}.")
        by_layer = {layer: self.data[name] for name, layer in names.items()}
        return GivenRows(origin=self.digest, dtype=dtypes.pop(), by_layer=by_layer)


def read_router_file(path: Path) -> RouterFile:
    """Read a file of router rows; UpcycleError when it cannot be, or holds no usable rows."""
    storage = Storage(path.parent)
    if not path.is_file():
        raise UpcycleError(
            f"there is no file {path}.",
            "--router-init takes normal, balanced, centroids, or a safetensors file of rows.",
        )
    stamp, entries = read_shard_header(storage, path.name)
    if stamp.size > _MOST_BYTES:
        raise UpcycleError(f"{path} has {stamp.size:,} bytes, and routers are smaller than that.")
    data = {}
    for entry in entries:
        if entry.dtype not in TORCH_DTYPES or len(entry.shape) != 2:
            raise UpcycleError(
                f"{path}: {entry.name} is {entry.dtype} of shape {list(entry.shape)}; rows are a "
                f"matrix of {', '.join(TORCH_DTYPES)}."
            )
        data[entry.name] = storage.read(path.name, entry.offset, entry.offset + entry.nbytes)
        _check_rows(path, entry, data[entry.name])
    digest = hashlib.sha256()
    for name in sorted(data):
        digest.update(f"{name} {len(data[name])}\n".encode() + data[name])
    return RouterFile(path, {entry.name: entry for entry in entries}, data, digest.hexdigest())


def _check_rows(path: Path, entry: Tensor, data: bytes) -> None:
    """Raise UpcycleError for rows that are no numbers, nothing, or one another's copy."""
    import numpy as np

    from upcycle_cli.arithmetic import as_float32

    rows_EH = as_float32(data, entry.dtype, entry.shape)
    where = f"{path}: {entry.name}"
    if not np.isfinite(rows_EH).all():
        raise UpcycleError(f"{where} holds values that are not finite.")
    if not rows_EH.any(axis=1).all():
        raise UpcycleError(f"{where} has a row of zeros, whose experts no logit would tell apart.")
    if len(np.unique(rows_EH, axis=0)) < len(rows_EH):
        raise UpcycleError(
            f"{where} has equal rows: their experts would be chosen together, or one by chance.",
            "Give one row for each virtual group; they are repeated for its experts.",
        )


def _more(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""
