"""Sources whose tensors are not what their config implies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from shapes import tensor_shapes, tiny_config, write_hollow

from upcycle_cli import Options, Recipe, UpcycleError, build_plan, open_checkpoint
from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.plan.expressions import Source
from upcycle_cli.recipe.recipe import ExpertLayout

RECIPE = Recipe("E2G2T2")
Changes = Mapping[str, tuple[int, ...] | None]
LAYER_1 = "model.layers.1"


def source_with(path: Path, changes: Changes, model_type: str = "llama") -> Checkpoint:
    """Return a checkpoint with other tensors than its config implies; None takes one out."""
    config = tiny_config(model_type)
    shapes = {**tensor_shapes(config), **changes}
    kept = {name: shape for name, shape in shapes.items() if shape is not None}
    return open_checkpoint(write_hollow(path / "dense", config, shapes=kept))


@pytest.mark.parametrize("listed", [True, False], ids=["shapes known", "by its row"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{LAYER_1}.self_attn.q_proj.bias": (8,)}, "unknown tensor"),
        ({"model.layers.2.self_attn.q_proj.weight": (8, 8)}, "unknown tensor model.layers.2"),
        ({f"{LAYER_1}.mlp.up_proj.weight_scale": (8,)}, "unknown tensor"),
        ({f"{LAYER_1}.self_attn.q_proj.weight": None}, f"lacks {LAYER_1}.self_attn.q_proj"),
        ({f"{LAYER_1}.mlp.up_proj.weight": None}, f"lacks {LAYER_1}.mlp.up_proj.weight"),
        (
            {f"{LAYER_1}.mlp.{matrix}_proj.weight": None for matrix in ("gate", "up")},
            f"lacks {LAYER_1}.mlp.gate_proj.weight and 1 more tensors",
        ),
        ({"model.embed_tokens.weight": None}, "lacks model.embed_tokens.weight"),
        # As many elements, transposed.
        ({f"{LAYER_1}.mlp.down_proj.weight": (12, 8)}, "[12, 8], but config.json implies [8, 12]"),
        ({f"{LAYER_1}.self_attn.q_proj.weight": (9, 8)}, "[9, 8], but config.json implies [8, 8]"),
        ({"lm_head.weight": (12, 8)}, "[12, 8], but config.json implies [11, 8]"),
    ],
    ids=str,
)
def test_refuse_tensors_that_the_config_does_not_imply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Changes, words: str, *, listed: bool
) -> None:
    """Where no shapes are known, the first layer shows what each layer of its kind must have."""
    source = source_with(tmp_path, changes)
    if not listed:
        monkeypatch.setattr("upcycle_cli.models.defaults.tensor_shapes", lambda *_: {})
    with pytest.raises(UpcycleError) as caught:
        build_plan(RECIPE, source)
    assert words in caught.value.message
    assert next(iter(changes)) in caught.value.message


def test_refuse_a_source_that_lacks_a_tensor(tmp_path: Path) -> None:
    bias = "model.layers.0.self_attn.k_proj.bias"
    lacking = {"model.norm.weight": "llama", "lm_head.weight": "llama", bias: "qwen2"}
    for name, kind in lacking.items():
        with pytest.raises(UpcycleError, match=f"lacks {name}, which its config.json"):
            build_plan(RECIPE, source_with(tmp_path / name, {name: None}, kind))


def test_a_row_of_the_table_of_families_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_with(tmp_path, {})
    wanted = [*build_plan(RECIPE, source).tensors]
    monkeypatch.setattr("upcycle_cli.models.defaults.tensor_shapes", lambda *_: {})
    assert [*build_plan(RECIPE, source).tensors] == wanted


def test_rotary_frequencies_are_dropped_with_a_reason(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    source = source_with(tmp_path, dict.fromkeys(names, (2,)))
    plan = build_plan(RECIPE, source)
    assert plan.dropped == dict.fromkeys(names, "rotary frequencies are computed from the config")
    assert plan.dense_parameters == source.num_parameters - 4
    assert not {*names} & {tensor.name for tensor in plan.tensors}


def test_a_tied_model_may_carry_its_head(tmp_path: Path) -> None:
    config = tiny_config("llama", tie_word_embeddings=True)
    shapes = tensor_shapes(config) | {"lm_head.weight": (11, 8)}
    source = open_checkpoint(write_hollow(tmp_path / "dense", config, shapes=shapes))
    plan = build_plan(RECIPE, source)
    head = next(tensor for tensor in plan.tensors if tensor.name == "lm_head.weight")
    assert head.expr == Source("lm_head.weight", "BF16", (11, 8))
    assert plan.config["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dtype": "int8"}, "`dtype` cannot be 'int8'"),
        ({"max_shard_bytes": 0}, "must be positive"),
        ({"expert_layout": "per_expert"}, "`expert_layout` cannot be 'per_expert'"),
    ],
)
def test_options_are_valid_or_are_not_made(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UpcycleError, match=words):
        Options(**values)
    fused: dict[str, Any] = {"expert_layout": "fused"}
    assert Options(**fused).expert_layout is ExpertLayout.FUSED
