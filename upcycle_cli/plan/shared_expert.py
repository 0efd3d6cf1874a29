"""The shared expert, which every token uses: the first K shards, or one that is still inert.

The targets add its output without a router's gate, or halve it by a gate of its own, so it is not
scaled as the routed experts are.
"""

from __future__ import annotations

from collections.abc import Iterator

from upcycle_cli.models.moe import Layout
from upcycle_cli.plan.dense_parts import DenseParts, VirtualGroup
from upcycle_cli.plan.expressions import Concat, Expr, Full, RandomLike, Scale

_SAMPLE_ROWS = 16  # enough rows of a matrix to tell its scale
_HALF_LOGIT_STD = 1e-9
"""The logit std of a gate of 1/2: float32 rounds the gate to 1/2, and llama.cpp, which divides by
the logit, needs one other than 0."""


def shared_expert(
    parts: DenseParts, layer: int, layout: Layout, group: VirtualGroup
) -> Iterator[tuple[str, Expr]]:
    """Yield the names and expressions of a layer's shared expert; nothing where there is none.

    `group` is the first group: all groups agree on the neurons that they share.
    """
    shared, count = parts.family.target.shared, parts.recipe.shared_experts
    if shared is None or not (count or shared.required):
        return
    expert_size = parts.family.dense.intermediate_size // parts.recipe.granularity
    for weight in parts.family.target.shared_weights(layout):
        held: list[Expr] = []
        for part in weight.parts:
            if not count:
                held.append(_inert(parts, layer, part, shared.size or expert_size))
                continue
            expr = parts.neurons(layer, part, (0, count * expert_size), group)
            factor = shared.down_factor if part == "down" else 1.0
            held.append(expr if factor == 1.0 else Scale(expr, factor))
        yield weight.name, Concat(tuple(held)) if len(held) > 1 else held[0]
    if shared.router is not None:
        std = _HALF_LOGIT_STD if count else 1.0
        yield shared.router, parts.random_rows(layer, "shared_expert_gate", 1, std)


def _inert(parts: DenseParts, layer: int, part: str, size: int) -> Expr:
    """Return a part of a shared expert that outputs zero but can learn.

    Its down matrix is zero, or the weight of the norm behind it is.
    """
    hidden = parts.family.dense.hidden_size
    shared = parts.family.target.shared
    if part == "down" and shared is not None and shared.norm is None:
        return Full(parts.mlp_dtype(layer), (hidden, size))
    rows = min(_SAMPLE_ROWS, parts.family.dense.intermediate_size)
    sample = parts.neurons(layer, part, (0, rows))
    stream = f"layers.{layer}.shared_expert.{part}"
    shape = (hidden, size) if part == "down" else (size, hidden)
    return RandomLike(parts.recipe.seed, stream, shape, sample)
