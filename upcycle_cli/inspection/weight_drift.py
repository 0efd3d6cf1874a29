"""Measures how far training has moved the experts from the dense model and from their copies.

Distances are relative Frobenius norms over all parts of an expert. Each part is compared with the
dense part times the scale factor. Neurons are matched in any order by the direction of some of
their weights; with several dense models, each group is compared with the most similar one. Neurons
of the shared expert are left out.
Legend: N experts, G routed shards, I dense intermediate size, K weights of a neuron; expert
e = g·G + s started as shard s of virtual group g.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models.mlp import locate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader
    from upcycle_cli.models.dense import DenseModel
    from upcycle_cli.models.moe_experts import Experts

_SKETCH_SIZE = 32
"""How many weights of a neuron's part identify it."""
_SIMILAR = 0.5
"""The cosine above which two sketches are of one neuron; noise of the weights' size leaves 0.7."""
_MOSTLY = 0.9
_BLOCK_ROWS = 1024
_MAX_DENOMINATOR, _ROUNDING = 16, 2e-4
"""A measured factor this close to a simple fraction is taken to be that fraction."""

Source = tuple["Checkpoint", "DenseModel", "Reader"]
"""A dense model that experts were made from."""


@dataclass(frozen=True, kw_only=True)
class LayerDrift:
    """How far training has moved the experts of one layer."""

    layer: int
    moved: tuple[float, ...]
    """The distance of each expert from its dense shard, relative to the shard's norm."""
    apart: float
    """The root mean square distance of experts from the mean of the copies of their shard."""
    unlike: float
    """The share of neurons that match none of the dense model's, such as reinitialized ones. The
    distances leave them out, unless a group has no others."""
    num_groups: int
    """E."""
    split_groups: int
    """The number of groups with unequal router rows."""
    models: tuple[int, ...]
    """For each group, the index of the most similar source."""


def measure_drift(
    experts: Experts, moe: Reader, sources: Sequence[Source]
) -> tuple[dict[str, float], tuple[LayerDrift, ...], int]:
    """Return each part's scale factor, the drift of each layer, and the number of shared neurons.

    Only the first source gives shared neurons. One part of one group is in memory at a time.
    Raises UpcycleError when the sizes of a dense model do not fit.
    """
    shared = _shared_neurons(experts, moe, sources[0], experts.layers[0])
    for checkpoint, model, _ in sources:
        routed = model.intermediate_size - len(shared)
        group_size, rest = divmod(routed, experts.expert_size)
        if rest or not group_size or experts.num_experts % group_size:
            raise UpcycleError(
                f"the MoE was not made from {checkpoint.path}: experts {experts.expert_size} wide "
                f"are not shards of MLPs {model.intermediate_size} wide."
            )

    def layers() -> Iterator[_Layer]:
        for layer in experts.layers:
            own = _shared_neurons(experts, moe, sources[0], layer) if len(shared) else shared
            left_out = own if len(own) else shared
            dense = [
                {part: _dense_rows(source, layer, part, left_out) for part in experts.part_names}
                for source in sources
            ]
            yield _Layer(experts, moe, layer, group_size, dense)

    compared = layers()
    first = next(compared)  # kept, so that its neurons are matched once for factors and drift
    factors = first.factors()
    drifts = tuple(layer.drift(factors) for layer in chain((first,), compared))
    return factors, drifts, len(shared)


def _shared_neurons(experts: Experts, moe: Reader, dense: Source, layer: int) -> NDArray[np.intp]:
    """Return the dense index of each neuron of a layer's shared expert; empty if few match."""
    none, width = np.zeros(0, np.intp), experts.shared_width
    if not 0 < width < dense[1].intermediate_size:
        return none
    ours, theirs = [], []
    for part in ("gate", "up", "down"):
        matrix = experts.shared_part(moe, layer, part)
        if matrix is not None:
            ours.append(_sketch(_by_neuron(matrix, experts.cut(part))))
            theirs.append(_sketch(_dense_rows(dense, layer, part, none)))
    if not ours:
        return none
    found = match_neurons(np.concatenate(ours, 1), np.concatenate(theirs, 1))
    return found.order if found.matched.mean() >= _MOSTLY else none


