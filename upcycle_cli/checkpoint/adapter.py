"""LoRA adapters, as peft saves them: which tensors of a model become W + s·B·A, and with which s.

The result equals peft's `merge_and_unload`, but nothing is merged on disk: the changed tensors are
computed when they are read. An adapter that is more than plain LoRA is refused.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from upcycle_cli.checkpoint import storage as files
from upcycle_cli.checkpoint.checkpoint import ADAPTER_PREFIX, Checkpoint
from upcycle_cli.checkpoint.header import LARGEST, TORCH_DTYPES, read_shard_header
from upcycle_cli.checkpoint.made import Dequantize, LowRank, Made, Source
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.safe_files import MOST_JSON_BYTES, read_small

_PREFIX = "base_model.model."
_LOW_RANK = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?(2)|\.weight)")
_INITIAL = (True, "gaussian", "eva", "orthogonal")  # others change the base before training
_PLAIN = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": _INITIAL}
_KNOWN = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "auto_mapping", "base_model_name_or_path", "revision", "task_type"),
    *("inference_mode", "peft_version", "lora_dropout", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("ensure_weight_tying", "runtime_config"),
)
"""Keys of plain LoRA. The tensors' names say what they change, the layer how it is stored."""
_TEXT = "model.language_model."
_SPELLINGS = (
    *(("", ""), ("model.", ""), ("transformer.", ""), ("lm_head.", "language_model.lm_head.")),
    *((_TEXT, disk) for disk in ("language_model.model.", "language_model.", "model.", "")),
    *(("model.", disk) for disk in ("model.language_model.", "language_model.model.")),
)
"""How names in memory, which adapters use, begin, and how they can begin on disk."""
_CONV1D = ("gpt2",)
"""Model types whose layers store their weights as (inputs, outputs)."""
_SLOW = re.compile(r"\)[*+?{]|([^*+?{(]*[*+?{(]){4}")
"""Patterns whose search can take exponential time, and a few harmless ones."""
_AGAIN = "Download or save the adapter again."


def open_adapter(storage: files.Storage) -> Checkpoint:
    """Open an adapter, local or remote; UpcycleError if it is damaged or more than plain LoRA."""
    path = storage.path
    hint = "After the + stands a LoRA adapter in safetensors, as peft's save_pretrained writes it."
    files.refuse_missing(path, hint)
    for name in (files.ADAPTER_NAME, files.ADAPTER_WEIGHTS_NAME):
        if not storage.has(name):
            raise UpcycleError(f"{path} has no {name}.", hint)
    raw = read_small(storage.local(files.ADAPTER_NAME), MOST_JSON_BYTES)
    config, digest = files.json_object(raw, str(path / files.ADAPTER_NAME)), hashlib.sha256(raw)
    for key in ("peft_type", *config):
        value = config.get(key)
        known = (value,) if key in _KNOWN else _PLAIN.get(key, ())
        if value not in known and (value or key == "peft_type"):
            words = f"{key} is {shown(value)}, but only plain LoRA can be read"
            raise UpcycleError(f"{path / files.ADAPTER_NAME}: {words}.", files.MERGE_WITH_PEFT)
    storage.prefetch_headers([files.ADAPTER_WEIGHTS_NAME])
    shard, entries = read_shard_header(storage, files.ADAPTER_WEIGHTS_NAME)
    if not entries:
        raise UpcycleError(f"{path / files.ADAPTER_WEIGHTS_NAME} has no tensors.", _AGAIN)
    held = {entry.name: entry for entry in entries}
    opened = Checkpoint(storage, config, digest.hexdigest(), held, (shard,), ())
    return replace(opened, config_name=files.ADAPTER_NAME)


