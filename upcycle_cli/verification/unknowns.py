"""Values that a plan leaves open until it sees data: router rows, and orders of neurons.

They are read from the MoE itself and checked. Rows must be usable and the same within a virtual
group; an order must be a permutation, found by hashing the neurons on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from upcycle_cli.checkpoint.arrays import NUMPY_DTYPES, as_float32, rounded, to_float32
from upcycle_cli.checkpoint.checkpoint import Reader
from upcycle_cli.checkpoint.header import ITEM_BYTES
from upcycle_cli.plan import expressions as ex
from upcycle_cli.plan.merge import MergedReader
from upcycle_cli.plan.output import OutputTensor
from upcycle_cli.verification.neuron_hashes import neuron_hashes
from upcycle_cli.write.evaluate import evaluate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Hashes = NDArray[np.uint64]

_BITS = {"F32": "<u4", "F16": "<u2", "BF16": "<u2"}


@dataclass
class Known:
    """Values for what is open, by stream: rows of routers, and orders as 32-bit integers."""

    rows: dict[str, bytes] = field(default_factory=dict)
    orders: dict[str, bytes] = field(default_factory=dict)

    def filled(self, expr: ex.Expr) -> ex.Expr:
        """Return an expression with the known values in it."""
        match expr:
            case ex.Constant(stream=stream, data=None):
                return replace(expr, data=self.rows.get(stream))
            case ex.Gather(order=ex.Permutation(stream=stream, seed=None, indices=None) as order):
                return replace(expr, order=replace(order, indices=self.orders.get(stream)))
            case ex.Concat(parts) | ex.Stack(parts):
                return replace(expr, parts=tuple(map(self.filled, parts)))
            case _ if is_open(expr):
                return replace(expr, of=self.filled(expr.of))  # type: ignore[arg-type,union-attr]
            case _:
                return expr


def is_open(expr: ex.Expr) -> bool:
    """Whether an expression has a value that is not known."""
    match expr:
        case ex.Constant(data=None) | ex.Gather(order=ex.Permutation(seed=None, indices=None)):
            return True
        case _:
            return any(map(is_open, ex.operands(expr)))


# Router rows --------------------------------------------------------------------------------------


def read_rows(tensor: OutputTensor, held: memoryview, dtype: str, known: Known) -> Iterator[str]:
    """Take the rows of a router from the MoE; yield what makes them unusable."""
    times, expr = 1, tensor.expr
    while isinstance(expr, ex.Repeat | ex.Cast):
        times *= expr.times if isinstance(expr, ex.Repeat) else 1
        expr = expr.of
    if not isinstance(expr, ex.Constant) or expr.data is not None:
        return
    rows_EH = as_float32(bytes(held), dtype, tensor.shape)[::times]
    known.rows[expr.stream] = rounded(rows_EH, expr.dtype).tobytes()
    if not np.isfinite(rows_EH).all():
        yield f"{tensor.name} holds values that are not finite"
    elif not rows_EH.any(axis=1).all():
        yield f"{tensor.name} has a row of zeros, whose experts no logit would tell apart"
    elif len(np.unique(rows_EH, axis=0)) < len(rows_EH):
        yield f"{tensor.name} has the same row for several groups"


def rows_differ(held: bytes, fitted: bytes, dtype: str, width: int) -> Iterator[tuple[int, float]]:
    """Yield the rows that are not those that were fitted again, each with its cosine to that."""
    one_EH, other_EH = (
        as_float32(data, dtype, (len(data) // (width * ITEM_BYTES[dtype]), width)).astype("f8")
        for data in (held, fitted)
    )
    lengths = np.linalg.norm(one_EH, axis=1), np.linalg.norm(other_EH, axis=1)
    cosines = (one_EH * other_EH).sum(1) / np.maximum(lengths[0] * lengths[1], 1e-30)
    for row, cosine in enumerate(cosines.tolist()):
        if not (cosine >= 0.999 and 0.95 <= lengths[0][row] / lengths[1][row] <= 1.05):
            yield row, cosine


# Orders of neurons --------------------------------------------------------------------------------


class _Neurons:
    """Hashes of the neurons of one group, by the part of the MLP: as held, and as wanted."""

    def __init__(self, size: int) -> None:
        self.held: dict[str, Hashes] = {}
        self.wanted: dict[str, Hashes] = {}
        self.seen = np.zeros(size, np.bool_)

    def note(self, part: str, start: int, held: Hashes, wanted: Hashes) -> None:
        """Note the neurons held from place `start` on; `wanted` are all of the dense MLP's."""
        places = slice(start, start + len(held))
        self.held.setdefault(part, np.zeros_like(wanted))[places] = held
        self.wanted.setdefault(part, wanted)
        self.seen[places] = True

    def order(self, first: NDArray[np.intp] | None) -> NDArray[np.intp] | None:
        """Return by place the dense neuron that is there; None where no part has an order.

        Places that are not seen are a shared expert's, and as in the `first` group.
        """
        if first is None and not self.seen.all():
            return None
        order = np.zeros(len(self.seen), np.intp) if first is None else first.copy()
        left = np.ones(len(self.seen), np.bool_)
        left[order[~self.seen]] = False
        # All parts together tell twins apart; of a damaged part the others still tell the order.
        for count in range(len(self.held), 0, -1):
            for parts in combinations(self.held, count):
                held = np.sum([self.held[part] for part in parts], axis=0)[self.seen]
                wanted = np.sum([self.wanted[part] for part in parts], axis=0)[left]
                by_held, by_wanted = (np.argsort(each, kind="stable") for each in (held, wanted))
                if np.array_equal(held[by_held], wanted[by_wanted]):
                    places = np.flatnonzero(self.seen)[by_held]
                    order[places] = np.flatnonzero(left)[by_wanted]
                    return order
        return None


