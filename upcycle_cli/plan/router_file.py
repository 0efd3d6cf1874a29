"""A file of router rows: one safetensors file, with a tensor `layers.3.router` for each layer.

Each is (E, H), a row for each virtual group, or (E·G, H) without virtual groups, in float32,
bfloat16 or float16. Layers are counted from 0, and those that stay dense have no rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from upcycle_cli.checkpoint.header import TORCH_DTYPES, Tensor
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.text import printable
from upcycle_cli.plan.permutation_file import check_names, open_user_file, tensors_digest


def router_stream(layer: int) -> str:
    """Return the name of a layer's router rows: in a file, and as a stream of random numbers."""
    return f"layers.{layer}.router"


@dataclass(frozen=True, kw_only=True)
class RouterRows:
    """Router rows that are not drawn: read from a file, or fitted to a calibration."""

    origin: str
    """The digest of the file's rows, or of the calibration's text."""
    dtype: str | None = None
    """None for the dtype in which the output stores its routers."""
    by_layer: Mapping[int, bytes] = field(default_factory=dict)
    """Empty until the calibration has run."""


@dataclass(frozen=True, eq=False)
class RouterFile:
    """The tensors of a file, and their bytes."""

    path: Path
    tensors: Mapping[str, Tensor]
    data: Mapping[str, bytes]
    digest: str

    @property
    def record(self) -> dict[str, str]:
        """The name of the file and the SHA-256 of its rows, as `upcycle.json` states them."""
        return {"name": printable(self.path.name), "sha256": self.digest}

    def rows(self, layers: Collection[int], shape: tuple[int, int]) -> RouterRows:
        """Return the rows of these layers; UpcycleError unless the file has them in this shape."""
        names = {router_stream(layer): layer for layer in layers}
        needed = f"rows of shape {list(shape)}, named as {next(iter(names))}"
        check_names(self.path, self.tensors, [*names], needed)
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
        return RouterRows(origin=self.digest, dtype=dtypes.pop(), by_layer=by_layer)


def read_router_file(path: Path, *, others: str = "") -> RouterFile:
    """Read a file of router rows; UpcycleError when it is unreadable or holds no usable rows.

    `others` are the other values of the option, for the hint.
    """
    hint = f"--router-init takes {others}a safetensors file of rows."
    storage, entries = open_user_file(path, hint, "routers")
    data = {}
    for entry in entries:
        if entry.dtype not in TORCH_DTYPES or len(entry.shape) != 2:
            raise UpcycleError(
                f"{path}: {entry.name} is {entry.dtype} of shape {list(entry.shape)}; rows are a "
                f"matrix of {', '.join(TORCH_DTYPES)}."
            )
        data[entry.name] = storage.read(path.name, entry.offset, entry.offset + entry.nbytes)
        _check_rows(path, entry, data[entry.name])
    return RouterFile(path, {entry.name: entry for entry in entries}, data, tensors_digest(data))


def _check_rows(path: Path, entry: Tensor, data: bytes) -> None:
    """Raise UpcycleError for rows that are not finite, all zero, or equal to one another."""
    import numpy as np

    from upcycle_cli.checkpoint.arrays import as_float32

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
