"""A difference between a tensor and the plan, in words.

Which other shard is there, which further factor it has, which rows were exchanged, or how many of
its values differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from upcycle_cli.checkpoint.arrays import as_float32
from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader
from upcycle_cli.plan.expressions import Cast, Expr, Repeat, leaves, num_bytes, type_of
from upcycle_cli.plan.merge import MergedReader
from upcycle_cli.plan.output import OutputTensor, Role
from upcycle_cli.plan.plan import Plan
from upcycle_cli.write.evaluate import evaluate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_MOST_EXPLAINED = 8
_SAMPLE_ITEMS = 1 << 18
_FEWEST_TRAINED = 8
_CLOSE = {"F32": 1e-5, "F16": 2e-3, "BF16": 1.6e-2}
"""How far a rounded product may be from a factor's exact one, relatively."""


@dataclass(frozen=True)
class Difference:
    """A leaf of a tensor that holds other bytes than its expression's value."""

    name: str
    start: int
    """Where the leaf begins in the tensor, in bytes."""
    expr: Expr


@dataclass(frozen=True)
class _Explainer:
    plan: Plan
    moe: Checkpoint
    exprs: Mapping[str, Expr]
    source: Reader | MergedReader
    held: Reader
    tensors: Mapping[str, OutputTensor]

    def values(self, found: Difference) -> tuple[Floats, Floats]:
        """Return what a leaf holds, and what it should hold."""
        kind = type_of(found.expr)
        data = self.held.mapped(found.name)[found.start : found.start + num_bytes(found.expr)]
        wanted = evaluate(found.expr, self.source.mapped)
        return tuple(as_float32(bytes(each), kind.dtype, kind.shape) for each in (data, wanted))  # type: ignore[return-value]

    def words(self, found: Difference) -> tuple[str, bool]:
        """Return what is wrong with a leaf, and whether that is a particular kind of damage."""
        held, wanted = self.values(found)
        tensor, name = self.tensors[found.name], found.name
        if words := _router_words(name, held, self.exprs[name]):
            return words, True
        for words in (
            _factor_words(held, wanted, type_of(found.expr).dtype),
            self._other_words(found, tensor),
            _moved_words(held, wanted),
        ):
            if words is not None:
                return f"{name} {words}", True
        return f"{name} {_plain_words(held, wanted)}", False

    def _other_words(self, found: Difference, tensor: OutputTensor) -> str | None:
        """Say which other expert's values are there."""
        if tensor.role is not Role.EXPERT:
            return None
        size, kind = num_bytes(found.expr), type_of(found.expr).dtype
        data = bytes(self.held.mapped(found.name)[found.start : found.start + size])
        own, seen = self._expert(tensor, found.start), {found.expr}
        for other in self.tensors.values():
            if (other.role, other.holds, other.layer) != (tensor.role, tensor.holds, tensor.layer):
                continue
            start = 0
            for leaf in leaves(self.exprs[other.name]):
                expr = leaf if type_of(leaf).dtype == kind else Cast(leaf, kind)
                if expr not in seen and num_bytes(expr) == size:
                    seen.add(expr)
                    if evaluate(expr, self.source.mapped) == data:
                        return self._instead(own, self._expert(other, start), other.name)
                start += num_bytes(expr)
        return None

    def _expert(self, tensor: OutputTensor, start: int) -> int:
        """Return the expert whose values begin in a tensor at this byte."""
        if tensor.expert is not None:
            return tensor.expert
        return start // (self.moe.tensors[tensor.name].nbytes // self.plan.num_experts)

    def _instead(self, own: int, other: int, name: str) -> str:
        if self.plan.expansion is not None:
            return f"holds what expert {other} should hold ({name}), not expert {own}"
        size, shared = self.plan.recipe.group_size, self.plan.recipe.shared_experts
        here, there = (shared + number % size for number in (other, own))
        if here != there:
            return f"holds shard {here} where shard {there} belongs"
        return f"holds shard {here} of group {other // size} instead of group {own // size}"