class Orders:
    """Finds the orders that a plan leaves open, tensor by tensor."""

    def __init__(self, source: Reader | MergedReader) -> None:
        self._source = source
        self._neurons: dict[str, _Neurons] = {}
        self._wanted: dict[ex.Expr, Hashes] = {}
        self.perturbed = False
        """Whether neurons cannot be recognised, since noise or new values were drawn upon them."""

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
        if not (isinstance(found, ex.Gather) and isinstance(found.of, ex.Source)):
            self.perturbed |= is_open(expr)
            return
        if not is_open(found):
            return
        if dtype != kind:  # widened without loss, or it will differ
            values = to_float32(matrix.view(NUMPY_DTYPES[dtype]), dtype)
            matrix = rounded(values, kind).view(_BITS[kind])
        part, plain = found.of.name, _in_order(expr)
        if plain not in self._wanted:
            data = evaluate(plain, self._source.mapped)
            values = np.ndarray(ex.type_of(plain).shape, _BITS[kind], data)
            self._wanted[plain] = neuron_hashes(values, found.dim, part)
        neurons = self._neurons.setdefault(found.order.stream, _Neurons(found.order.size))
        held = neuron_hashes(matrix, found.dim, part)
        neurons.note(part, found.start, held, self._wanted[plain])

    def find(self, known: Known) -> Iterator[str]:
        """Note the orders that were found; yield where there is none."""
        first: dict[str, NDArray[np.intp]] = {}  # by layer: the first group's order
        for stream, neurons in self._neurons.items():
            layer = stream.partition(".neuron_order")[0]
            order = neurons.order(first.get(layer))
            if order is None:
                yield f"{stream}: the neurons are no permutation of the dense MLP's"
                continue
            first.setdefault(layer, order)
            known.orders[stream] = order.astype("<u4").tobytes()


@lru_cache(maxsize=4)
def _identity(size: int) -> ex.Permutation:
    return ex.Permutation(size, "identity", indices=np.arange(size, dtype="<u4").tobytes())


def _in_order(expr: ex.Expr) -> ex.Expr:
    """Return an expression of gathered neurons with all neurons, in the dense MLP's order."""
    if isinstance(expr, ex.Gather):
        return replace(expr, order=_identity(expr.order.size), start=0, stop=expr.order.size)
    assert isinstance(expr, ex.Cast | ex.Scale)
    return replace(expr, of=_in_order(expr.of))
