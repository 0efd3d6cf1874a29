"""The order in which a virtual group has the dense MLP's neurons, found from the weights.

Whoever made the MoE, and whatever it says of itself: each neuron of a group is matched to one of
the dense MLP by the first few entries of all its parts, as a conversion must have written them,
and by all of its weights where those are not enough. What is found is a candidate: whoever asks
compares all of it, bit for bit.

Legend: N experts, G shards, I dense intermediate size, K the first entries of a neuron; expert
e = g·G + s holds shard s of virtual group g. Where some shards are shared, they are the same for
all groups, and a group has the neurons that are left.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from upcycle_cli.checkpoint.checkpoint import Reader
from upcycle_cli.checkpoint.header import TORCH_DTYPES
from upcycle_cli.inspection.neuron_matching import match, match_some, neuron_hashes
from upcycle_cli.models.mlp import find_weight, locate, parts_of
from upcycle_cli.old_verification.bits import bits
from upcycle_cli.old_verification.facts import Facts
from upcycle_cli.old_verification.gathered import Gathered
from upcycle_cli.old_verification.merged import MeanReader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from upcycle_cli.inspection.neuron_matching import Hashes, Indices

_FIRST = 16
"""Entries by which neurons are told apart at first."""
_SAMPLE = 8
"""Neurons of an expert that tell whether it is a slice; if it is all but one, the rest shows it."""


def cut_of(facts: Facts, part: str) -> int | None:
    """Return the dimension of a part's dense matrix that counts neurons; None where none does.

    Of a part that the dense MLP lacks, which is found elsewhere, that of the experts.
    """
    held = facts.dense_mlp
    return find_weight(held if part in parts_of(held) else facts.layout.experts, part).split_dim


def first_entries(matrix: torch.Tensor, cut: int) -> torch.Tensor:
    """Return the first entries of each neuron: (I, K), or (K, I) where columns are neurons."""
    return matrix[:_FIRST] if cut else matrix[..., :_FIRST] if matrix.dim() > 1 else matrix


def group_part(
    facts: Facts, moe: Reader, part: str, layer: int, group: int
) -> list[torch.Tensor] | None:
    """Return a part of each expert of a group, None where one is not there, or not like the rest.

    They are views of the files, and lie as the dense matrix does.
    """
    found, wanted, dtypes = [], facts.expert_shape(part), set()
    cut = cut_of(facts, part)
    for expert in range(group * facts.group_size, (group + 1) * facts.group_size):
        place = facts.locate(part, layer, expert)
        entry = facts.moe.tensors.get(place.tensor)
        if entry is None or entry.dtype not in TORCH_DTYPES or entry.shape != wanted:
            return None
        dtypes.add(entry.dtype)
        found.append(place.select(moe.tensor(place.tensor), cut))
    return found if len(dtypes) == 1 else None


def dense_part(facts: Facts, dense: Reader | MeanReader, part: str, layer: int) -> torch.Tensor:
    """Return a part of a dense MLP, a view of its file."""
    place = facts.dense_place(part, layer)
    return dense.tensor(place.tensor)[place.index]


def shared_part(facts: Facts, moe: Reader, part: str, layer: int) -> torch.Tensor | None:
    """Return a part of a layer's shared expert, a view of its file; None where it is not there."""
    weights, prefix = facts.target.shared_weights(facts.layout), facts.target.prefix(layer)
    row, width = find_weight(weights, part), facts.shared_width
    entry = facts.moe.tensors.get(prefix + row.name)
    wanted = row.shape(width, facts.hidden_size)
    if entry is None or entry.dtype not in TORCH_DTYPES or entry.shape != wanted:
        return None
    return moe.tensor(entry.name)[locate(weights, part, width=width).index]


def shared_factor(facts: Facts, part: str) -> float:
    """Return what a part of the shared expert is multiplied by: a gate of 1/2 is made up for."""
    gated = facts.target.shared is not None and facts.target.shared.router is not None
    return 2.0 if gated and part == "down" else 1.0


