"""An expert that every token meets: the first shards of the dense MLP, or one that is inert yet.

Targets add what it computes as it is, but for a gate of its own where it has one: what makes up for
the routed experts' gates is no business of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from upcycle_cli.expr import Alike, Concat, Expr, Order, Scale, Zeros

if TYPE_CHECKING:
    from upcycle_cli.families import Family
    from upcycle_cli.families.mlp import Weight
    from upcycle_cli.families.moe import Layout
    from upcycle_cli.recipe import Recipe

_SAMPLE_ROWS = 16  # of a matrix, enough to tell its scale
_HALF_LOGIT_STD = 1e-9
"""Of a gate that is to be 1/2: float32 cannot tell the difference, and llama.cpp, which divides by
the logit, needs one that is not 0."""


class Parts(Protocol):
    """What makes the tensors of one conversion."""

    @property
    def recipe(self) -> Recipe:
        """What is asked for."""

    @property
    def family(self) -> Family:
        """What the dense model becomes."""

    def part_range(
        self,
        layer: int,
        mlp: Sequence[Weight],
        part: str,
        shard: tuple[int, int],
        group: tuple[int, Order | None] = (0, None),
    ) -> Expr:
        """Return a part of the dense MLP from here to there of its intermediate size."""

    def normal(
        self, layer: int, mlp: Sequence[Weight], purpose: str, rows: int, logit_std: float
    ) -> Expr:
        """Return random rows."""

    def mlp_dtype(self, layer: int, mlp: Sequence[Weight]) -> str:
        """Return the dtype of the MLP in the output."""


def shared_expert(
    parts: Parts, layer: int, mlp: Sequence[Weight], layout: Layout, group: tuple[int, Order | None]
) -> Iterator[tuple[str, Expr]]:
    """Yield the tensors of a layer's shared expert, none where there is none, by their names in it.

    `group` is the model and the order of the first, which all have in common as far as they share.
    """
    shared, count = parts.family.target.shared, parts.recipe.shared_experts
    if shared is None or not (count or shared.insisted_on):
        return
    expert_size = parts.family.dense.intermediate_size // parts.recipe.granularity
    for weight in parts.family.target.shared_weights(layout):
        made: list[Expr] = []
        for part in weight.holds:
            if not count:
                made.append(_inert(parts, layer, mlp, part, shared.size or expert_size))
                continue
            expr = parts.part_range(layer, mlp, part, (0, count * expert_size), group)
            factor = shared.down_factor if part == "down" else 1.0
            made.append(expr if factor == 1.0 else Scale(expr, factor))
        yield weight.name, Concat(tuple(made)) if len(made) > 1 else made[0]
    if shared.router is not None:
        std = _HALF_LOGIT_STD if count else 1.0
        yield shared.router, parts.normal(layer, mlp, "shared_expert_gate", 1, std)


def _inert(parts: Parts, layer: int, mlp: Sequence[Weight], part: str, size: int) -> Expr:
    """Make a part of one that does nothing yet, and can learn.

    Its down matrix is zero, or the weight of a norm behind it.
    """
    hidden = parts.family.dense.hidden_size
    shared = parts.family.target.shared
    if part == "down" and shared is not None and shared.norm is None:
        return Zeros(parts.mlp_dtype(layer, mlp), (hidden, size))
    rows = min(_SAMPLE_ROWS, parts.family.dense.intermediate_size)
    sample = parts.part_range(layer, mlp, part, (0, rows))
    stream = f"layers.{layer}.shared_expert.{part}"
    shape = (hidden, size) if part == "down" else (size, hidden)
    return Alike(parts.recipe.seed, stream, shape, sample)
