"""Values that a plan leaves open until it sees data: router rows, and orders of neurons.

They are read from the MoE itself and checked. Rows must be usable and the same within a virtual
group; an order must be a permutation, found by hashing the neurons on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from upcycle_cli.checkpoint.arrays import as_float32, rounded, to_float32
from upcycle_cli.checkpoint.checkpoint import Reader
from upcycle_cli.plan.expressions import (
    AddNoise,
    Cast,
    Concat,
    Constant,
    Expr,
    Gather,
    Permutation,
    Reinit,
    Repeat,
    Scale,
    Source,
    Stack,
    Transpose,
    leaves,
    num_bytes,
    operands,
    source_names,
    type_of,
)
from upcycle_cli.plan.merge import MergedReader
from upcycle_cli.plan.output import OutputTensor
from upcycle_cli.verification.neuron_hashes import match_hashes, neuron_hashes
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

    def filled(self, expr: Expr) -> Expr:
        """Return an expression with the known values in it."""
        match expr:
            case Constant(stream=stream, data=None):
                return replace(expr, data=self.rows.get(stream))
            case Gather(of=of, order=order):
                if order.seed is None and order.indices is None:
                    order = replace(order, indices=self.orders.get(order.stream))
                return replace(expr, of=self.filled(of), order=order)
            case Concat(parts) | Stack(parts):
                return replace(expr, parts=tuple(map(self.filled, parts)))
            case Cast(of) | Scale(of) | AddNoise(of) | Reinit(of) | Transpose(of) | Repeat(of):
                return replace(expr, of=self.filled(of))
            case _:
                return expr


def is_open(expr: Expr) -> bool:
    """Whether an expression has a value that is not known."""
    match expr:
        case Constant(data=None) | Gather(order=Permutation(seed=None, indices=None)):
            return True
        case _:
            return any(map(is_open, operands(expr)))


# Router rows --------------------------------------------------------------------------------------


def read_rows(tensor: OutputTensor, held: memoryview, dtype: str, known: Known) -> Iterator[str]:
    """Take the rows of a router from the MoE; yield what makes them unusable."""
    times = tensor.expr.times if isinstance(tensor.expr, Repeat) else 1
    expr = tensor.expr.of if isinstance(tensor.expr, Repeat) else tensor.expr
    while isinstance(expr, Cast):
        expr = expr.of
    if not isinstance(expr, Constant) or expr.data is not None:
        return
    rows_EH = as_float32(bytes(held), dtype, tensor.shape)[::times]
    known.rows[expr.stream] = rounded(rows_EH, expr.dtype).tobytes()
    if not np.isfinite(rows_EH).all():
        yield f"{tensor.name} holds values that are not finite"
    elif not rows_EH.any(axis=1).all():
        yield f"{tensor.name} has a row of zeros, whose experts no logit would tell apart"
    else:
        _, group = np.unique(rows_EH, axis=0, return_inverse=True)
        first: dict[int, int] = {}
        for row, kind in enumerate(group.reshape(-1).tolist()):
            if kind in first:
                yield f"{tensor.name}: rows {first[kind]} and {row} of its groups are the same"
            first.setdefault(kind, row)


def rows_differ(held: bytes, fitted: bytes, dtype: str, width: int) -> Iterator[tuple[int, float]]:
    """Yield the rows that are not those that were fitted again, each with its cosine to that."""
    one_EH, other_EH = (
        as_float32(data, dtype, (len(data) // (width * _itemsize(dtype)), width)).astype(np.float64)
        for data in (held, fitted)
    )
    lengths = np.linalg.norm(one_EH, axis=1), np.linalg.norm(other_EH, axis=1)
    cosines = (one_EH * other_EH).sum(1) / np.maximum(lengths[0] * lengths[1], 1e-30)
    for row, cosine in enumerate(cosines.tolist()):
        if not (cosine >= 0.999 and 0.95 <= lengths[0][row] / lengths[1][row] <= 1.05):
            yield row, cosine


# Orders of neurons --------------------------------------------------------------------------------


@dataclass
class _Neurons:
    """Hashes of the neurons of one group, by the part of the MLP: as held, and as wanted."""

    size: int
    held: dict[str, Hashes] = field(default_factory=dict)
    wanted: dict[str, Hashes] = field(default_factory=dict)
    seen: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.seen = np.zeros(self.size, np.bool_)

    def note(self, part: str, start: int, held: Hashes, wanted: Hashes) -> None:
        """Note the neurons held from place `start` on; `wanted` are all of the dense MLP's."""
        places = slice(start, start + len(held))
        self.held.setdefault(part, np.zeros(self.size, np.uint64))[places] = held
        self.wanted.setdefault(part, wanted.copy())[places] = wanted[places]
        self.seen[places] = True


