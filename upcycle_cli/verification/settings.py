"""Settings: does the MoE's config.json say what the dense model's says, to whoever reads it?

Every key is judged. What transformers reads is compared in effect, with each architecture's own
defaults; a key that neither model's architecture has must be the dense model's, since something
else may read it: another engine, a trainer, a later version.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from upcycle_cli.checkpoint import CONFIG_NAME, ITEM_BYTES, TORCH_DTYPES, Checkpoint
from upcycle_cli.errors import shown
from upcycle_cli.families.target import Target
from upcycle_cli.redirects import REDIRECTS, config_redirects
from upcycle_cli.verification.facts import Facts
from upcycle_cli.verification.models import TransformersError, load_config, transformers_says

_ABSENT = object()
_JUDGED_BY_OTHERS = frozenset(
    {
        # what the model is, which the two have not in common; and who wrote it
        "architectures",
        "dtype",
        "model_type",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "_name_or_path",
        # in effect and by the letter: `_in_effect`, `_rope_failures`, `_window_failures` and
        # `_head_failures`
        "head_dim",
        "layer_types",
        "max_window_layers",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "use_sliding_window",
    }
)
_JUDGED_WHERE_READ = frozenset(
    {
        # how the tensors' shapes read, which they are held to
        "decoder_sparse_step",
        "mlp_only_layers",
        "qkv_bias",
        "shared_expert_intermediate_size",
        # training alone, by `_training_failures`
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
    }
)
"""Keys that are judged by others where the MoE's architecture has them; elsewhere they are odd."""


def own_setting_failures(moe: Checkpoint, target: Target) -> Iterator[str]:
    """Name what config.json says of the MoE alone, and must not."""
    for failure in (
        *_architecture_failures(moe.config, target),
        *config_redirects(moe.config),
        *_head_failures(moe.config),
        *_rope_failures(moe.config),
        *_training_failures(moe.config),
    ):
        yield f"{CONFIG_NAME}: {failure}"


def setting_failures(facts: Facts) -> Iterator[str]:
    """Name the settings in which the MoE's config.json differs from the dense model's."""
    try:
        dense, moe = load_config(facts.dense.path), load_config(facts.moe.path)
        with transformers_says():  # which has settings that cannot be read, too
            found = list(_setting_failures(facts, dense, moe))
    except TransformersError as error:
        found = [f"transformers cannot read config.json: {error}"]
    yield from found


def _setting_failures(facts: Facts, dense: Any, moe: Any) -> Iterator[str]:  # noqa: ANN401
    yield from _differences(_in_effect(dense), _in_effect(moe))
    yield from _window_failures(facts, dense, moe)
    # The reverse is --untie-embeddings; whether its head is right is for the weights check.
    if moe.tie_word_embeddings and not dense.tie_word_embeddings:
        yield "tie_word_embeddings is true by the MoE's config.json, false by the dense model's"
    keys = facts.target.keys
    defaults = type(moe)()
    judged = {key for key in _JUDGED_WHERE_READ if hasattr(defaults, key)}
    judged |= {*_JUDGED_BY_OTHERS, *REDIRECTS, keys.num_experts, keys.top_k, keys.expert_size}
    judged.add(keys.norm_topk_prob or keys.top_k)
    for key in {**dense.to_dict(), **facts.dense.config, **facts.moe.config}:
        if key not in judged:
            yield from _key_failures(facts, key, dense, moe)
    yield from _dtype_failures(facts)


def setting_notes(facts: Facts) -> Iterator[str]:
    """Say what is right, and what some readers still get wrong."""
    config = facts.moe.config
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and "rope_theta" not in config:
        yield (
            "Its rope settings are in the notation of transformers 5 alone: older readers take "
            "their default."
        )
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and len(set(map(str, kinds))) > 1:
        yield (
            "Some layers have a window and some have none, which transformers 4 does not know of "
            f"{facts.target.model_type}."
        )
    sizes = {ITEM_BYTES[entry.dtype] for entry in facts.moe.tensors.values()}
    if any(facts.expert_size * size % 16 for size in {2, *sizes}):
        yield (
            f"Experts {facts.expert_size} wide have rows of an odd size, which the grouped matrix "
            "product of transformers and others does not take."
        )


