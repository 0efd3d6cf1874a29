"""Experts that differ by noise, or by neurons that were drawn anew: is that all, and as recorded?

`upcycle.json` says that they do, and with that promises nothing; this holds it to the rest. With
noise, what an expert holds beyond its shard must be such noise. With neurons that were drawn anew
each expert has exactly as many of these as the share makes, the same in all of its parts, with the
mean and the standard deviation of what they replaced, and all others bit for bit. No two experts
have the same draws.

Legend: N experts, G shards, I dense intermediate size; expert e = g·G + s holds shard s of group g.
A neuron is a row of gate and up, a column of down, and an entry of their biases.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from upcycle_cli.checkpoint.storage import RECORD_NAME
from upcycle_cli.core.callbacks import Watch
from upcycle_cli.old_verification.bits import one_thread, same, unequal
from upcycle_cli.old_verification.kept import order_of
from upcycle_cli.old_verification.neurons import Neurons, group_part
from upcycle_cli.old_verification.recipes import SHUFFLED, SLICED, Record, is_positive
from upcycle_cli.old_verification.rounding import Rounding
from upcycle_cli.old_verification.statistics import Sample, alike, sums_of

if TYPE_CHECKING:
    from upcycle_cli.inspection.neuron_matching import Indices
    from upcycle_cli.old_verification.facts import Facts

_COMPARED = 4096
"""Draws of a part by which it is told from others, and how many of these there may be at once."""
_EXACT = 1e-6
"""Relative: what double precision makes of the same sums in another order is less."""
_DISTINCT = 1e12
"""Of so many choices of neurons no two experts have the same by chance."""
_FOR_ONE_THREAD = 1 << 19
"""Of matrices with fewer elements, several threads wait for one another at each of many steps."""

Parts = dict[str, torch.Tensor]


def perturbed_parts(facts: Facts) -> tuple[str, ...]:
    """Return the parts that are not the dense model's: noise is on matrices alone."""
    if facts.recipe.noise:
        return facts.kind.matrices
    return tuple(part for part in facts.parts if part != "down_bias")


def claimed_moments(record: Record, layer: int, part: str) -> tuple[float, float] | None:
    """Return the recorded mean and standard deviation of what draws of a layer's part went by."""
    listed = record.data.get("perturbation")
    for each in listed if isinstance(listed, list) else ():
        if isinstance(each, dict) and each.get("layer") == layer:
            found = each.get(part)
            values = found if isinstance(found, dict) else {}
            mean, std = values.get("mean"), values.get("std")
            if isinstance(mean, float) and abs(mean) < 1e30 and (std == 0 or is_positive(std)):
                return mean, float(std)
    return None


