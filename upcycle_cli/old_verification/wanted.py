"""Every tensor that an MoE must have, derived from the dense model's, and how it is judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from upcycle_cli.old_verification.copies import Copy, copies_of
from upcycle_cli.old_verification.dtypes import added_tensors, correction_biases, shared_tensors
from upcycle_cli.old_verification.facts import Facts
from upcycle_cli.old_verification.places import Experts


@dataclass(frozen=True)
class Wanted:
    """A tensor that the MoE must have: its shape, and how its values are judged.

    `role` is copied (a `copy` of dense rows), expert, router, zero, shared (of the size that the
    dense tensor `source` has), shared_router; added, of one value, or `source` times it; made, of
    which another judges.
    """

    shape: tuple[int, ...]
    role: str
    source: str = ""
    layer: int = 0
    copy: Copy | None = None
    value: float = 1.0
    """What fills it, or what the dense tensor is multiplied by."""


def wanted_tensors(facts: Facts, experts: Experts) -> dict[str, Wanted]:
    """Return every tensor that the MoE must have, derived from the dense model's tensors."""
    wanted: dict[str, Wanted] = {}
    for copy in copies_of(facts):
        shape = copy.shape(facts.dense.tensors[copy.source].shape)
        wanted[copy.name] = Wanted(shape, "copied", copy=copy)
    # A tied model may carry its head all the same, and an untied MoE must.
    needs_head = not facts.moe_config.get("tie_word_embeddings", False)
    embedding = facts.family.embedding
    head = facts.target.head
    if head not in wanted and (needs_head or head in facts.moe.tensors):
        shape = facts.dense.tensors[embedding].shape
        wanted[head] = Wanted(shape, "copied", copy=Copy(head, embedding))
    for linear in facts.target.required_biases:
        for layer in range(facts.num_layers):
            name = f"{facts.target.prefix(layer)}{linear}"
            weight = facts.dense.tensors.get(f"{name}.weight")
            if weight is not None and f"{name}.bias" not in wanted:
                wanted[f"{name}.bias"] = Wanted(weight.shape[:1], "zero")
    bias = facts.target.correction_bias
    if bias is not None:
        zero = Wanted(bias.shape(facts.num_experts), "zero")
        wanted |= dict.fromkeys(correction_biases(facts), zero)
    N, H = facts.num_experts, facts.hidden_size
    by_part = {part: Wanted(facts.expert_shape(part), "expert") for part in facts.parts}
    for layer in facts.layers:
        wanted[facts.router_name(layer)] = Wanted((N, H), "router")
        for name, part in experts.names(layer).items():
            wanted[name] = by_part[part]
        wanted |= _wanted_shared(facts, layer)
        for name, shape, source, row in added_tensors(facts, layer):
            root = 1.0 if row.root is None else float(facts.setting(row.root)) ** 0.5
            wanted[name] = Wanted(shape, "added", source, layer, value=root * row.factor)
    return wanted


def _wanted_shared(facts: Facts, layer: int) -> Iterator[tuple[str, Wanted]]:
    """Yield the shared expert: shards of the dense MLP, or one that must not do anything."""
    key = None if facts.target.shared is None else facts.target.shared.size_key
    size = facts.expert_size if key is None else facts.target.value(facts.moe_config, key)
    size = facts.shared_width or size
    for name, weight, source in shared_tensors(facts, layer):
        shape = (1, facts.hidden_size) if weight is None else weight.shape(size, facts.hidden_size)
        role = "shared_router" if weight is None else "shared" if source else "zero"
        role = "made" if facts.shared_experts else role
        yield name, Wanted(shape, role, source, layer)
