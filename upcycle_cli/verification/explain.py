"""A difference between a tensor and the plan, in words.

Which other shard is there, which further factor it has, which rows were exchanged, or how many of
its values differ.
"""

from __future__ import annotations

import math
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
from upcycle_cli.verification.neuron_hashes import neuron_hashes
from upcycle_cli.write.evaluate import evaluate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_MOST_EXPLAINED = 8
_FEWEST_TRAINED = 8
_MOST_SAMPLED = 64
_SAMPLE_ITEMS = 1 << 18
_MOST_LEFT = 0.2
"""How much of a change a factor may leave unexplained, relatively: the rounding of products."""


@dataclass(frozen=True)
class Place:
    """A leaf of a tensor of the MoE, and where it begins in the tensor, in bytes."""

    name: str
    start: int
    expr: Expr


@dataclass(frozen=True)
class _Explainer:
    plan: Plan
    moe: Checkpoint
    exprs: Mapping[str, Expr]
    source: Reader | MergedReader
    held: Reader
    tensors: Mapping[str, OutputTensor]

    def values(self, found: Place) -> tuple[Floats, Floats]:
        """Return what a leaf holds, and what it should hold."""
        kind = type_of(found.expr)
        data = self.held.mapped(found.name)[found.start : found.start + num_bytes(found.expr)]
        wanted = evaluate(found.expr, self.source.mapped)
        return tuple(as_float32(bytes(each), kind.dtype, kind.shape) for each in (data, wanted))  # type: ignore[return-value]

    def words(self, found: Place) -> tuple[str, bool]:
        """Return what is wrong with a leaf, and whether training cannot have done that."""
        held, wanted = self.values(found)
        if words := self._other_words(found) or _moved_words(held, wanted):
            return f"{found.name} {words}", True
        if words := _router_words(held, self.exprs[found.name]):
            return f"{found.name}{words}", False
        if words := _factor_words(held, wanted):
            return f"{found.name} {words}", True
        return f"{found.name} {_plain_words(held, wanted)}", False

    def _other_words(self, found: Place) -> str | None:
        """Say which other expert's values are there."""
        tensor = self.tensors[found.name]
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
        if self.plan.growing is not None:
            return f"holds what expert {other} should hold ({name}), not expert {own}"
        size, shared = self.plan.recipe.group_size, self.plan.recipe.shared_experts
        here, there = (shared + number % size for number in (other, own))
        if here != there:
            return f"holds shard {here} where shard {there} belongs"
        return f"holds shard {here} of group {other // size} instead of group {own // size}"


def explain(
    plan: Plan,
    moe: Checkpoint,
    differing: Sequence[Place],
    exprs: Mapping[str, Expr],
    source: Reader | MergedReader,
    held: Reader,
) -> list[str]:
    """Return a sentence for each tensor that differs; one for all where they were trained."""
    if not differing:
        return []
    tensors = {tensor.name: tensor for tensor in plan.tensors if tensor.name in exprs}
    explainer = _Explainer(plan, moe, exprs, source, held, tensors)
    # The first difference of each tensor stands for the others.
    by_name = {each.name: each for each in reversed(differing)}
    ordered = [by_name[name] for name in dict.fromkeys(each.name for each in differing)]
    found = [explainer.words(each) for each in ordered[:_MOST_EXPLAINED]]
    if len(ordered) >= _FEWEST_TRAINED and not any(particular for _, particular in found):
        sample = ordered[:: len(ordered) // _MOST_SAMPLED + 1]
        changes = [_relative_change(*explainer.values(each)) for each in sample]
        small = [change for change in changes if change < 1.0]
        if len(small) > len(changes) * 0.9:
            return [
                f"these weights were trained: {len(ordered)} of {len(exprs)} tensors changed, mean "
                f"relative change {np.mean(small):.2g}; use `upcycle inspect --weights --dense` "
                "to see how far"
            ]
    rest = [f"{each.name} holds other values than the plan's" for each in ordered[_MOST_EXPLAINED:]]
    return [words for words, _ in found] + rest


def _relative_change(held: Floats, wanted: Floats) -> float:
    """Return the size of the change of the first values, relative to theirs."""
    held, wanted = (values.reshape(-1)[:_SAMPLE_ITEMS] for values in (held, wanted))
    return float(np.linalg.norm(held - wanted)) / (float(np.linalg.norm(wanted)) or math.inf)


def _router_words(held: Floats, expr: Expr) -> str | None:
    """Say which row of a router differs from the others of its virtual group."""
    if not isinstance(expr, Repeat):
        return None
    if not np.isfinite(held).all():
        return " holds values that are not finite"
    rows = held.reshape(len(held) // expr.times, expr.times, -1)
    differ = np.argwhere((rows != rows[:, :1]).any(-1))
    if not len(differ):
        return None
    group, place = differ[0]
    row = group * expr.times + place
    return f": row {row} differs from the first of virtual group {group}"


def _factor_words(held: Floats, wanted: Floats) -> str | None:
    """Say by what further factor a value was multiplied."""
    if not (np.isfinite(held).all() and np.isfinite(wanted).all()):
        return None
    one, other = (values.reshape(-1).astype(np.float64) for values in (held, wanted))
    square = float(other @ other)
    factor = float(one @ other) / square if square > 0 else 0.0
    change, left = np.linalg.norm(one - other), np.linalg.norm(one - factor * other)
    if factor == 0.0 or abs(factor - 1.0) < 1e-3 or left > _MOST_LEFT * change:
        return None
    return f"is its expected value multiplied by a further {factor:.4g}"


def _moved_words(held: Floats, wanted: Floats) -> str | None:
    """Say which rows or columns were exchanged."""
    for dim, what in enumerate(("row", "column")) if held.ndim == 2 else ():
        one, other = (neuron_hashes(each.view("<u4"), dim, what) for each in (held, wanted))
        moved = np.flatnonzero(one != other)
        if not len(moved) or not np.array_equal(np.sort(one), np.sort(other)):
            continue
        if len(moved) == 2:
            return f"has {what}s {moved[0]} and {moved[1]} exchanged"
        return f"has its {what}s in another order: {len(moved)} of {len(one)} moved"
    return None


def _plain_words(held: Floats, wanted: Floats) -> str:
    """Say how many values differ, and the first of them."""
    differ = held.view("<u4") != wanted.view("<u4")
    first = np.unravel_index(int(differ.argmax()), differ.shape)
    return (
        f"differs in {int(differ.sum())} of {differ.size} elements, first at "
        f"{[int(place) for place in first]}: {float(held[first]):.8g} instead of "
        f"{float(wanted[first]):.8g}"
    )
