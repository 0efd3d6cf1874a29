"""The inputs of a recipe beside the source: a text, prompts, router rows, neuron orders.

Router rows and neuron orders are safetensors files with one tensor per layer.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from upcycle_cli.checkpoint.header import TORCH_DTYPES, Tensor, read_shard_header
from upcycle_cli.checkpoint.storage import Storage
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.text import printable
from upcycle_cli.plan.expressions import Constant, Permutation
from upcycle_cli.plan.texts import BUILTIN, CalibrationText, Prompts, calibration_text, read_prompts
from upcycle_cli.recipe.recipe import NeuronOrder, Recipe, RouterInit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_INTEGERS = {"I32": "<i4", "U32": "<u4", "I64": "<i8"}


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """What a file of tensors contains."""

    name: str
    """The last part of the tensors' names."""
    dtypes: Collection[str]
    needed: str
    """The meaning of a layer's tensor, for messages."""


ROUTER_ROWS = FileKind(
    name="router",
    dtypes=TORCH_DTYPES,
    needed="a row for each virtual group, or for each expert without virtual groups",
)
NEURON_ORDERS = FileKind(
    name="neuron_order",
    dtypes=_INTEGERS,
    needed="a permutation of the dense MLP's neurons, or one for each virtual group",
)


def router_stream(layer: int) -> str:
    """Return the name of a layer's router rows: in a file, and as a random stream."""
    return f"layers.{layer}.router"


def flaw_of(rows_EH: NDArray[np.float32]) -> str | None:
    """Return why router rows are unusable; None if they are usable."""
    import numpy as np

    if not np.isfinite(rows_EH).all():
        return "holds values that are not finite"
    if not rows_EH.any(axis=1).all():
        return "has a row of zeros, so a logit would always be 0"
    if len(np.unique(rows_EH, axis=0)) < len(rows_EH):
        return "has equal rows, so their experts would have equal logits"
    return None


def order_name(layer: int, group: int | None = None) -> str:
    """Return the name of a layer's or a group's order: in a file, and as a random stream."""
    return f"layers.{layer}.neuron_order" + ("" if group is None else f".{group}")


@dataclass(frozen=True, eq=False, kw_only=True)
class TensorFile:
    """The tensors of a file, their bytes, and the digest of both; orders as 32-bit integers."""

    path: Path
    kind: FileKind
    tensors: Mapping[str, Tensor]
    data: Mapping[str, bytes]
    digest: str

    @property
    def record(self) -> dict[str, str]:
        """The name of the file and the SHA-256 of its tensors, as `upcycle.json` states them."""
        return {"name": printable(self.path.name), "sha256": self.digest}

    def check(self, layers: Collection[int], *shapes: tuple[int, ...]) -> None:
        """Raise UpcycleError unless each of these layers has a tensor in one of these shapes."""
        names = [f"layers.{layer}.{self.kind.name}" for layer in layers]
        if missing := [name for name in names if name not in self.tensors]:
            hint = f"Each layer that becomes a mixture of experts needs {self.kind.needed}."
            raise UpcycleError(f"{self.path} lacks {missing[0]}.", hint)
        for name, tensor in self.tensors.items():
            if name not in names:
                words = f"{self.path}: {name} belongs to no MoE layer."
                raise UpcycleError(words, "Remove it, or choose other `layers`.")
            if tensor.shape not in shapes:
                able = " or ".join(str([*shape]) for shape in shapes)
                words = f"{name} has shape {[*tensor.shape]}, not {able}: {self.kind.needed}"
                raise UpcycleError(f"{self.path}: {words}.")

    def check_shared(self, width: int) -> None:
        """Raise UpcycleError unless all groups begin with the same `width` neurons."""
        for name, data in self.data.items():
            whole = 4 * self.tensors[name].shape[-1]
            if len({data[at : at + 4 * width] for at in range(0, len(data), whole)}) > 1:
                raise UpcycleError(
                    f"{self.path}: the orders of {name} differ in the first {width} neurons, which "
                    "form the shared expert.",
                    "Use the same first neurons for all groups, or leave out `shared_experts`.",
                )

    def router_rows(self, layer: int, dtype: str) -> Constant:
        """Return a layer's router rows; UpcycleError if a router of `dtype` cannot use them."""
        import numpy as np

        from upcycle_cli.checkpoint.header import as_float32, rounded, to_float32

        name = router_stream(layer)
        stored, data = self.tensors[name], self.data[name]
        with np.errstate(over="ignore"):
            rows_EH = rounded(as_float32(data, stored.dtype, stored.shape), dtype)
        rows_EH = to_float32(rows_EH, dtype)
        where = f"{self.path}: {name}"
        if stored.dtype != dtype:
            where += f", as {TORCH_DTYPES[dtype]},"
        if flaw := flaw_of(rows_EH):
            hint = "Give one row for each virtual group; they are repeated for its experts."
            raise UpcycleError(f"{where} {flaw}.", hint if "equal" in flaw else None)
        return Constant(name, stored.dtype, (*rows_EH.shape,), self.digest, data)

    def orders(self, layer: int, expansion: int) -> list[Permutation]:
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