def shared_neurons(facts: Facts, dense: Reader | MeanReader, moe: Reader, layer: int) -> Indices:
    """Return by place the dense neurons that are shared: the first ones, if nothing tells others.

    They are told by all of their weights, and what is found is a candidate.
    """
    width = facts.shared_width
    ours, wanted = np.zeros(width, np.uint64), np.zeros(facts.dense_size, np.uint64)
    for part in facts.parts if width else ():
        held, cut = shared_part(facts, moe, part, layer), cut_of(facts, part)
        if held is None or cut is None:
            return np.arange(width)
        whole = dense_part(facts, dense, part, layer)
        first = whole.narrow(cut, 0, min(_SAMPLE, width)).to(held.dtype)
        sample = held.narrow(cut, 0, min(_SAMPLE, width))
        if np.array_equal(as_bits(sample), as_bits(first * shared_factor(facts, part))):
            return np.arange(width)
        ours += hashes_of(held, cut, part)
        wanted += hashes_of(whole.to(held.dtype) * shared_factor(facts, part), cut, part)
    found = match_some(ours, wanted)
    return np.arange(width) if found is None else found


def routed_neurons(facts: Facts, dense: Reader | MeanReader, moe: Reader, layer: int) -> Indices:
    """Return the dense neurons that are not shared, in order."""
    return np.delete(np.arange(facts.dense_size), shared_neurons(facts, dense, moe, layer))


def as_bits(tensor: torch.Tensor) -> NDArray[Any]:
    """Return a weight's bits as numpy holds them, one nan as good as another."""
    held = bits(tensor)
    if bool(tensor.isnan().any()):
        held = held.masked_fill(tensor.isnan(), -1)
    found: NDArray[Any] = held.numpy()
    return found.view(f"u{found.itemsize}")


def hashes_of(tensor: torch.Tensor, cut: int, part: str) -> Hashes:
    """Return a hash for each neuron of a weight."""
    return neuron_hashes(as_bits(tensor), cut, part)


