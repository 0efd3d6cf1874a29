"""What the expert weights of an MoE show: which experts are equal, and which groups are whole.

One expert is in memory at a time. With the dense models, weight_drift.py also measures the scale
factors and how far training has moved the experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

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
        sizes = {experts.group_size(reader, layer) for layer in experts.layers}
        granularity = sizes.pop() if len(sizes) == 1 else 1
        most, reordered, differing = 0, 0, list[str]()
        for layer in experts.layers:
            digests = [_digest(experts, reader, layer, e) for e in range(experts.num_experts)]
            most = max(most, len(set(digests)))
            first, neurons = digests[:granularity], b""
            for start in range(granularity, experts.num_experts, granularity):
                others = digests[start : start + granularity]
                if others == first:
                    continue
                neurons = neurons or _neurons(experts, reader, layer, range(granularity))
                group = range(start, start + granularity)
                if _neurons(experts, reader, layer, group) == neurons:
                    reordered += 1
                    continue
                differing += [
                    f"{experts.name(layer, '')[:-1]}, expert {start + shard}"
                    for shard, (one, other) in enumerate(zip(first, others, strict=True))
                    if one != other
                ]
        shared = experts.shared_width
        works = shared > 0 and any(experts.shared_works(reader, i) for i in experts.layers)
        factors = movement = num_shared = None
        if sources:
            with ExitStack() as stack:
                models = [dense_model(source.config, source.tensors) for source in sources]
                readers = [stack.enter_context(source.reader()) for source in sources]
                dense = [*zip(sources, models, readers, strict=True)]
                factors, movement, num_shared = measure_drift(experts, reader, dense)
    if len(differing) > _MAX_DIFFERING:
        total = experts.num_experts * len(experts.layers)
        differing = [f"{len(differing):,} of {total:,} experts differ from the first group"]
    return WeightFacts(
        distinct_experts=most,
        granularity=granularity,
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
