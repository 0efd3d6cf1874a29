"""Which MoE architecture a dense model becomes, and why some can become none."""

from __future__ import annotations

import re
from typing import Any

import pytest
from configs import FULL, SIZES, SLIDING, dense_model
from conftest import sizes_of
from shapes import tiny_config

from upcycle_cli import UpcycleError
from upcycle_cli.models.choose import choose
from upcycle_cli.models.dense import read_dense
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.families import targets_of
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.recipe.recipe import SHIPPED, Routing


@pytest.mark.parametrize(
    ("model_type", "routing", "target"),
    [
        ("llama", None, "mixtral"),
        ("llama", Routing.TOPK_SOFTMAX, "mixtral"),
        ("llama", Routing.SOFTMAX_TOPK, "qwen2_moe"),
        ("llama", Routing.SIGMOID_TOPK, "glm4_moe"),
        ("mistral", None, "mixtral"),
        ("mistral", Routing.SIGMOID_TOPK, SHIPPED),
        ("qwen2", None, "qwen2_moe"),
        ("qwen2", Routing.SIGMOID_TOPK, "glm4_moe"),
        ("qwen3", Routing.SOFTMAX_TOPK, "qwen3_moe"),
        ("olmo2", None, "flex_olmo"),
        ("olmo2", Routing.SIGMOID_TOPK, SHIPPED),
        ("olmo3", None, SHIPPED),
        ("nemotron", Routing.SOFTMAX_TOPK, SHIPPED),
        ("phi3", None, "mixtral"),
        ("phi3", Routing.SOFTMAX_TOPK, SHIPPED),
        ("glm", None, "glm4_moe"),
        ("nemotron_h", None, "nemotron_h"),
    ],
)
def test_auto_takes_the_first_that_can(
    model_type: str, routing: Routing | None, target: str
) -> None:
    config = {"model_type": model_type, **sizes_of(model_type), "sliding_window": 8}
    family = choose(config, "auto", routing)
    wanted = f"upcycled_{model_type}" if target == SHIPPED else target
    assert family.target.model_type == wanted
    assert family.dense == read_dense(DENSE[model_type], config)
    assert choose(config, target, routing).target.model_type == wanted


def test_targets_in_the_order_of_what_reads_them() -> None:
    native = ("mixtral", "qwen2_moe", "glm4_moe", "solar_open")
    assert targets_of(DENSE["llama"]) == (*native, SHIPPED)
    assert targets_of(DENSE["nemotron"]) == (SHIPPED,)
    assert targets_of(DENSE["nemotron_h"]) == ("nemotron_h",)


def test_the_default_routing_is_that_of_the_released_models() -> None:
    """Every engine implements that one; see the norm_topk_prob of each."""
    defaults = {name: target.routings[0] for name, target in NATIVE.items()}
    assert defaults == {
        "mixtral": Routing.TOPK_SOFTMAX,
        "qwen2_moe": Routing.SOFTMAX_TOPK,
        "qwen3_moe": Routing.TOPK_SOFTMAX,
        "flex_olmo": Routing.TOPK_SOFTMAX,  # which the norm behind it makes the same
        "ernie4_5_moe": Routing.TOPK_SOFTMAX,
        "glm4_moe": Routing.SIGMOID_TOPK,
        "dots1": Routing.SIGMOID_TOPK,
        "hy_v3": Routing.SIGMOID_TOPK,
        "mellum": Routing.TOPK_SOFTMAX,
        "solar_open": Routing.SIGMOID_TOPK,
        "deepseek_v3": Routing.SIGMOID_TOPK,
        "gemma4_text": Routing.TOPK_SOFTMAX,
        "granitemoe": Routing.TOPK_SOFTMAX,
        "granitemoe_swa": Routing.TOPK_SOFTMAX,
        "granitemoehybrid": Routing.TOPK_SOFTMAX,
        "hunyuan_v1_moe": Routing.TOPK_SOFTMAX,
        "cohere2_moe": Routing.TOPK_SOFTMAX,
        "lfm2_moe": Routing.SIGMOID_TOPK,
        "qwen3_5_moe_text": Routing.TOPK_SOFTMAX,
        "nemotron_h": Routing.SIGMOID_TOPK,
    }


