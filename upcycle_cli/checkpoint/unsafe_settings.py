"""Config keys and files that run foreign code or change what a checkpoint computes.

They make a model compute something other than its config and weights say. A source that has one is
refused, and an MoE that has one fails verification.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from upcycle_cli.checkpoint.storage import TOKENIZER_CONFIG_NAME, read_json
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.safe_files import matches

if TYPE_CHECKING:
    from upcycle_cli.checkpoint.checkpoint import Checkpoint

_CONFIG_KEYS: Mapping[str, str] = {
    "attribute_map": "renames settings",
    "auto_map": "names code that the model ships",
    "compression_config": "says that the weights are compressed",
    "configuration_files": "makes transformers read another config",
    "distributed_config": "changes how transformers loads the weights",
    "fusion_config": "makes transformers replace parts of the model",
    "per_layer_config": "changes settings from layer to layer",
    "quantization_config": "says that the weights are quantised",
    "transformers_weights": "makes transformers load another weight file",
}
_HEADS_BY_LAYER = {"gemma4_text", "gemma4_unified_text"}
"""Types whose config class uses `per_layer_config` for the attention heads of each layer."""
_HEAD_KEYS = {"head_dim", "num_key_value_heads"}
_IMPLEMENTATIONS = (
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
)
"""Keys that name an implementation in transformers, or a repo with kernels to download."""
_TOKENIZER_KEYS: Mapping[str, str] = {
    "auto_map": "names code that the model ships",
    "fast_tokenizer_files": "makes transformers read another tokenizer",
}
_FILES: Mapping[str, str] = {
    "adapter_config.json": "is an adapter, which transformers adds to the weights",
    "*.py": "is code, which loaders run with trust_remote_code",
    "custom_generate/": "is a link to a directory from which transformers would run code",
    "custom_generate/*.py": "is code, which transformers runs with trust_remote_code",
}


def unsafe_config_settings(config: Mapping[str, Any], parts: Collection[str] = ()) -> Iterator[str]:
    """Describe each unsafe key of a config; `parts` are the keys of known nested configs."""
    for part in parts:
        yield from (f"{part}: {failure}" for failure in unsafe_config_settings(config[part]))
    layers = config.get("per_layer_config")
    only_heads = isinstance(layers, dict) and all(
        isinstance(changes, dict) and changes.keys() <= _HEAD_KEYS for changes in layers.values()
    )
    model_type = str(config.get("model_type")).removeprefix("upcycled_")
    if only_heads and model_type in _HEADS_BY_LAYER:
        config = {key: value for key, value in config.items() if key != "per_layer_config"}
    yield from _named(config, _CONFIG_KEYS)
    for key in _IMPLEMENTATIONS:
        value = config.get(key)
        values = value.values() if isinstance(value, dict) else (value,)
        named = [name for name in values if name is not None]
        # A repo is ORG/NAME, optionally with a revision and a kernel name.
        if any(not isinstance(name, str) or {*name} & {*"/:@"} for name in named):
            yield f"{key} is {shown(value)}, which makes transformers run kernels from elsewhere"
    for key, value in config.items():
        known = (*parts, "perceiver_config")  # releases of SmolVLM hold one that nothing reads
        if key not in known and isinstance(value, dict) and value.get("model_type"):
            yield f"{key} is the config of another model (model_type {shown(value['model_type'])})"


def _named(config: Mapping[str, Any], keys: Mapping[str, str]) -> Iterator[str]:
    for key, effect in keys.items():
        if config.get(key):
            yield f"{key} is {shown(config[key])}, which {effect}"


def refuse_unsafe_settings(
    source: Checkpoint, *, ignore_code: bool = False, parts: Iterable[str] = ()
) -> None:
    """Raise UpcycleError for a source with unsafe settings or files; see `unsafe_settings`."""
    if found := unsafe_settings(source, ignore_code=ignore_code, parts=parts):
        raise UpcycleError(
            f"{found[0]}. A conversion would differ from the model that people run.",
            "If the model does not need it, remove it from a copy and convert the copy.",
        )


def unsafe_settings(
    source: Checkpoint, *, ignore_code: bool = False, parts: Iterable[str] = ()
) -> list[str]:
    """Describe unsafe settings and files.

    With `ignore_code`, code in the source is accepted: models of this type shipped it before
    transformers had the architecture. `parts` is as for `unsafe_config_settings`.
    """
    config, names = source.config, source.storage.names()
    if ignore_code:
        config = {key: value for key, value in config.items() if key != "auto_map"}
        names = [name for name in names if not name.endswith(".py") or "/" in name]
    found = [f"config.json: {each}" for each in unsafe_config_settings(config, tuple(parts))]
    if source.storage.has(TOKENIZER_CONFIG_NAME):
        tokenizer = read_json(source.storage.local(TOKENIZER_CONFIG_NAME))
        keys = _named(tokenizer, _TOKENIZER_KEYS)
        found += [f"{TOKENIZER_CONFIG_NAME}: {each}" for each in keys]
    for pattern, effect in _FILES.items():
        # Many file systems ignore case.
        found += [f"{name} {effect}" for name in names if matches(name.casefold(), [pattern])]
    return found