@dataclass
class Perturbed:
    """Compares the experts of a layer after another, and keeps what was measured."""

    facts: Facts
    neurons: Neurons
    rounding: Rounding
    samples: dict[str, Sample] = field(default_factory=dict)
    """By part, of all layers."""
    redrawn: int = 0
    """Neurons that are not the dense model's, of all experts of all layers."""
    own: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    """Draws what the experts are compared with."""

    @property
    def redrawn_share(self) -> float:
        """The share of experts' neurons that are not the dense model's."""
        facts = self.facts
        return self.redrawn / (len(facts.layers) * facts.num_experts * facts.expert_size)

    @property
    def whole(self) -> Sample:
        """What was measured of all parts together."""
        total = Sample()
        for sample in self.samples.values():
            total.merge(sample)
        return total

    def failures(self, layers: Sequence[int], watch: Watch) -> Iterator[str]:
        """Say what is wrong with the experts of layers, all of whose tensors have their shapes."""
        small = self.facts.expert_size * self.facts.hidden_size < _FOR_ONE_THREAD
        for done, layer in enumerate(layers, start=1):
            with one_thread() if small else nullcontext():
                found = [*_Layer(self, layer).failures()]
            yield from found
            watch.checked(done, len(layers), "layers")
        # Of all layers together there are more values, which say more.
        for part, sample in self.samples.items():
            for failure in sample.failures():
                yield f"{part} of all experts {failure}"

    def metrics(self) -> dict[str, float]:
        """Return what was measured, if anything."""
        found, recipe = self.whole, self.facts.recipe
        if not recipe.perturbed:
            return {}
        if recipe.noise:
            return {"noise": found.strength * recipe.noise, "noise_bound": found.bound}
        return {
            "redrawn_share": self.redrawn_share,
            "redrawn_std": found.strength,
            "redrawn_std_bound": found.bound,
        }

    def in_words(self) -> str:
        """Say what experts are, where nothing is wrong with them."""
        facts, measured = self.facts, self.whole
        by_chance = f"± {100 * measured.bound:.2g} % by chance"
        if facts.recipe.noise:
            found = measured.strength * facts.recipe.noise
            return (
                "Every expert is its shard of the dense MLP with normal noise of its own, "
                f"measured as {found:.4g} × the standard deviation of each matrix "
                f"({facts.recipe.noise:g} by {RECORD_NAME}, {by_chance})"
            )
        count, size = facts.recipe.redrawn(facts.expert_size), facts.expert_size
        return (
            f"In each expert {count} of {size} neurons ({self.redrawn_share:.4g}) were drawn anew, "
            "the same ones in all matrices, with the mean and the standard deviation of what they "
            f"replaced (measured {measured.strength:.4g} times the latter, {by_chance}); all "
            "others are the dense MLP's, bit for bit"
        )


