"""What configs mean, by transformers' own account, and what becomes of them.

A key that is absent means the default of its model type; here transformers' config classes say
what that is, and its models, on the meta device, which tensors there are. What holds of every row
of the tables is in test_contracts.py; here is what a grid of settings shows of one or a few.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense, difference, logits, random_ids, read_json, sizes_of
from find_families import dense_decoders
from shapes import BIG, big_config, make_recipe, tensor_shapes, tiny_config

from upcycle_cli import UpcycleError, convert, inspect, verify
from upcycle_cli.families import choose, dense_family, is_moe, is_target, targets_of
from upcycle_cli.families.dense import DenseModel, read_dense
from upcycle_cli.families.dense_rows import DENSE
from upcycle_cli.families.engines import Engine, Support, engines
from upcycle_cli.families.layers import listed, parse_layers
from upcycle_cli.families.moe_rows import NATIVE
from upcycle_cli.families.overview import becomes, overview
from upcycle_cli.families.refused import REFUSED
from upcycle_cli.families.translate import moe_config
from upcycle_cli.recipe import SHIPPED, Recipe, Routing

SLIDING, FULL = "sliding_attention", "full_attention"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def transformers_config(config: Mapping[str, Any]) -> Any:  # noqa: ANN401 - transformers is untyped
    from transformers import CONFIG_MAPPING

    # transformers writes into the rope settings that it is given.
    return CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))


def model_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of transformers' own model, without those that are only another's alias."""
    from transformers import AutoModelForCausalLM

    theirs = transformers_config(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if theirs.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def dense_model(config: Mapping[str, Any]) -> DenseModel:
    return read_dense(dense_family(config), config)


# What a config means -----------------------------------------------------------------------------

SIZES = {
    "vocab_size": 11,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as little as can be": {},
    "null heads": {"num_key_value_heads": None},
    "fewer kv heads": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "top-level theta": {"rope_theta": 5e5},
    "integer theta": {"rope_theta": 1_000_000},
    "llama3 scaling": {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
    "old linear scaling": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "null scaling": {"rope_scaling": None},
    "new rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
    "new yarn": {"rope_parameters": {**YARN, "rope_theta": 7e4}},
    "new yarn, old theta": {"rope_parameters": YARN, "rope_theta": 6e4},
    "both, theta twice": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 7e4},
        "rope_theta": 6e4,
    },
    "old scaling beside new": {
        "rope_scaling": YARN,
        "rope_parameters": {"rope_type": "default", "rope_theta": 7e4},
        "rope_theta": 6e4,
    },
    "empty scaling": {"rope_scaling": {}, "rope_theta": 6e4},
    "scaling that is none": {"rope_scaling": {"rope_type": "default"}, "rope_theta": 6e4},
    "tokens": {"bos_token_id": 3, "eos_token_id": [4, 5], "pad_token_id": 6},
    "null tokens": {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    "eps, act, dropout": {"rms_norm_eps": 1e-3, "hidden_act": "gelu", "attention_dropout": 0.5},
    "positions": {"max_position_embeddings": 77},
    "attention bias": {"attention_bias": True},
    "window": {"sliding_window": 8},
    "no window": {"sliding_window": None},
    "window used": {"sliding_window": 8, "use_sliding_window": True},
    "window on the last": {
        "sliding_window": 8,
        "use_sliding_window": True,
        "max_window_layers": 3,
    },
    "window on all": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0},
    "window used and null": {"sliding_window": None, "use_sliding_window": True},
    "window by layer": {
        "sliding_window": 8,
        "use_sliding_window": True,
        "layer_types": [SLIDING, FULL, FULL, SLIDING],
    },
    "window used nowhere": {
        "sliding_window": 8,
        "use_sliding_window": True,
        "layer_types": [FULL] * 4,
    },
    "kinds without a window": {"layer_types": [FULL] * 4},
    "no experts": {"num_experts": 0, "num_experts_per_tok": 3, "router_jitter_noise": 0.1},
    "no local experts": {"num_local_experts": 0, "n_routed_experts": None},
    "head_dim": {"head_dim": 16},
    "null head_dim": {"head_dim": None},
}
NOT_IN_TRANSFORMERS = {
    # Its classes refuse these, or its models do.
    ("mistral", "null heads"),
    ("qwen2", "null head_dim"),
    ("qwen3", "null head_dim"),
}
ELSEWHERE = ("as little as can be", "new yarn", "tied", "head_dim", "null heads", "null head_dim")
"""What is tried of the families other than llama, beside windows where they have any."""
MEANINGS = [
    pytest.param({"model_type": model_type, **SIZES, **changes}, id=f"{model_type}, {name}")
    for model_type in ("llama", "mistral", "qwen2", "qwen3")
    for name, changes in VARIANTS.items()
    if (model_type, name) not in NOT_IN_TRANSFORMERS
    if model_type == "llama" or "window" in name or name in ELSEWHERE
]
RELEASED = [pytest.param(big_config(name), id=name) for name in BIG]


