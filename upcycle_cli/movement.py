"""How far experts have come in training: from the dense model's shards, and from one another.

Distances are relative Frobenius norms over all parts of an expert, each of which is compared with
its dense part times the factor that conversion multiplied it by. Legend: N experts, G shards;
expert e = g·G + s started as shard s of virtual group g.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle_cli.errors import UpcycleError
from upcycle_cli.families.mlp import place

if TYPE_CHECKING:
    import torch

    from upcycle_cli.checkpoint import Checkpoint, Reader
    from upcycle_cli.experts import Experts
    from upcycle_cli.families.dense import DenseModel


@dataclass(frozen=True, kw_only=True)
class LayerMovement:
    """How far the experts of one layer have come."""

    layer: int
    moved: tuple[float, ...]
    """By expert, its distance from the dense shard that it started as, relative to that."""
    apart: float
    """The root mean square of experts' distances from the mean of those of their shard."""
    num_groups: int
    """E."""
    split_groups: int
    """Those whose router rows are not all equal."""


def movements(
    experts: Experts,
    moe: Reader,
    dense: tuple[Checkpoint, DenseModel, Reader],
    factors: Mapping[str, float],
) -> Iterator[LayerMovement]:
    """Yield the movement of each layer; `factors` is by part what the conversion multiplied by.

    One part of one expert is in memory at a time, and the sum of its copies. Raises UpcycleError
    when the dense model has other sizes.
    """
    checkpoint, model, reader = dense
    size = experts.expert_size
    granularity, rest = divmod(model.intermediate_size, size)
    if rest or not granularity or experts.num_experts % granularity:
        raise UpcycleError(
            f"{checkpoint.path} has MLPs {model.intermediate_size} wide, of which experts {size} "
            "wide are no shards: it is not the source."
        )
    for layer in experts.layers:
        squares, whole = [0.0] * experts.num_experts, [0.0] * granularity
        apart = 0.0
        mlp = model.mlp(checkpoint.tensors, layer)
        for part, factor in factors.items():
            for shard in range(granularity):
                span = (shard * size, (shard + 1) * size)
                found = place(mlp, part, width=model.intermediate_size, shard=span)
                source = reader.tensor(model.prefix(layer) + found.tensor)[found.index]
                wanted = source.double() * factor
                whole[shard] += float(wanted.square().sum())
                apart += _add(experts, moe, (layer, part, wanted), squares, shard, granularity)
        every = sum(whole) * experts.num_experts / granularity
        rows = experts.router(moe, layer)
        routers = rows.reshape(-1, granularity, rows.shape[-1])
        yield LayerMovement(
            layer=layer,
            moved=tuple(
                _ratio(square, whole[expert % granularity]) for expert, square in enumerate(squares)
            ),
            apart=_ratio(apart, every),
            num_groups=len(routers),
            split_groups=int((routers != routers[:, :1]).flatten(1).any(1).sum()),
        )


def _add(
    experts: Experts,
    moe: Reader,
    wanted: tuple[int, str, torch.Tensor],
    squares: list[float],
    shard: int,
    granularity: int,
) -> float:
    """Add each copy's squared distance, and return the sum of those from the copies' mean."""
    layer, part, value = wanted
    total, sum_of_squares = value.new_zeros(value.shape), 0.0
    copies = range(shard, experts.num_experts, granularity)
    for expert in copies:
        difference = experts.part(moe, layer, expert, part).double() - value
        square = float(difference.square().sum())
        squares[expert] += square
        sum_of_squares += square
        total += difference
    return max(0.0, sum_of_squares - float(total.square().sum()) / len(copies))


def _ratio(square: float, whole: float) -> float:
    return math.sqrt(square / whole) if whole else 0.0
