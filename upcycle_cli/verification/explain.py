"""Explain in words how tensors differ from the plan.

A message names another expert's values, a factor, or exchanged rows; failing that, it counts the
values that differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
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


def explain(
    plan: Plan,
    moe: Checkpoint,
    differing: Sequence[Place],
    exprs: Mapping[str, Expr],
    source: Reader,
    held: Reader,
) -> list[str]:
    """Return a sentence for each expert or tensor that differs, or one if all were trained."""
    # The first difference of each tensor stands for the others.
    by_name = {each.name: each for each in reversed(differing)}
    ordered = [by_name[name] for name in dict.fromkeys(each.name for each in differing)]

    def values(place: Place) -> tuple[Floats, Floats]:
        kind, stop = type_of(place.expr), place.start + num_bytes(place.expr)
        data = held.mapped(place.name)[place.start : stop], evaluate(place.expr, source.mapped)
        one, other = (as_float32(bytes(each), kind.dtype, kind.shape) for each in data)
        return one, other

    tensors = {tensor.name: tensor for tensor in plan.tensors}
    said: dict[tuple[str, str], list[str]] = {}
    particular = False
    for place in ordered[:_MOST_EXPLAINED]:
        one, other = values(place)
        tensor = tensors[place.name]
        is_expert = tensor.role is Role.EXPERT
        noun = "shard" if is_expert and plan.growing is None else "expected value"
        words = _other_expert(plan, moe, place, exprs, source, held)
        words = words or _moved_words(one, other) or _factor_words(one, other, noun)
        particular = particular or words is not None  # training does none of these
        who = place.name
        if is_expert:
            who = f"layer {tensor.layer}, expert {_expert_of(plan, moe, tensor, place.start)}"
        said.setdefault((who, words or _plain_words(one, other)), []).append(place.name)
    sentences = [
        f"{who} {words}" + (f" ({_joined(names)})" if who not in names else "")
        for (who, words), names in said.items()
    ]
    if len(ordered) >= _FEWEST_TRAINED and not particular:
        sample = ordered[:: len(ordered) // _MOST_SAMPLED + 1]
        changes = [_relative_change(*values(each)) for each in sample]
        small = [change for change in changes if change < 1.0]
        if len(small) > len(changes) * 0.9:
            return [
                f"{TRAINED}: {len(ordered):,} of {len(exprs):,} tensors changed, by "
                f"{np.mean(small):.2%} on average; inspect the MoE beside its dense model to see "
                "how far each layer moved"
            ]
    rest = ordered[_MOST_EXPLAINED:]
    return sentences + [f"{each.name} does not have its expected values" for each in rest]


def _joined(names: Sequence[str]) -> str:
    """Return the names of an expert's tensors as one: experts.2.{w1,w3}.weight."""
    columns = zip_longest(*(name.split(".") for name in names), fillvalue="")
    found = [[*dict.fromkeys(column)] for column in columns]
    return ".".join(part[0] if len(part) == 1 else f"{{{','.join(part)}}}" for part in found)


def _expert_of(plan: Plan, moe: Checkpoint, tensor: OutputTensor, start: int) -> int:
    """Return the expert that holds this byte of a tensor."""
    if tensor.expert is not None:
        return tensor.expert
    return start // (moe.tensors[tensor.name].nbytes // plan.num_experts)


def _other_expert(
    plan: Plan,
    moe: Checkpoint,
    place: Place,
    exprs: Mapping[str, Expr],
    source: Reader,
    held: Reader,
) -> str | None:
    """Say which other expert's values a tensor of an expert has."""
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
                    own = _expert_of(plan, moe, tensor, place.start)
                    return _instead(plan, own, _expert_of(plan, moe, other, start))
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
