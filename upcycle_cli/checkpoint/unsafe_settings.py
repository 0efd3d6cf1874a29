"""What sends a loader elsewhere: config keys and files that change what a checkpoint computes.

Whoever reads `config.json` and the weights alone would describe another model than the one that a
user gets. So they are refused in a source, which is to be converted as it is used, and fail in an
MoE. One row each: who reads it, and what that does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.safe_files import matches

if TYPE_CHECKING:
    from upcycle_cli.checkpoint.checkpoint import Checkpoint

_CONFIG_KEYS: Mapping[str, str] = {
    "attribute_map": "gives settings other names",
    "auto_map": "names code of its own",
    "compression_config": "says that the weights are compressed",
    "configuration_files": "makes transformers read another config",
    "distributed_config": "changes how transformers loads the weights",
    "fusion_config": "makes transformers replace parts of the model",
    "per_layer_config": "changes settings from layer to layer",
    "quantization_config": "says that the weights are quantised",
    "transformers_weights": "makes transformers load another weight file",
}
_HEADS_BY_LAYER = ("gemma4_text", "upcycled_gemma4_text")
"""Types whose own config class says by `per_layer_config` which heads each layer has."""
_OF_HEADS = {"head_dim", "num_key_value_heads"}
_IMPLEMENTATIONS = (
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
)
"""Keys that name code of transformers, or a repo with kernels to be downloaded and run."""
_TOKENIZER_KEYS: Mapping[str, str] = {
    "auto_map": "names code of its own",
    "fast_tokenizer_files": "makes transformers read another tokenizer",
}
UNSAFE_KEYS = frozenset({*_CONFIG_KEYS, *_IMPLEMENTATIONS})  # what `unsafe_config_settings` judges

_FILES: Mapping[str, str] = {
    "adapter_config.json": "is an adapter, which transformers puts on top of the weights",
    "*.py": "is code, which loaders run with trust_remote_code",
    "custom_generate/": "is a link to a directory from which transformers would run code",
    "custom_generate/*.py": "is code, which transformers runs with trust_remote_code",
}


def unsafe_config_settings(config: Mapping[str, Any], parts: Collection[str] = ()) -> Iterator[str]:
    """Name the keys that send a loader elsewhere; `parts` are those of configs inside of this."""
    for part in parts:
        yield from (f"{part}: {failure}" for failure in unsafe_config_settings(config[part]))
    keys = {**_CONFIG_KEYS}
    if config.get("model_type") in _HEADS_BY_LAYER and _is_of_heads(config.get("per_layer_config")):
        del keys["per_layer_config"]
    yield from _named(config, keys)
    for key in _IMPLEMENTATIONS:
        value = config.get(key)
        values = value.values() if isinstance(value, dict) else (value,)
        named = [name for name in values if name is not None]
        # A repo is ORG/NAME, perhaps with a revision and the name of a kernel.
        if any(not isinstance(name, str) or {*name} & {*"/:@"} for name in named):
            yield f"{key} is {shown(value)}, which makes transformers run kernels from elsewhere"
    for key, value in config.items():
        if key not in parts and isinstance(value, dict) and value.get("model_type"):
            yield f"{key} is a model of its own (model_type {shown(value['model_type'])})"


def _is_of_heads(layers: object) -> bool:
    """Whether layers differ in what no MLP depends on."""
    return isinstance(layers, dict) and all(
        isinstance(changed, dict) and changed.keys() <= _OF_HEADS for changed in layers.values()
    )


def _named(config: Mapping[str, Any], keys: Mapping[str, str]) -> Iterator[str]:
    for key, effect in keys.items():
        if config.get(key):
            yield f"{key} is {shown(config[key])}, which {effect}"


def unsafe_files(names: Collection[str]) -> Iterator[str]:
    """Name each file of a checkpoint that is read beside its config and weights, or run."""
    for name in sorted(names):
        for pattern, effect in _FILES.items():
            # Where case does not count, as on many disks, another spelling is the same file.
            if matches(name.casefold(), [pattern]):
                yield f"{name} {effect}"


def refuse_unsafe_settings(
    source: Checkpoint, *, outgrown: bool = False, parts: Iterable[str] = ()
) -> None:
    """Raise UpcycleError for a source that is not what its config and weights say.

    `outgrown` says that models of its type came with code of their own before transformers had the
    architecture itself, which is what runs unless somebody trusts that code. `parts` is as for
    `unsafe_config_settings`.
    """
    config, names = source.config, source.storage.names()
    if outgrown:
        config = {key: value for key, value in config.items() if key != "auto_map"}
        names = [name for name in names if not name.endswith(".py") or "/" in name]
    for origin, found in (
        ("config.json: ", unsafe_config_settings(config, tuple(parts))),
        ("tokenizer_config.json: ", _named(source.tokenizer_config(), _TOKENIZER_KEYS)),
        ("", unsafe_files(names)),
    ):
        for redirect in found:
            raise UpcycleError(
                f"{origin}{redirect}. What is converted would not be what this model's users run.",
                "If it is not needed, take it out of a copy of the model, and convert that.",
            )