@dataclass
class Neurons:
    """Finds the orders of groups. `factors` is by part, biases too, what it was multiplied by."""

    facts: Facts
    dense: Reader | MeanReader
    moe: Reader
    factors: Mapping[str, float]
    reordered: dict[int, int] = field(default_factory=dict)
    """By layer, how many groups were found to have an order of their own."""
    uneven: set[int] = field(default_factory=set)
    """Layers whose groups have several orders, so that their experts are no copies."""
    told: set[tuple[int, int]] = field(default_factory=set)
    """Layers and groups of which it was said which neurons they have twice, or lack."""
    _wanted: dict[tuple[int, str, torch.dtype], Hashes] = field(default_factory=dict)
    """By layer, part and dtype: only of the layer that was asked for last."""
    _routed: dict[int, Indices] = field(default_factory=dict)
    """The same by layer."""

    @cached_property
    def cuts(self) -> dict[str, int]:
        """The parts that have something of each neuron, with the dimension that counts them."""
        cuts = {part: cut_of(self.facts, part) for part in self.facts.parts}
        return {part: cut for part, cut in cuts.items() if cut is not None}

    def routed(self, layer: int) -> Indices:
        """Return the dense neurons of a layer that are not shared, in order."""
        if layer not in self._routed:
            self._routed = {layer: routed_neurons(self.facts, self.dense, self.moe, layer)}
        return self._routed[layer]

    def is_sliced(self, layer: int, group: int) -> bool:
        """Whether a group's experts begin as the slices of the dense MLP do, in any of their parts.

        A group that is not all there counts as sliced, which is what it is held to then.
        """
        size, first = self.facts.expert_size, self.facts.shared_width
        for part, cut in self.cuts.items():
            held = group_part(self.facts, self.moe, part, layer, group)
            if held is None:
                return True
            whole = first_entries(dense_part(self.facts, self.dense, part, layer), cut)
            starts = [first_entries(each, cut).narrow(cut, 0, min(_SAMPLE, size)) for each in held]
            wanted = [
                whole.narrow(cut, first + shard * size, min(_SAMPLE, size))
                for shard in range(len(held))
            ]
            one, other = torch.cat(starts, cut), torch.cat(wanted, cut)
            if np.array_equal(as_bits(one), as_bits(self._made(other, part, one.dtype))):
                return True
        return False

    def order(self, layer: int, group: int) -> Indices | None:
        """Return by place of a group the dense neuron that it has, each once; None for none."""
        held: dict[str, list[torch.Tensor]] = {}
        for part in self.cuts:
            found = group_part(self.facts, self.moe, part, layer, group)
            if found is None:
                return None
            held[part] = found
        every = [self._hashes(layer, part, found) for part, found in held.items()]
        ours, wanted = (np.sum(side, axis=0) for side in zip(*every, strict=True))
        routed = self.routed(layer)

        def finer(some: Indices, others: Indices) -> tuple[Hashes, Hashes]:
            left, right = np.zeros(len(some), np.uint64), np.zeros(len(others), np.uint64)
            for part, cut in self.cuts.items():
                whole = torch.cat(held[part], cut).index_select(cut, torch.from_numpy(some))
                dense = dense_part(self.facts, self.dense, part, layer)
                dense = dense.index_select(cut, torch.from_numpy(routed[others]))
                left += hashes_of(whole, cut, part)
                right += hashes_of(self._made(dense, part, whole.dtype), cut, part)
            return left, right

        order = match(ours, wanted[routed], finer)
        return None if order is None else routed[order]

    def orders(self, layer: int, bring: Callable[[int], bool]) -> dict[int, Indices]:
        """Return the orders of those of a layer's groups that have one of their own.

        `bring` hears of groups that are going to be looked at, and says whether they can be. A
        group in which no order is found is held to that of the dense MLP.
        """
        orders: dict[int, Indices] = {}
        if any(math.isnan(factor) for factor in self.factors.values()):
            return orders
        for group in self.facts.groups:
            if not self.is_sliced(layer, group) and bring(group):
                order = self.order(layer, group)
                if order is not None:
                    orders[group] = order
        self.reordered.pop(layer, None)
        if orders:
            self.reordered[layer] = len(orders)
            first = next(iter(orders.values()))
            several = any(not np.array_equal(order, first) for order in orders.values())
            if several or len(orders) < len(self.facts.groups):
                self.uneven.add(layer)
        return orders

    def gathered(
        self,
        part: str,
        layer: int,
        group: int,
        order: Indices,
        cast: Callable[[str, torch.dtype], torch.Tensor] | None = None,
    ) -> Gathered:
        """Return a part of a group that has an order, to be compared.

        `cast` gives a dense tensor in a dtype by its name.
        """
        held = group_part(self.facts, self.moe, part, layer, group)
        assert held is not None, "only what is there has an order"
        place, dtype = self.facts.dense_place(part, layer), held[0].dtype
        if cast is None:
            source = self.dense.tensor(place.tensor)[place.index].to(dtype)
        else:
            source = cast(place.tensor, dtype)[place.index]
        return Gathered(tuple(held), source, self.cuts[part], order, self.factors[part])

    def by_parts(self, layer: int, group: int) -> dict[str, Indices]:
        """Return by part which dense neuron each place seems to have in it, -1 where none.

        For words: nothing says that they agree, or that each is there once.
        """
        found = {}
        for part in self.cuts:
            held = group_part(self.facts, self.moe, part, layer, group)
            if held is None:
                continue
            ours, wanted = self._hashes(layer, part, held)
            by_hash = np.argsort(wanted, kind="stable")
            place = np.searchsorted(wanted, ours, sorter=by_hash).clip(max=len(wanted) - 1)
            neurons = by_hash[place]
            here = self.facts.shared_width + np.arange(len(ours))
            # A neuron that has a twin may be either; where it stands is the likelier one.
            neurons = np.where(wanted[here] == ours, here, neurons)
            found[part] = np.where(wanted[neurons] == ours, neurons, -1)
        return found

    def _made(self, values: torch.Tensor, part: str, dtype: torch.dtype) -> torch.Tensor:
        factor = self.factors[part]
        values = values.to(dtype)
        return values if factor == 1.0 else values * factor

    def _hashes(self, layer: int, part: str, held: list[torch.Tensor]) -> tuple[Hashes, Hashes]:
        """Return the hashes of the first entries of a group's neurons, and of the dense MLP's."""
        cut, dtype = self.cuts[part], held[0].dtype
        ours = [hashes_of(first_entries(each, cut), cut, part) for each in held]
        key = layer, part, dtype
        if key not in self._wanted:
            for old in [old for old in self._wanted if old[0] != layer]:
                del self._wanted[old]
            first = first_entries(dense_part(self.facts, self.dense, part, layer), cut)
            self._wanted[key] = hashes_of(self._made(first, part, dtype), cut, part)
        return np.concatenate(ours), self._wanted[key]


def most_likely(by_parts: Mapping[str, Indices]) -> Indices:
    """Return by place the neuron that most parts have there, -1 where no two agree."""
    columns = np.stack(list(by_parts.values()))
    likely = np.full(columns.shape[1], -1)
    same = (columns == columns[:1]).all(0)
    likely[same] = columns[0, same]
    for spot in np.flatnonzero(~same):
        counts = Counter(columns[:, spot][columns[:, spot] >= 0].tolist()).most_common(2)
        clear = counts and (len(counts) == 1 or counts[0][1] > counts[1][1])
        likely[spot] = counts[0][0] if clear else -1
    return likely