BIASED = {"attention_bias": True}
PHI3 = {"model_type": "phi3", **SIZES}
MIXED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}


def test_windows_in_some_layers_have_a_sibling_for_each_routing() -> None:
    config = tiny_config("qwen3", **MIXED)
    wanted = {
        None: "dots1",
        Routing.SIGMOID_TOPK: "dots1",
        Routing.TOPK_SOFTMAX: "mellum",
        Routing.SOFTMAX_TOPK: "mellum",
    }
    found = {routing: choose(config, "auto", routing).target.model_type for routing in wanted}
    assert found == wanted


@pytest.mark.parametrize(
    ("config", "target", "routing", "message", "hint"),
    [
        (
            tiny_config("llama"),
            "gpt_moe",
            None,
            "--target 'gpt_moe' is not a target.",
            "llama can become mixtral or qwen2_moe or glm4_moe or solar_open or upcycled.",
        ),
        (
            tiny_config("qwen2"),
            "mixtral",
            None,
            "qwen2 cannot become mixtral.",
            "It can become qwen2_moe or glm4_moe or upcycled.",
        ),
        (
            tiny_config("llama"),
            "mixtral",
            Routing.SOFTMAX_TOPK,
            "mixtral cannot express this model: it has no softmax-topk routing.",
            "qwen2_moe or upcycled can: pass --target qwen2_moe.",
        ),
        *(
            (
                tiny_config("llama", **BIASED),
                target,
                None,
                f"{target} cannot express this model: attention_bias is true, and the "
                "target's o_proj has no bias.",
                "upcycled can: pass --target upcycled.",
            )
            for target in ("mixtral", "qwen2_moe", "glm4_moe")
        ),
        *(
            (
                tiny_config("llama", mlp_bias=True),
                target,
                None,
                f"{target} cannot express this model: the model's MLPs have biases, and the "
                "target's experts have none.",
                "upcycled can: pass --target upcycled.",
            )
            for target in ("mixtral", "qwen2_moe", "glm4_moe")
        ),
        (
            {"model_type": "nemotron_h", **sizes_of("nemotron_h"), "mlp_bias": True},
            "auto",
            None,
            "nemotron_h cannot express this model: the model's MLPs have biases, and the "
            "target's experts have none.",
            "No target can yet.",
        ),
        (
            {"model_type": "nemotron_h", "hybrid_override_pattern": "M*M"},
            "auto",
            None,
            "nemotron_h cannot express this model: the model has no layer with a dense MLP.",
            "No target can yet.",
        ),
        (
            {"model_type": "nemotron_h", **sizes_of("nemotron_h")},
            "auto",
            Routing.TOPK_SOFTMAX,
            "nemotron_h cannot express this model: it has no topk-softmax routing.",
            "No target can yet.",
        ),
        (
            tiny_config("qwen3", **MIXED),
            "qwen3_moe",
            None,
            "qwen3_moe cannot express this model: only some layers have a sliding window "
            "(layer_types), and the target's layers are all alike.",
            "dots1 or mellum or upcycled can: pass --target dots1.",
        ),
        *(
            (
                {**PHI3, **settings},
                "mixtral",
                None,
                "mixtral cannot express this model: only a part of each head is rotated "
                "(partial_rotary_factor), and the target rotates all of it.",
                "upcycled can: pass --target upcycled.",
            )
            for settings in (
                {"partial_rotary_factor": 0.5},
                {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            )
        ),
        (
            {**PHI3, "rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [2]}},
            "mixtral",
            None,
            "mixtral cannot express this model: its rotary embeddings are scaled by longrope, "
            "which is untested with the target.",
            "upcycled can: pass --target upcycled.",
        ),
        (
            tiny_config("qwen3", **MIXED),
            "glm4_moe",
            None,
            "glm4_moe cannot express this model: some layers have a sliding window, and the "
            "target supports none.",
            "dots1 or mellum or upcycled can: pass --target dots1.",
        ),
    ],
)
def test_refusals(
    config: dict[str, Any], target: str, routing: Routing | None, message: str, hint: str
) -> None:
    with pytest.raises(UpcycleError) as caught:
        choose(config, target, routing)
    assert caught.value.message == message
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    "config",
    [
        tiny_config("llama", **BIASED),
        tiny_config("llama", mlp_bias=True),
        {**PHI3, "partial_rotary_factor": 0.5},
        {"model_type": "ernie4_5", **sizes_of("ernie4_5"), "use_bias": True},
    ],
)
def test_what_no_architecture_can_express_gets_code_of_its_own(config: dict[str, Any]) -> None:
    assert choose(config, "auto", None).target.ships_code


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "config.json has no model_type."),
        ({"model_type": "gpt9"}, "model type 'gpt9' cannot be upcycled yet."),
        ({"model_type": "bloom"}, "cannot be upcycled: its MLP adds the residual stream"),
        ({"model_type": "qwen3_moe"}, "this is a mixture of experts already"),
        ({"model_type": "olmoe", "num_experts": 64}, "this is a mixture of experts already"),
        ({"model_type": "llama", "num_local_experts": 4}, "this is a mixture of experts already"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 8}, "a mixture of experts already"),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}},
            "the weights are quantised (gptq in config.json).",
        ),
    ],
)
def test_models_that_are_not_dense_ones(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UpcycleError) as caught:
        choose(config, "auto", None)
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("llama", {"hidden_size": "8"}, "hidden_size must be a positive integer, not '8'"),
        ("llama", {"hidden_size": None}, "hidden_size must be a positive integer, not null"),
        ("llama", {"vocab_size": True}, "vocab_size must be a positive integer, not True"),
        ("llama", {"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number"),
        ("llama", {"attention_bias": 1}, "attention_bias must be true or false, not 1"),
        ("llama", {"hidden_act": None}, "hidden_act must be an activation that transformers knows"),
        ("llama", {"eos_token_id": ["x"]}, "eos_token_id must be a token id or null"),
        ("llama", {"num_attention_heads": 3, "head_dim": None}, "not a multiple of"),
        ("llama", {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling must be an object or null"),
        ("llama", {"rope_theta": "1e4"}, "rope_theta must be a number"),
        ("llama", {"rope_parameters": {FULL: {"rope_theta": 1.0}}}, "differs from layer to layer"),
        ("qwen3", {"head_dim": None}, "head_dim must be a positive integer, not null"),
        ("qwen2", {"layer_types": [FULL]}, "layer_types has 1 entries for 2 layers"),
        ("qwen2", {"layer_types": [FULL, "chunked_attention"]}, "layer_types may hold"),
        ("qwen2", {"layer_types": [FULL, SLIDING]}, "use_sliding_window is false"),
        ("mistral", {"sliding_window": 0}, "sliding_window must be a positive integer, not 0"),
        ("glm", {"partial_rotary_factor": 2}, "must be a number above 0 and at most 1, not 2"),
        (
            "glm",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": True}},
            "partial_rotary_factor must be a number above 0",
        ),
    ],
)
def test_settings_that_mean_nothing(model_type: str, changes: dict[str, Any], message: str) -> None:
    config = tiny_config(model_type, **changes)
    with pytest.raises(UpcycleError, match=re.escape(message)):
        dense_model(config)


def test_rows_that_are_turned_come_in_pairs() -> None:
    dense = dense_model(tiny_config("glm", head_dim=8, partial_rotary_factor=0.5))
    assert (dense.rotary_share, dense.rotary_dim) == (0.5, 4)
    odd = dense_model(tiny_config("glm", head_dim=8, partial_rotary_factor=0.4))
    with pytest.raises(UpcycleError, match=r"0\.4 of head_dim 8 is 3, and"):
        _ = odd.rotary_dim