class Orders:
    """Finds the orders that a plan leaves open, tensor by tensor."""

    def __init__(self, source: Reader | MergedReader) -> None:
        self._source = source
        self._neurons: dict[str, _Neurons] = {}
        self._wanted: dict[Expr, Hashes] = {}
        self.perturbed = False
        """Whether neurons cannot be recognised, since noise or new values were drawn upon them."""

    def look_at(self, tensor: OutputTensor, held: memoryview, dtype: str) -> None:
        """Note the neurons of a tensor of experts."""
        start = 0
        for leaf in leaves(tensor.expr):
            nbytes = num_bytes(leaf) // _itemsize(type_of(leaf).dtype) * _itemsize(dtype)
            shape = type_of(leaf).shape
            matrix = np.ndarray(shape, _BITS[dtype], held[start : start + nbytes])
            start += nbytes
            if not isinstance(leaf, Transpose):
                self._note(leaf, matrix, dtype)
                continue
            row = 0
            for part in leaves(leaf.of):
                count = type_of(part).shape[0]
                self._note(part, matrix[:, row : row + count].T, dtype)
                row += count

    def _note(self, expr: Expr, matrix: NDArray[Any], dtype: str) -> None:
        found = _gather_of(expr)
        if found is None:
            self.perturbed |= is_open(expr)
            return
        part, kind = next(source_names(expr)), type_of(expr).dtype
        if dtype != kind:  # widened without loss, or it will differ
            matrix = rounded(to_float32(matrix.view(_NUMPY[dtype]), dtype), kind).view(_BITS[kind])
        identity = Permutation(found.order.size, "identity", indices=_identity(found.order.size))
        plain = _with_order(expr, identity)
        if plain not in self._wanted:
            data = evaluate(plain, self._source.mapped)
            values = np.ndarray(type_of(plain).shape, _BITS[kind], data)
            self._wanted[plain] = neuron_hashes(values, found.dim, part)
        neurons = self._neurons.setdefault(found.order.stream, _Neurons(found.order.size))
        held = neuron_hashes(matrix, found.dim, part)
        neurons.note(part, found.start, held, self._wanted[plain])

    def find(self, known: Known) -> Iterator[str]:
        """Note the orders that were found; yield where there is none."""
        first: dict[str, NDArray[np.intp]] = {}  # by layer: the first group's order
        for stream, neurons in self._neurons.items():
            layer = stream.partition(".neuron_order")[0]
            order = _order_of(neurons, first.get(layer))
            if order is None:
                yield f"{stream}: the neurons are no permutation of the dense MLP's"
                continue
            first.setdefault(layer, order)
            known.orders[stream] = order.astype("<u4").tobytes()
        self._wanted.clear()


def _order_of(neurons: _Neurons, shared: NDArray[np.intp] | None) -> NDArray[np.intp] | None:
    """Return by place the dense neuron that is there; None where no part has an order.

    Where places are not seen, which is where a shared expert has them, they are as in `shared`.
    """
    parts = [*neurons.held]
    # All parts together tell twins apart; of a damaged part the others still tell the order.
    for chosen in (parts, *([part] for part in parts)):
        held = sum((neurons.held[part] for part in chosen), np.zeros(neurons.size, np.uint64))
        wanted = sum((neurons.wanted[part] for part in chosen), np.zeros(neurons.size, np.uint64))
        order = np.full(neurons.size, -1, np.intp)
        left = np.ones(neurons.size, np.bool_)
        if not neurons.seen.all():
            if shared is None:
                return None
            order[~neurons.seen] = shared[~neurons.seen]
            left[order[~neurons.seen]] = False
        found = match_hashes(held[neurons.seen], wanted[left])
        if found is not None:
            order[neurons.seen] = np.flatnonzero(left)[found]
            return order
    return None


@lru_cache(maxsize=4)
def _identity(size: int) -> bytes:
    return np.arange(size, dtype="<u4").tobytes()


def _gather_of(expr: Expr) -> Gather | None:
    """Return the gather by an open order that an expression casts and scales; None for others."""
    while isinstance(expr, Cast | Scale):
        expr = expr.of
    is_plain = isinstance(expr, Gather) and isinstance(expr.of, Source)
    return expr if is_plain and is_open(expr) else None  # type: ignore[return-value]


def _with_order(expr: Expr, order: Permutation) -> Expr:
    if isinstance(expr, Gather):
        return replace(expr, order=order, start=0, stop=order.size)
    assert isinstance(expr, Cast | Scale)
    return replace(expr, of=_with_order(expr.of, order))


def _itemsize(dtype: str) -> int:
    return np.dtype(_BITS[dtype]).itemsize


_NUMPY: Mapping[str, str] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
