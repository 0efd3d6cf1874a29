"""Which layers become mixtures of experts."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from configs import converted
from conftest import sizes_of
from shapes import tiny_config

from upcycle_cli import Recipe, UpcycleError
from upcycle_cli.models.layers import format_layers, parse_layers
from upcycle_cli.models.lookup import choose
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.recipe.recipe import SHIPPED

HAVING_MLPS = (1, 3, 4, 5, 7)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        (None, HAVING_MLPS),
        ("3", (3,)),
        ("0-4", (1, 3, 4)),
        ("4-", (4, 5, 7)),
        ("1,5,7", (1, 5, 7)),
        (" 7 , 1 ,1", (1, 7)),
        ("every:1", HAVING_MLPS),
        ("every:2", (1, 4, 7)),
        ("every:9", (1,)),
    ],
)
def test_parse_layers(text: str | None, layers: tuple[int, ...]) -> None:
    assert parse_layers(text, HAVING_MLPS, 8) == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *(
            (text, f"'{text}' is not a choice of layers.")
            for text in ("", "all", "-3", "1;2", "1,,2", "every:0", "9999999")
        ),
        *(
            (text, f"there are no layers {text}: the model has layers 0 to 7.")
            for text in ("8", "3-8", "5-3")
        ),
        ("1,6", "layer 6 has no dense MLP."),
    ],
)
def test_refuse_other_text(text: str, message: str) -> None:
    with pytest.raises(UpcycleError, match=re.escape(message)) as caught:
        parse_layers(text, HAVING_MLPS, 8)
    assert caught.value.hint


def test_format_layers() -> None:
    assert format_layers((0, 2, 4, 5, 6, 9)) == "0, 2, 4-6, 9"
    assert format_layers(()) == ""


BLOCKS = ["linear_attention", "mlp", "full_attention", "moe"]
NEMOTRON_H = {"layers_block_type": BLOCKS, "hybrid_override_pattern": "M-*E"}


@pytest.mark.parametrize(
    ("model_type", "target", "layers", "stated"),
    [
        ("ernie4_5", "ernie4_5_moe", "1,3", {"moe_layer_end_index": 3, "moe_layer_interval": 2}),
        ("nemotron_h", "nemotron_h", "3", NEMOTRON_H),
        ("olmo2", SHIPPED, "0,3", {"moe_layers": [0, 3]}),
    ],
)
def test_the_layers_are_in_the_config(
    model_type: str, target: str, layers: str, stated: dict[str, Any]
) -> None:
    sizes = sizes_of(model_type)
    if not sizes.keys() & {"layer_types", "layers_block_type"}:
        sizes["num_hidden_layers"] = 4
    recipe = Recipe("E2G2T2", layers=layers)
    moe = converted({"model_type": model_type, **sizes}, target, recipe)
    assert moe | stated == moe


@pytest.mark.parametrize(
    ("target", "layers", "reason"),
    [
        ("mixtral", "1", "all its layers are mixtures of experts."),
        ("glm4_moe", "every:2", "its dense layers can only be the first ones"),
    ],
)
def test_layers_that_a_target_cannot_keep_dense(target: str, layers: str, reason: str) -> None:
    config = tiny_config("llama", num_hidden_layers=4)
    with pytest.raises(UpcycleError, match=f"cannot express this model: {reason}"):
        choose(config, target, None, layers=layers)
    assert choose(config, "auto", None, layers=layers).target.model_type == "qwen2_moe"


@pytest.mark.parametrize(
    ("target", "config", "message"),
    [
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("qwen2_moe", {"mlp_only_layers": "0"}, "mlp_only_layers is '0'"),
        ("glm4_moe", {"first_k_dense_replace": "4"}, "first_k_dense_replace is '4'"),
        ("nemotron_h", {"hybrid_override_pattern": "M?"}, "hybrid_override_pattern is 'M?'"),
        ("nemotron_h", {"layers_block_type": ["mlp", "x"]}, "layers_block_type is"),
        ("ernie4_5_moe", {"moe_layer_interval": 0}, "moe_layer_interval is 0"),
        ("ernie4_5_moe", {"moe_layer_start_index": [1, 1]}, "moe_layer_start_index is [1, 1]"),
    ],
)
def test_an_inconsistent_config(target: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UpcycleError, match=re.escape(message)):
        NATIVE[target].moe_layers({"layers_block_type": None, **config}, 4)


@pytest.mark.parametrize("target", NATIVE)
def test_a_config_reads_the_layers_that_it_states(target: str) -> None:
    """All choices without an objection; a target can always take all layers."""
    row, count, kinds = NATIVE[target], 5, ("mlp",) * 5
    assert row.layers.objection(range(count), kinds) is None
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            if row.layers.objection(chosen, kinds) is None:
                stated = row.layers.write(chosen, kinds)
                assert row.moe_layers(stated, count) == chosen