def _architecture_failures(config: Mapping[str, Any], target: Target) -> Iterator[str]:
    architectures = config.get("architectures")
    if architectures != [target.architecture]:
        yield f"architectures is {shown(architectures)}, not {[target.architecture]!r}"


def _head_failures(config: Mapping[str, Any]) -> Iterator[str]:
    head_dim = config.get("head_dim")
    if head_dim is not None and (type(head_dim) is not int or head_dim < 1):
        yield f"head_dim is {shown(head_dim)}, not a size"


def _rope_failures(config: Mapping[str, Any]) -> Iterator[str]:
    """Whichever of the keys a reader takes, it must read the same."""
    written = {key: config[key] for key in ("rope_parameters", "rope_scaling") if key in config}
    inner = {key: value for key, value in written.items() if isinstance(value, dict)}
    thetas = {key: config[key] for key in ("rope_theta",) if key in config}
    for key, settings in inner.items():
        if "rope_theta" in settings:
            thetas[f"{key}.rope_theta"] = settings["rope_theta"]
        kind, old_kind = (settings.get(name) for name in ("rope_type", "type"))
        if None not in (kind, old_kind) and kind != old_kind:
            yield f"{key} has rope_type {shown(kind)} and type {shown(old_kind)}"
    first, *others = thetas.items() or [("", None)]
    for key, theta in others:
        if theta != first[1]:
            yield f"{first[0]} is {shown(first[1])}, but {key} is {shown(theta)}"
    kinds = {str(_scaling(value)) for value in written.values()}
    if inner and len(written) == 2 and len(kinds) > 1:
        scaling, parameters = written["rope_scaling"], written["rope_parameters"]
        yield f"rope_scaling is {shown(scaling)}, but rope_parameters is {shown(parameters)}"


def _scaling(value: object) -> dict[str, Any]:
    """Return what stretches rotary embeddings, in one notation; nothing for the plain kind."""
    settings = dict(value) if isinstance(value, dict) else {}
    kind = settings.pop("rope_type", settings.pop("type", "default"))
    settings = {
        key: item
        for key, item in settings.items()
        if key not in ("rope_theta", "type") and item is not None
    }
    return {} if kind == "default" else dict(sorted((settings | {"rope_type": kind}).items()))


def _training_failures(config: Mapping[str, Any]) -> Iterator[str]:
    """Name what spoils further training, which no forward pass shows."""
    coefficient = config.get("router_aux_loss_coef", 0.0)
    if not _is_number(coefficient) or not 0 <= coefficient <= 1:
        yield (
            f"router_aux_loss_coef is {shown(coefficient)}, and a load-balancing loss is added "
            "with a weight between 0 and 1"
        )
    jitter = config.get("router_jitter_noise")
    if jitter is not None and jitter != 0:
        yield (
            f"router_jitter_noise is {shown(jitter)}, which makes training multiply the MLP's "
            "input by noise"
        )
    flag = config.get("output_router_logits", False)
    if type(flag) is not bool:
        yield f"output_router_logits is {shown(flag)}, neither true nor false"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _in_effect(config: Any) -> dict[str, Any]:  # noqa: ANN401 - transformers has no types to name
    """Return the settings that each architecture writes down, or derives, its own way."""
    rope = getattr(config, "rope_parameters", None) or {}
    head_dim = getattr(config, "head_dim", None)
    return {
        "head_dim": head_dim or config.hidden_size // config.num_attention_heads,
        "rope_parameters": {
            key: value for key, value in sorted(rope.items()) if key != "type" and value is not None
        },
        "sliding_window of each layer": _windows(config),
    }


