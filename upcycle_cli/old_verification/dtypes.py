"""Which dtype each tensor of an MoE is to have."""

from __future__ import annotations

from collections.abc import Iterator

from upcycle_cli.checkpoint.header import TORCH_DTYPES
from upcycle_cli.checkpoint.storage import RECORD_NAME
from upcycle_cli.models.mlp import Weight
from upcycle_cli.models.moe import ExtraTensor, Layout
from upcycle_cli.old_verification.facts import Facts
from upcycle_cli.old_verification.sizes import read_tensors


def counterparts(facts: Facts) -> dict[str, str]:
    """Return the dense tensor whose dtype each tensor of the MoE takes, by its name in the MoE.

    What was made without a dense tensor, such as a router, takes that of what it works with.
    """
    dense = read_tensors(facts.dense)
    copied = (name for name in dense if name not in facts.became)
    found = {held: name for name in copied for held in facts.in_moe(name)}
    found.setdefault(facts.target.head, facts.family.embedding)
    for name in facts.moe.tensors:
        # A bias that the architecture insists on goes with the matrix beside it.
        matrix = f"{name.removesuffix('.bias')}.weight"
        if name.endswith(".bias") and name not in found and matrix in found:
            found[name] = found[matrix]
    for layer in facts.layers:
        first = facts.dense_place(facts.parts[0], layer).tensor
        found[facts.router_name(layer)] = first
        found |= {name: source or first for name, _, source in shared_tensors(facts, layer)}
        found |= {name: source or first for name, _, source, _ in added_tensors(facts, layer)}
        for expert in range(facts.num_experts):
            for part in facts.parts:
                # Fused gate_up holds both, and takes the gate's, which comes first.
                name = facts.locate(part, layer, expert).tensor
                found.setdefault(name, facts.dense_place(part, layer).tensor)
    return found


def shared_tensors(
    facts: Facts, layer: int, layout: Layout | None = None
) -> Iterator[tuple[str, Weight | None, str]]:
    """Yield the shared expert of a layer, if there is one: its weights, then its router.

    Each with its row, None for the router, and the dense tensor that it is made of, or at whose
    scale it is drawn, if any; by the names that it has in a layout, in the MoE's unless given.
    """
    shared, prefix = facts.target.shared, facts.target.prefix(layer)
    if shared is None or not (shared.required or facts.shared_experts):
        return
    for weight in facts.target.shared_weights(layout or facts.layout):
        part = weight.parts[0]
        inert = part == "down" and not facts.shared_experts and shared.norm is None
        source = "" if inert else facts.dense_place(part, layer).tensor
        yield prefix + weight.name, weight, source
    if shared.router is not None:
        yield prefix + shared.router, None, ""


def added_tensors(
    facts: Facts, layer: int
) -> Iterator[tuple[str, tuple[int, ...], str, ExtraTensor]]:
    """Yield what a layer has beside its experts: name, shape, dense tensor or "", and row."""
    for row in facts.target.extra_tensors:
        size = facts.num_experts if row.per_expert else facts.hidden_size
        source = "" if row.of is None else facts.family.layer.format(layer=layer) + row.of
        yield facts.target.prefix(layer) + row.name, (size,), source, row


def correction_biases(facts: Facts) -> set[str]:
    """Return the names of the biases on the choice of experts, which are in float32 always."""
    name = facts.target.correction_bias_name(facts.layout, facts.routing)
    return set() if name is None else {facts.target.prefix(layer) + name for layer in facts.layers}


def kept_wide(facts: Facts) -> set[str]:
    """Return the names of what is in float32 whatever the rest is in.

    Where experts have a correction bias, transformers runs the router in it, and saves it so.
    """
    biases, held = correction_biases(facts), facts.moe.tensors
    if not biases or isinstance(facts.record.data.get("dtype"), str):
        return biases
    routers = {facts.router_name(layer) for layer in facts.layers} & held.keys()
    return biases | {name for name in routers if held[name].dtype == "F32"}


def dtype_failures(facts: Facts) -> Iterator[str]:
    """Name the tensors whose dtype is neither the recorded one, their origin's, nor everyone's.

    A tensor of a dtype that no weight has is left to others.
    """
    wide = kept_wide(facts)
    held = {name: entry.dtype for name, entry in facts.moe.tensors.items()}
    for name in wide & held.keys():
        if held[name] != "F32":
            yield f"{name} is {held[name]}, and must be F32: it moves by little"
    stored = {name: d for name, d in held.items() if d in TORCH_DTYPES and name not in wide}
    recorded = facts.record.data.get("dtype")
    if isinstance(recorded, str):
        for name, dtype in stored.items():
            if TORCH_DTYPES[dtype] != recorded:
                yield f"{name} is {dtype}, {RECORD_NAME} records {recorded}"
        return
    if len(set(stored.values())) == 1 and stored.keys() == held.keys() - wide:
        return
    for name, source in counterparts(facts).items():
        wanted = facts.dense.tensors[source].dtype
        if name in stored and stored[name] != wanted:
            of = "" if source == name else f" ({source})"
            neither = f"neither the dense model's {wanted}{of} nor the dtype of all tensors"
            yield f"{name} is {stored[name]}: {neither}"
