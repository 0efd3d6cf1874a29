"""How far experts have come in training: from the dense model's shards, and from one another.

Distances are relative Frobenius norms over all parts of an expert, each of which is compared with
its dense part times the factor that conversion multiplied it by. Neurons are known again in any
order, since training moves them by less than they are apart; so is the dense model of a group,
where there are several.
Legend: N experts, G shards, I dense intermediate size; expert e = g·G + s started as shard s of
virtual group g. What is shared is left out: then G counts the shards that are routed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models.mlp import locate

if TYPE_CHECKING:
    import torch

    from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader
    from upcycle_cli.models.dense import DenseModel
    from upcycle_cli.plan.moe_experts import Experts

_SKETCHED = 32
"""Entries of a neuron's part."""
_ALIKE = 0.7
"""The cosine of neurons of which one was made of the other; of others it is small."""
_ROWS = 1024
_SIMPLE, _ROUNDED = 16, 2e-4
"""The largest denominator of a factor, and how far rounding takes a measured one from it."""


Source = tuple["Checkpoint", "DenseModel", "Reader"]
"""A dense model that experts were made of."""


@dataclass(frozen=True, kw_only=True)
class LayerDrift:
    """How far the experts of one layer have come."""

    layer: int
    moved: tuple[float, ...]
    """By expert, its distance from the dense shard that it started as, relative to that."""
    apart: float
    """The root mean square of experts' distances from the mean of those of their shard."""
    unlike: float
    """The share of neurons that are like none of the dense model's, as those that were drawn anew;
    they are left out of both distances, unless a group has no other."""
    num_groups: int
    """E."""
    split_groups: int
    """Those whose router rows are not all equal."""
    models: tuple[int, ...]
    """By group, the source that it is most like."""


def measured(
    experts: Experts, moe: Reader, sources: Sequence[Source]
) -> tuple[dict[str, float], tuple[LayerDrift, ...], int]:
    """Return by part what it was multiplied by, the movement of each layer, and the shared neurons.

    The latter are how many of the first source are. `sources` are the dense models that the experts
    can be of. One part of one expert is in memory at a time, and the sum of its copies; of a group
    that has an order of its own, one part of all. Raises UpcycleError when a dense model has other
    sizes.
    """
    shared = shared_neurons(experts, moe, sources[0], experts.layers[0])
    for checkpoint, model, _ in sources:
        routed = model.intermediate_size - len(shared)
        group_size, rest = divmod(routed, experts.expert_size)
        if rest or not group_size or experts.num_experts % group_size:
            raise UpcycleError(
                f"{checkpoint.path} has MLPs {model.intermediate_size} wide, of which experts "
                f"{experts.expert_size} wide are no shards: it is not the source."
            )
    parts = [part for part, _ in experts.parts(moe, experts.layers[0], 0)]

    def layers() -> Iterator[_Layer]:
        for layer in experts.layers:
            own = shared_neurons(experts, moe, sources[0], layer) if len(shared) else shared
            kept = _others(own if len(own) else shared, sources[0][1].intermediate_size)
            wholes = []
            for source in sources:
                whole = {part: _dense_part(source, layer, part) for part in parts}
                for part, matrix in whole.items() if len(shared) else ():
                    cut = experts.cut(part)
                    whole[part] = matrix if cut is None else matrix.index_select(cut, kept)
                wholes.append(whole)
            yield _Layer(experts, moe, layer, group_size, wholes)

    made = layers()
    first = next(made)  # what its neurons are is found once, for its factors and its movement
    factors = first.factors()
    found = tuple(layer.movement(factors) for layer in chain((first,), made))
    return factors, found, len(shared)


def shared_neurons(experts: Experts, moe: Reader, dense: Source, layer: int) -> torch.Tensor:
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
                side.append(_unit(_sketch(matrix, cut)))
    if not sides[0]:
        return none
    ours, theirs = (torch.cat(side, 1) / len(side) ** 0.5 for side in sides)
    if float((ours * theirs[:width]).sum(1).median()) > _ALIKE:
        return torch.arange(width)
    best = [(ours[i : i + _ROWS] @ theirs.T).max(1) for i in range(0, width, _ROWS)]
    found = torch.cat([each.indices for each in best])
    alike = float(torch.cat([each.values for each in best]).median()) > _ALIKE
    return found if alike and len({*found.tolist()}) == width else none


