"""The MoE's config.json: the source's config and the keys of the target.

Defaults differ between model types, so for native targets every effective value is written. Shipped
code uses the config class of its family and needs only its own keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle_cli.models.defaults import defaults_of
from upcycle_cli.models.dense import FULL, SLIDING, DenseModel
from upcycle_cli.models.lookup import Family
from upcycle_cli.models.moe import Target
from upcycle_cli.models.shipped import auto_map
from upcycle_cli.models.wrappers import nested_configs, text_config_of, with_text_config
from upcycle_cli.recipe.recipe import Recipe

_WINDOW_KEYS = {"layer_types", "sliding_window", "use_sliding_window", "max_window_layers"}
_NOT_COPIED = _WINDOW_KEYS | {
    # `_rope` writes these.
    *("rope_theta", "rope_scaling", "rope_parameters"),
    # No forward pass reads these: they stay as the source has them, or absent.
    *("use_cache", "initializer_range", "pretraining_tp"),
}
_ORIGINAL = "original_max_position_embeddings"
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok")


def moe_config(
    config: Mapping[str, Any],
    family: Family,
    recipe: Recipe,
    scale: float,
    *,
    untie_embeddings: bool,
    dtype: str | None,
) -> dict[str, Any]:
    """Return the MoE's config; `scale` is the factor on the gates.

    `dtype` is torch's name of the output dtype, or None to keep the source's.
    """
    dense, target = family.dense, family.target
    result = moe_text_config(config, family) | _recipe_keys(family, recipe, scale)
    tied = dense.values.get("tie_word_embeddings", False) and not untie_embeddings
    if target.inside is not None:
        native = None if target.ships_code else target.outer_type
        result = with_text_config(config, result, native, tied=tied)
    result |= {
        "architectures": [target.architecture],
        "model_type": target.outer_type,
        "tie_word_embeddings": tied,
    }
    result.pop("auto_map", None)  # transformers has that code itself by now
    if target.ships_code:
        result["auto_map"] = auto_map(wrapped=target.inside is not None)
    if dtype is not None:
        result |= {"dtype": dtype, "torch_dtype": dtype}
    for held in (result, *(result[part] for part in nested_configs(result))):
        remove_local_path(held)
    return result


def remove_local_path(config: dict[str, Any]) -> None:
    """Remove a local path from `_name_or_path`."""
    if str(config.get("_name_or_path", "")).startswith(("/", "~")):
        del config["_name_or_path"]


def moe_text_config(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the config of the MoE's text model, without the keys of the recipe."""
    dense, target = family.dense, family.target
    config = dense.family.with_current_keys(text_config_of(config))
    # transformers treats these as aliases: "num_experts": 0 would override num_local_experts.
    dropped = {*_EXPERT_KEYS, *target.keys.aliases}
    if not target.ships_code:  # engines apply a window to any model
        dropped |= _WINDOW_KEYS - defaults_of(target.model_type).keys()
    result = {key: value for key, value in config.items() if key not in dropped}
    if not target.ships_code:
        result["model_type"] = target.model_type
        # Every key that both model types have gets its effective value.
        shared = defaults_of(dense.model_type).keys() & defaults_of(target.model_type).keys()
        if target.model_type == dense.model_type:
            shared = {key for key in shared if dense.values[key] is not None}
        result |= {key: dense.values[key] for key in sorted(shared - _NOT_COPIED)}
    result |= _rope(config, dense, target)
    balancing = {
        "router_aux_loss_coef": 0.01,  # the paper's load-balancing coefficient
        "output_router_logits": False,
    }
    known = balancing if target.ships_code else defaults_of(target.model_type)
    result |= {key: value for key, value in balancing.items() if key in known}
    settings = {**target.constants, **_windows(dense, target), **target.settings(dense)}
    if "rope_parameters" in settings:  # rope_scaling would override it
        result.pop("rope_scaling", None)
    return result | settings


def _windows(dense: DenseModel, target: Target) -> dict[str, Any]:
    known = defaults_of(target.model_type).keys()
    if "sliding_window" not in known or target.model_type == dense.model_type:
        return {}
    first = next((i for i, window in enumerate(dense.windows) if window), None)
    found: dict[str, Any] = {"sliding_window": None if first is None else dense.windows[first]}
    if len(known & _WINDOW_KEYS) > 1:
        found["layer_types"] = [SLIDING if window else FULL for window in dense.windows]
    if known & {"use_sliding_window", "max_window_layers"}:
        found["use_sliding_window"] = first is not None
        found["max_window_layers"] = dense.num_layers if first is None else first
    return found


def _rope(config: Mapping[str, Any], dense: DenseModel, target: Target) -> dict[str, Any]:
    """Return rope settings in the old keys, which everything reads, and in new ones if given."""
    if not {"rope_theta", "rope_scaling"} <= dense.values.keys():
        # Wrapped text models with multidimensional positions have `rope_parameters`. Old keys
        # cannot express settings per kind of layer.
        rope = config.get("rope_parameters")
        if config.get("rope_scaling") or not isinstance(rope, dict) or "rope_theta" not in rope:
            return {}
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    theta, scaling = dense.values["rope_theta"], dense.values["rope_scaling"]
    if target.ships_code:  # transformers 4 refuses a key more in the old form of longrope
        scaling = config.get("rope_scaling") or scaling
    elif scaling and _ORIGINAL in defaults_of(dense.model_type):
        scaling = {**scaling, _ORIGINAL: dense.values[_ORIGINAL]}  # it overrides the inner one
    found = {"rope_theta": theta, "rope_scaling": None if scaling is None else dict(scaling)}
    key = "partial_rotary_factor"
    if key in dense.values or key in defaults_of(target.model_type):
        found[key] = dense.values.get(key, dense.rotary_share)
    if "rope_parameters" in config and not target.ships_code:
        found["rope_parameters"] = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    return found


def _recipe_keys(family: Family, recipe: Recipe, scale: float) -> dict[str, Any]:
    dense, target = family.dense, family.target
    keys, expert_size = target.keys, dense.intermediate_size // recipe.granularity
    stated: dict[str | None, Any] = {
        # Possibly derived by a rule of the source; shipped code reads the source's own key.
        None if target.ships_code else keys.dense_size: dense.intermediate_size,
        keys.num_experts: recipe.num_experts,
        keys.top_k: recipe.top_k,
        keys.expert_size: expert_size,
        keys.expert_size_copy: expert_size,
        keys.scale: scale,
    }
    found = {key: value for key, value in stated.items() if key is not None}
    found |= target.layers.write(family.layers, dense.kinds)
    if keys.routing is not None:
        key, meanings = keys.routing
        found[key] = next(value for value, meant in meanings.items() if meant is recipe.routing)
    if target.ships_code and recipe.trains_tied:
        found["virtual_group_size"] = recipe.group_size
    if target.shared is not None:
        found |= target.shared.config_keys(recipe.shared_experts, expert_size)
    return found
