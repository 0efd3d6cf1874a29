"""What the expert weights of an MoE show: which experts are equal, and which groups are whole.

One expert is in memory at a time. With the dense models, weight_drift.py also measures the scale
factors and how far training has moved the experts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader, raw_bytes
from upcycle_cli.core.display import Compact
from upcycle_cli.inspection.weight_drift import LayerDrift, measure_drift
from upcycle_cli.models.lookup import dense_model
from upcycle_cli.models.moe_experts import Experts
from upcycle_cli.verification.neuron_hashes import neuron_hashes

_MAX_DIFFERING = 8


@dataclass(frozen=True, kw_only=True, repr=False)
class WeightFacts(Compact):
    """What the expert weights show; the fields after `shared_works` need the dense models."""

    distinct_experts: int
    """The number of different experts, in the layer with the most."""
    granularity: int
    """Experts per group: neighbours with equal router rows; 1 when all rows differ."""
    num_experts: int
    """The experts of all layers."""
    diverged: int
    """Experts that have copies in other groups of their layer, but no equal one."""
    whole_groups: bool
    """Whether the groups of each layer have the same neurons, in any order."""
    reordered_groups: int = 0
    """Groups of all layers with the same neurons as the first group in another order."""
    differing: tuple[str, ...] = ()
    """The experts that differ from the first group's, or one line with their number."""
    shared_width: int = 0
    """The intermediate size of the shared expert; 0 without one."""
    shared_works: bool = False
    """Whether the shared expert's output is nonzero in some layer."""
    shared_neurons: int | None = None
    """How many neurons of the dense MLP the shared expert has."""
    factors: Mapping[str, float] | None = None
    """The factor by which each matrix was multiplied."""
    sources: tuple[str, ...] = ()
    """The names of the dense models."""
    movement: tuple[LayerDrift, ...] | None = None
    """How far training has moved the experts of each layer."""


def examine_weights(experts: Experts, sources: Sequence[Checkpoint] = ()) -> WeightFacts:
    """Read an MoE's experts and routers, and compare them with its dense models if given.

    Raises UpcycleError when tensors are missing, or the sizes of a dense model do not fit.
    """
    with experts.moe.reader() as reader:
        factors = movement = num_shared = None
        sizes = {experts.group_size(reader, layer) for layer in experts.layers}
        group_size = granularity = sizes.pop() if len(sizes) == 1 else 1
        if sources:
            with ExitStack() as stack:
                models = [dense_model(source.config, source.tensors) for source in sources]
                readers = [stack.enter_context(source.reader()) for source in sources]
                dense = [*zip(sources, models, readers, strict=True)]
                factors, movement, num_shared = measure_drift(experts, reader, dense)
            # Training can make the router rows of a group unequal.
            group_size = experts.num_experts // movement[0].num_groups
        most, diverged, reordered, differing = 0, 0, 0, list[str]()
        for layer in experts.layers:
            found = _compare(experts, reader, layer, group_size)
            most = max(most, len(set(chain(*found.digests))))
            diverged += found.diverged
            reordered += found.reordered
            differing += [f"{experts.name(layer, '')[:-1]}, expert {e}" for e in found.differing]
        shared = experts.shared_width
        works = shared > 0 and any(experts.shared_works(reader, i) for i in experts.layers)
    total = experts.num_experts * len(experts.layers)
    if len(differing) > _MAX_DIFFERING:
        differing = [f"{len(differing):,} of {total:,} experts differ from the first group"]
    return WeightFacts(
        distinct_experts=most,
        granularity=granularity,
        num_experts=total,
        diverged=diverged,
        whole_groups=not differing,
        reordered_groups=reordered,
        differing=tuple(differing),
        shared_width=shared,
        shared_works=works,
        shared_neurons=num_shared,
        factors=factors,
        sources=tuple(source.name for source in sources),
        movement=movement,
    )


class _Compared(NamedTuple):
    """The groups of a layer, compared with the first one."""

    digests: Sequence[Sequence[bytes]]
    """The digest of each expert, by group."""
    equal: Sequence[int]
    """The groups with the same neurons as the first, itself included."""
    reordered: int
    """How many of them have their neurons in another order."""

    @property
    def differing(self) -> list[int]:
        """The experts that differ from the first group's."""
        size = len(self.digests[0])
        return [
            group * size + shard
            for group, digests in enumerate(self.digests)
            for shard in range(size)
            if group not in self.equal and digests[shard] != self.digests[0][shard]
        ]

    @property
    def diverged(self) -> int:
        """The number of experts that have copies, but no equal one."""
        if len(self.digests) == 1:
            return 0
        copies = [Counter(column) for column in zip(*self.digests, strict=True)]
        return sum(
            copies[shard][digest] == 1 and (group not in self.equal or len(self.equal) == 1)
            for group, digests in enumerate(self.digests)
            for shard, digest in enumerate(digests)
        )


def _compare(experts: Experts, reader: Reader, layer: int, size: int) -> _Compared:
    """Compare the groups of a layer, which have `size` experts each."""
    groups = [range(start, start + size) for start in range(0, experts.num_experts, size)]
    digests = [[_digest(experts, reader, layer, e) for e in group] for group in groups]
    first, equal, reordered = b"", [0], 0
    for number, group in enumerate(groups[1:], 1):
        if digests[number] != digests[0]:
            first = first or _neurons(experts, reader, layer, groups[0])
            if _neurons(experts, reader, layer, group) != first:
                continue
            reordered += 1
        equal.append(number)
    return _Compared(digests, equal, reordered)


def _digest(experts: Experts, reader: Reader, layer: int, expert: int) -> bytes:
    digest = hashlib.sha256()
    for _, tensor in experts.parts(reader, layer, expert):
        digest.update(raw_bytes(tensor))
    return digest.digest()


def _neurons(experts: Experts, reader: Reader, layer: int, group: range) -> bytes:
    """Return the sorted hashes of a group's neurons, and the bytes of parts without neurons."""
    hashes, rest = [], []
    for expert in group:
        total = np.zeros(experts.expert_size, np.uint64)
        for part, tensor in experts.parts(reader, layer, expert):
            dim = experts.cut(part)
            if dim is None:
                rest.append(bytes(raw_bytes(tensor)))
                continue
            bits = np.frombuffer(raw_bytes(tensor), f"u{tensor.element_size()}")
            total += neuron_hashes(bits.reshape(tensor.shape), dim, part)
        hashes.append(total)
    return np.sort(np.concatenate(hashes)).tobytes() + b"".join(rest)
