"""How far experts have come in training: from the dense model's shards, and from one another.

Distances are relative Frobenius norms over all parts of an expert, each of which is compared with
its dense part times the factor that conversion multiplied it by. A group that has the neurons in an
order of its own is compared neuron by neuron: training moves them by less than they are apart.
Legend: N experts, G shards, I dense intermediate size; expert e = g·G + s started as shard s of
virtual group g. What is shared is left out: then G counts the shards that are routed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from upcycle_cli.errors import UpcycleError
from upcycle_cli.families.mlp import place

if TYPE_CHECKING:
    import torch

    from upcycle_cli.checkpoint import Checkpoint, Reader
    from upcycle_cli.experts import Experts
    from upcycle_cli.families.dense import DenseModel

_SKETCHED = 32
"""Entries of a neuron's part."""
_ALIKE = 0.7
"""The cosine of neurons of which one was made of the other; of others it is small."""
_ROWS = 1024


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

    One part of one expert is in memory at a time, and the sum of its copies; of a group that has an
    order of its own, one part of all. Raises UpcycleError when the dense model has other sizes.
    """
    checkpoint, model, _ = dense
    size, first = experts.expert_size, experts.layers[0]
    shared = shared_neurons(experts, moe, dense, first)
    routed = model.intermediate_size - len(shared)
    group_size, rest = divmod(routed, size)
    if rest or not group_size or experts.num_experts % group_size:
        raise UpcycleError(
            f"{checkpoint.path} has MLPs {model.intermediate_size} wide, of which experts {size} "
            "wide are no shards: it is not the source."
        )
    for layer in experts.layers:
        whole = {part: _dense_part(dense, layer, part) for part in factors}
        if len(shared):
            own = shared_neurons(experts, moe, dense, layer)
            kept = _others(own if len(own) else shared, model.intermediate_size)
            for part, matrix in whole.items():
                cut = experts.cut(part)
                whole[part] = matrix if cut is None else matrix.index_select(cut, kept)
        yield _Layer(experts, moe, layer, group_size, whole, factors).movement()


def shared_neurons(
    experts: Experts, moe: Reader, dense: tuple[Checkpoint, DenseModel, Reader], layer: int
) -> torch.Tensor:
    """Return by place the dense neurons that a layer's shared expert was made of; none of others.

    A neuron is told by some of its entries, which training moves by less than neurons are apart.
    """
    import torch

    none, width = torch.zeros(0, dtype=torch.int64), experts.shared_width
    if not 0 < width < dense[1].intermediate_size:
        return none
    sides: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for part in ("gate", "up", "down"):
        held = experts.shared_part(moe, layer, part)
        if held is not None:
            cut = experts.cut(part)
            assert cut is not None
            for side, matrix in zip(sides, (held, _dense_part(dense, layer, part)), strict=True):
                rows = _sketch(matrix, cut)
                side.append(rows / (rows.norm(dim=1, keepdim=True) + 1e-30))
    if not sides[0]:
        return none
    ours, theirs = (torch.cat(side, 1) / len(side) ** 0.5 for side in sides)
    if float((ours * theirs[:width]).sum(1).median()) > _ALIKE:
        return torch.arange(width)
    best = [(ours[i : i + _ROWS] @ theirs.T).max(1) for i in range(0, width, _ROWS)]
    found = torch.cat([each.indices for each in best])
    alike = float(torch.cat([each.values for each in best]).median()) > _ALIKE
    return found if alike and len({*found.tolist()}) == width else none


def _dense_part(
    dense: tuple[Checkpoint, DenseModel, Reader], layer: int, part: str
) -> torch.Tensor:
    checkpoint, model, reader = dense
    mlp = model.mlp(checkpoint.tensors, layer)
    found = place(mlp, part, width=model.intermediate_size)
    return reader.tensor(model.prefix(layer) + found.tensor)[found.index]


def _others(neurons: torch.Tensor, count: int) -> torch.Tensor:
    import torch

    kept = torch.ones(count, dtype=torch.bool)
    kept[neurons] = False
    return kept.nonzero().flatten()


@dataclass
class _Layer:
    """The experts of one layer beside the dense MLP that they were made of."""

    experts: Experts
    moe: Reader
    layer: int
    group_size: int
    whole: Mapping[str, torch.Tensor]
    """The parts of the dense MLP."""
    factors: Mapping[str, float]

    def movement(self) -> LayerMovement:
        import torch

        count, size = self.experts.num_experts, self.experts.expert_size
        orders = [self._order(group) for group in range(count // self.group_size)]
        squares, lengths = torch.zeros(2, count, dtype=torch.float64)
        apart = 0.0
        for part, cut in self._cuts.items():
            for shard in range(self.group_size):
                wanted = self.whole[part]
                if cut is not None:
                    wanted = wanted.narrow(cut, shard * size, size)
                wanted = wanted.double() * self.factors[part]
                total, sum_of_squares = torch.zeros_like(wanted), 0.0
                for group, order in enumerate(orders):
                    held, owners = self._held(part, group, shard, order)
                    difference = held.double() - wanted
                    square = _by_neuron(difference, cut)
                    squares.index_add_(0, owners.expand(len(square)), square)
                    length = _by_neuron(wanted, cut)
                    lengths.index_add_(0, owners.expand(len(length)), length)
                    sum_of_squares += float(square.sum())
                    total += difference
                apart += max(0.0, sum_of_squares - float(total.square().sum()) / len(orders))
        rows = self.experts.router(self.moe, self.layer)
        routers = rows.reshape(-1, self.group_size, rows.shape[-1])
        return LayerMovement(
            layer=self.layer,
            moved=tuple(map(_ratio, squares.tolist(), lengths.tolist())),
            apart=_ratio(apart, float(lengths.sum())),
            num_groups=len(routers),
            split_groups=int((routers != routers[:, :1]).flatten(1).any(1).sum()),
        )

    @cached_property
    def _cuts(self) -> dict[str, int | None]:
        """By part, the dimension that counts neurons; None where none does."""
        return {part: self.experts.cut(part) for part in self.factors}

    def _held(
        self, part: str, group: int, shard: int, order: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a group's part of a shard, in the dense MLP's order, and whose each neuron is."""
        import torch

        size, start, cut = self.experts.expert_size, group * self.group_size, self._cuts[part]
        if order is None or cut is None:
            expert = start + shard
            return self.experts.part(self.moe, self.layer, expert, part), torch.tensor([expert])
        places = order[shard * size : (shard + 1) * size]
        return torch.cat(self._group(part, group), cut).index_select(cut, places), (
            start + places // size
        )

    def _group(self, part: str, group: int) -> list[torch.Tensor]:
        experts = range(group * self.group_size, (group + 1) * self.group_size)
        return [self.experts.part(self.moe, self.layer, expert, part) for expert in experts]

    def _order(self, group: int) -> torch.Tensor | None:
        """Return where in a group each neuron of the dense MLP is, None where it always was."""
        import torch

        from upcycle_cli.matching import nearest

        held, wanted = [], []
        for part, cut in self._cuts.items():
            if cut is not None and self.whole[part].dim() == 2:
                held.append(torch.cat([_sketch(each, cut) for each in self._group(part, group)]))
                wanted.append(_sketch(self.whole[part], cut) * self.factors[part])
        found = nearest(torch.cat(wanted, 1).numpy(), torch.cat(held, 1).numpy())
        return None if found is None else torch.from_numpy(found)


def _sketch(matrix: torch.Tensor, cut: int) -> torch.Tensor:
    """Return some entries of each neuron, enough to tell it from all others."""
    return matrix.movedim(cut, 0)[:, :_SKETCHED].float()


def _by_neuron(values: torch.Tensor, cut: int | None) -> torch.Tensor:
    """Return the squares of a part, summed up by neuron; in one where it has none."""
    squares = values.square()
    return squares.sum().reshape(1) if cut is None else squares.movedim(cut, 0).flatten(1).sum(1)


def _ratio(square: float, whole: float) -> float:
    return math.sqrt(square / whole) if whole else 0.0
