"""A difference between a tensor and the plan, in words.

It says which other expert is there, which further factor the tensor has, which rows were exchanged,
or how many of its values differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from upcycle_cli.checkpoint.arrays import as_float32
from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader
from upcycle_cli.plan.expressions import Cast, Expr, leaves, num_bytes, type_of
from upcycle_cli.plan.output import OutputTensor, Role
from upcycle_cli.plan.plan import Plan
from upcycle_cli.verification.neuron_hashes import neuron_hashes
from upcycle_cli.write.evaluate import evaluate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

TRAINED = "these weights were trained"
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


def explain(
    plan: Plan,
    moe: Checkpoint,
    differing: Sequence[Place],
    exprs: Mapping[str, Expr],
    source: Reader,
    held: Reader,
) -> list[str]:
    """Return a sentence for each tensor that differs; one for all where they were trained."""
    # The first difference of each tensor stands for the others.
    by_name = {each.name: each for each in reversed(differing)}
    ordered = [by_name[name] for name in dict.fromkeys(each.name for each in differing)]

    def values(place: Place) -> tuple[Floats, Floats]:
        kind, stop = type_of(place.expr), place.start + num_bytes(place.expr)
        data = held.mapped(place.name)[place.start : stop], evaluate(place.expr, source.mapped)
        one, other = (as_float32(bytes(each), kind.dtype, kind.shape) for each in data)
        return one, other

    sentences, particular = [], False
    for place in ordered[:_MOST_EXPLAINED]:
        one, other = values(place)
        words = _other_expert(plan, moe, place, exprs, source, held)
        words = words or _moved_words(one, other) or _factor_words(one, other)
        particular = particular or words is not None  # training does none of these
        sentences.append(f"{place.name} {words or _plain_words(one, other)}")
    if len(ordered) >= _FEWEST_TRAINED and not particular:
        sample = ordered[:: len(ordered) // _MOST_SAMPLED + 1]
        changes = [_relative_change(*values(each)) for each in sample]
        small = [change for change in changes if change < 1.0]
        if len(small) > len(changes) * 0.9:
            return [
                f"{TRAINED}: {len(ordered)} of {len(exprs)} tensors changed, mean "
                f"relative change {np.mean(small):.2g}; `upcycle inspect`, with `weights` and "
                "`dense`, measures each layer"
            ]
    rest = ordered[_MOST_EXPLAINED:]
    return sentences + [f"{each.name} holds other values than the plan's" for each in rest]


def _other_expert(
    plan: Plan,
    moe: Checkpoint,
    place: Place,
    exprs: Mapping[str, Expr],
    source: Reader,
    held: Reader,
) -> str | None:
    """Say which other expert's values a tensor of an expert has."""

    def expert_of(tensor: OutputTensor, start: int) -> int:
        if tensor.expert is not None:
            return tensor.expert
        return start // (moe.tensors[tensor.name].nbytes // plan.num_experts)

    experts = {t.name: t for t in plan.tensors if t.role is Role.EXPERT and t.name in exprs}
    if (tensor := experts.get(place.name)) is None:
        return None
    size, kind = num_bytes(place.expr), type_of(place.expr).dtype
    data, seen = held.mapped(place.name)[place.start : place.start + size], {place.expr}
    for other in experts.values():
        if (other.parts, other.layer) != (tensor.parts, tensor.layer):
            continue
        start = 0
        for leaf in leaves(exprs[other.name]):
            expr = leaf if type_of(leaf).dtype == kind else Cast(leaf, kind)
            if expr not in seen and num_bytes(expr) == size:
                seen.add(expr)
                if evaluate(expr, source.mapped) == data:
                    return _instead(plan, expert_of(tensor, place.start), expert_of(other, start))
            start += num_bytes(expr)
    return None


def _instead(plan: Plan, own: int, other: int) -> str:
    if plan.growing is None:
        size, shared = plan.recipe.group_size, plan.recipe.shared_experts
        here, there = (shared + number % size for number in (other, own))
        if here != there:
            return f"holds shard {here} where shard {there} belongs"
    return f"holds what expert {other} should hold, not expert {own}"


def _relative_change(held: Floats, wanted: Floats) -> float:
    """Return the size of the change of the first values, relative to theirs."""
    held, wanted = (values.reshape(-1)[:_SAMPLE_ITEMS] for values in (held, wanted))
    return float(np.linalg.norm(held - wanted)) / (float(np.linalg.norm(wanted)) or math.inf)


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
