"""Configs of dense models, and of what becomes of them, by transformers and by upcycle_cli."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from upcycle_cli.models.dense import DenseModel, read_dense
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.lookup import choose, dense_family
from upcycle_cli.models.moe_config import moe_config
from upcycle_cli.recipe.recipe import SHIPPED, Recipe

SLIDING, FULL = "sliding_attention", "full_attention"

SIZES = {
    "vocab_size": 11,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


NATIVE_PAIRS = [(name, t) for name, row in DENSE.items() for t in row.targets if t != SHIPPED]
"""Each dense type with each of its targets that is a class of transformers."""


def transformers_config(config: Mapping[str, Any]) -> Any:  # noqa: ANN401 - transformers is untyped
    from transformers import CONFIG_MAPPING

    # transformers writes into the rope settings that it is given.
    return CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))


def source_of(target: str) -> str:
    """Return a dense model type that can become the target."""
    return next((name for name, native in NATIVE_PAIRS if native == target), "olmo2")


def dense_model(config: Mapping[str, Any]) -> DenseModel:
    return read_dense(dense_family(config), config)


def converted(
    config: Mapping[str, Any],
    target: str,
    recipe: Recipe,
    **settings: Any,  # noqa: ANN401
) -> dict[str, Any]:
    family = choose(config, target, recipe.routing, layers=recipe.layers)
    row = family.target
    options = {"untie_embeddings": False, "dtype": None} | settings
    resolved = recipe.resolve(row.routings[0], scales_in_config=row.keys.scale is not None)
    scale = resolved.factors(family.dense.mlp_kind).config
    return moe_config(config, family, resolved, scale, **options)
