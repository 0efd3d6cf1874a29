"""How far training has moved the experts: from the dense model's shards, and from one another.

Distances are relative Frobenius norms over all parts of an expert. Each part is compared with the
dense part times the factor that the conversion applied. Neurons are matched in any order, by some
of their weights, since training moves them by less than they differ; if there are several dense
models, each group is compared with the most similar one.
Legend: N experts, G shards, I dense intermediate size; expert e = g·G + s started as shard s of
virtual group g. Neurons of the shared expert are left out: G counts the routed shards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models.mlp import locate

if TYPE_CHECKING:
    import torch

    from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader
    from upcycle_cli.models.dense import DenseModel
    from upcycle_cli.plan.moe_experts import Experts

_SKETCH_SIZE = 32
"""How many weights of a neuron's part identify it."""
_SIMILAR = 0.7
"""The cosine above which two sketches are of the same neuron, trained; others are near 0."""
_ROWS = 1024
_MAX_DENOMINATOR, _ROUNDING = 16, 2e-4
"""A measured factor this close to a simple fraction is taken to be that fraction."""

Source = tuple["Checkpoint", "DenseModel", "Reader"]
"""A dense model that the experts were made of."""


@dataclass(frozen=True, kw_only=True)
class LayerDrift:
    """How far training has moved the experts of one layer."""

    layer: int
    moved: tuple[float, ...]
    """The distance of each expert from its dense shard, relative to the shard's norm."""
    apart: float
    """The root mean square distance of experts from the mean of the copies of their shard."""
    unlike: float
    """The share of neurons that match none of the dense model's, such as reinitialized ones; both
    distances leave them out, unless a group has no other."""
    num_groups: int
    """E."""
    split_groups: int
    """Groups whose router rows are not equal any more."""
    models: tuple[int, ...]
    """For each group, the index of the most similar source."""


def measure_drift(
    experts: Experts, moe: Reader, sources: Sequence[Source]
) -> tuple[dict[str, float], tuple[LayerDrift, ...], int]:
    """Return each part's scale factor, the drift of each layer, and the number of shared neurons.

    The shared neurons are those of the first source. In memory are one part of one expert and the
    sum of its copies; for a group with its own neuron order, one part of the group. Raises
    UpcycleError when the sizes of a dense model do not fit.
    """
    shared = _shared_neurons(experts, moe, sources[0], experts.layers[0])
    for checkpoint, model, _ in sources:
        routed = model.intermediate_size - len(shared)
        group_size, rest = divmod(routed, experts.expert_size)
        if rest or not group_size or experts.num_experts % group_size:
            raise UpcycleError(
                f"{checkpoint.path} is not the source: experts of width {experts.expert_size} are "
                f"not shards of its MLPs of width {model.intermediate_size}."
            )
    parts = [part for part, _ in experts.parts(moe, experts.layers[0], 0)]

    def layers() -> Iterator[_Layer]:
        for layer in experts.layers:
            own = _shared_neurons(experts, moe, sources[0], layer) if len(shared) else shared
            routed = _complement(own if len(own) else shared, sources[0][1].intermediate_size)
            dense_mlps = []
            for source in sources:
                mlp = {part: _dense_part(source, layer, part) for part in parts}
                for part, matrix in mlp.items() if len(shared) else ():
                    dim = experts.cut(part)
                    mlp[part] = matrix if dim is None else matrix.index_select(dim, routed)
                dense_mlps.append(mlp)
            yield _Layer(experts, moe, layer, group_size, dense_mlps)

    compared = layers()
    first = next(compared)  # kept, so that its neurons are matched once for factors and drift
    factors = first.factors()
    drifts = tuple(layer.drift(factors) for layer in chain((first,), compared))
    return factors, drifts, len(shared)


