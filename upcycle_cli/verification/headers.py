"""Headers: are the tensors of an MoE those of the model that its config.json describes?

Nothing is loaded before they are: a config can ask for more memory than there is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from upcycle_cli.checkpoint import Checkpoint
from upcycle_cli.families.target import Target
from upcycle_cli.verification.facts import is_fused
from upcycle_cli.verification.models import TransformersError, empty_shapes

_HEAD = "lm_head.weight"


def header_failures(moe: Checkpoint, target: Target) -> Iterator[str]:
    """Hold names and shapes against those of transformers' model, made on the meta device."""
    try:
        in_memory = empty_shapes(moe.path)
    except TransformersError as error:
        yield f"transformers cannot make a model from config.json: {error}"
        return
    fused = is_fused(moe, target)
    wanted: dict[str, tuple[int, ...]] = {}
    for name, shape in in_memory.items():
        wanted |= {name: shape} if fused else _on_disk(target, name, shape)
    for name, shape in wanted.items():
        entry = moe.tensors.get(name)
        if entry is None:
            # A tied head is the embedding, and needs no tensor of its own.
            if name != _HEAD or not moe.config.get("tie_word_embeddings", False):
                yield f"{name} is missing"
        elif entry.shape != shape:
            yield f"{name} has shape {list(entry.shape)}, config.json implies {list(shape)}"
    for name in moe.tensors:
        if name not in wanted:
            yield f"{name} is not a tensor of the model that config.json describes"


def _on_disk(target: Target, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Translate a tensor of transformers' model to the tensors that hold it on disk.

    In memory the experts are fused: gate_up (N, 2·I/G, H), down (N, H, I/G).
    """
    match = re.match(r"model\.layers\.(\d+)\.", name)
    if match is None:
        return {name: shape}
    layer, names = int(match[1]), target.names
    if name == names.fused_router.format(layer=layer):
        return {names.router.format(layer=layer): shape}
    if name == names.fused_gate_up.format(layer=layer):
        num_experts, rows, columns = shape
        return {
            template.format(layer=layer, expert=expert): (rows // 2, columns)
            for expert in range(num_experts)
            for template in (names.gate, names.up)
        }
    if name == names.fused_down.format(layer=layer):
        num_experts, *matrix = shape
        return {
            names.down.format(layer=layer, expert=expert): tuple(matrix)
            for expert in range(num_experts)
        }
    return {name: shape}
