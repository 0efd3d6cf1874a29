"""`defaults.json` against transformers: the whole file, and the shapes that are read from it."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from family_defaults import (
    MOE,
    TARGET,
    config_class,
    declared,
    formatted,
    generated,
    installed,
    kinds,
    tiny_config,
)

from upcycle_cli.models import dense_rows as families
from upcycle_cli.models.defaults import defaults_of, tensor_shapes
from upcycle_cli.models.moe_rows import NATIVE

FILE: dict[str, Any] = json.loads(TARGET.read_text("utf-8"))
DENSE = tuple(FILE["tensors"])
TYPES = tuple(FILE["defaults"])

pytestmark = pytest.mark.skipif(
    installed() != FILE["transformers"],
    reason=f"defaults.json is of transformers {FILE['transformers']}, not of {installed()}",
)


def test_rows_with_native_targets_have_defaults() -> None:
    for row in families.DENSE.values():
        assert not row.targets or row.model_type in TYPES
        if any(NATIVE[target].unsupported_tensors for target in row.targets):
            assert row.model_type in DENSE


def flags_of(model_type: str) -> list[str]:
    """The booleans of a config that add or remove tensors."""
    return [key for key in declared(model_type) if key.endswith("_bias") or key.startswith("tie_")]


def model_shapes(config: Any) -> dict[str, tuple[int, ...]]:  # noqa: ANN401 - transformers is untyped
    """The tensors of transformers' own model, by their names on disk."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }
    if config.model_type != "nemotron_h":
        return shapes
    # As in the released checkpoints; transformers renames on loading and on saving.
    return {
        name.replace("model.", "backbone.", 1) if name.startswith("model.") else name: shape
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("model_type", DENSE)
def test_the_shapes_are_the_models_for_all_flags(model_type: str) -> None:
    flags = flags_of(model_type)
    for states in itertools.product((False, True), repeat=len(flags)):
        config = tiny_config(model_type, **dict(zip(flags, states, strict=True)))
        ours = tensor_shapes(model_type, config.to_dict(), kinds(model_type))
        assert ours == model_shapes(config), dict(zip(flags, states, strict=True))


@pytest.mark.parametrize("model_type", sorted(TYPES))
def test_an_absent_key_means_its_default(model_type: str) -> None:
    listed = defaults_of(model_type)
    wide = 64 * config_class(model_type)().num_attention_heads
    for given in ({}, {"vocab_size": 96}, {"hidden_size": wide}):
        config = config_class(model_type)(**given)
        rope = getattr(config, "rope_parameters", None) or {}
        for key in ("rope_theta", "partial_rotary_factor") if "rope_theta" in listed else ():
            assert rope.get(key) == listed.get(key)
        read = json.loads(config.to_json_string(use_diff=False)) | rope | given
        # A null is derived, and so is the window of a model that does not slide.
        derived = {"sliding_window"} if "use_sliding_window" in listed else set()
        derived |= config.attribute_map.keys()  # saved by their other names
        derived |= {config.attribute_map.get(key, "") for key in given}
        derived |= {key for key, value in listed.items() if value in ("auto", -1)}
        for key, value in (dict(listed) | given).items():
            if value is not None and key not in derived:
                assert read[key] == value, key


def test_the_file_is_what_transformers_says() -> None:
    fresh = generated([name for name in TYPES if name not in MOE or name in DENSE])
    assert fresh == FILE
    assert TARGET.read_text("utf-8") == formatted(fresh), "python tests/family_defaults.py --write"
