"""The experts of an MoE: what its config says of them, and what their weights say by themselves.

Tensors are read one at a time. Legend: N experts, H hidden, I expert intermediate size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader, raw_bytes
from upcycle_cli.models.families import dense_model
from upcycle_cli.plan.moe_experts import Experts

if TYPE_CHECKING:
    from upcycle_cli.inspection.weight_drift import LayerDrift

_MAX_DIFFERING = 8


@dataclass(frozen=True, kw_only=True)
class WeightFacts:
    """What the expert weights themselves say."""

    distinct_experts: int
    """How many different experts the layer with the most has."""
    granularity: int
    """Experts per group, by their router rows; 1 when the rows all differ."""
    whole_groups: bool
    """Whether the groups of every layer hold the same neurons, in whatever order."""
    reordered_groups: int = 0
    """Those, of all layers, that hold them in another order than the first."""
    differing: tuple[str, ...] = ()
    """Experts that are no copy of their place in the first group, where it is no matter of order;
    how many, where many are."""
    shared_width: int = 0
    """How wide the shared expert is; 0 where there is none."""
    shared_works: bool = False
    """Whether it does anything, in some layer."""
    shared_neurons: int | None = None
    """Measured against the dense model: how many of its neurons are shared."""
    factors: Mapping[str, float] | None = None
    """Measured against the dense model: what each matrix was multiplied by."""
    sources: tuple[str, ...] = ()
    """The dense models of that measurement, by their names."""
    movement: tuple[LayerDrift, ...] | None = None
    """Measured against the dense model: how far the experts of each layer have come."""


def examine(experts: Experts, sources: Sequence[Checkpoint] = ()) -> WeightFacts:
    """Read an MoE's experts and routers; with its dense models, measure the scale factors too.

    Raises UpcycleError when tensors are missing or the dense model has other sizes.
    """
    with experts.moe.reader() as reader:
        sizes = {experts.group_size(reader, layer) for layer in experts.layers}
        granularity = sizes.pop() if len(sizes) == 1 else 1
        most, reordered, differing = 0, 0, []
        for layer in experts.layers:
            digests = [expert_digest(experts, reader, layer, e) for e in range(experts.num_experts)]
            most = max(most, len(set(digests)))
            first, neurons = digests[:granularity], None
            for start in range(granularity, experts.num_experts, granularity):
                others = digests[start : start + granularity]
                if others == first:
                    continue
                if neurons is None:
                    neurons = group_neurons(experts, reader, layer, range(granularity))
                group = range(start, start + granularity)
                if group_neurons(experts, reader, layer, group) == neurons:
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
            from upcycle_cli.inspection.weight_drift import measured

            with ExitStack() as stack:
                models = [dense_model(each.config, each.tensors) for each in sources]
                readers = [stack.enter_context(each.reader()) for each in sources]
                dense = [*zip(sources, models, readers, strict=True)]
                factors, movement, num_shared = measured(experts, reader, dense)
    if len(differing) > _MAX_DIFFERING:
        every = experts.num_experts * len(experts.layers)
        differing = [f"{len(differing):,} of {every:,} experts are no copies"]
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
        sources=tuple(each.name for each in sources),
        movement=movement,
    )


def expert_digest(experts: Experts, reader: Reader, layer: int, expert: int) -> bytes:
    """Identify an expert by the bytes of its parts."""
    digest = hashlib.sha256()
    for _, tensor in experts.parts(reader, layer, expert):
        digest.update(raw_bytes(tensor))
    return digest.digest()


def group_neurons(experts: Experts, reader: Reader, layer: int, group: range) -> bytes:
    """Identify the neurons of some experts, in whatever order they are, and their biases."""
    import numpy as np

    from upcycle_cli.inspection.neuron_matching import neuron_hashes

    found, rest = [], []
    for expert in group:
        total = np.zeros(experts.expert_size, np.uint64)
        for part, tensor in experts.parts(reader, layer, expert):
            cut = experts.cut(part)
            if cut is None:
                rest.append(bytes(raw_bytes(tensor)))
                continue
            bits = np.frombuffer(raw_bytes(tensor), f"u{tensor.element_size()}")
            total += neuron_hashes(bits.reshape(tensor.shape), cut, part)
        found.append(total)
    return np.sort(np.concatenate(found)).tobytes() + b"".join(rest)