def explain(
    plan: Plan,
    moe: Checkpoint,
    differing: Sequence[Difference],
    exprs: Mapping[str, Expr],
    source: Reader | MergedReader,
    held: Reader,
) -> list[str]:
    """Return a sentence for each tensor that differs; one for all where they were trained."""
    if not differing:
        return []
    tensors = {tensor.name: tensor for tensor in plan.tensors if tensor.name in exprs}
    explainer = _Explainer(plan, moe, exprs, source, held, tensors)
    by_name: dict[str, Difference] = {}
    for each in differing:
        by_name.setdefault(each.name, each)
    found, particular = list[str](), 0
    for each in [*by_name.values()][:_MOST_EXPLAINED]:
        words, is_particular = explainer.words(each)
        found.append(words)
        particular += is_particular
    many = len(by_name) >= _FEWEST_TRAINED and not particular
    trained = _trained_words(explainer, [*by_name.values()], len(exprs)) if many else None
    if trained is not None:
        return [trained]
    rest = [*by_name][_MOST_EXPLAINED:]
    return found + [f"{name} holds other values than the plan's" for name in rest]


def _trained_words(
    explainer: _Explainer, differing: Sequence[Difference], total: int
) -> str | None:
    """Say that weights were trained, where most values of many tensors moved a little."""
    changes = []
    for each in differing:
        held, wanted = (values.reshape(-1)[:_SAMPLE_ITEMS] for values in explainer.values(each))
        moved = float(np.mean(held != wanted))
        length = float(np.linalg.norm(wanted))
        change = float(np.linalg.norm(held - wanted)) / length if length > 0 else 1.0
        if not (np.isfinite(change) and moved > 0.05 and change < 1.0):
            continue
        changes.append(change)
    if len(changes) < len(differing) * 0.9:
        return None
    return (
        f"these weights were trained: {len(differing)} of {total} tensors changed, mean relative "
        f"change {np.mean(changes):.2g}; use `upcycle inspect --weights --dense` to see how far"
    )


def _router_words(name: str, held: Floats, expr: Expr) -> str | None:
    """Say which row of a router differs from the others of its virtual group."""
    if not isinstance(expr, Repeat):
        return None
    if not np.isfinite(held).all():
        return f"{name} holds values that are not finite"
    rows = held.reshape(len(held) // expr.times, expr.times, -1)
    for group, own in enumerate(rows):
        for place in range(1, expr.times):
            if not np.array_equal(own[0], own[place]):
                # Of three or more the odd one is named; of two either could be it.
                odd = 0 if expr.times > 2 and np.array_equal(own[1], own[2]) else place
                row = group * expr.times + odd
                return f"{name}: row {row} differs from the others of virtual group {group}"
    return None


def _factor_words(held: Floats, wanted: Floats, dtype: str) -> str | None:
    """Say by what further factor a value was multiplied."""
    if not (np.isfinite(held).all() and np.isfinite(wanted).all()):
        return None
    one, other = held.reshape(-1).astype(np.float64), wanted.reshape(-1).astype(np.float64)
    square = float(other @ other)
    factor = float(one @ other) / square if square > 0 else 0.0
    if factor == 0.0 or abs(factor - 1.0) < 1e-6:
        return None
    if not np.allclose(one, factor * other, rtol=_CLOSE[dtype], atol=1e-30):
        return None
    if int(np.count_nonzero(one != other)) < max(2, int(np.count_nonzero(other)) // 4):
        return None
    return f"is its expected value multiplied by a further {factor:.4g}"


def _moved_words(held: Floats, wanted: Floats) -> str | None:
    """Say which rows, columns or entries were exchanged."""
    if held.ndim != 2:
        return None
    for what, one, other in (("row", held, wanted), ("column", held.T, wanted.T)):
        rows = [[row.tobytes() for row in np.ascontiguousarray(each)] for each in (one, other)]
        if rows[0] == rows[1] or sorted(rows[0]) != sorted(rows[1]):
            continue
        moved = [i for i, (a, b) in enumerate(zip(*rows, strict=True)) if a != b]
        if len(moved) == 2:
            return f"has {what}s {moved[0]} and {moved[1]} exchanged"
        return f"has its {what}s in another order: {len(moved)} of {len(one)} moved"
    return None


def _plain_words(held: Floats, wanted: Floats) -> str:
    """Say how many values differ, and the first of them."""
    differ = (held != wanted) & ~(np.isnan(held) & np.isnan(wanted))
    differ |= (held == 0) & (wanted == 0) & (np.signbit(held) != np.signbit(wanted))
    if not differ.any():
        return "holds other bits"
    first = tuple(int(axis[0]) for axis in np.nonzero(differ))
    return (
        f"differs in {int(differ.sum())} of {differ.size} elements, first at {[*first]}: "
        f"{float(held[first]):.8g} instead of {float(wanted[first]):.8g}"
    )