def window_of(theirs: Any, layer: int) -> int | None:  # noqa: ANN401
    """How far a layer sees, by what transformers' modelling code reads from a config."""
    window: int | None
    match theirs.model_type:
        case "llama" | "glm4_moe" | "solar_open" | "hy_v3":
            window = None
        case "qwen2" | "qwen3" | "qwen2_moe" | "dots1":
            window = theirs.sliding_window if theirs.layer_types[layer] == SLIDING else None
        case "mistral" | "mixtral" | "qwen3_moe":
            window = theirs.sliding_window
        case other:
            raise AssertionError(other)
    return window


def meaning(theirs: Any) -> dict[str, Any]:  # noqa: ANN401
    """What a forward pass reads, from transformers' own config object."""
    rope = dict(theirs.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    rope.pop("type", None)
    if rope.get("partial_rotary_factor") == 1.0:  # all of it, as where nothing is said
        del rope["partial_rotary_factor"]
    num_heads = theirs.num_attention_heads
    kv_heads = theirs.num_key_value_heads
    return {
        "vocab_size": theirs.vocab_size,
        "hidden_size": theirs.hidden_size,
        "num_layers": theirs.num_hidden_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_heads if kv_heads is None else kv_heads,
        "head_dim": getattr(theirs, "head_dim", None) or theirs.hidden_size // num_heads,
        "hidden_act": theirs.hidden_act,
        "rms_norm_eps": theirs.rms_norm_eps,
        "attention_dropout": theirs.attention_dropout,
        "max_position_embeddings": theirs.max_position_embeddings,
        "tie_word_embeddings": theirs.tie_word_embeddings,
        "bos_token_id": theirs.bos_token_id,
        "eos_token_id": theirs.eos_token_id,
        "pad_token_id": theirs.pad_token_id,
        "rope_theta": theta,
        "rope": None if kind == "default" else {"rope_type": kind, **rope},
        "windows": [window_of(theirs, i) for i in range(theirs.num_hidden_layers)],
    }


RENAMED = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}


def our_meaning(dense: DenseModel) -> dict[str, Any]:
    ours = {
        key: dense.values[RENAMED.get(key, key)]
        for key in meaning(transformers_config({"model_type": "llama"}))
        if key not in {"rope", "windows"}
    }
    scaling = dense.values["rope_scaling"]
    ours["rope"] = None if scaling is None else {k: v for k, v in scaling.items() if k != "type"}
    ours["windows"] = list(dense.windows)
    return ours


@pytest.mark.parametrize("config", [*MEANINGS, *RELEASED])
def test_a_config_means_what_transformers_says(config: dict[str, Any]) -> None:
    dense = dense_model(config)
    assert our_meaning(dense) == meaning(transformers_config(config))
    assert dense.intermediate_size == transformers_config(config).intermediate_size
    assert dense.num_layers == len(dense.mlp_layers) == len(dense.windows)
    assert dense.model_type == config["model_type"]


@pytest.mark.parametrize("config", MEANINGS)
def test_the_dense_tensors_are_those_of_transformers(config: dict[str, Any]) -> None:
    assert dense_model(config).shapes == model_shapes(config)


@pytest.mark.parametrize("name", BIG)
def test_released_models_have_the_tensors_that_their_fixtures_get(name: str) -> None:
    config = {**big_config(name), "num_hidden_layers": 2}
    shapes = dense_model(config).shapes
    assert shapes == tensor_shapes(config) == model_shapes(config)


# What becomes of it ------------------------------------------------------------------------------


def convertible(config: dict[str, Any]) -> list[str]:
    found = []
    for target in DENSE[config["model_type"]].targets:
        try:
            choose(config, target, None)
        except UpcycleError:
            continue
        found.append(target)
    return found


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
    return moe_config(config, family.dense, row, resolved, family.layers, **options)


