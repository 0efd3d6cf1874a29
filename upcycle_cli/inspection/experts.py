"""Compares the experts of an MoE with their copies, one expert in memory at a time.

With the dense models, weight_drift.py also measures the scale factors and the drift in training.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain

import numpy as np

from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader, raw_bytes
from upcycle_cli.core.display import Compact
from upcycle_cli.inspection.weight_drift import LayerDrift, measure_drift
from upcycle_cli.models.lookup import dense_model
from upcycle_cli.models.moe_experts import Experts
from upcycle_cli.verification.neuron_hashes import neuron_hashes


@dataclass(frozen=True, kw_only=True, repr=False)
class WeightFacts(Compact):
    """The results for the experts' weights; those after `shared_width` need the dense models."""

    distinct_experts: int
    """The number of different experts, in the layer with the most."""
    granularity: int
    """Experts per group: neighbours with equal router rows; 1 when all rows differ."""
    num_experts: int
    """The experts of all layers."""
    diverged: int
    """Experts that have copies in other groups of their layer, but no equal one."""
    shared_width: int = 0
    """The intermediate size of the shared expert; 0 without one."""
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

    Raises UpcycleError for missing tensors, and for dense models of other sizes.
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
        layers = [_compare(experts, reader, layer, group_size) for layer in experts.layers]
    return WeightFacts(
        distinct_experts=max(distinct for distinct, _ in layers),
        granularity=granularity,
        num_experts=experts.num_experts * len(layers),
        diverged=sum(diverged for _, diverged in layers),
        shared_width=experts.shared_width,
        shared_neurons=num_shared,
        factors=factors,
        sources=tuple(source.name for source in sources),
        movement=movement,
    )


def _compare(experts: Experts, reader: Reader, layer: int, size: int) -> tuple[int, int]:
    """Return how many experts are different, and how many have diverged.

    Groups have `size` experts. An expert has diverged if no other group has the same expert at its
    place, nor all neurons of its group in another order.
    """
    groups = [range(start, start + size) for start in range(0, experts.num_experts, size)]
    digests = [[_digest(experts, reader, layer, e) for e in group] for group in groups]
    distinct = len({*chain(*digests)})
    if all(own == digests[0] for own in digests):
        return distinct, 0
    neurons = [_neurons(experts, reader, layer, group) for group in groups]
    alone = [neurons.count(each) == 1 for each in neurons]
    places = [Counter(column) for column in zip(*digests, strict=True)]
    diverged = sum(
        alone[group] and place[own[shard]] == 1
        for group, own in enumerate(digests)
        for shard, place in enumerate(places)
    )
    return distinct, diverged


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
