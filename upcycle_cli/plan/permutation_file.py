"""A file of neuron orders: one safetensors file, with a tensor `layers.3.neuron_order` per layer.

Each is a permutation of the dense MLP's neurons of shape (I,), for every virtual group, or (E, I),
one for each group, in 32- or 64-bit integers. Shard s of a group gets the neurons at places
[s·I/G, (s+1)·I/G). Layers are counted from 0; layers that stay dense have no permutation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from upcycle_cli.checkpoint.header import TensorEntry, read_shard_header
from upcycle_cli.checkpoint.storage import Storage
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.text import counted, printable
from upcycle_cli.plan.expressions import Permutation
from upcycle_cli.recipe.recipe import NeuronOrder, Recipe

_INTEGERS = {"I32": "<i4", "U32": "<u4", "I64": "<i8"}
_MAX_BYTES = 4_000_000_000


def order_name(layer: int, group: int | None = None) -> str:
    """Return the name of a layer's or a group's order: in a file, and as a random stream."""
    return f"layers.{layer}.neuron_order" + ("" if group is None else f".{group}")


@dataclass(frozen=True, eq=False)
class PermutationFile:
    """The permutations of a file, as 32-bit integers."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    data: Mapping[str, bytes]
    digest: str

    @property
    def record(self) -> dict[str, str]:
        """What `upcycle.json` says of it: its name, and the SHA-256 of the orders in it."""
        return {"name": printable(self.path.name), "sha256": self.digest}

    def check(self, layers: Collection[int], expansion: int, size: int) -> None:
        """Raise UpcycleError unless these layers, and no others, have orders of `size` neurons."""
        check_names(self.path, self.shapes, [*map(order_name, layers)], "an order")
        for name, shape in self.shapes.items():
            if shape not in ((size,), (expansion, size)):
                raise UpcycleError(
                    f"{self.path}: {name} has shape {list(shape)}; {[size]} is needed, a "
                    f"permutation of the dense MLP's neurons, or {[expansion, size]}, one for each "
                    "virtual group."
                )

    def check_shared(self, width: int) -> None:
        """Raise UpcycleError unless all groups begin with the same `width` neurons."""
        for name, (*groups, size) in self.shapes.items():
            starts = [4 * size * group for group in range(groups[0] if groups else 1)]
            if len({self.data[name][start : start + 4 * width] for start in starts}) > 1:
                raise UpcycleError(
                    f"{self.path}: the orders of {name} differ in their first {width} places, and "
                    "those are the shared expert's.",
                    "Begin the orders of all groups alike, or leave out --shared-experts.",
                )

    def of_layer(self, layer: int, expansion: int) -> list[Permutation | None]:
        """Return the order of each group; a tensor (I,) gives all groups equal orders."""
        name = order_name(layer)
        *groups, size = self.shapes[name]
        if not groups:
            return [
                Permutation(size, name, origin=self.digest, indices=self.data[name])
            ] * expansion
        step = 4 * size
        return [
            Permutation(
                size,
                order_name(layer, group),
                origin=self.digest,
                indices=self.data[name][group * step : (group + 1) * step],
            )
            for group in range(expansion)
        ]


def read_permutation_file(path: Path) -> PermutationFile:
    """Read a file of neuron orders; UpcycleError when unreadable or when one is no permutation."""
    takes = "sliced, shuffled, clustered, or a safetensors file of permutations"
    storage, entries = open_user_file(path, f"--neuron-order takes {takes}.", "orders")
    data = {entry.name: _read(storage, path, entry) for entry in entries}
    return PermutationFile(
        path, {entry.name: entry.shape for entry in entries}, data, tensors_digest(data)
    )


def open_user_file(path: Path, hint: str, what: str) -> tuple[Storage, list[TensorEntry]]:
    """Return the storage and the tensors of a user's safetensors file; raises UpcycleError.

    `hint` lists the option's other values, and `what` names the tensors.
    """
    if not path.is_file():
        raise UpcycleError(f"there is no file {path}.", hint)
    storage = Storage(path.parent)
    stamp, entries = read_shard_header(storage, path.name)
    if stamp.size > _MAX_BYTES:
        raise UpcycleError(f"{path} has {stamp.size:,} bytes, and {what} are smaller than that.")
    return storage, entries


def tensors_digest(data: Mapping[str, bytes]) -> str:
    """Return the SHA-256 of tensors and their names, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(data):
        digest.update(f"{name} {len(data[name])}\n".encode() + data[name])
    return digest.hexdigest()


def check_names(path: Path, held: Collection[str], wanted: Sequence[str], needed: str) -> None:
    """Raise UpcycleError unless a file has the tensors of all MoE layers and no others.

    `needed` says in words what each of these layers needs.
    """

    def some(names: Sequence[str]) -> str:
        return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]

    if missing := [name for name in wanted if name not in held]:
        raise UpcycleError(
            f"{path} lacks {some(missing)}.",
            f"It holds {', '.join([*held][:3]) or 'nothing'}. Each layer that becomes a mixture of "
            f"experts needs {needed}.",
        )
    if unknown := [name for name in held if name not in wanted]:
        raise UpcycleError(
            f"{path}: {some(unknown)} belongs to no layer that becomes a mixture of experts "
            f"({counted(len(wanted), 'layer')}).",
            "Take it out, or choose other --layers.",
        )


def check_neuron_orders(
    file: PermutationFile | None, recipe: Recipe, layers: Collection[int], size: int
) -> None:
    """Raise UpcycleError unless a file is given exactly where the recipe needs one, and fits."""
    if (file is not None) != (recipe.neuron_order is NeuronOrder.FILE):
        raise UpcycleError(
            "neuron orders come from a file, and there is none."
            if file is None
            else f"a file of neuron orders was given, and --neuron-order is {recipe.neuron_order}.",
            "Give the file itself: --neuron-order ORDERS.safetensors.",
        )
    if file is not None:
        file.check(layers, recipe.expansion, size)
        file.check_shared(size // recipe.granularity * recipe.shared_experts)


def _read(storage: Storage, path: Path, entry: TensorEntry) -> bytes:
    """Return a tensor's permutations as 32-bit integers; UpcycleError if one is none."""
    import numpy as np

    where = f"{path}: {entry.name}"
    if entry.dtype not in _INTEGERS or not 1 <= len(entry.shape) <= 2 or not entry.num_elements:
        raise UpcycleError(
            f"{where} is {entry.dtype} of shape {list(entry.shape)}; an order is (I,) or (E, I) "
            f"of {', '.join(_INTEGERS)}."
        )
    raw = storage.read(path.name, entry.offset, entry.offset + entry.nbytes)
    orders_EI = np.frombuffer(raw, _INTEGERS[entry.dtype]).reshape(-1, entry.shape[-1])
    for group, order_I in enumerate(orders_EI):
        odd = np.flatnonzero(np.sort(order_I) != np.arange(len(order_I)))
        if len(odd):
            which = f", group {group}" if len(entry.shape) == 2 else ""
            raise UpcycleError(
                f"{where}{which} is no permutation: it must name each neuron from 0 to "
                f"{len(order_I) - 1} once."
            )
    return orders_EI.astype("<u4").tobytes()