def with_adapter(base: Checkpoint, adapter: Checkpoint) -> Checkpoint:
    """Return the base with the tensors that an adapter changes as computed ones.

    Raises UpcycleError for tensors that do not fit the base or the adapter's config.
    """
    path, made = adapter.path / files.ADAPTER_WEIGHTS_NAME, dict[str, Made](base.made)
    left_out = dict(base.left_out)
    pairs = dict[tuple[str, bool], dict[str, Source]]()
    if odd := next((name for name in base.stored if name.startswith(ADAPTER_PREFIX)), None):
        raise UpcycleError(f"{base.path}: no tensor of a model has a name like '{odd}'.")
    for name, entry in adapter.tensors.items():
        own = name.removeprefix(_PREFIX)
        low_rank = _LOW_RANK.fullmatch(own)
        if own == name or entry.dtype not in TORCH_DTYPES or (not low_rank and ".lora_" in own):
            words = f"{path}: {name} ({entry.dtype}) is no tensor of plain LoRA."
            raise UpcycleError(words, files.MERGE_WITH_PEFT)
        source = Source(ADAPTER_PREFIX + name, entry.dtype, entry.shape)
        if low_rank:
            module, of_embedding, part = low_rank.groups()
            pairs.setdefault((module, of_embedding is not None), {})[part] = source
            continue
        # peft loads these into the base, whether modules_to_save names them or not.
        held = _held(base, own.replace(".base_layer.", "."), path)
        if held.shape != source.shape:
            words = f"{name} has shape {[*source.shape]}, but {[*held.shape]} in {base.path}"
            hint = f"If the vocabulary was resized: {files.MERGE_WITH_PEFT}"
            raise UpcycleError(f"{path}: {words}.", hint)
        if isinstance(old := made.get(held.name), Dequantize) and old.scale is not None:
            left_out[old.scale.name] = "the adapter replaces the weight of this scale"
        made[held.name] = Dequantize(source, None, (1, 1), held.dtype)
    for (module, of_embedding), pair in pairs.items():
        held = _held(base, f"{module}.weight", path)
        turned = of_embedding or base.config.get("model_type") in _CONV1D
        factor = _factor(adapter, module, held.shape[::-1] if turned else held.shape, pair)
        of = made.get(held.name, held)
        if isinstance(of, LowRank):
            raise UpcycleError(f"{path} changes {held.name} twice.", _AGAIN)
        made[held.name] = LowRank(of, pair["A"], pair["B"], factor, turned, held.dtype)
    return replace(base, made=made, left_out=left_out, adapter=adapter)


def _held(base: Checkpoint, name: str, path: Path) -> Source:
    """Return the base's tensor of this name in memory; UpcycleError without one."""
    for memory, disk in _SPELLINGS:
        entry = base.tensors.get(disk + name.removeprefix(memory))
        if entry is None or not name.startswith(memory):
            continue
        if entry.dtype not in TORCH_DTYPES:
            words = f"{path} changes {name}, which {base.path} stores as {entry.dtype}."
            raise UpcycleError(words, f"Only {', '.join(TORCH_DTYPES)} can be changed.")
        return Source(entry.name, entry.dtype, entry.shape)
    hint = "Give the base model of this adapter. A head that is tied cannot be changed alone."
    raise UpcycleError(f"{path} changes {name}, which {base.path} does not have.", hint)


def _factor(
    adapter: Checkpoint, module: str, shape: tuple[int, ...], pair: Mapping[str, Source]
) -> float:
    """Return s of W + s·B·A; UpcycleError if A or B does not fit W (O, I) or the config."""
    rank = _setting(adapter.config, "r", "rank_pattern", module)
    alpha = _setting(adapter.config, "lora_alpha", "alpha_pattern", module)
    usable = type(rank) is int and rank > 0 and type(alpha) in (int, float)
    if not usable or not abs(alpha) <= LARGEST["F32"]:
        words = f"{module} has rank {shown(rank)} and alpha {shown(alpha)}"
        raise UpcycleError(f"{adapter.path / files.ADAPTER_NAME}: {words}.", _AGAIN)
    found = {name: each.shape for name, each in pair.items()}
    wanted = {"A": (rank, *shape[1:]), "B": (*shape[:1], rank)}
    if found != wanted:
        words = f"A and B of {module} have shapes {shown(found)}, not {wanted}"
        hint = "Give the base model of this adapter."
        raise UpcycleError(f"{adapter.path / files.ADAPTER_WEIGHTS_NAME}: {words}.", hint)
    return float(alpha / (math.sqrt(rank) if adapter.config.get("use_rslora") else rank))


def _setting(config: Mapping[str, Any], usual: str, by_module: str, module: str) -> Any:  # noqa: ANN401
    """Return a module's rank or alpha, as peft finds it; UpcycleError for a bad pattern."""
    try:
        for pattern, value in (config.get(by_module) or {}).items():
            if _pattern(pattern).fullmatch(module):
                return value
    except (AttributeError, re.error, RecursionError, OverflowError) as error:
        words = f"{files.ADAPTER_NAME}: {by_module} is unusable: {error}."
        raise UpcycleError(words, _AGAIN) from error
    return config.get(usual)


@cache
def _pattern(text: str) -> re.Pattern[str]:
    if len(text) > 200 or _SLOW.search(text):
        raise re.error(f"{shown(text)} could take for ever")
    return re.compile(rf"(.*\.)?({text})")
