"""Files of router rows and of neuron orders: safetensors, a tensor a layer.

`layers.3.router` is (E, H), a row for each virtual group, or (E·G, H) without virtual groups, in
float32, bfloat16 or float16. `layers.3.neuron_order` is a permutation of the dense MLP's neurons of
shape (I,), for every virtual group, or (E, I), one for each, in 32- or 64-bit integers. Shard s of
a group gets the neurons at places [s·I/G, (s+1)·I/G). Layers are counted from 0; layers that stay
dense have no tensor.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle_cli.checkpoint.header import TORCH_DTYPES, Tensor, read_shard_header
from upcycle_cli.checkpoint.storage import Storage
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.text import printable
from upcycle_cli.plan.expressions import Permutation
from upcycle_cli.recipe.recipe import NeuronOrder, Recipe

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_INTEGERS = {"I32": "<i4", "U32": "<u4", "I64": "<i8"}


def router_stream(layer: int) -> str:
    """Return the name of a layer's router rows: in a file, and as a random stream."""
    return f"layers.{layer}.router"


def order_name(layer: int, group: int | None = None) -> str:
    """Return the name of a layer's or a group's order: in a file, and as a random stream."""
    return f"layers.{layer}.neuron_order" + ("" if group is None else f".{group}")


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
class TensorFile:
    """The tensors of a file, their bytes, and the digest of both."""

    path: Path
    tensors: Mapping[str, Tensor]
    data: Mapping[str, bytes]
    digest: str

    @property
    def record(self) -> dict[str, str]:
        """The name of the file and the SHA-256 of its tensors, as `upcycle.json` states them."""
        return {"name": printable(self.path.name), "sha256": self.digest}

    def check_tensors(self, names: Collection[str], *shapes: tuple[int, ...], needed: str) -> None:
        """Raise UpcycleError unless the file has these tensors alone, in one of these shapes."""
        if missing := [name for name in names if name not in self.tensors]:
            raise UpcycleError(
                f"{self.path} lacks {missing[0]}.",
                f"Each layer that becomes a mixture of experts needs {needed}.",
            )
        for name, tensor in self.tensors.items():
            if name not in names:
                raise UpcycleError(
                    f"{self.path}: {name} belongs to no layer that becomes a mixture of experts.",
                    "Take it out, or choose other --layers.",
                )
            if tensor.shape not in shapes:
                able = " or ".join(str([*shape]) for shape in shapes)
                words = f"{name} has shape {[*tensor.shape]}; {able} is needed: {needed}"
                raise UpcycleError(f"{self.path}: {words}.")


class RouterFile(TensorFile):
    """A file of router rows."""

    def rows(self, layers: Collection[int], shape: tuple[int, int]) -> RouterRows:
        """Return the rows of these layers; UpcycleError unless the file has them in this shape."""
        names = {router_stream(layer): layer for layer in layers}
        needed = "a row for each virtual group, or for each expert without virtual groups"
        self.check_tensors(names, shape, needed=needed)
        dtypes = {tensor.dtype for tensor in self.tensors.values()}
        if len(dtypes) > 1:
            raise UpcycleError(f"{self.path} has rows of several dtypes: {', '.join(dtypes)}.")
        by_layer = {layer: self.data[name] for name, layer in names.items()}
        return RouterRows(origin=self.digest, dtype=dtypes.pop(), by_layer=by_layer)


class PermutationFile(TensorFile):
    """A file of neuron orders, its data as 32-bit integers."""

    def check(self, layers: Collection[int], recipe: Recipe, size: int) -> None:
        """Raise UpcycleError unless these layers, and no others, have orders of `size` neurons.

        All groups must begin with the same neurons where the recipe shares an expert.
        """
        needed = "a permutation of the dense MLP's neurons, or one for each virtual group"
        shapes = (size,), (recipe.expansion, size)
        self.check_tensors([*map(order_name, layers)], *shapes, needed=needed)
        width = size // recipe.granularity * recipe.shared_experts
        for name, data in self.data.items():
            if len({data[at : at + 4 * width] for at in range(0, len(data), 4 * size)}) > 1:
                raise UpcycleError(
                    f"{self.path}: the orders of {name} differ in their first {width} places, and "
                    "those are the shared expert's.",
                    "Begin the orders of all groups alike, or leave out --shared-experts.",
                )

    def of_layer(self, layer: int, expansion: int) -> list[Permutation | None]:
        """Return the order of each group; a tensor (I,) gives all groups equal orders."""
        name = order_name(layer)
        data, (*groups, size) = self.data[name], self.tensors[name].shape
        if not groups:
            return [Permutation(size, name, origin=self.digest, indices=data)] * expansion
        indices = [data[at : at + 4 * size] for at in range(0, len(data), 4 * size)]
        return [
            Permutation(size, order_name(layer, group), origin=self.digest, indices=each)
            for group, each in enumerate(indices)
        ]