@pytest.mark.parametrize("config", [*MEANINGS, *RELEASED])
def test_the_moe_means_what_the_dense_model_meant(config: dict[str, Any]) -> None:
    """Whatever the target's own defaults are."""
    dense = meaning(transformers_config(config))
    for target in convertible(config):
        moe = converted(config, target, make_recipe("E2G2T2"))
        assert meaning(transformers_config(moe)) == dense, target


@pytest.mark.parametrize("target", DENSE["llama"].targets)
def test_the_moe_of_an_empty_config_leaves_nothing_to_the_targets_defaults(target: str) -> None:
    """Every key that both model types have is written, whatever it is."""
    moe = converted({"model_type": "llama"}, target, make_recipe("E4G2T4"))
    ours, theirs = (transformers_config({"model_type": name}) for name in ("llama", target))
    shared = (ours.to_dict().keys() & theirs.to_dict().keys()) - NOT_READ
    assert shared <= moe.keys()
    assert moe["architectures"] == [NATIVE[target].architecture]
    assert transformers_config(moe).model_type == target


NOT_READ = {
    # by a forward pass; or what transformers writes by itself
    *("use_cache", "initializer_range", "dtype", "transformers_version", "rope_parameters"),
    *("chunk_size_feed_forward", "id2label", "label2id", "problem_type", "return_dict"),
    *("is_encoder_decoder", "output_attentions", "output_hidden_states", "_name_or_path"),
    *("architectures", "model_type", "pretraining_tp"),
}


@pytest.mark.parametrize("target", NATIVE)
def test_the_recipe_is_in_the_config(target: str) -> None:
    row = NATIVE[target]
    model_type = next(name for name, family in DENSE.items() if target in family.targets)
    config = {"model_type": model_type, **sizes_of(model_type)}
    for routing in row.routings:
        recipe = make_recipe("E4G3T6", routing)
        moe = converted(config, target, recipe)
        # Infinity as transformers writes it, which it reads from a file only.
        theirs = transformers_config({k: v for k, v in moe.items() if k != "time_step_limit"})
        assert getattr(theirs, row.keys.num_experts) == 12
        assert theirs.num_experts_per_tok == 6
        assert getattr(theirs, row.keys.expert_size) == 48 // 3
        assert row.routing(moe) is routing
        if row.keys.scale is not None:
            assert getattr(theirs, row.keys.scale) == 3.0
        if target in ("qwen2_moe", "qwen3_moe"):
            assert theirs.norm_topk_prob == (routing is Routing.TOPK_SOFTMAX)
        # What generation and serving expect, and the paper's coefficient for whoever trains.
        assert getattr(theirs, "output_router_logits", False) is False
        assert getattr(theirs, "router_aux_loss_coef", 0.01) == 0.01


def test_the_recipe_is_in_the_config_of_shipped_code() -> None:
    for routing in Routing:
        config = {"model_type": "olmo2", **sizes_of("olmo2")}
        moe = converted(config, SHIPPED, make_recipe("E4G3T6", routing))
        assert moe["model_type"] == "upcycled_olmo2"
        assert (moe["num_experts"], moe["num_experts_per_tok"]) == (12, 6)
        assert (moe["intermediate_size"], moe["moe_intermediate_size"]) == (48, 16)
        assert (moe["routing"], moe["moe_layers"]) == (routing, [0, 1])
        c = 4 * 3**2 / 6 if routing is Routing.SOFTMAX_TOPK else 3
        assert moe["routed_scaling_factor"] == c


def test_routing_of_a_config_that_does_not_say() -> None:
    for name in ("mixtral", "qwen2_moe", "qwen3_moe"):
        routing = NATIVE[name].routing({})
        renormalises = getattr(transformers_config({"model_type": name}), "norm_topk_prob", True)
        assert (routing is Routing.TOPK_SOFTMAX) == renormalises


def test_a_routing_that_is_none() -> None:
    with pytest.raises(ValueError, match="norm_topk_prob must be True or False, not 1"):
        NATIVE["qwen3_moe"].routing({"norm_topk_prob": 1})
    with pytest.raises(ValueError, match="norm_topk_prob must be True, not False"):
        NATIVE["glm4_moe"].routing({"norm_topk_prob": False})


