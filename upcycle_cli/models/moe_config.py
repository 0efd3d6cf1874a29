"""An MoE's config: the source's, with what the target needs said.

Defaults differ between two model types, so of a native pair every value that the source means is
written out. The shipped code has its family's own config class, and needs its own keys alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from upcycle_cli.models.defaults import defaults_of
from upcycle_cli.models.dense import DenseModel
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.moe import Target
from upcycle_cli.models.shipped import UPCYCLED_PREFIX, auto_map
from upcycle_cli.models.wrappers import inner, parts, with_inner
from upcycle_cli.recipe.recipe import Recipe

_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
_ELSEWHERE = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers")
"""Keys that a target's own settings say."""
_ALIASED = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok")
_IN_TRAINING = ("use_cache", "initializer_range", "pretraining_tp")
"""Keys that no forward pass reads: they stay as the source has them, or absent."""


def moe_config(
    config: Mapping[str, Any],
    dense: DenseModel,
    target: Target,
    recipe: Recipe,
    layers: Sequence[int],
    *,
    untie_embeddings: bool,
    dtype: str | None,
) -> dict[str, Any]:
    """Return the MoE's config; `layers` are those that become mixtures of experts.

    `dtype` is torch's name for the output dtype, or None to leave what the source says.
    """
    current = dense.family.current(inner(config))
    result = _text_config(current, dense, target, recipe, layers)
    tied = dense.values.get("tie_word_embeddings", False) and not untie_embeddings
    if target.inside is not None:
        native = None if target.ships_code else target.outer_type
        result = with_inner(config, result, native, tied=tied)
    result |= {
        "architectures": [target.architecture],
        "model_type": target.outer_type,
        "tie_word_embeddings": tied,
    }
    result.pop("auto_map", None)  # code that transformers has itself by now
    if target.ships_code:
        result["auto_map"] = auto_map(wrapped=target.inside is not None)
    if dtype is not None:
        result |= {"dtype": dtype, "torch_dtype": dtype}
    for held in (result, *(result[part] for part in parts(result))):
        forget_place(held)
    return result


def forget_place(config: dict[str, Any]) -> None:
    """Take out the local path of the person who saved it, which belongs to nobody."""
    if str(config.get("_name_or_path", "")).startswith(("/", "~")):
        del config["_name_or_path"]


def _text_config(
    config: Mapping[str, Any],
    dense: DenseModel,
    target: Target,
    recipe: Recipe,
    layers: Sequence[int],
) -> dict[str, Any]:
    """Return what the MoE's config says of its text model, which mostly is the whole."""
    result = dict(config)
    # Aliases in transformers: a source that says `"num_experts": 0` would undo num_local_experts.
    for key in (*_ALIASED, *target.keys.aliases):
        result.pop(key, None)
    if not target.ships_code:
        result |= {"model_type": target.model_type} | _effective(dense, target)
    result |= _rope(config, dense, target)
    balancing = {
        "router_aux_loss_coef": 0.01,  # the paper's load-balancing coefficient
        "output_router_logits": False,
    }
    known = balancing if target.ships_code else defaults_of(target.model_type)
    result |= {key: value for key, value in balancing.items() if key in known}
    settings = target.settings(dense)
    if "rope_parameters" in settings:  # by kinds of layers, which the older key would undo
        result.pop("rope_scaling", None)
    return result | settings | _choices(dense, target, recipe, layers)


def _effective(dense: DenseModel, target: Target) -> dict[str, Any]:
    """Return what the source means by every key that both model types have."""
    kept = {*_ROPE, *_ELSEWHERE, *_IN_TRAINING}
    shared = defaults_of(dense.model_type).keys() & defaults_of(target.model_type).keys()
    if target.model_type == dense.model_type:
        shared = {key for key in shared if dense.values[key] is not None}
    return {key: dense.values[key] for key in sorted(shared - kept)}


def _rope(config: Mapping[str, Any], dense: DenseModel, target: Target) -> dict[str, Any]:
    """State rotary embeddings in the older keys, which all read, and the source's newer ones."""
    if not {"rope_theta", "rope_scaling"} <= dense.values.keys():
        return _older_rope(config)
    theta, scaling = dense.values["rope_theta"], dense.values["rope_scaling"]
    found = {"rope_theta": theta, "rope_scaling": None if scaling is None else dict(scaling)}
    if "partial_rotary_factor" in dense.values:
        found["partial_rotary_factor"] = dense.values["partial_rotary_factor"]
    if "rope_parameters" in config and not target.ships_code:
        found["rope_parameters"] = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    return found


def _older_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return by older keys what stays as the source has it, and has by the newest one alone.

    That is how text models inside of others are turned by several positions. Where each kind of
    layer has settings of its own, no older key stands for them.
    """
    rope = config.get("rope_parameters")
    if config.get("rope_scaling") or not isinstance(rope, dict) or "rope_theta" not in rope:
        return {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def _choices(
    dense: DenseModel, target: Target, recipe: Recipe, layers: Sequence[int]
) -> dict[str, Any]:
    """Return the keys that say the recipe."""
    keys = target.keys
    found: dict[str, Any] = {}
    if not target.ships_code:
        found[keys.dense_size] = dense.intermediate_size  # which a rule may have derived
    found |= {
        keys.num_experts: recipe.num_experts,
        keys.top_k: recipe.top_k,
        keys.expert_size: dense.intermediate_size // recipe.granularity,
        **target.layers.write(layers, dense.kinds),
    }
    if keys.expert_size_too is not None:
        found[keys.expert_size_too] = found[keys.expert_size]
    if keys.routing is not None:
        key, meanings = keys.routing
        found[key] = next(value for value, meant in meanings.items() if meant is recipe.routing)
    if target.ships_code and recipe.trains_tied:
        found["virtual_group_size"] = recipe.group_size
    if keys.scale is not None:
        found[keys.scale] = recipe.factors(dense.mlp_kind).config
    if target.shared is not None and recipe.shared_experts:
        found |= target.shared.choices(recipe.shared_experts, found[keys.expert_size])
    elif target.shared is not None and target.shared.size is not None:
        assert target.shared.size_key is not None
        found[target.shared.size_key] = target.shared.size
    return found


def has_plain_attention(config: Mapping[str, Any], *, rotary_share: float = 1.0) -> bool:
    """Whether a config's heads make up the hidden size, no layer slides, and rope is plain.

    `rotary_share` is the part of each head that positions turn, 1 for the code that is shipped,
    whose attention is the dense model's own. What all models of a type have counts as plain where
    engines were tried with it.
    """
    family = DENSE.get(str(config.get("model_type")).removeprefix(UPCYCLED_PREFIX))
    if family is not None and family.own_attention:
        return True
    heads, head_dim = config.get("num_attention_heads"), config.get("head_dim")
    whole = head_dim is None or (
        type(heads) is int
        and type(head_dim) is int
        and heads * head_dim == config.get("hidden_size")
    )
    slides = bool(config.get("sliding_window")) and config.get("use_sliding_window", True)
    ropes = [config.get(key) for key in ("rope_scaling", "rope_parameters")]
    ropes += [kind for rope in ropes if isinstance(rope, dict) for kind in rope.values()]
    kinds = {rope.get("rope_type", "default") for rope in ropes if isinstance(rope, dict)}
    return whole and not slides and kinds <= {"default"} and rotary_share == 1.0