def _windows(config: Any) -> list[int | None]:  # noqa: ANN401
    """Return the window of each layer, None where it sees all; as each architecture reads it."""
    num_layers = config.num_hidden_layers
    if config.model_type == "llama":
        return [None] * num_layers
    window = config.sliding_window
    if config.model_type in ("mistral", "mixtral", "qwen3_moe"):
        return [window] * num_layers
    return [window if kind == "sliding_attention" else None for kind in config.layer_types]


def _window_failures(facts: Facts, dense: Any, moe: Any) -> Iterator[str]:  # noqa: ANN401
    """What is written of windows must fit the effect, for readers that take one key alone."""
    windows = _windows(moe)
    sliding = [layer for layer, window in enumerate(windows) if window is not None]
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    implied = {
        "use_sliding_window": bool(sliding),
        "sliding_window": windows[sliding[0]] if sliding else None,
        "max_window_layers": sliding[0] if sliding else len(windows),
        "layer_types": kinds,
    }
    for key, value in implied.items():
        by_dense, by_moe = (hasattr(type(config)(), key) for config in (dense, moe))
        # Where there are windows, every key is needed: each has a default of its own.
        written = facts.moe.config.get(key, None if sliding and by_moe else value)
        if key == "sliding_window":
            written = written or None  # transformers writes 0 where there is none
        # What neither architecture reads may have come from the dense model.
        kept = not (by_dense or by_moe) and _same(written, facts.dense.config.get(key, _ABSENT))
        if not kept and not _same(written, value):
            yield (
                f"{CONFIG_NAME}: {key} is {shown(written)}, and the windows of the layers make it "
                f"{shown(value)}"
            )


def _differences(dense: Mapping[str, Any], moe: Mapping[str, Any]) -> Iterator[str]:
    for key, value in dense.items():
        if not _same(moe[key], value):
            yield _difference(key, moe[key], value)


def _key_failures(
    facts: Facts,
    key: str,
    dense: Any,  # noqa: ANN401
    moe: Any,  # noqa: ANN401
) -> Iterator[str]:
    """Judge one key; `dense` and `moe` are transformers' configs."""
    written, original = (
        checkpoint.config.get(key, _ABSENT) for checkpoint in (facts.moe, facts.dense)
    )
    ours, theirs, usual = (getattr(config, key, _ABSENT) for config in (moe, dense, type(moe)()))
    if written is not _ABSENT and _same(written, original) and _same(ours, theirs):
        return
    if theirs is not _ABSENT and ours is not _ABSENT:
        if not _same(ours, theirs):
            yield _difference(key, ours, theirs)
    elif written is not _ABSENT and not _same(written, original) and not _same(written, usual):
        # Not even what transformers adds by itself when it saves such a model again.
        yield (
            f"{CONFIG_NAME}: {key} is {shown(written)}, and the dense model has no such setting: "
            "nothing tells what reads it"
        )


def _difference(key: str, ours: object, theirs: object) -> str:
    return (
        f"{key} is {_words(ours)} by the MoE's config.json, {_words(theirs)} by the dense model's"
    )


def _words(value: object) -> str:
    return "absent" if value is None else value if isinstance(value, str) else shown(value)


def _same(one: object, other: object) -> bool:
    """Whether two JSON values are equal; true is not 1."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _dtype_failures(facts: Facts) -> Iterator[str]:
    """A config may keep the dense model's dtype, or state its own tensors'; loaders obey it."""
    stored = {TORCH_DTYPES.get(entry.dtype) for entry in facts.moe.tensors.values()}
    for key in ("dtype", "torch_dtype"):
        value = facts.moe.config.get(key)
        kept = (facts.dense.config.get("dtype"), facts.dense.config.get("torch_dtype"))
        if value is not None and value not in kept and stored != {value}:
            yield f"{CONFIG_NAME}: {key} is {shown(value)}, which is not the dtype of all tensors"
