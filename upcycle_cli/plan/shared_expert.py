"""An expert that every token meets: the first shards of the dense MLP, or one that is inert yet.

Targets add what it computes as it is, but for a gate of its own where it has one: what makes up for
the routed experts' gates is no business of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from upcycle_cli.plan.expressions import Concat, Expr, RandomLike, Scale, Zeros

if TYPE_CHECKING:
    from upcycle_cli.models.mlp import Weight
    from upcycle_cli.models.moe import Layout
    from upcycle_cli.plan.tensors import Group, Maker

_SAMPLE_ROWS = 16  # of a matrix, enough to tell its scale
_HALF_LOGIT_STD = 1e-9
"""Of a gate that is to be 1/2: float32 cannot tell the difference, and llama.cpp, which divides by
the logit, needs one that is not 0."""


def shared_expert(
    maker: Maker, layer: int, mlp: Sequence[Weight], layout: Layout, group: Group
) -> Iterator[tuple[str, Expr]]:
    """Yield the tensors of a layer's shared expert, none where there is none, by their names in it.

    `group` is the model and the order of the first, which all have in common as far as they share.
    """
    shared, count = maker.family.target.shared, maker.recipe.shared_experts
    if shared is None or not (count or shared.required):
        return
    expert_size = maker.family.dense.intermediate_size // maker.recipe.granularity
    for weight in maker.family.target.shared_weights(layout):
        made: list[Expr] = []
        for part in weight.parts:
            if not count:
                made.append(_inert(maker, layer, mlp, part, shared.size or expert_size))
                continue
            expr = maker.part_range(layer, mlp, part, (0, count * expert_size), group)
            factor = shared.down_factor if part == "down" else 1.0
            made.append(expr if factor == 1.0 else Scale(expr, factor))
        yield weight.name, Concat(tuple(made)) if len(made) > 1 else made[0]
    if shared.router is not None:
        std = _HALF_LOGIT_STD if count else 1.0
        yield shared.router, maker.normal(layer, mlp, "shared_expert_gate", 1, std)


def _inert(maker: Maker, layer: int, mlp: Sequence[Weight], part: str, size: int) -> Expr:
    """Make a part of one that does nothing yet, and can learn.

    Its down matrix is zero, or the weight of a norm behind it.
    """
    hidden = maker.family.dense.hidden_size
    shared = maker.family.target.shared
    if part == "down" and shared is not None and shared.norm is None:
        return Zeros(maker.mlp_dtype(layer, mlp), (hidden, size))
    rows = min(_SAMPLE_ROWS, maker.family.dense.intermediate_size)
    sample = maker.part_range(layer, mlp, part, (0, rows))
    stream = f"layers.{layer}.shared_expert.{part}"
    shape = (hidden, size) if part == "down" else (size, hidden)
    return RandomLike(maker.recipe.seed, stream, shape, sample)