def read_tensor_file(path: Path, kind: FileKind) -> TensorFile:
    """Read a file; UpcycleError if it is unreadable or has tensors of another kind."""
    storage, tensors, data = Storage(path.parent), dict[str, Tensor](), dict[str, bytes]()
    for entry in read_shard_header(storage, path.name)[1]:
        is_named = re.fullmatch(rf"layers\.\d+\.{kind.name}", entry.name)
        is_usable = entry.dtype in kind.dtypes and entry.shape and entry.num_elements
        if not (is_named and is_usable):
            raise UpcycleError(
                f"{path}: {printable(entry.name)} is {entry.dtype} of shape {[*entry.shape]}.",
                f"The tensor of layer 3 is layers.3.{kind.name}, of dtype "
                f"{' or '.join(kind.dtypes)}.",
            )
        tensors[entry.name] = entry
        held = storage.read(path.name, entry.offset, entry.offset + entry.nbytes)
        data[entry.name] = _permutations(path, entry, held) if kind is NEURON_ORDERS else held
    digest = hashlib.sha256()
    for name in sorted(data):
        digest.update(f"{name} {len(data[name])}\n".encode() + data[name])
    return TensorFile(path=path, kind=kind, tensors=tensors, data=data, digest=digest.hexdigest())


def _permutations(path: Path, tensor: Tensor, data: bytes) -> bytes:
    """Return orders as 32-bit integers; UpcycleError unless each is a permutation."""
    import numpy as np

    size = tensor.shape[-1]
    orders_EI = np.frombuffer(data, _INTEGERS[tensor.dtype]).reshape(-1, size)
    for group, order_I in enumerate(orders_EI):
        if (np.sort(order_I) != np.arange(size)).any():
            which = f", group {group}" if len(tensor.shape) == 2 else ""
            words = f"{tensor.name}{which} is not a permutation of 0 to {size - 1}"
            raise UpcycleError(f"{path}: {words}.")
    return orders_EI.astype("<u4").tobytes()


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The text or prompts, the router rows and the neuron orders that the user gave."""

    text: CalibrationText | Prompts | None = None
    rows: TensorFile | None = None
    orders: TensorFile | None = None
    complete: bool = True
    """False if some may be missing: verify then reads their values from the output."""

    @property
    def text_digest(self) -> str:
        """The digest of the text or the prompts; "" without any."""
        return "" if self.text is None else self.text.digest

    @classmethod
    def read(
        cls,
        *,
        calibration: Path | str | None = None,
        rows: Path | str | None = None,
        orders: Path | str | None = None,
        prompts: Path | str | None = None,
    ) -> Self:
        """Read a text (a file, or `builtin`) and files; UpcycleError if one is unreadable."""
        if calibration is not None and prompts is not None:
            words = "`positive_prompts` and `calibration` exclude each other."
            raise UpcycleError(words, "Leave one out.")
        text = None if prompts is None else read_prompts(Path(prompts))
        return cls(
            text=text if calibration is None else calibration_text(calibration),
            rows=None if rows is None else read_tensor_file(Path(rows), ROUTER_ROWS),
            orders=None if orders is None else read_tensor_file(Path(orders), NEURON_ORDERS),
        )

    def for_recipe(
        self, recipe: Recipe, layers: Collection[int], *, width: int, hidden: int
    ) -> Inputs:
        """Return the inputs of a resolved recipe, with the built-in text if it needs one.

        Raises UpcycleError for a missing or superfluous input, and for a file that does not fit the
        layers, I = `width` and H = `hidden`.
        """
        prompts = self.text if isinstance(self.text, Prompts) else None
        init, order = recipe.router_init, recipe.neuron_order
        by_init, by_order = f"`router_init` is {init}", f"`neuron_order` is {order}"
        needed = (
            (self.rows, init is RouterInit.FILE, by_init, "a file of router rows"),
            (prompts, init is RouterInit.PROMPTS, by_init, "`positive_prompts`"),
            (self.orders, order is NeuronOrder.FILE, by_order, "a file of neuron orders"),
        )
        for found, is_needed, chosen, name in needed:
            if (found is not None) != is_needed and (self.complete or not is_needed):
                given = f"{'without' if found is None else 'with'} {name}"
                raise UpcycleError(f"{chosen}, {given}.", "Give both, or neither.")
        if self.rows is not None:
            self.rows.check(layers, (recipe.router_rows, hidden))
        if self.orders is not None:
            self.orders.check(layers, (width,), (recipe.expansion, width))
            self.orders.check_shared(width // recipe.granularity * recipe.shared_experts)
        if self.text is None and self.complete and recipe.calibrates:
            return replace(self, text=calibration_text(BUILTIN))
        return self