def check_neuron_orders(
    file: PermutationFile | None, recipe: Recipe, layers: Collection[int], size: int
) -> None:
    """Raise UpcycleError unless a file is given exactly where the recipe needs one, and fits."""
    if (file is not None) != (recipe.neuron_order is NeuronOrder.FILE):
        raise UpcycleError(
            f"--neuron-order is {recipe.neuron_order}, and "
            f"{'no file' if file is None else 'a file'} of neuron orders was given.",
            "Give the file itself: --neuron-order ORDERS.safetensors.",
        )
    if file is not None:
        file.check(layers, recipe, size)


def read_router_file(path: Path) -> RouterFile:
    """Read a file of router rows; UpcycleError when it is unreadable or holds no usable rows."""
    from upcycle_cli.checkpoint.arrays import as_float32

    hint = "--router-init of convert takes normal, balanced, centroids, or a safetensors file."
    tensors, data = _read(path, "router", hint, TORCH_DTYPES, (2,))
    for name, tensor in tensors.items():
        _check_rows(f"{path}: {name}", as_float32(data[name], tensor.dtype, tensor.shape))
    return RouterFile(path, tensors, data, _digest(data))


def read_permutation_file(path: Path) -> PermutationFile:
    """Read a file of neuron orders; UpcycleError when unreadable or when one is no permutation."""
    import numpy as np

    hint = "--neuron-order takes sliced, shuffled, clustered, or a safetensors file."
    tensors, data = _read(path, "neuron_order", hint, _INTEGERS, (1, 2))
    for name, tensor in tensors.items():
        size = tensor.shape[-1]
        orders_EI = np.frombuffer(data[name], _INTEGERS[tensor.dtype]).reshape(-1, size)
        for group, order_I in enumerate(orders_EI):
            if (np.sort(order_I) != np.arange(size)).any():
                which = f", group {group}" if len(tensor.shape) == 2 else ""
                raise UpcycleError(
                    f"{path}: {name}{which} is no permutation: it must name each neuron from 0 to "
                    f"{size - 1} once."
                )
        data[name] = orders_EI.astype("<u4").tobytes()
    return PermutationFile(path, tensors, data, _digest(data))


def _read(
    path: Path, kind: str, hint: str, dtypes: Collection[str], dims: Collection[int]
) -> tuple[dict[str, Tensor], dict[str, bytes]]:
    """Return the tensors and bytes of a file; UpcycleError for another name, dtype or form."""
    if not path.is_file():
        raise UpcycleError(f"there is no file {path}.", hint)
    storage, tensors, data = Storage(path.parent), {}, {}
    for entry in read_shard_header(storage, path.name)[1]:
        if not re.fullmatch(rf"layers\.\d+\.{kind}", entry.name):
            words = f"{path}: no layer has a tensor called {printable(entry.name)}."
            raise UpcycleError(words, f"Name those of layer 3 layers.3.{kind}.")
        if entry.dtype not in dtypes or len(entry.shape) not in dims or not entry.num_elements:
            raise UpcycleError(
                f"{path}: {entry.name} is {entry.dtype} of shape {[*entry.shape]}; it must be of "
                f"{' or '.join(map(str, dims))} dimensions, and of {', '.join(dtypes)}."
            )
        tensors[entry.name] = entry
        data[entry.name] = storage.read(path.name, entry.offset, entry.offset + entry.nbytes)
    return {**tensors}, data


def _digest(data: Mapping[str, bytes]) -> str:
    """Return the SHA-256 of tensors and their names, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(data):
        digest.update(f"{name} {len(data[name])}\n".encode() + data[name])
    return digest.hexdigest()


def _check_rows(where: str, rows_EH: NDArray[np.float32]) -> None:
    """Raise UpcycleError for rows that are not finite, all zero, or equal to one another."""
    import numpy as np

    if not np.isfinite(rows_EH).all():
        raise UpcycleError(f"{where} holds values that are not finite.")
    if not rows_EH.any(axis=1).all():
        raise UpcycleError(f"{where} has a row of zeros, whose experts no logit would tell apart.")
    if len(np.unique(rows_EH, axis=0)) < len(rows_EH):
        raise UpcycleError(
            f"{where} has equal rows: their experts would be chosen together, or one by chance.",
            "Give one row for each virtual group; they are repeated for its experts.",
        )