def _shared_neurons(experts: Experts, moe: Reader, dense: Source, layer: int) -> torch.Tensor:
    """Return the dense index of each neuron of a layer's shared expert; empty if none match."""
    import torch

    none, width = torch.zeros(0, dtype=torch.int64), experts.shared_width
    if not 0 < width < dense[1].intermediate_size:
        return none
    sides: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for part in ("gate", "up", "down"):
        matrix = experts.shared_part(moe, layer, part)
        if matrix is not None:
            dim = experts.cut(part)
            assert dim is not None
            for side, each in zip(sides, (matrix, _dense_part(dense, layer, part)), strict=True):
                side.append(_normalized(_sketch(each, dim)))
    if not sides[0]:
        return none
    ours, theirs = (torch.cat(side, 1) / len(side) ** 0.5 for side in sides)
    if float((ours * theirs[:width]).sum(1).median()) > _SIMILAR:
        return torch.arange(width)
    best = [(ours[i : i + _ROWS] @ theirs.T).max(1) for i in range(0, width, _ROWS)]
    found = torch.cat([each.indices for each in best])
    similar = float(torch.cat([each.values for each in best]).median()) > _SIMILAR
    return found if similar and len({*found.tolist()}) == width else none


def _dense_part(dense: Source, layer: int, part: str) -> torch.Tensor:
    checkpoint, model, reader = dense
    mlp = model.mlp(checkpoint.tensors, layer)
    found = locate(mlp, part, width=model.intermediate_size)
    name = model.prefix(layer) + found.tensor
    if name not in checkpoint.tensors:
        raise UpcycleError(f"{checkpoint.path} lacks {name}, which its config.json implies.")
    return reader.tensor(name)[found.index]


def _complement(neurons: torch.Tensor, count: int) -> torch.Tensor:
    import torch

    kept = torch.ones(count, dtype=torch.bool)
    kept[neurons] = False
    return kept.nonzero().flatten()


class _Group(NamedTuple):
    """A virtual group, the dense model that it is compared with, and which neurons match."""

    start: int
    """The first expert."""
    model: int
    order: torch.Tensor | None
    """For each dense neuron, its position in the group; None when the order is unchanged."""
    matched: torch.Tensor
    """Which dense neurons are compared: those that match, or all if none does."""
    unlike: float
    """The share of neurons that do not match."""


