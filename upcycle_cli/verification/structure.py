"""Structure: do the MoE's files hold what its config.json implies, and the dense model's settings?

Names and shapes are held against transformers' own model, made without memory on the meta device;
the settings of the forward pass against the dense model's, each with its own architecture's
defaults; and transformers loads the model and reports what it missed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from upcycle_cli.checkpoint import (
    INDEX_NAME,
    TORCH_DTYPES,
    WEIGHTS_NAME,
    Checkpoint,
    read_json,
)
from upcycle_cli.errors import UpcycleError, shown
from upcycle_cli.families.target import Target
from upcycle_cli.files import MOST_LISTING_BYTES
from upcycle_cli.verification.facts import Facts, dtype_failures, is_fused
from upcycle_cli.verification.listing import listing_failures
from upcycle_cli.verification.models import MoeLoader, TransformersError, empty_shapes
from upcycle_cli.verification.report import CheckResult, Findings
from upcycle_cli.verification.settings import own_setting_failures, setting_failures

NAME = "structure"
_HEAD = "lm_head.weight"


def check_structure(facts: Facts, loader: MoeLoader) -> CheckResult:
    """Check names, shapes, dtypes, index and settings, and that transformers loads the model."""
    findings = Findings()
    for failure in (
        *own_failures(facts.moe, facts.target, facts.moe_names),
        *dtype_failures(facts),
        *setting_failures(facts),
    ):
        findings.add(failure)
    loading = loader.loading
    for complaint in loading.complaints:
        findings.add(complaint)
    loaded = loading.info is not None
    passed = (
        f"{len(facts.moe.tensors)} tensors have the names, shapes and dtypes that config.json "
        "implies, and the settings of the forward pass are the dense model's."
    )
    note = ""
    if loaded and not loading.complaints:
        passed += " Transformers loads it and misses nothing."
    elif loading.not_tried is not None:
        note = f"Loading it with transformers was not tried: {loading.not_tried}."
    metrics = {"tensors": len(facts.moe.tensors), "loaded": loaded}
    return findings.result(NAME, passed, metrics, note)


def own_failures(moe: Checkpoint, target: Target, names: Sequence[str]) -> Iterator[str]:
    """Name what is wrong with an MoE as far as it can be seen without the dense model.

    `names` are those of all files beside it.
    """
    yield from _header_failures(moe, target)
    for name, entry in moe.tensors.items():
        if entry.dtype not in TORCH_DTYPES:
            yield f"{name} is {entry.dtype}, and weights are {', '.join(TORCH_DTYPES)}"
    yield from _index_failures(moe)
    yield from listing_failures(names, moe)
    yield from own_setting_failures(moe, target)


def _header_failures(moe: Checkpoint, target: Target) -> Iterator[str]:
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


def _index_failures(moe: Checkpoint) -> Iterator[str]:
    path = moe.path
    if not (path / INDEX_NAME).exists():
        return
    try:
        metadata = read_json(path / INDEX_NAME, MOST_LISTING_BYTES).get("metadata")
    except UpcycleError as error:
        yield error.message
        return
    if (path / WEIGHTS_NAME).exists():
        yield f"{INDEX_NAME} is there beside {WEIGHTS_NAME}, which loaders read instead"
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total != moe.nbytes:
        yield (
            f"{INDEX_NAME}: metadata.total_size is {shown(total)}, and the tensors take "
            f"{moe.nbytes} bytes"
        )