@pytest.mark.parametrize("alias", NATIVE["glm4_moe"].keys.aliases)
def test_other_names_of_the_number_of_experts_are_dropped(alias: str) -> None:
    """An alias in the source would undo what is written."""
    config = tiny_config("llama", **{alias: 0})
    moe = converted(config, "glm4_moe", make_recipe("E2G1T1"))
    assert moe["n_routed_experts"] == 2
    assert alias not in moe


def test_what_is_not_ours_survives_and_what_is_another_models_does_not() -> None:
    config = tiny_config(
        "llama",
        pretraining_tp=1,
        torch_dtype="bfloat16",
        _name_or_path="/home/somebody/llama",
        a_key_of_nobody=[1, {"deep": None}],
    )
    moe = converted(config, "mixtral", make_recipe("E2G1T1"))
    assert moe["a_key_of_nobody"] == [1, {"deep": None}]
    assert (moe["pretraining_tp"], moe["torch_dtype"]) == (1, "bfloat16")
    assert "_name_or_path" not in moe
    assert "dtype" not in moe
    named = converted(config | {"_name_or_path": "meta/llama"}, "mixtral", make_recipe("E2G1T1"))
    assert named["_name_or_path"] == "meta/llama"


def test_the_source_config_is_left_as_it_was() -> None:
    config = tiny_config("qwen2", rope_parameters={**YARN, "rope_theta": 7e4})
    before = repr(config)
    moe = converted(config, "qwen2_moe", make_recipe("E2G1T1"))
    moe["rope_parameters"]["factor"] = 9.0
    moe["rope_scaling"]["factor"] = 9.0
    assert repr(config) == before


def test_old_keys_are_written_for_new_ones() -> None:
    """transformers 4, vLLM and the converters read `rope_theta` and `rope_scaling`."""
    rope = {**YARN, "rope_theta": 7e4}
    moe = converted(tiny_config("llama", rope_parameters=rope), "mixtral", make_recipe("E2G1T1"))
    assert (moe["rope_theta"], moe["rope_scaling"]) == (7e4, YARN)
    assert moe["rope_parameters"] == rope
    plain = converted(tiny_config("llama", rope_theta=5e5), "mixtral", make_recipe("E2G1T1"))
    assert "rope_parameters" not in plain
    assert (plain["rope_theta"], plain["rope_scaling"]) == (5e5, None)


@pytest.mark.parametrize(
    ("model_type", "variant", "used", "first"),
    [
        ("mistral", "window", True, 0),
        ("mistral", "no window", False, 4),
        ("llama", "window used", False, 4),  # no window, whatever it says
        ("qwen2", "window on the last", True, 3),
        ("qwen2", "window by layer", True, 0),
        ("qwen2", "window", False, 4),
    ],
)
def test_windows_are_written_in_every_way_that_is_read(
    model_type: str, variant: str, first: int, *, used: bool
) -> None:
    """Engines without `layer_types` go by the first layer that slides."""
    moe = converted(
        {"model_type": model_type, **SIZES, **VARIANTS[variant]}, "qwen2_moe", make_recipe("E2G1T1")
    )
    assert moe["use_sliding_window"] is used
    assert moe["max_window_layers"] == first
    assert moe["sliding_window"] == (8 if used else None)
    assert len(moe["layer_types"]) == 4
    assert (SLIDING in moe["layer_types"]) is used


def test_options_are_in_the_config() -> None:
    config = tiny_config("llama", tie_word_embeddings=True, torch_dtype="bfloat16")
    recipe = make_recipe("E2G1T1")
    assert converted(config, "mixtral", recipe)["tie_word_embeddings"] is True
    untied = converted(config, "mixtral", recipe, untie_embeddings=True)
    assert untied["tie_word_embeddings"] is False
    cast = converted(config, "mixtral", recipe, dtype="float16")
    assert (cast["dtype"], cast["torch_dtype"]) == ("float16", "float16")


