"""The shared expert: the shards of the dense MLP that every token meets, bit for bit.

What it computes is added as it is. Where the architecture weighs it by a sigmoid, that must be 1/2
for any token, and its down matrix is twice the dense one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from upcycle_cli.old_verification.bits import difference, same
from upcycle_cli.old_verification.neurons import (
    Neurons,
    cut_of,
    dense_part,
    shared_factor,
    shared_neurons,
    shared_part,
)

_LARGEST_LOGIT = 1e-6
"""Of a gate that is 1/2: the sigmoid is off by a quarter of it, which float32 hardly sees."""


def shared_failures(neurons: Neurons, layer: int) -> Iterator[str]:
    """Say what a layer's shared expert holds that it should not; nothing of tensors not there."""
    facts, shared = neurons.facts, neurons.facts.target.shared
    if shared is None or not facts.shared_experts:
        return
    prefix = facts.target.prefix(layer)
    own = torch.from_numpy(shared_neurons(facts, neurons.dense, neurons.moe, layer))
    for weight in facts.target.shared_weights(facts.layout):
        for part in weight.parts:
            held, cut = shared_part(facts, neurons.moe, part, layer), cut_of(facts, part)
            if held is None or cut is None:
                continue
            source = dense_part(facts, neurons.dense, part, layer).index_select(cut, own)
            wanted = source.to(held.dtype) * shared_factor(facts, part)
            if not same(held, wanted):
                yield f"{prefix}{weight.name} ({part}) {difference(held, wanted)}"
    if shared.router is not None and prefix + shared.router in facts.moe.tensors:
        yield from _gate_failures(neurons, layer, prefix + shared.router)


def _gate_failures(neurons: Neurons, layer: int, name: str) -> Iterator[str]:
    row_1H = neurons.moe.tensor(name).double()
    gamma = neurons.facts.gamma_name(layer)
    if gamma is not None:
        row_1H = row_1H * (neurons.dense.tensor(gamma).double() + neurons.facts.family.norm_offset)
    # What leaves the norm has a length of √H before γ, so no token has a larger logit.
    logit = float(row_1H.norm()) * math.sqrt(row_1H.shape[-1])
    if not logit <= _LARGEST_LOGIT:
        yield f"{name}: its logit can reach {logit:.2g}, and the gate must be 1/2 for every token"