@dataclass
class _Layer:
    """The experts of one layer beside the dense MLPs that they were made of."""

    experts: Experts
    moe: Reader
    layer: int
    group_size: int
    dense_mlps: Sequence[Mapping[str, torch.Tensor]]
    """For each source, the parts of its MLP."""

    def factors(self) -> dict[str, float]:
        """Return for each part the least-squares ratio of the first group to its dense MLP."""
        group, found = self._groups[0], {}
        for part, dim in self._dims.items():
            products = dense_squares = squares = 0.0
            for shard in range(self.group_size):
                dense, matched = self._dense_shard(part, group, shard)
                actual = self._expert_shard(part, group, shard)[0]
                dense, actual = dense.to(actual.dtype).double(), actual.double()
                if actual.shape != dense.shape:
                    raise UpcycleError("the dense model has MLPs of other sizes: not the source.")
                products += float((_sum_by_neuron(actual * dense, dim) * matched).sum())
                dense_squares += float((_sum_by_neuron(dense.square(), dim) * matched).sum())
                squares += float(actual.square().sum())
            ratio = products / dense_squares if dense_squares else 1.0
            if group.unlike == 1 and dense_squares:
                ratio = math.sqrt(squares / dense_squares)  # reinitialized neurons keep the scale
            simple = float(Fraction(ratio).limit_denominator(_MAX_DENOMINATOR))
            found[part] = simple if math.isclose(simple, ratio, rel_tol=_ROUNDING) else ratio
        return found

    def drift(self, factors: Mapping[str, float]) -> LayerDrift:
        """Return how far the experts have moved; `factors` are those of the conversion."""
        import torch

        squares, lengths = torch.zeros(2, self.experts.num_experts, dtype=torch.float64)
        apart = 0.0
        for part, dim in self._dims.items():
            for shard in range(self.group_size):
                total: dict[int, torch.Tensor] = {}
                copies: dict[int, torch.Tensor] = {}
                for group in self._groups:
                    actual, owners = self._expert_shard(part, group, shard)
                    dense, matched = self._dense_shard(part, group, shard)
                    # A conversion casts first, then multiplies and rounds.
                    dense = (dense.to(actual.dtype) * factors[part]).double()
                    difference = _masked(actual.double() - dense, matched, dim)
                    for sums, values in ((squares, difference), (lengths, dense)):
                        own = _sum_by_neuron(values.square(), dim) * matched
                        sums.index_add_(0, owners.expand(len(own)), own)
                    apart += float(difference.square().sum())
                    total[group.model] = total.get(group.model, 0) + difference
                    copies[group.model] = copies.get(group.model, 0) + matched
                for model, each in total.items():
                    mean = _sum_by_neuron(each.square(), dim) / copies[model].clamp(min=1)
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
    def _dims(self) -> dict[str, int | None]:
        """For each part, the dimension that counts neurons; None for a part without one."""
        return {part: self.experts.cut(part) for part in self.dense_mlps[0]}

    def _dense_shard(
        self, part: str, group: _Group, shard: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a shard's part of the dense MLP, and which of its neurons are compared."""
        import torch

        size, dim = self.experts.expert_size, self._dims[part]
        matrix = self.dense_mlps[group.model][part]
        if dim is None:
            return matrix.double(), torch.ones(1)
        start = shard * size
        return matrix.narrow(dim, start, size).double(), group.matched[start : start + size]

    def _expert_shard(
        self, part: str, group: _Group, shard: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a group's part of a shard in the dense order, and each neuron's expert."""
        import torch

        size, dim = self.experts.expert_size, self._dims[part]
        if group.order is None or dim is None:
            expert = group.start + shard
            return self.experts.part(self.moe, self.layer, expert, part), torch.tensor([expert])
        places = group.order[shard * size : (shard + 1) * size]
        matrix = torch.cat(self._group_parts(part, group.start), dim).index_select(dim, places)
        return matrix, group.start + places // size

    def _group_parts(self, part: str, start: int) -> list[torch.Tensor]:
        experts = range(start, start + self.group_size)
        return [self.experts.part(self.moe, self.layer, expert, part) for expert in experts]

    @cached_property
    def _groups(self) -> list[_Group]:
        import torch

        from upcycle_cli.inspection.neuron_matching import match_neurons

        dims = {
            part: dim
            for part, dim in self._dims.items()
            if dim is not None and self.dense_mlps[0][part].dim() == 2
        }
        dense = [
            torch.cat([_normalized(_sketch(mlp[part], dim)) for part, dim in dims.items()], 1)
            for mlp in self.dense_mlps
        ]
        groups = []
        for start in range(0, self.experts.num_experts, self.group_size):
            sketches = [
                _normalized(torch.cat([_sketch(m, dim) for m in self._group_parts(part, start)]))
                for part, dim in dims.items()
            ]
            ours = torch.cat(sketches, 1).numpy()
            matches = [match_neurons(rows.numpy(), ours) for rows in dense]
            model = max(range(len(matches)), key=lambda number: matches[number].similarity)
            found = matches[model]
            matched = found.matched if found.matched.any() else ~found.matched
            order = None if found.order is None else torch.from_numpy(found.order)
            unlike = 1 - float(found.matched.mean())
            groups.append(_Group(start, model, order, torch.from_numpy(matched), unlike))
        return groups


def _masked(values: torch.Tensor, matched: torch.Tensor, dim: int | None) -> torch.Tensor:
    """Return a part with zeros for the neurons that are not compared."""
    return values if dim is None else (values.movedim(dim, -1) * matched).movedim(-1, dim)


def _normalized(rows: torch.Tensor) -> torch.Tensor:
    lengths: torch.Tensor = rows.norm(dim=1, keepdim=True)
    return rows / (lengths + 1e-30)


def _sketch(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the first weights of each neuron, (I, K)."""
    return matrix.movedim(dim, 0)[:, :_SKETCH_SIZE].float()


def _sum_by_neuron(values: torch.Tensor, dim: int | None) -> torch.Tensor:
    """Return the sum of each neuron's values; one sum for a part without neurons."""
    return values.sum().reshape(1) if dim is None else values.movedim(dim, 0).flatten(1).sum(1)


def _ratio(square: float, whole: float) -> float:
    return math.sqrt(square / whole) if whole else 0.0
