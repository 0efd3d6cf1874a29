"""The MoE's config: the recipe, the source's settings, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from configs import converted, source_of, transformers_config
from conftest import sizes_of
from shapes import tiny_config
from test_dense import YARN

from upcycle_cli import Recipe, UpcycleError
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.recipe.recipe import SHIPPED, Routing

RECIPE = Recipe("E2G1T1")
NOT_READ = {
    # by a forward pass, or written by transformers itself
    *("use_cache", "initializer_range", "dtype", "transformers_version", "rope_parameters"),
    *("chunk_size_feed_forward", "id2label", "label2id", "problem_type", "return_dict"),
    *("is_encoder_decoder", "output_attentions", "output_hidden_states", "_name_or_path"),
    *("architectures", "model_type", "pretraining_tp"),
}


@pytest.mark.parametrize("target", [t for t in DENSE["llama"].targets if t != SHIPPED])
def test_nothing_is_left_to_the_targets_defaults(target: str) -> None:
    """Every key that both model types have is written."""
    moe = converted({"model_type": "llama"}, target, Recipe("E4G2T4"))
    ours, theirs = (transformers_config({"model_type": name}) for name in ("llama", target))
    assert (ours.to_dict().keys() & theirs.to_dict().keys()) - NOT_READ <= moe.keys()
    assert moe["architectures"] == [NATIVE[target].architecture]
    assert transformers_config(moe).model_type == target


@pytest.mark.parametrize("target", NATIVE)
def test_the_recipe_is_in_the_config(target: str) -> None:
    row = NATIVE[target]
    model_type = source_of(target)
    config = {"model_type": model_type, **sizes_of(model_type)}
    for routing in row.routings:
        moe = converted(config, target, Recipe("E4G3T6", routing=routing))
        # from_dict does not read infinity as transformers writes it.
        theirs = transformers_config({k: v for k, v in moe.items() if k != "time_step_limit"})
        stated = [row.keys.num_experts, row.keys.top_k, row.keys.expert_size]
        assert [getattr(theirs, key) for key in stated] == [12, 6, 48 // 3]
        assert row.routing(moe) is routing
        if row.keys.scale is not None:
            assert getattr(theirs, row.keys.scale) == 3.0
        if target in ("qwen2_moe", "qwen3_moe", "mellum"):
            assert theirs.norm_topk_prob == (routing is Routing.TOPK_SOFTMAX)
        # What generation and serving expect, and the paper's coefficient for training.
        assert getattr(theirs, "output_router_logits", False) is False
        assert getattr(theirs, "router_aux_loss_coef", 0.01) == 0.01


def test_the_routing_that_a_config_states() -> None:
    for name in ("mixtral", "qwen2_moe", "qwen3_moe"):
        theirs = transformers_config({"model_type": name})
        renormalises = getattr(theirs, "norm_topk_prob", True)
        assert (NATIVE[name].routing({}) is Routing.TOPK_SOFTMAX) == renormalises
    with pytest.raises(UpcycleError, match="norm_topk_prob must be True or False, not 1"):
        NATIVE["qwen3_moe"].routing({"norm_topk_prob": 1})
    with pytest.raises(UpcycleError, match="norm_topk_prob must be True, not False"):
        NATIVE["glm4_moe"].routing({"norm_topk_prob": False})


@pytest.mark.parametrize("alias", NATIVE["glm4_moe"].keys.aliases)
def test_aliases_of_the_number_of_experts_are_dropped(alias: str) -> None:
    """An alias in the source would override the number that is written."""
    moe = converted(tiny_config("llama", **{alias: 0}), "glm4_moe", RECIPE)
    assert moe["n_routed_experts"] == 2
    assert alias not in moe


STRAY = {
    "decoder_sparse_step": 2,
    "mlp_only_layers": [0],
    "router_jitter_noise": 0.5,
    "norm_topk_prob": False,
    "shared_expert_intermediate_size": 8,
    "output_router_logits": True,
    "attention_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "use_bias": True,
    "sliding_window": 4,
    "position_embedding_type": "nope",
}


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe", *DENSE["llama"].targets[-3:]])
def test_keys_of_the_target_in_the_source_mean_nothing(target: str) -> None:
    usual, moe = (converted(tiny_config("llama", **keys), target, RECIPE) for keys in ({}, STRAY))
    assert usual.items() <= moe.items()


@pytest.mark.parametrize(
    ("model_type", "target", "keys"),
    [
        ("qwen3", "hy_v3", {"first_k_dense_replace": 1, "qk_norm": True, "expert_hidden_dim": 12}),
        ("llama", "solar_open", {"first_k_dense_replace": 0, "partial_rotary_factor": 1.0}),
        ("llama", "qwen2_moe", {"qkv_bias": True}),
        ("llama", "granitemoe", {"attention_multiplier": 0.5, "logits_scaling": 1.0}),
    ],
)
def test_keys_that_only_engines_read(model_type: str, target: str, keys: dict[str, Any]) -> None:
    recipe = Recipe("E2G1T1", layers="1-" if target == "hy_v3" else None)
    assert keys.items() <= converted(tiny_config(model_type), target, recipe).items()


def test_options_of_the_output_are_in_the_config() -> None:
    tied = tiny_config("llama", tie_word_embeddings=True)
    for untie in (True, False):
        moe = converted(tied, "mixtral", RECIPE, untie_embeddings=untie, dtype="float16")
        assert (moe["tie_word_embeddings"], moe["dtype"]) == (not untie, "float16")


def test_unknown_keys_survive_and_local_paths_do_not() -> None:
    kept = {"pretraining_tp": 1, "torch_dtype": "bfloat16", "unknown": [1, {"deep": None}]}
    moe = converted(tiny_config("llama", _name_or_path="/home/a/llama", **kept), "mixtral", RECIPE)
    assert moe | kept == moe
    assert not {"_name_or_path", "dtype"} & moe.keys()
    named = converted(tiny_config("llama", _name_or_path="meta/llama"), "mixtral", RECIPE)
    assert named["_name_or_path"] == "meta/llama"


def test_old_rope_keys_are_written_for_new_ones() -> None:
    """transformers 4, vLLM and the converters read `rope_theta` and `rope_scaling`."""
    rope = {**YARN, "rope_theta": 7e4}
    moe = converted(tiny_config("llama", rope_parameters=rope), "mixtral", RECIPE)
    assert (moe["rope_theta"], moe["rope_scaling"]) == (7e4, YARN)
    assert moe["rope_parameters"] == rope
    plain = converted(tiny_config("llama", rope_theta=5e5), "mixtral", RECIPE)
    assert "rope_parameters" not in plain
    assert (plain["rope_theta"], plain["rope_scaling"]) == (5e5, None)
    # The old keys cannot state settings by kind of layer, so only the source's key is written.
    by_kind = {"model_type": "gemma3_text", **sizes_of("gemma3_text"), "rope_theta": 1e6}
    moe = converted(by_kind, "upcycled", Recipe("E2G2T2"))
    assert moe["rope_theta"] == 1e6
    assert "rope_scaling" not in moe


@pytest.mark.parametrize("kind", ["longrope", "yarn"])
def test_phi3_scales_rope_by_longrope_whatever_it_is_called(kind: str) -> None:
    """An original length beside the scaling, or its default, overrides the one inside."""
    scaling = {"type": kind, "short_factor": [1.0], "long_factor": [2.0]}
    config = tiny_config("phi3", head_dim=2, hidden_size=4, rope_scaling=dict(scaling))
    moe = converted(config, "glm4_moe", RECIPE)
    theirs = transformers_config(config | {"num_attention_heads": 2})
    assert transformers_config(moe).rope_parameters == {**theirs.rope_parameters, "type": kind}
    assert moe["rope_scaling"]["original_max_position_embeddings"] == 4096
    # transformers 4 refuses any other key in this form.
    assert converted(config, "upcycled", RECIPE)["rope_scaling"] == scaling


def test_former_keys_win() -> None:
    """The first LFM2 models use former keys, which transformers prefers to the present ones."""
    old = {"block_ff_dim": 96, "tie_embedding": False, "block_auto_adjust_ff_dim": False}
    config = {"model_type": "lfm2", **sizes_of("lfm2"), "tie_word_embeddings": True, **old}
    theirs = transformers_config(config)
    assert (theirs.intermediate_size, theirs.tie_word_embeddings) == (96, False)
    moe = converted(config, "lfm2_moe", Recipe("E2G2T2"))
    assert (moe["intermediate_size"], moe["moe_intermediate_size"]) == (96, 48)
    assert moe["tie_word_embeddings"] is False
    assert not moe.keys() & {"block_ff_dim", "tie_embedding"}
    # exaone was released with its own keys, beside code that is now part of transformers.
    own = {"num_layers": 3, "layer_norm_epsilon": 0.5, "activation_function": "gelu"}
    config = {"model_type": "exaone", **sizes_of("exaone"), **own}
    moe = converted(config, "mixtral", Recipe("E2G2T2"))
    assert transformers_config(moe).num_hidden_layers == 3
    assert (moe["rms_norm_eps"], moe["hidden_act"]) == (0.5, "gelu")
