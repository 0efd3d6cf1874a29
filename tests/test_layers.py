"""Which layers become mixtures of experts."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense, difference, logits, random_ids, read_json, sizes_of
from shapes import make_recipe, tiny_config

from upcycle_cli import UpcycleError, convert, inspect, verify
from upcycle_cli.models.choose import choose
from upcycle_cli.models.families import dense_family, is_moe, is_target
from upcycle_cli.models.layers import format_layers, parse_layers
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.recipe.recipe import SHIPPED, Routing


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        (None, (1, 3, 4, 5, 7)),
        ("3", (3,)),
        ("0-4", (1, 3, 4)),
        ("4-", (4, 5, 7)),
        ("1,5,7", (1, 5, 7)),
        (" 7 , 1 ,1", (1, 7)),
        ("every:1", (1, 3, 4, 5, 7)),
        ("every:2", (1, 4, 7)),
        ("every:9", (1,)),
    ],
)
def test_a_choice_of_layers(text: str | None, layers: tuple[int, ...]) -> None:
    assert parse_layers(text, (1, 3, 4, 5, 7), 8) == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a choice of layers."),
        ("all", "'all' is not a choice of layers."),
        ("-3", "'-3' is not a choice of layers."),
        ("1;2", "'1;2' is not a choice of layers."),
        ("1,,2", "'1,,2' is not a choice of layers."),
        ("every:0", "'every:0' is not a choice of layers."),
        ("9999999", "'9999999' is not a choice of layers."),
        ("8", "there are no layers 8: the model has layers 0 to 7."),
        ("3-8", "there are no layers 3-8: the model has layers 0 to 7."),
        ("5-3", "there are no layers 5-3: the model has layers 0 to 7."),
        ("0", "layer 0 has no dense MLP to make experts of."),
        ("1,6", "layer 6 has no dense MLP to make experts of."),
    ],
)
def test_no_choice_of_layers(text: str, message: str) -> None:
    with pytest.raises(UpcycleError) as caught:
        parse_layers(text, (1, 3, 4, 5, 7), 8)
    assert caught.value.message == message
    assert caught.value.hint


def test_layers_in_words() -> None:
    assert format_layers((0, 2, 4, 5, 6, 9)) == "0, 2, 4-6, 9"
    assert format_layers(()) == ""


@pytest.mark.parametrize(
    ("model_type", "target", "layers", "said"),
    [
        ("llama", "qwen2_moe", "1-2", {"mlp_only_layers": [0, 3], "decoder_sparse_step": 1}),
        ("qwen3", "qwen3_moe", "every:2", {"mlp_only_layers": [1, 3], "decoder_sparse_step": 1}),
        ("llama", "glm4_moe", "2-", {"first_k_dense_replace": 2}),
        ("llama", "glm4_moe", None, {"first_k_dense_replace": 0}),
        ("lfm2", "lfm2_moe", "1-", {"num_dense_layers": 1}),
        (
            "cohere2",
            "cohere2_moe",
            "1-2",
            {"mlp_layer_types": ["dense", "sparse", "sparse", "dense"]},
        ),
        (
            "ernie4_5",
            "ernie4_5_moe",
            "1,3",
            {"moe_layer_start_index": 1, "moe_layer_end_index": 3, "moe_layer_interval": 2},
        ),
        (
            "nemotron_h",
            "nemotron_h",
            "3",
            {
                "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"],
                "hybrid_override_pattern": "M-*E",
            },
        ),
        ("olmo2", SHIPPED, "0,3", {"moe_layers": [0, 3]}),
        ("nemotron", SHIPPED, "1", {"moe_layers": [1]}),
    ],
)
def test_layers_that_stay_dense(
    make_dense: MakeDense,
    tmp_path: Path,
    model_type: str,
    target: str,
    layers: str | None,
    said: dict[str, Any],
) -> None:
    fixed = sizes_of(model_type).keys() & {"layer_types", "layers_block_type"}
    sizes: dict[str, Any] = {} if fixed else {"num_hidden_layers": 4}
    dense = make_dense(model_type, **sizes)
    exact = Routing.TOPK_SOFTMAX
    routing = exact if target in (SHIPPED, "qwen2_moe") else None
    recipe = make_recipe("E2G2T2", routing, layers=layers)
    done = convert(dense, tmp_path / "moe", recipe, target=target)
    config = read_json(tmp_path / "moe" / "config.json")
    assert {key: config[key] for key in said} == said
    found = inspect(tmp_path / "moe")
    assert found.moe_layers == done.plan.family.layers
    ids = random_ids()
    wanted, got = (logits(path, ids, torch.float32) for path in (dense, tmp_path / "moe"))
    assert difference(got, wanted) < 1e-4
    assert verify(dense, tmp_path / "moe").passed


@pytest.mark.parametrize(
    ("target", "layers", "message"),
    [
        (
            "mixtral",
            "1",
            "mixtral cannot express this model: all its layers are mixtures of experts.",
        ),
        (
            "glm4_moe",
            "0",
            "glm4_moe cannot express this model: its dense layers can only be the first ones "
            "(first_k_dense_replace).",
        ),
        (
            "glm4_moe",
            "every:2",
            "glm4_moe cannot express this model: its dense layers can only be the first ones "
            "(first_k_dense_replace).",
        ),
    ],
)
def test_layers_that_a_target_cannot_leave_dense(target: str, layers: str, message: str) -> None:
    config = tiny_config("llama", num_hidden_layers=4)
    with pytest.raises(UpcycleError) as caught:
        choose(config, target, None, layers=layers)
    assert caught.value.message == message
    # Auto takes the next one.
    assert choose(config, "auto", None, layers=layers).target.model_type == "qwen2_moe"


@pytest.mark.parametrize(
    ("target", "config", "message"),
    [
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("qwen2_moe", {"mlp_only_layers": "0"}, "mlp_only_layers is '0'"),
        ("glm4_moe", {"first_k_dense_replace": 4}, "first_k_dense_replace is 4"),
        ("glm4_moe", {"first_k_dense_replace": True}, "first_k_dense_replace is True"),
        ("nemotron_h", {"hybrid_override_pattern": "M?"}, "hybrid_override_pattern is 'M?'"),
        ("nemotron_h", {"layers_block_type": ["mlp", "x"]}, "layers_block_type is"),
        ("granitemoehybrid", {"num_local_experts": None}, "num_local_experts is None"),
        ("ernie4_5_moe", {"moe_layer_interval": 0}, "moe_layer_interval is 0"),
        ("ernie4_5_moe", {"moe_layer_start_index": [1, 1]}, "moe_layer_start_index is [1, 1]"),
    ],
)
def test_layers_that_a_config_cannot_mean(
    target: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        NATIVE[target].moe_layers({"layers_block_type": None, **config}, 4)


@pytest.mark.parametrize("target", NATIVE)
def test_a_choice_of_layers_reads_what_it_writes(target: str) -> None:
    """Of any layers that it does not object to; all of them it takes."""
    row, count = NATIVE[target], 5
    assert row.layers.objection(range(count), count) is None
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            if row.layers.objection(chosen, count) is None:
                said = row.layers.write(chosen, ("mlp",) * count)
                assert row.moe_layers(said, count) == chosen


def test_layers_in_a_range() -> None:
    layers = NATIVE["ernie4_5_moe"].layers
    assert layers.scope == "a range"
    assert [layers.objection(chosen, 6) for chosen in ((1, 2, 3), (1, 3, 5), (4,))] == [None] * 3
    for chosen in ((0, 2, 4), (0, 1, 3)):
        assert "a range of layers" in str(layers.objection(chosen, 6))


def test_a_hybrid_is_dense_or_not_by_its_layers() -> None:
    dense = {"model_type": "nemotron_h", "hybrid_override_pattern": "M-*-"}
    moe = dense | {"hybrid_override_pattern": "M-*E"}
    assert (is_moe(dense), is_target(dense)) == (False, False)
    assert (is_moe(moe), is_target(moe)) == (True, True)
    with pytest.raises(UpcycleError, match="a mixture of experts already"):
        dense_family(moe)
