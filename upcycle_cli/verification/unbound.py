"""Read the values that a plan leaves unbound from the MoE: router rows and neuron orders.

Rows must be usable and equal within a virtual group. An order must be a permutation, which is
found by hashing the neurons of both models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np

from upcycle_cli.checkpoint.checkpoint import Reader
from upcycle_cli.checkpoint.header import NUMPY_DTYPES, as_float32, rounded, to_float32
from upcycle_cli.checkpoint.storage import RECORD_NAME
from upcycle_cli.plan import expressions as ex
from upcycle_cli.plan.calibration import LayerFound
from upcycle_cli.plan.inputs import flaw_of
from upcycle_cli.plan.output import OutputTensor
from upcycle_cli.verification.neuron_hashes import neuron_hashes
from upcycle_cli.write.evaluate import evaluate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Hashes = NDArray[np.uint64]

_MOST_FIT_ERROR = 0.05
"""How far the same calibration on another machine may move a router row, relatively."""
_BITS = {"F32": "<u4", "F16": "<u2", "BF16": "<u2"}


def is_unbound(expr: ex.Expr) -> bool:
    """Whether an expression has an unbound value."""
    match expr:
        case ex.Constant(data=None) | ex.Gather(order=ex.Permutation(seed=None, indices=None)):
            return True
        case _:
            return any(map(is_unbound, ex.operands(expr)))


class _Neurons:
    """Hashes of the neurons of one group by the part of the MLP: of the MoE, and as wanted."""

    def __init__(self, size: int) -> None:
        self.held: dict[str, Hashes] = {}
        self.wanted: dict[str, Hashes] = {}
        self.seen = np.zeros(size, np.bool_)

    def note(self, part: str, start: int, held: Hashes, wanted: Hashes) -> None:
        """Note the neurons from place `start` on; `wanted` are all neurons of the dense MLP."""
        places = slice(start, start + len(held))
        self.held.setdefault(part, np.zeros_like(wanted))[places] = held
        self.wanted.setdefault(part, wanted)
        self.seen[places] = True

    def order(self, first: NDArray[np.intp] | None) -> NDArray[np.intp] | None:
        """Return the dense neuron at each place; None without an order."""
        if first is None and not self.seen.all():
            return None
        order = np.zeros(len(self.seen), np.intp) if first is None else first.copy()
        left = np.ones(len(self.seen), np.bool_)
        # Places that were not seen belong to a shared expert, and are as in the first group.
        left[order[~self.seen]] = False
        # All parts together distinguish twins. If some are damaged, one of the others may do.
        for parts in ([*self.held], *([part] for part in self.held)):
            held = np.sum([self.held[part] for part in parts], axis=0)[self.seen]
            wanted = np.sum([self.wanted[part] for part in parts], axis=0)[left]
            by_held, by_wanted = (np.argsort(each, kind="stable") for each in (held, wanted))
            if np.array_equal(held[by_held], wanted[by_wanted]):
                places = np.flatnonzero(self.seen)[by_held]
                order[places] = np.flatnonzero(left)[by_wanted]
                return order
        return None


class Unbound:
    """Collects unbound values tensor by tensor.

    `fitted` has the result of another calibration by layer, or is empty. `recorded` has the SHA-256
    of each router as convert wrote it.
    """

    def __init__(
        self, source: Reader, fitted: Mapping[int, LayerFound], recorded: Mapping[str, str]
    ) -> None:
        self._source, self._fitted, self._recorded = source, fitted, recorded
        self._neurons: dict[str, _Neurons] = {}
        self._wanted: dict[ex.Expr, Hashes] = {}
        self._rows: dict[str, bytes] = {}
        self.orders: dict[str, bytes] = {}
        """By stream, as 32-bit integers."""

    def read_rows(self, tensor: OutputTensor, held: memoryview, dtype: str) -> Iterator[str]:
        """Take the rows of a router from the MoE; yield failures."""
        times, expr = 1, tensor.expr
        while isinstance(expr, ex.Repeat | ex.Cast):
            times *= expr.times if isinstance(expr, ex.Repeat) else 1
            expr = expr.of
        assert isinstance(expr, ex.Constant)
        rows_EH = as_float32(bytes(held), dtype, tensor.shape)[::times]
        self._rows[expr.stream] = rounded(rows_EH, expr.dtype).tobytes()
        if flaw := flaw_of(rows_EH):
            yield f"{tensor.name} {flaw}"
        digest = sha256(held).hexdigest()
        if dtype == tensor.dtype and self._recorded.get(tensor.name, digest) != digest:
            yield f"{tensor.name} was changed: its SHA-256 differs from {RECORD_NAME}"
        if tensor.layer is None or tensor.layer not in self._fitted:
            return
        again_EH = as_float32(self._fitted[tensor.layer].rows, tensor.dtype, rows_EH.shape)
        pair = rows_EH - again_EH, again_EH
        errors_E, lengths_E = (np.linalg.norm(each.astype("f8"), axis=1) for each in pair)
        for row in np.flatnonzero(~(errors_E <= _MOST_FIT_ERROR * lengths_E)):
            yield f"{tensor.name}: another calibration gives a different row for group {row}"

    def look_at(self, tensor: OutputTensor, held: memoryview, dtype: str) -> None:
        """Note the neurons of a tensor of experts."""
        start = 0
        for leaf in ex.leaves(tensor.expr):
            shape = ex.type_of(leaf).shape
            matrix = np.ndarray(shape, _BITS[dtype], held, start)
            start += matrix.nbytes
            if not isinstance(leaf, ex.Transpose):
                self._note(leaf, matrix, dtype)
                continue
            row = 0
            for part in ex.leaves(leaf.of):
                count = ex.type_of(part).shape[0]
                self._note(part, matrix[:, row : row + count].T, dtype)
                row += count

    def _note(self, expr: ex.Expr, matrix: NDArray[Any], dtype: str) -> None:
        found, kind = expr, ex.type_of(expr).dtype
        while isinstance(found, ex.Cast | ex.Scale):
            found = found.of
        if not is_unbound(found):
            return
        if not (isinstance(found, ex.Gather) and isinstance(found.of, ex.Held)):
            return  # noise or new neurons hide the order
        if dtype != kind:  # widened without loss, or it will differ
            values = to_float32(matrix.view(NUMPY_DTYPES[dtype]), dtype)
            matrix = rounded(values, kind).view(_BITS[kind])
        part, plain = next(ex.source_names(found.of)), _in_order(expr)
        if plain not in self._wanted:
            data = evaluate(plain, self._source.mapped)
            values = np.ndarray(ex.type_of(plain).shape, _BITS[kind], data)
            self._wanted[plain] = neuron_hashes(values, found.dim, part)
        neurons = self._neurons.setdefault(found.order.stream, _Neurons(found.order.size))
        held = neuron_hashes(matrix, found.dim, part)
        neurons.note(part, found.start, held, self._wanted[plain])

    def find_orders(self) -> Iterator[str]:
        """Find the order of the neurons of each group; yield failures."""
        first: dict[str, NDArray[np.intp]] = {}  # by layer: the first group's order
        for stream, neurons in self._neurons.items():
            layer = stream.partition(".neuron_order")[0]
            order = neurons.order(first.get(layer))
            if order is None:
                yield f"{stream}: the neurons are not a permutation of the dense MLP's neurons"
                continue
            first.setdefault(layer, order)
            self.orders[stream] = order.astype("<u4").tobytes()

    def bind(self, expr: ex.Expr) -> ex.Expr:
        """Return an expression with the values that were found."""
        match expr:
            case ex.Constant(stream=stream, data=None):
                return replace(expr, data=self._rows.get(stream))
            case ex.Gather(order=ex.Permutation(stream=stream, seed=None, indices=None) as order):
                found = self._fitted.get(int(stream.split(".")[1]))
                indices = self.orders.get(stream, None if found is None else found.order)
                return replace(expr, order=replace(order, indices=indices))
            case ex.Concat(parts) | ex.Stack(parts):
                return replace(expr, parts=tuple(map(self.bind, parts)))
            case _ if is_unbound(expr):
                return replace(expr, of=self.bind(expr.of))  # type: ignore[arg-type,union-attr]
            case _:
                return expr


def _in_order(expr: ex.Expr) -> ex.Expr:
    """Return an expression of gathered neurons with all neurons, in the dense MLP's order."""
    if isinstance(expr, ex.Gather):
        size = expr.order.size
        indices = np.arange(size, dtype="<u4").tobytes()
        order = ex.Permutation(size, "identity", indices=indices)
        return replace(expr, order=order, start=0, stop=size)
    assert isinstance(expr, ex.Cast | ex.Scale)
    return replace(expr, of=_in_order(expr.of))