def _dense_rows(dense: Source, layer: int, part: str, left_out: NDArray[np.intp]) -> torch.Tensor:
    """Return a part of a dense MLP, a row for each neuron that is not left out."""
    checkpoint, model, reader = dense
    mlp = model.mlp(checkpoint.tensors, layer)
    found = locate(mlp, part, width=model.intermediate_size)
    name = model.prefix(layer) + found.tensor
    if name not in checkpoint.tensors:
        raise UpcycleError(f"{checkpoint.path} lacks {name}, which its config.json implies.")
    rows = _by_neuron(reader.tensor(name)[found.index], found.split_dim)
    if found.split_dim is None or not len(left_out):
        return rows
    return rows[torch.from_numpy(np.setdiff1d(np.arange(len(rows)), left_out))]


@dataclass(frozen=True)
class Matches:
    """Which of their neurons is which of ours."""

    order: NDArray[np.intp]
    """The place of each of our neurons among theirs; any free place without a match."""
    matched: NDArray[np.bool_]
    """Whether each of our neurons has a match."""
    similarity: float
    """The sum of the cosines."""

    @property
    def unlike(self) -> float:
        """The share of our neurons without a match."""
        return 1 - float(self.matched.mean())


def match_neurons(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> Matches:
    """Match neurons by the direction of sketches, (I, K); there may be more of theirs."""
    ours, theirs = (
        rows / (np.linalg.norm(rows, axis=1)[:, None] + 1e-30) for rows in (ours, theirs)
    )
    cosines = (ours * theirs[: len(ours)]).sum(1)
    in_place = cosines > _SIMILAR
    unmoved = Matches(np.arange(len(ours)), in_place, float(cosines.sum()))
    if in_place.all():
        return unmoved
    order, best = np.empty(len(ours), np.intp), np.empty(len(ours), np.float32)
    for start in range(0, len(ours), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        block = ours[rows] @ theirs.T
        order[rows], best[rows] = block.argmax(1), block.max(1)
    similar = np.flatnonzero(best > _SIMILAR)
    places, first = np.unique(order[similar], return_index=True)
    if in_place.sum() >= _MOSTLY * len(places):
        return unmoved
    similar = similar[first]
    matched = np.zeros(len(order), np.bool_)
    matched[similar] = True
    order[~matched] = np.setdiff1d(np.arange(len(theirs)), places)[: (~matched).sum()]
    return Matches(order, matched, float(best[similar].sum()))


@dataclass
class _Layer:
    """The experts of one layer, and the dense MLPs that they were made from."""

    experts: Experts
    moe: Reader
    layer: int
    group_size: int
    dense_mlps: Sequence[Mapping[str, torch.Tensor]]
    """For each source, the parts of its MLP, (I, K)."""

    def factors(self) -> dict[str, float]:
        """Return for each part the least-squares ratio of the first group to its dense MLP."""
        found, unlike = {}, self._matches[0][1].unlike
        for part in self.dense_mlps[0]:
            actual, dense, matched, _ = self._compared(part, 0)
            actual, dense = actual.double(), dense.double()
            dense_squares = float((dense.square() * matched).sum())
            ratio = float((actual * dense * matched).sum()) / dense_squares if dense_squares else 1
            if unlike == 1 and dense_squares:  # reinitialized neurons keep the scale
                ratio = math.sqrt(float(actual.square().sum()) / dense_squares)
            simple = float(Fraction(ratio).limit_denominator(_MAX_DENOMINATOR))
            found[part] = simple if math.isclose(simple, ratio, rel_tol=_ROUNDING) else ratio
        return found

    def drift(self, factors: Mapping[str, float]) -> LayerDrift:
        """Return how far the experts have moved; `factors` are the conversion's."""
        squares, lengths = torch.zeros(2, self.experts.num_experts, dtype=torch.float64)
        apart = 0.0
        for part in self.dense_mlps[0]:
            total: dict[int, Any] = {}
            copies: dict[int, Any] = {}
            for group, (model, _) in enumerate(self._matches):
                actual, dense, matched, owners = self._compared(part, group)
                # A conversion casts first, then multiplies and rounds.
                dense = (dense * factors[part]).double() * matched
                difference = actual.double() * matched - dense
                squares.index_add_(0, owners, difference.square().sum(1))
                lengths.index_add_(0, owners, dense.square().sum(1))
                apart += float(difference.square().sum())
                total[model] = total.get(model, 0) + difference
                copies[model] = copies.get(model, 0) + matched
            for model, each in total.items():
                apart -= float((each.square() / copies[model].clamp(min=1)).sum())
        rows = self.experts.router(self.moe, self.layer)
        routers = rows.reshape(-1, self.group_size, rows.shape[-1])
        return LayerDrift(
            layer=self.layer,
            moved=tuple(map(_ratio, squares.tolist(), lengths.tolist())),
            apart=_ratio(max(0.0, apart), float(lengths.sum())),
            unlike=sum(each.unlike for _, each in self._matches) / len(self._matches),
            num_groups=len(routers),
            split_groups=int((routers != routers[:, :1]).flatten(1).any(1).sum()),
            models=tuple(model for model, _ in self._matches),
        )

    def _compared(
        self, part: str, group: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return a group's part and the dense one, (I, K), which rows count, and their experts.

        A part without neurons has a row for each expert.
        """
        actual, (model, matches) = self._rows(part, group), self._matches[group]
        dense = self.dense_mlps[model][part].to(actual.dtype)
        owners, matched = torch.arange(self.group_size), torch.ones(self.group_size)
        if self.experts.cut(part) is None:
            dense = dense.expand(self.group_size, -1)
        else:
            order, found = torch.from_numpy(matches.order), matches.matched
            # A group without any match is compared as it is.
            actual, matched = actual[order], torch.from_numpy(found if found.any() else ~found)
            owners = order // self.experts.expert_size
        if actual.shape != dense.shape:
            raise UpcycleError("the MoE was not made from this dense model: sizes differ.")
        return actual, dense, matched[:, None], group * self.group_size + owners

    def _rows(self, part: str, group: int, columns: int | None = None) -> torch.Tensor:
        """Return the first `columns` of a part of a group."""
        start, dim = group * self.group_size, self.experts.cut(part)
        experts = range(start, start + self.group_size)
        matrices = (self.experts.part(self.moe, self.layer, e, part) for e in experts)
        return torch.cat([_by_neuron(matrix, dim)[:, :columns] for matrix in matrices])

    @cached_property
    def _matches(self) -> list[tuple[int, Matches]]:
        """For each group, the most similar dense model, and which of its neurons are which."""
        parts = [part for part in ("gate", "up", "down") if part in self.dense_mlps[0]]
        dense = [np.concatenate([_sketch(m[part]) for part in parts], 1) for m in self.dense_mlps]
        best = []
        for group in range(self.experts.num_experts // self.group_size):
            sketches = [_sketch(self._rows(part, group, _SKETCH_SIZE)) for part in parts]
            joined = np.concatenate(sketches, 1)
            matches = enumerate(match_neurons(rows, joined) for rows in dense)
            best.append(max(matches, key=lambda found: found[1].similarity))
        return best


def _by_neuron(part: torch.Tensor, dim: int | None) -> torch.Tensor:
    """Return a part with a row for each neuron; one row for a part without neurons."""
    rows = part[None] if dim is None else part.movedim(dim, 0)
    return rows.reshape(len(rows), -1)


def _sketch(rows: torch.Tensor) -> NDArray[np.float32]:
    """Return the first weights of each neuron, (I, K), with norm 1."""
    sketch = rows[:, :_SKETCH_SIZE].float()
    found: NDArray[np.float32] = (sketch / (sketch.norm(dim=1, keepdim=True) + 1e-30)).numpy()
    return found


def _ratio(square: float, whole: float) -> float:
    return math.sqrt(square / whole) if whole else 0.0