@dataclass
class _Layer:
    """One layer while it is compared."""

    whole: Perturbed
    layer: int
    went_by: dict[str, list[tuple[int, float, float]]] = field(default_factory=dict)
    """By part, what draws went by: how many values, their sum, and that of their squares."""
    drawn: list[tuple[str, str, torch.Tensor]] = field(default_factory=list)
    """The first draws of each expert's part, with that and a name."""
    chosen: list[bytes] = field(default_factory=list)
    casts: dict[tuple[str, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def failures(self) -> Iterator[str]:
        """Say what is wrong."""
        facts, reordered, sound = self.whole.facts, 0, True
        for group in facts.groups:
            held = {}
            for part in facts.parts:
                found = group_part(facts, self.whole.neurons.moe, part, self.layer, group)
                if found is not None:
                    held[part] = found
            if len(held) < len(facts.parts):
                yield f"{self._name(group * facts.granularity)} has parts of several dtypes"
                return
            base = {part: self._base(part, each[0].dtype) for part, each in held.items()}
            order = order_of(facts.recipe, self.whole.neurons.cuts, held, base)
            reordered += order is not None
            for failure in self._group(group, held, base, order):
                sound = False
                yield failure
        if not sound:
            return
        meant = {SLICED: 0, SHUFFLED: facts.expansion - 1}.get(facts.recipe.neuron_order)
        if meant not in {None, reordered} and facts.recipe.reinit < 1:
            yield (
                f"layer {self.layer}: {reordered} of {facts.expansion} groups have an order of "
                f"their own, and by {RECORD_NAME} the order is {facts.recipe.neuron_order}"
            )
        yield from self._alike()
        yield from self._record()

    def _name(self, expert: int, part: str | None = None) -> str:
        if part is None:
            return f"layer {self.layer}, expert {expert}"
        return self.whole.facts.locate(part, self.layer, expert).label

    def _base(self, part: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a part of the dense MLP as a conversion writes it before it draws."""
        place, neurons = self.whole.facts.dense_place(part, self.layer), self.whole.neurons
        key = place.tensor, dtype
        if key not in self.casts:
            source = neurons.dense.tensor(place.tensor)
            self.casts[key] = self.whole.rounding.cast(place.tensor, source, dtype)
        values, factor = self.casts[key][place.index], neurons.factors[part]
        return values if factor == 1.0 else values * factor

    def _group(
        self,
        group: int,
        held: Mapping[str, list[torch.Tensor]],
        base: Parts,
        order: Indices | None,
    ) -> Iterator[str]:
        facts, cuts = self.whole.facts, self.whole.neurons.cuts
        anew: dict[str, list[tuple[str, torch.Tensor, torch.Tensor]]] = {}
        for shard in range(facts.granularity):
            expert = group * facts.granularity + shard
            mine = {part: each[shard] for part, each in held.items()}
            wanted = self._wanted(base, order, shard)
            if facts.recipe.noise:
                yield from self._noisy(expert, mine, wanted)
                continue
            redrawn = self._redrawn(mine, wanted)
            failure = self._uneven(expert, mine, wanted, redrawn)
            if failure is not None:
                yield failure
                continue
            for part, cut in cuts.items():
                new, old = (each[part].index_select(cut, redrawn) for each in (mine, wanted))
                pair = self._name(expert, part), new.reshape(-1), old.reshape(-1)
                anew.setdefault(part, []).append(pair)
        for part, triples in anew.items():
            if order is not None:
                # Of which expert a neuron was that is nowhere in the group, nothing tells.
                name, (_, new_parts, old_parts) = triples[0][0], zip(*triples, strict=True)
                triples = [(name, torch.cat(new_parts), torch.cat(old_parts))]  # noqa: PLW2901
            for name, new, old in triples:
                mean, std = self._moments(part, old)
                around = torch.tensor([mean], dtype=torch.float32)
                yield from self._compare(name, part, new, around, std)

    def _wanted(self, base: Parts, order: Indices | None, shard: int) -> Parts:
        """Return what an expert holds of the dense MLP, before it draws."""
        size, wanted = self.whole.facts.expert_size, Parts()
        for part, values in base.items():
            cut = self.whole.neurons.cuts.get(part)
            if cut is None:
                wanted[part] = values
            elif order is None:
                wanted[part] = values.narrow(cut, shard * size, size)
            else:
                places = torch.from_numpy(order[shard * size : (shard + 1) * size].copy())
                wanted[part] = values.index_select(cut, places)
        return wanted

    def _noisy(self, expert: int, mine: Parts, wanted: Parts) -> Iterator[str]:
        for part, values in wanted.items():
            if part not in self.whole.facts.kind.matrices:
                if not same(mine[part], values):
                    yield f"{self._name(expert, part)} is not the dense model's"
                continue
            flat = values.reshape(-1)
            _, std = self._moments(part, flat)
            std *= self.whole.facts.recipe.noise
            yield from self._compare(
                self._name(expert, part), part, mine[part].reshape(-1), flat, std
            )

    def _redrawn(self, mine: Parts, wanted: Parts) -> torch.Tensor:
        """Return which of an expert's neurons are not the dense model's in any of its matrices."""
        masks = [
            _changed(mine[part], wanted[part], self.whole.neurons.cuts[part])
            for part in self.whole.facts.kind.matrices
        ]
        return torch.stack(masks).any(0).nonzero().flatten()

    def _uneven(self, expert: int, mine: Parts, wanted: Parts, redrawn: torch.Tensor) -> str | None:
        """Say where an expert's parts, or its number of new neurons, are not what they must be."""
        facts = self.whole.facts
        size, meant = facts.expert_size, facts.recipe.redrawn(facts.expert_size)
        new = torch.zeros(size, dtype=torch.bool).index_fill_(0, redrawn, True)
        for part, values in wanted.items():
            cut, name = self.whole.neurons.cuts.get(part), self._name(expert, part)
            if cut is None:
                if not same(mine[part], values):
                    return f"{name} is not the dense model's"
                continue
            changed = _changed(mine[part], values, cut)
            kept = (new & ~changed).nonzero().flatten()
            if part in facts.kind.matrices and len(kept) and not _constant(values):
                return (
                    f"{name} has neuron {int(kept[0])} of the dense MLP, which is drawn anew in "
                    f"the expert's other matrices, and so {len(kept)} in all"
                )
            other = (changed & ~new).nonzero().flatten()
            if len(other):
                return (
                    f"{name} differs from the dense model in neuron {int(other[0])}, which the "
                    "expert's matrices have as it was"
                )
        if len(redrawn) != meant:
            return (
                f"{self._name(expert)}: {len(redrawn)} of {size} neurons are not the dense MLP's, "
                f"and by {RECORD_NAME} {meant} were drawn anew"
            )
        self.whole.redrawn += len(redrawn)
        self.chosen.append(new.numpy().tobytes())
        return None

    def _moments(self, part: str, values: torch.Tensor) -> tuple[float, float]:
        """Return the mean and standard deviation of what draws went by, and keep them."""
        found = sums_of(values)
        self.went_by.setdefault(part, []).append(found)
        return _mean_and_std([found])

    def _compare(
        self, name: str, part: str, held: torch.Tensor, base: torch.Tensor, std: float
    ) -> Iterator[str]:
        if not std:
            if bool((held != base.to(held.dtype)).any()):
                yield f"{name} differs where there was nothing to draw by"
            return
        sample = Sample()
        first = sample.add(held, base, std, self.whole.own)
        for failure in sample.failures():
            yield f"{name} {failure}"
        self.whole.samples.setdefault(part, Sample()).merge(sample)
        self.drawn.append((part, name, first[:_COMPARED].clone()))

    def _alike(self) -> Iterator[str]:
        """Say which experts have the same draws, or the same choice of neurons."""
        facts = self.whole.facts
        meant = facts.recipe.redrawn(facts.expert_size)
        if self.chosen and math.comb(facts.expert_size, meant) > _DISTINCT:
            first = dict[bytes, int]()
            for expert, mask in enumerate(self.chosen):
                if first.setdefault(mask, expert) != expert:
                    other = self._name(first[mask])
                    yield f"{self._name(expert)} has the same neurons drawn anew as {other}"
                    return
        parts = {part: [part] for part in {part for part, _, _ in self.drawn}}
        if len(self.drawn) <= _COMPARED:
            parts = {"": [part for part in parts if part in facts.kind.matrices]}
        for some in parts.values():
            found = [(name, draws) for part, name, draws in self.drawn if part in some]
            length = min((len(draws) for _, draws in found), default=0)
            pair = alike(torch.stack([draws[:length] for _, draws in found])) if found else None
            if pair is not None:
                yield f"{found[pair[0]][0]} has the same draws as {found[pair[1]][0]}"

    def _record(self) -> Iterator[str]:
        for part, every in self.went_by.items():
            claimed = claimed_moments(self.whole.facts.record, self.layer, part)
            if claimed is None:
                continue  # which the check of claims says
            mean, std = _mean_and_std(every)
            if abs(mean - claimed[0]) + abs(std - claimed[1]) > _EXACT * (abs(mean) + std):
                yield (
                    f"{RECORD_NAME}: perturbation has mean {claimed[0]:.6g} and std "
                    f"{claimed[1]:.6g} for {part}, layer {self.layer}; what was drawn by has "
                    f"{mean:.6g} and {std:.6g}"
                )


def _changed(held: torch.Tensor, wanted: torch.Tensor, cut: int) -> torch.Tensor:
    """Return for each neuron whether any of its entries differs."""
    return unequal(held, wanted).movedim(cut, 0).reshape(held.shape[cut], -1).any(1)


def _constant(values: torch.Tensor) -> bool:
    return bool((values == values.reshape(-1)[0]).all())


def _mean_and_std(every: list[tuple[int, float, float]]) -> tuple[float, float]:
    count, total, squares = (sum(column) for column in zip(*every, strict=True))
    mean = total / count
    return mean, math.sqrt(max(0.0, squares / count - mean * mean))
