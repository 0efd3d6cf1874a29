"""Structure: do the MoE's files hold what its config.json implies, and the dense model's settings?

Names and shapes are held against transformers' own model, made without memory on the meta device;
the settings of the forward pass against the dense model's, each with its own architecture's
defaults; and transformers loads the model and reports what it missed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from upcycle_cli.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    TORCH_DTYPES,
    WEIGHTS_NAME,
    Checkpoint,
    read_json,
)
from upcycle_cli.errors import UpcycleError
from upcycle_cli.families.target import Target
from upcycle_cli.verification.facts import Facts, dtype_failures, is_fused
from upcycle_cli.verification.models import (
    MoeLoader,
    TransformersError,
    empty_shapes,
    load_config,
)
from upcycle_cli.verification.report import CheckResult, Findings

NAME = "structure"
_HEAD = "lm_head.weight"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_SHARED_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "attention_dropout",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def check_structure(facts: Facts, loader: MoeLoader) -> CheckResult:
    """Check names, shapes, dtypes, index and settings, and that transformers loads the model."""
    findings = Findings()
    for failure in (
        *own_failures(facts.moe, facts.target),
        *dtype_failures(facts),
        *_config_dtype_failures(facts),
        *_setting_failures(facts),
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


def own_failures(moe: Checkpoint, target: Target) -> Iterator[str]:
    """Name what is wrong with an MoE as far as it can be seen without the dense model."""
    yield from _header_failures(moe, target)
    for name, entry in moe.tensors.items():
        if entry.dtype not in TORCH_DTYPES:
            yield f"{name} is {entry.dtype}, and weights are {', '.join(TORCH_DTYPES)}"
    yield from _index_failures(moe)
    yield from _stray_failures(moe)
    yield from _config_failures(moe, target)


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


def _config_dtype_failures(facts: Facts) -> Iterator[str]:
    """A config may keep the dense model's dtype, or state its own tensors'; loaders obey it."""
    stored = {TORCH_DTYPES.get(entry.dtype) for entry in facts.moe.tensors.values()}
    for key in ("dtype", "torch_dtype"):
        value = facts.moe.config.get(key)
        kept = (facts.dense.config.get("dtype"), facts.dense.config.get("torch_dtype"))
        if value is not None and value not in kept and stored != {value}:
            yield f"{key} is {value!r} by config.json, but that is not the dtype of all tensors"


def _index_failures(moe: Checkpoint) -> Iterator[str]:
    path = moe.path
    if not (path / INDEX_NAME).exists():
        return
    try:
        metadata = read_json(path / INDEX_NAME).get("metadata")
    except UpcycleError as error:
        yield error.message
        return
    if (path / WEIGHTS_NAME).exists():
        yield f"{INDEX_NAME} is there beside {WEIGHTS_NAME}, which loaders read instead"
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total != moe.nbytes:
        yield (
            f"{INDEX_NAME}: metadata.total_size is {total!r}, the tensors take {moe.nbytes} bytes"
        )


def _stray_failures(moe: Checkpoint) -> Iterator[str]:
    """Name the weight files that no loader should find, and some would."""
    read = {PurePosixPath(shard.name).as_posix() for shard in moe.shards}
    for file in sorted(moe.path.iterdir()):
        if file.suffix in _WEIGHT_SUFFIXES and file.name not in read:
            yield f"{file.name} is a weight file that holds no tensor of this model"


def _config_failures(moe: Checkpoint, target: Target) -> Iterator[str]:
    """Name what config.json says of the MoE alone, and must not."""
    config, architecture = moe.config, target.architecture
    if config.get("architectures") != [architecture]:
        yield (
            f"{CONFIG_NAME}: architectures is {config.get('architectures')!r}, "
            f"not {[architecture]!r}"
        )
    if "auto_map" in config:
        yield f"{CONFIG_NAME}: auto_map is there, and the architecture needs no code of its own"
    if config.get("quantization_config") is not None:
        yield f"{CONFIG_NAME}: quantization_config is there, and no tensor is quantised"
    # The other architectures do not read it, and may have it from the dense model.
    jitter = config.get("router_jitter_noise")
    if target.model_type == "mixtral" and jitter not in (None, 0):
        yield (
            f"{CONFIG_NAME}: router_jitter_noise is {jitter!r}, which makes training multiply the "
            "MLP's input by noise"
        )


def _setting_failures(facts: Facts) -> Iterator[str]:
    try:
        dense, moe = load_config(facts.dense.path), load_config(facts.moe.path)
    except TransformersError as error:
        yield f"transformers cannot read config.json: {error}"
        return
    moe_settings = _settings(moe)
    for key, value in _settings(dense).items():
        if moe_settings[key] != value:
            yield (
                f"{key} is {_shown(moe_settings[key])} by the MoE's config.json, "
                f"{_shown(value)} by the dense model's"
            )
    # The reverse is --untie-embeddings; whether its head is right is for the weights check.
    if moe.tie_word_embeddings and not dense.tie_word_embeddings:
        yield "tie_word_embeddings is true by the MoE's config.json, false by the dense model's"


def _settings(config: Any) -> dict[str, Any]:  # noqa: ANN401 - transformers has no types to name
    """Return what the forward pass reads, in effect: with the architecture's own defaults."""
    settings = {key: getattr(config, key, None) for key in _SHARED_SETTINGS}
    head_dim = getattr(config, "head_dim", None)
    settings["head_dim"] = head_dim or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    settings["rope_parameters"] = {
        key: value for key, value in sorted(rope.items()) if key != "type" and value is not None
    }
    settings["sliding_window of each layer"] = _windows(config)
    return settings


def _windows(config: Any) -> list[int | None]:  # noqa: ANN401
    """Return the window of each layer, None where it sees all; as each architecture reads it."""
    num_layers = config.num_hidden_layers
    if config.model_type == "llama":
        return [None] * num_layers
    window = config.sliding_window
    if config.model_type in ("mistral", "mixtral", "qwen3_moe"):
        return [window] * num_layers
    return [window if kind == "sliding_attention" else None for kind in config.layer_types]


def _shown(value: Any) -> str:  # noqa: ANN401
    return "absent" if value is None else f"{value}"