# Which target ------------------------------------------------------------------------------------


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
        "solar_open": Routing.SIGMOID_TOPK,
        "deepseek_v3": Routing.SIGMOID_TOPK,
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
                f"{target} cannot express this model: attention_bias is true, and its o_proj has "
                "no bias.",
                "upcycled can: pass --target upcycled.",
            )
            for target in ("mixtral", "qwen2_moe", "glm4_moe")
        ),
        *(
            (
                tiny_config("llama", mlp_bias=True),
                target,
                None,
                f"{target} cannot express this model: the MLPs have biases, and its experts have "
                "none.",
                "upcycled can: pass --target upcycled.",
            )
            for target in ("mixtral", "qwen2_moe", "glm4_moe")
        ),
        (
            {"model_type": "nemotron_h", **sizes_of("nemotron_h"), "mlp_bias": True},
            "auto",
            None,
            "nemotron_h cannot express this model: the MLPs have biases, and its experts have "
            "none.",
            "No target can yet.",
        ),
        (
            {"model_type": "nemotron_h", "hybrid_override_pattern": "M*M"},
            "auto",
            None,
            "nemotron_h cannot express this model: it has no layer with a dense MLP.",
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
            "qwen3_moe cannot express this model: only some layers slide (layer_types), and its "
            "layers all attend alike.",
            "dots1 or upcycled can: pass --target dots1.",
        ),
        *(
            (
                {**PHI3, **settings},
                "mixtral",
                None,
                "mixtral cannot express this model: positions turn only a part of each head "
                "(partial_rotary_factor), and its turn all.",
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
            "mixtral cannot express this model: its rotary embeddings are stretched by longrope, "
            "which nobody has tried with it.",
            "upcycled can: pass --target upcycled.",
        ),
        (
            tiny_config("qwen3", **MIXED),
            "glm4_moe",
            None,
            "glm4_moe cannot express this model: some layers have a window, and its layers see "
            "all.",
            "dots1 or upcycled can: pass --target dots1.",
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
        ({"model_type": "bloom"}, "cannot be upcycled: its MLP adds the residual stream itself"),
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


# Which layers ------------------------------------------------------------------------------------


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
    assert listed((0, 2, 4, 5, 6, 9)) == "0, 2, 4-6, 9"
    assert listed(()) == ""


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
    assert layers.words == "a range"
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


def test_names_that_keys_had_once() -> None:
    """LFM2's first models say these, and transformers takes them before the others."""
    old = {"block_ff_dim": 96, "tie_embedding": False, "block_auto_adjust_ff_dim": False}
    config = {"model_type": "lfm2", **sizes_of("lfm2"), "tie_word_embeddings": True, **old}
    theirs = transformers_config(config)
    assert (theirs.intermediate_size, theirs.tie_word_embeddings) == (96, False)
    moe = converted(config, "lfm2_moe", make_recipe("E2G2T2"))
    assert (moe["intermediate_size"], moe["moe_intermediate_size"]) == (96, 48)
    assert moe["tie_word_embeddings"] is False
    assert not moe.keys() & {"block_ff_dim", "tie_embedding"}


def test_one_type_is_dense_or_not_by_its_number_of_experts() -> None:
    dense = {"model_type": "granitemoehybrid", **sizes_of("granitemoehybrid")}
    moe = {key: value for key, value in dense.items() if key != "num_local_experts"}  # 8 of them
    assert (is_moe(dense), is_target(dense)) == (False, False)
    assert (is_moe(moe), is_target(moe)) == (True, True)
    assert dense_model(dense).intermediate_size == 48
    with pytest.raises(UpcycleError, match="a mixture of experts already"):
        dense_family(moe)


# Engines -----------------------------------------------------------------------------------------

RUNS, WRONG = Support.RUNS, Support.WRONG
ENGINE_TARGETS = ("mixtral", "qwen2_moe", "qwen3_moe")


@pytest.mark.parametrize(
    ("target", "routing", "verdicts"),
    [
        (
            "mixtral",
            Routing.TOPK_SOFTMAX,
            {"transformers": RUNS, "vLLM": RUNS, "llama.cpp": RUNS, "MLX": RUNS},
        ),
        (
            "qwen2_moe",
            Routing.SOFTMAX_TOPK,
            {"transformers": RUNS, "vLLM": RUNS, "llama.cpp": RUNS, "MLX": RUNS},
        ),
        # llama.cpp never renormalises for qwen2moe and MLX neither ...
        (
            "qwen2_moe",
            Routing.TOPK_SOFTMAX,
            {"transformers": RUNS, "vLLM": RUNS, "llama.cpp": WRONG, "MLX": WRONG},
        ),
        # ... and llama.cpp always does for qwen3moe.
        (
            "qwen3_moe",
            Routing.SOFTMAX_TOPK,
            {"transformers": RUNS, "vLLM": RUNS, "llama.cpp": WRONG, "MLX": RUNS},
        ),
        (
            "qwen3_moe",
            Routing.TOPK_SOFTMAX,
            {"transformers": RUNS, "vLLM": RUNS, "llama.cpp": RUNS, "MLX": RUNS},
        ),
    ],
)
def test_what_is_known_of_engines(
    target: str, routing: Routing, verdicts: dict[str, Support]
) -> None:
    found = engines(target, routing, tied=False, fused=False, plain_attention=True)
    assert {engine.name: engine.support for engine in found} == verdicts
    assert len(found) == len(verdicts)


def test_what_was_tried_was_plain_attention() -> None:
    found = engines("mixtral", Routing.TOPK_SOFTMAX, tied=False, fused=False, plain_attention=False)
    assert [engine.name for engine in found] == ["transformers"]


def test_heads_that_turn_in_part_were_tried_in_transformers_alone() -> None:
    """Of native targets: shipped code has the attention that the dense model has."""
    turned = {"model_type": "glm", **sizes_of("glm")}
    for share, engines_of in ((0.5, {"transformers"}), (1.0, {"transformers", "vLLM", "MLX"})):
        config = turned | {"partial_rotary_factor": share}
        native, *_ = becomes(config, ())
        assert (native.name, set(native.engines)) == ("glm4_moe", engines_of)
        moe = converted(config, "glm4_moe", make_recipe("E2G2T2"))
        assert NATIVE["glm4_moe"].rotary_share(moe) == share
    saved = {"rope_parameters": {"partial_rotary_factor": 0.25}}
    assert NATIVE["glm4_moe"].rotary_share(saved) == 0.25
    assert NATIVE["mixtral"].rotary_share(saved) == 1.0
    shipped, *_ = becomes({"model_type": "nemotron", **sizes_of("nemotron")}, ())
    assert "vLLM" in shipped.engines


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_fused_experts_are_not_for_everyone(target: str) -> None:
    routing = Routing.SOFTMAX_TOPK if target == "qwen2_moe" else Routing.TOPK_SOFTMAX
    found = engines(target, routing, tied=False, fused=True, plain_attention=True)
    split = Support.PER_EXPERT_ONLY
    assert found == (
        Engine("transformers", RUNS),
        Engine("transformers 4", split),
        Engine("vLLM", split if target == "mixtral" else RUNS),
        Engine("llama.cpp", split if target == "mixtral" else RUNS),
        Engine("MLX", split),
    )


def test_what_leaves_out_the_factor_on_gates_is_right_where_experts_hold_it() -> None:
    facts: Any = {"tied": True, "fused": False, "plain_attention": True}
    routing = Routing.SIGMOID_TOPK
    by_config = engines("lfm2_moe", routing, **facts)
    by_experts = engines("lfm2_moe", routing, **facts, scaled=False)
    assert Engine("llama.cpp", Support.BALANCED_OR_WRONG) in by_config
    assert Engine("llama.cpp", RUNS) in by_experts
    assert Engine("vLLM", WRONG) in by_experts
    # Of other attention only transformers was tried.
    odd = engines("lfm2_moe", routing, **{**facts, "plain_attention": False})
    assert [engine.name for engine in odd] == ["transformers", "transformers 4"]


def test_no_layout_helps_where_the_routing_is_another() -> None:
    wrong = engines("qwen2_moe", Routing.TOPK_SOFTMAX, tied=True, fused=True, plain_attention=True)
    assert {Engine("llama.cpp", WRONG), Engine("MLX", WRONG)} <= set(wrong)


@pytest.mark.parametrize("name", ["llama.cpp", "MLX"])
def test_a_tied_head_stops_some_engines_for_qwen2_moe_only(name: str) -> None:
    support = {
        (target, tied): {
            engine.support
            for engine in engines(
                target, NATIVE[target].routings[0], tied=tied, fused=False, plain_attention=True
            )
            if engine.name == name
        }
        for target in ("mixtral", "qwen2_moe", "qwen3_moe")
        for tied in (True, False)
    }
    assert support == {
        ("mixtral", True): {RUNS},
        ("mixtral", False): {RUNS},
        ("qwen2_moe", True): {Support.UNTIED_ONLY},
        ("qwen2_moe", False): {RUNS},
        ("qwen3_moe", True): {RUNS},
        ("qwen3_moe", False): {RUNS},
    }


@pytest.mark.parametrize(
    ("target", "routing"),
    [
        (name, routing)
        for name, target in NATIVE.items()
        if name in ENGINE_TARGETS
        for routing in target.routings
    ],
)
def test_transformers_runs_everything(target: str, routing: Routing) -> None:
    for tied, fused in ((False, False), (True, True)):
        found = engines(target, routing, tied=tied, fused=fused, plain_attention=True)
        assert found[0] == Engine("transformers", RUNS)


@pytest.mark.parametrize(
    ("target", "name", "found"),
    [
        ("qwen3_moe", "vLLM", [RUNS]),
        ("qwen3_moe", "llama.cpp", [Support.REFUSES]),
        ("qwen2_moe", "vLLM", [RUNS]),
        ("granitemoe", "vLLM", []),  # was not tried
        ("glm4_moe", "MLX", [RUNS]),
        ("upcycled_nemotron", "vLLM", [RUNS]),
        ("nemotron_h", "llama.cpp", [Support.REFUSES]),
    ],
)
def test_what_keeps_some_dense_layers(target: str, name: str, found: list[Support]) -> None:
    routing = Routing.SIGMOID_TOPK if target == "glm4_moe" else Routing.TOPK_SOFTMAX
    listed = engines(
        target, routing, tied=False, fused=False, plain_attention=True, every_layer=False
    )
    assert [engine.support for engine in listed if engine.name == name] == found


def test_a_head_that_an_engine_gets_wrong_in_silence() -> None:
    settings = {"fused": False, "plain_attention": True}
    for every_layer in (True, False):
        tied, untied = (
            engines(
                "glm4_moe", Routing.SIGMOID_TOPK, tied=tied, every_layer=every_layer, **settings
            )
            for tied in (True, False)
        )
        assert Engine("vLLM", Support.UNTIED_OR_WRONG) in tied
        assert Engine("vLLM", RUNS) in untied


# What transformers has ---------------------------------------------------------------------------


def test_every_dense_decoder_is_a_row_or_refused_with_a_reason() -> None:
    """`python tests/find_families.py` prints what a row of the others would say."""
    known = DENSE.keys() | REFUSED.keys()
    assert {*dense_decoders()} <= known
    assert not DENSE.keys() & REFUSED.keys()
    readme = Path(__file__).parent.parent.joinpath("README.md").read_text("utf-8")
    assert f"can be upcycled, {len(DENSE)} of them" in readme
    listed = overview()
    assert listed.dense.keys() == DENSE.keys()
    assert listed.refused == REFUSED
    inside = (texts for wrapped in listed.wrappers.values() for texts in wrapped.values())
    assert {name for targets in (*listed.dense.values(), *inside) for name in targets} == {
        target.name for target in listed.targets
    }
    for model_type, reason in REFUSED.items():
        with pytest.raises(UpcycleError, match=f"{model_type}' cannot be upcycled: {reason}"):
            dense_family({"model_type": model_type})


def test_what_a_model_can_become_and_what_that_means() -> None:
    """As its own config has it: what it cannot become, with the reason, and what runs the rest."""
    found = {target.name: target for target in becomes(tiny_config("llama"), ())}
    assert found.keys() == {*targets_of(DENSE["llama"])}
    assert {target.refusal for target in found.values()} == {None}
    assert set(found["mixtral"].engines) == {"transformers", "vLLM", "llama.cpp", "MLX"}
    assert found["qwen2_moe"].engines["llama.cpp"] == (Routing.SOFTMAX_TOPK,)
    assert set(found["mixtral"].trainers) == {"transformers", "TRL", "peft", "NeMo AutoModel"}
    tied = becomes({**tiny_config("qwen3"), "tie_word_embeddings": True}, ())
    assert [set(target.trainers) & {"torchtitan", "NeMo AutoModel"} for target in tied[:2]] == [
        {"torchtitan"},
        set(),
    ]
    assert (found["glm4_moe"].balanced, found["glm4_moe"].layers) == ("bias", "the last ones")
    assert found[SHIPPED].balanced == "auxiliary loss of each layer"
    biased = becomes({**tiny_config("llama"), "mlp_bias": True}, ())
    assert [target.name for target in biased if target.refusal is None] == [SHIPPED]
    assert "the MLPs have biases" in str(biased[0].refusal)
    # Heads that do not make up the hidden size were run in transformers alone.
    odd = becomes({**tiny_config("llama"), "head_dim": 24}, ())
    assert {engine for target in odd for engine in target.engines} == {"transformers"}