def _dense_part(dense: Source, layer: int, part: str) -> torch.Tensor:
    checkpoint, model, reader = dense
    mlp = model.mlp(checkpoint.tensors, layer)
    found = locate(mlp, part, width=model.intermediate_size)
    name = model.prefix(layer) + found.tensor
    if name not in checkpoint.tensors:
        raise UpcycleError(f"{checkpoint.path} lacks {name}, which its config.json implies.")
    return reader.tensor(name)[found.index]


def _others(neurons: torch.Tensor, count: int) -> torch.Tensor:
    import torch

    kept = torch.ones(count, dtype=torch.bool)
    kept[neurons] = False
    return kept.nonzero().flatten()


@dataclass(frozen=True)
class _Group:
    """A virtual group, and what it was made of."""

    start: int
    """Its first expert."""
    model: int
    order: torch.Tensor | None
    """Where in it each neuron of the dense MLP is, None where it always was."""
    there: torch.Tensor
    """Which of those are there at all; all of them where none is known again."""
    unlike: float
    """The share of them that is not known again."""


@dataclass
class _Layer:
    """The experts of one layer beside the dense MLPs that they were made of."""

    experts: Experts
    moe: Reader
    layer: int
    group_size: int
    wholes: Sequence[Mapping[str, torch.Tensor]]
    """By source, the parts of its MLP."""

    def factors(self) -> dict[str, float]:
        """Return by part the least-squares ratio of the first group to its dense MLP."""
        group, found = self._groups[0], {}
        for part, cut in self._cuts.items():
            products = squares = own = 0.0
            for shard in range(self.group_size):
                wanted, there = self._wanted(part, group, shard)
                held = self._held(part, group, shard)[0]
                wanted, held = wanted.to(held.dtype).double(), held.double()
                if held.shape != wanted.shape:
                    raise UpcycleError("the dense model has MLPs of other sizes: not the source.")
                products += float((_by_neuron(held * wanted, cut) * there).sum())
                squares += float((_by_neuron(wanted.square(), cut) * there).sum())
                own += float(held.square().sum())
            ratio = products / squares if squares else 1.0
            if group.unlike == 1 and squares:
                ratio = math.sqrt(own / squares)  # what was drawn anew has its scale still
            near = float(Fraction(ratio).limit_denominator(_SIMPLE))
            found[part] = near if math.isclose(near, ratio, rel_tol=_ROUNDED) else ratio
        return found

    def movement(self, factors: Mapping[str, float]) -> LayerDrift:
        """Return how far the experts have come; `factors` is by part what they were made with."""
        import torch

        count = self.experts.num_experts
        squares, lengths = torch.zeros(2, count, dtype=torch.float64)
        apart = 0.0
        for part, cut in self._cuts.items():
            for shard in range(self.group_size):
                total: dict[int, torch.Tensor] = {}
                copies: dict[int, torch.Tensor] = {}
                for group in self._groups:
                    held, owners = self._held(part, group, shard)
                    wanted, there = self._wanted(part, group, shard)
                    # As a conversion writes it: cast, multiplied and rounded.
                    wanted = (wanted.to(held.dtype) * factors[part]).double()
                    difference = _masked(held.double() - wanted, there, cut)
                    for sums, values in ((squares, difference), (lengths, wanted)):
                        own = _by_neuron(values.square(), cut) * there
                        sums.index_add_(0, owners.expand(len(own)), own)
                    apart += float(difference.square().sum())
                    total[group.model] = total.get(group.model, 0) + difference
                    copies[group.model] = copies.get(group.model, 0) + there
                for model, each in total.items():
                    mean = _by_neuron(each.square(), cut) / copies[model].clamp(min=1)
                    apart -= float(mean.sum())
        rows = self.experts.router(self.moe, self.layer)
        routers = rows.reshape(-1, self.group_size, rows.shape[-1])
        return LayerDrift(
            layer=self.layer,
            moved=tuple(map(_ratio, squares.tolist(), lengths.tolist())),
            apart=_ratio(max(0.0, apart), float(lengths.sum())),
            unlike=sum(group.unlike for group in self._groups) / len(self._groups),
            num_groups=len(routers),
            split_groups=int((routers != routers[:, :1]).flatten(1).any(1).sum()),
            models=tuple(group.model for group in self._groups),
        )

    @cached_property
    def _cuts(self) -> dict[str, int | None]:
        """By part, the dimension that counts neurons; None where none does."""
        return {part: self.experts.cut(part) for part in self.wholes[0]}

    def _wanted(self, part: str, group: _Group, shard: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a shard's part in the dense MLP, and which of its neurons are there."""
        import torch

        size, cut = self.experts.expert_size, self._cuts[part]
        whole = self.wholes[group.model][part]
        if cut is None:
            return whole.double(), torch.ones(1)
        start = shard * size
        return whole.narrow(cut, start, size).double(), group.there[start : start + size]

    def _held(self, part: str, group: _Group, shard: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a group's part of a shard, in the dense MLP's order, and whose each neuron is."""
        import torch

        size, cut = self.experts.expert_size, self._cuts[part]
        if group.order is None or cut is None:
            expert = group.start + shard
            return self.experts.part(self.moe, self.layer, expert, part), torch.tensor([expert])
        places = group.order[shard * size : (shard + 1) * size]
        held = torch.cat(self._group(part, group.start), cut).index_select(cut, places)
        return held, group.start + places // size

    def _group(self, part: str, start: int) -> list[torch.Tensor]:
        experts = range(start, start + self.group_size)
        return [self.experts.part(self.moe, self.layer, expert, part) for expert in experts]

    @cached_property
    def _groups(self) -> list[_Group]:
        import torch

        from upcycle_cli.inspection.neuron_matching import recognised

        parts = {
            part: cut
            for part, cut in self._cuts.items()
            if cut is not None and self.wholes[0][part].dim() == 2
        }
        wanted = [
            torch.cat([_unit(_sketch(whole[part], cut)) for part, cut in parts.items()], 1).numpy()
            for whole in self.wholes
        ]
        found = []
        for start in range(0, self.experts.num_experts, self.group_size):
            each = [
                _unit(torch.cat([_sketch(held, cut) for held in self._group(part, start)]))
                for part, cut in parts.items()
            ]
            held = torch.cat(each, 1).numpy()
            known = [recognised(rows, held) for rows in wanted]
            model = max(range(len(known)), key=lambda number: known[number][2])
            order, there, _ = known[model]
            unlike = 1 - float(there.mean())
            mask = torch.from_numpy(there if there.any() else ~there)
            places = None if order is None else torch.from_numpy(order)
            found.append(_Group(start, model, places, mask, unlike))
        return found


def _masked(values: torch.Tensor, there: torch.Tensor, cut: int | None) -> torch.Tensor:
    """Return a part without the neurons that are not there."""
    return values if cut is None else (values.movedim(cut, -1) * there).movedim(-1, cut)


def _unit(rows: torch.Tensor) -> torch.Tensor:
    lengths: torch.Tensor = rows.norm(dim=1, keepdim=True)
    return rows / (lengths + 1e-30)


def _sketch(matrix: torch.Tensor, cut: int) -> torch.Tensor:
    """Return some entries of each neuron, enough to tell it from all others."""
    return matrix.movedim(cut, 0)[:, :_SKETCHED].float()


def _by_neuron(values: torch.Tensor, cut: int | None) -> torch.Tensor:
    """Return what a part has, summed up by neuron; in one where it has none."""
    return values.sum().reshape(1) if cut is None else values.movedim(cut, 0).flatten(1).sum(1)


def _ratio(square: float, whole: float) -> float:
    return math.sqrt(square / whole) if whole else 0.0
