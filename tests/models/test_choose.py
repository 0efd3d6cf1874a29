"""Which target a dense model becomes, and why some can become none."""

from __future__ import annotations

import re
from typing import Any

import pytest
from configs import SIZES
from conftest import sizes_of
from shapes import tiny_config

from upcycle_cli import UpcycleError
from upcycle_cli.models.dense import read_dense
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.lookup import choose
from upcycle_cli.recipe.recipe import SHIPPED, Routing

SIGMOID, SOFTMAX, RENORMALISED = (Routing.SIGMOID_TOPK, Routing.SOFTMAX_TOPK, Routing.TOPK_SOFTMAX)


@pytest.mark.parametrize(
    ("model_type", "routing", "target"),
    [
        ("llama", None, "mixtral"),
        ("llama", SOFTMAX, "qwen2_moe"),
        ("llama", SIGMOID, "glm4_moe"),
        ("mistral", None, "mixtral"),
        ("mistral", SIGMOID, SHIPPED),
        ("qwen2", None, "qwen2_moe"),
        ("qwen2", SIGMOID, "glm4_moe"),
        ("qwen3", SOFTMAX, "qwen3_moe"),
        ("olmo2", None, "flex_olmo"),
        ("olmo3", None, SHIPPED),
        ("nemotron", SOFTMAX, SHIPPED),
        ("phi3", None, "mixtral"),
        ("phi3", SOFTMAX, SHIPPED),
        ("nemotron_h", None, "nemotron_h"),
        ("helium", None, SHIPPED),
    ],
)
def test_auto_takes_the_first_possible_target(
    model_type: str, routing: Routing | None, target: str
) -> None:
    config = {"model_type": model_type, **sizes_of(model_type), "sliding_window": 8}
    family = choose(config, "auto", routing)
    wanted = f"upcycled_{model_type}" if target == SHIPPED else target
    assert family.target.model_type == wanted
    assert family.dense == read_dense(DENSE[model_type], config)
    assert choose(config, target, routing).target.model_type == wanted


PHI3 = {"model_type": "phi3", **SIZES}
NEMOTRON_H = {"model_type": "nemotron_h", **sizes_of("nemotron_h")}
MIXED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
LONGROPE = {"type": "longrope", "short_factor": [1], "long_factor": [2]}
CODE = "use `target` upcycled."
ONLY_CODE = f"upcycled can: {CODE}"
NONE = "No target can yet."
LLAMA_TARGETS = "solar_open, upcycled, ernie4_5_moe, granitemoe, granitemoehybrid."
SEED_OSS = {"model_type": "seed_oss", **SIZES, "attention_out_bias": True}
AFTER_CODE = f"upcycled or granitemoe or granitemoehybrid can: {CODE}"
HALF = {"partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("config", "target", "routing", "words", "hint"),
    [
        (tiny_config("llama"), "gpt_moe", None, "cannot become 'gpt_moe'", LLAMA_TARGETS),
        (tiny_config("qwen2"), "mixtral", None, "cannot become 'mixtral'.", "Choose from auto"),
        (
            tiny_config("llama"),
            "qwen3_moe",
            None,
            "become 'qwen3_moe': it always norm",
            "from auto",
        ),
        (tiny_config("mistral"), "gpt_oss", None, "it clamps the gates of its experts.", "from"),
        (tiny_config("qwen2"), "deepseek_v3", None, "all its heads share one rotary key", "from"),
        (tiny_config("qwen3"), "deepseek_v3", None, "cannot become 'deepseek_v3'.", "from"),
        (SEED_OSS, "glm4_moe", None, "o_proj has a bias, but the target's", ONLY_CODE),
        (SEED_OSS | {"mlp_bias": True}, "glm4_moe", None, "experts have none", ONLY_CODE),
        (tiny_config("llama", attention_bias=True), "ernie4_5_moe", None, "o_proj", AFTER_CODE),
        (tiny_config("mistral", sliding_window=8), "granitemoe", None, "supports none", "mixtral"),
        (tiny_config("llama"), "mixtral", SOFTMAX, "it has no softmax-topk", "`target` qwen2_moe."),
        (tiny_config("llama", attention_bias=True), "glm4_moe", None, "o_proj has a", AFTER_CODE),
        (tiny_config("llama", mlp_bias=True), "mixtral", None, "experts have none", ONLY_CODE),
        (NEMOTRON_H | {"layers_block_type": ["full_attention"]}, "auto", None, "no layer", NONE),
        (NEMOTRON_H, "auto", RENORMALISED, "it has no topk-softmax routing", NONE),
        (tiny_config("qwen3", **MIXED), "qwen3_moe", None, "only some layers", "`target` dots1."),
        (tiny_config("qwen3", **MIXED), "glm4_moe", None, "supports none", "`target` dots1."),
        *(
            (PHI3 | settings, "mixtral", None, words, hint)
            for settings, words, hint in (
                (HALF, "only a part of each head is rotated", "upcycled or glm4_moe can"),
                ({"rope_scaling": LONGROPE}, "its rotary embeddings are scaled by longrope", CODE),
            )
        ),
        (PHI3 | HALF, "ernie4_5_moe", None, "only a part of each head", "upcycled or glm4_moe can"),
    ],
)
def test_a_target_that_cannot_express_a_model(
    config: dict[str, Any], target: str, routing: Routing | None, words: str, hint: str
) -> None:
    with pytest.raises(UpcycleError, match=re.escape(words)) as caught:
        choose(config, target, routing)
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "config.json has no model_type."),
        ({"model_type": "gpt9"}, "model type 'gpt9' cannot be upcycled yet."),
        ({"model_type": "gpt9", "auto_map": {}}, "model type 'gpt9' cannot be upcycled yet."),
        ({"model_type": "bitnet"}, "cannot be upcycled: its MLP normalises over all neurons"),
        ({"model_type": "qwen3_moe"}, "this is a mixture of experts already"),
        ({"model_type": "olmoe", "num_experts": 64}, "this is a mixture of experts already"),
        ({"model_type": "llama", "num_local_experts": 4}, "this is a mixture of experts already"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 8}, "a mixture of experts already"),
    ],
)
def test_a_model_that_is_no_dense_one(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UpcycleError, match=re.escape(message)) as caught:
        choose(config, "auto", None)
    assert caught.value.hint
    assert ("-hf" in caught.value.hint) == ("auto_map" in config)
