"""Explain in words how tensors differ from the plan.

A message names another expert's values, a factor, or exchanged rows; failing that, it counts the
values that differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader
from upcycle_cli.checkpoint.header import as_float32
from upcycle_cli.plan.expressions import Cast, Expr, leaves, num_bytes, type_of
from upcycle_cli.plan.output import OutputTensor, Role
from upcycle_cli.plan.plan import Plan
from upcycle_cli.verification.neuron_hashes import neuron_hashes
from upcycle_cli.verification.result import TRAINED
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


def stored_leaves(expr: Expr, dtype: str) -> Iterator[Expr]:
    """Yield the leaves of an expression in the dtype in which the MoE has them."""
    for leaf in leaves(expr):
        yield leaf if type_of(leaf).dtype == dtype else Cast(leaf, dtype)


@dataclass(frozen=True)
class Explainer:
    """Explains the differences between an MoE and the expressions of its plan."""

    plan: Plan
    moe: Checkpoint
    exprs: Mapping[str, Expr]
    """By the name of the tensor, with the values that only the MoE has."""
    source: Reader
    held: Reader

    def explain(self, differing: Sequence[Place]) -> list[str]:
        """Return a sentence for each tensor that differs, or one if all were trained."""
        first: dict[str, Place] = {}  # the first difference of a tensor stands for the others
        for place in differing:
            first.setdefault(place.name, place)
        ordered, sentences, particular = [*first.values()], list[str](), False
        tensors = {tensor.name: tensor for tensor in self.plan.tensors}
        for place in ordered[:_MOST_EXPLAINED]:
            one, other = self._values(place)
            tensor, who, where, noun = tensors[place.name], place.name, "", "expected value"
            words = None
            if tensor.role is Role.EXPERT:
                expert = self._expert_of(tensor, place.start)
                who, where = f"layer {tensor.layer}, expert {expert}", f" ({place.name})"
                noun = "shard" if self.plan.growing is None else noun
                words = self._other_expert(tensor, place)
            words = words or _moved_words(one, other) or _factor_words(one, other, noun)
            particular = particular or words is not None  # training does none of these
            sentences.append(f"{who} {words or _plain_words(one, other)}{where}")
        if len(ordered) >= _FEWEST_TRAINED and not particular:
            sample = ordered[:: len(ordered) // _MOST_SAMPLED + 1]
            changes = [_relative_change(*self._values(each)) for each in sample]
            small = [change for change in changes if change < 1.0]
            if len(small) > len(changes) * 0.9:
                return [
                    f"{TRAINED}: {len(ordered):,} of {len(self.exprs):,} tensors changed, by "
                    f"{np.mean(small):.2%} on average; inspect the MoE beside its dense model to "
                    "see how far each layer moved"
                ]
        rest = ordered[_MOST_EXPLAINED:]
        return sentences + [f"{each.name} does not have its expected values" for each in rest]

    def _values(self, place: Place) -> tuple[Floats, Floats]:
        """Return the values of the MoE and of the plan."""
        kind, stop = type_of(place.expr), place.start + num_bytes(place.expr)
        held = self.held.mapped(place.name)[place.start : stop]
        data = held, evaluate(place.expr, self.source.mapped)
        one, other = (as_float32(bytes(each), kind.dtype, kind.shape) for each in data)
        return one, other

    def _expert_of(self, tensor: OutputTensor, start: int) -> int:
        """Return the expert that holds this byte of a tensor."""
        if tensor.expert is not None:
            return tensor.expert
        return start // (self.moe.tensors[tensor.name].nbytes // self.plan.num_experts)

    def _other_expert(self, tensor: OutputTensor, place: Place) -> str | None:
        """Say which other expert's values a tensor of an expert has."""
        size, kind = num_bytes(place.expr), type_of(place.expr).dtype
        data = self.held.mapped(place.name)[place.start : place.start + size]
        seen = {place.expr}
        for other in self.plan.tensors:
            if (other.role, other.parts, other.layer) != (Role.EXPERT, tensor.parts, tensor.layer):
                continue
            start = 0
            found = self.exprs.get(other.name)
            for expr in () if found is None else stored_leaves(found, kind):
                if expr not in seen and num_bytes(expr) == size:
                    seen.add(expr)
                    if evaluate(expr, self.source.mapped) == data:
                        own = self._expert_of(tensor, place.start)
                        return _instead(self.plan, own, self._expert_of(other, start))
                start += num_bytes(expr)
        return None


def _instead(plan: Plan, own: int, other: int) -> str:
    if plan.growing is None:
        size, shared = plan.recipe.group_size, plan.recipe.shared_experts
        here, there = (shared + number % size for number in (other, own))
        if here != there:
            return f"holds shard {here} where shard {there} belongs"
    return f"holds the values of expert {other}"


def _relative_change(held: Floats, wanted: Floats) -> float:
    """Return the size of the change of the first values, relative to theirs."""
    held, wanted = (values.reshape(-1)[:_SAMPLE_ITEMS] for values in (held, wanted))
    return float(np.linalg.norm(held - wanted)) / (float(np.linalg.norm(wanted)) or math.inf)


def _factor_words(held: Floats, wanted: Floats, noun: str) -> str | None:
    """Say by which factor a value was multiplied; `noun` is what the value should be."""
    if not (np.isfinite(held).all() and np.isfinite(wanted).all()):
        return None
    one, other = (values.reshape(-1).astype(np.float64) for values in (held, wanted))
    square = float(other @ other)
    factor = float(one @ other) / square if square > 0 else 0.0
    change, left = np.linalg.norm(one - other), np.linalg.norm(one - factor * other)
    if factor == 0.0 or abs(factor - 1.0) < 1e-3 or left > _MOST_LEFT * change:
        return None
    return f"is its {noun} × {factor:.4g}"


def _moved_words(held: Floats, wanted: Floats) -> str | None:
    """Say which rows or columns were exchanged."""
    for dim, what in enumerate(("row", "column")) if held.ndim == 2 else ():
        one, other = (neuron_hashes(each.view("<u4"), dim, what) for each in (held, wanted))
        moved = np.flatnonzero(one != other)
        if not len(moved) or not np.array_equal(np.sort(one), np.sort(other)):
            continue
        if len(moved) == 2:
            return f"has {what}s {moved[0]} and {moved[1]} exchanged"
        return f"has its {what}s in another order ({len(moved):,} of {len(one):,} moved)"
    return None


def _plain_words(held: Floats, wanted: Floats) -> str:
    """Say how many values differ, and the first of them."""
    differ = held.view("<u4") != wanted.view("<u4")
    first = np.unravel_index(int(differ.argmax()), differ.shape)
    return (
        f"differs in {int(differ.sum()):,} of {differ.size:,} elements, first at "
        f"{[int(place) for place in first]}: {float(held[first]):.8g} instead of "
        f"{float(wanted[first]):.8g}"
    )
