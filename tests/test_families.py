"""What configs mean, by transformers' own account, and what becomes of them.

A key that is absent means the default of its model type; here transformers' config classes say
what that is, and its models, on the meta device, which tensors there are.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from shapes import BIG, big_config, make_recipe, tensor_shapes, tiny_config

from upcycle_cli import UpcycleError
from upcycle_cli.families import DENSE, PAIRS, TARGETS, choose, dense_family
from upcycle_cli.families.dense import Decoder, dense_shapes
from upcycle_cli.families.engines import Engine, Support, engines
from upcycle_cli.families.llama import DEFAULTS as LLAMA
from upcycle_cli.families.mistral import DEFAULTS as MISTRAL
from upcycle_cli.families.qwen2 import DEFAULTS as QWEN2
from upcycle_cli.families.qwen3 import DEFAULTS as QWEN3
from upcycle_cli.families.target import ExpertLayout, config_routing, expected, moe_config
from upcycle_cli.recipe import Recipe, Routing

DEFAULTS = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3}
ALL_PAIRS = [(dense, target) for dense, targets in PAIRS.items() for target in targets]
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


# Defaults ----------------------------------------------------------------------------------------


def test_every_dense_family_has_its_defaults_tested() -> None:
    assert DEFAULTS.keys() == DENSE.keys()


@pytest.mark.parametrize("model_type", list(DEFAULTS))
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    theirs = transformers_config({"model_type": model_type})
    ours = dict(DEFAULTS[model_type])
    assert ours.pop("rope_theta") == theirs.rope_parameters["rope_theta"]
    assert theirs.rope_parameters["rope_type"] == "default"
    assert ours.pop("rope_parameters") is None
    assert ours.pop("rope_scaling") is None
    if model_type in {"llama", "mistral", "qwen2"}:
        # null means: derive it.
        assert ours.pop("head_dim") is None
        derived = theirs.hidden_size // theirs.num_attention_heads
        assert getattr(theirs, "head_dim", derived) == derived
    if model_type == "llama":
        assert ours.pop("num_key_value_heads") is None
        assert theirs.num_key_value_heads == theirs.num_attention_heads
    if "use_sliding_window" in ours:
        # transformers forgets the window of a model that does not use it.
        assert ours.pop("sliding_window") == type(theirs)(use_sliding_window=True).sliding_window
    assert ours == {key: getattr(theirs, key) for key in ours}


@pytest.mark.parametrize("model_type", list(DEFAULTS))
def test_every_default_is_read(model_type: str) -> None:
    """Changing any one of them changes the decoder: none is there for show."""
    plain = DENSE[model_type].decoder({"model_type": model_type, "use_sliding_window": True})
    changes = {
        **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), True),
        "use_sliding_window": False,
        "hidden_act": "gelu",
        "attention_dropout": 0.5,
        "rope_scaling": YARN,
        "rope_parameters": YARN,
        "num_attention_heads": 64,
        "num_key_value_heads": 16,
        "max_window_layers": 3,
    }
    for key in DEFAULTS[model_type]:
        config = {"model_type": model_type, "use_sliding_window": True, key: changes.get(key, 96)}
        assert DENSE[model_type].decoder(config) != plain, key


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
MEANINGS = [
    pytest.param({"model_type": model_type, **SIZES, **changes}, id=f"{model_type}, {name}")
    for model_type in DENSE
    for name, changes in VARIANTS.items()
    if (model_type, name) not in NOT_IN_TRANSFORMERS
]
RELEASED = [pytest.param(big_config(name), id=name) for name in BIG]


def window_of(theirs: Any, layer: int) -> int | None:  # noqa: ANN401
    """How far a layer sees, by what transformers' modelling code reads from a config."""
    window: int | None
    match theirs.model_type:
        case "llama":
            window = None
        case "qwen2" | "qwen3" | "qwen2_moe":
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


def our_meaning(decoder: Decoder) -> dict[str, Any]:
    ours = {
        key: getattr(decoder, key)
        for key in meaning(transformers_config({"model_type": "llama"}))
        if key not in {"rope", "windows"}
    }
    scaling = decoder.rope_scaling
    ours["rope"] = None if scaling is None else {k: v for k, v in scaling.items() if k != "type"}
    ours["windows"] = [
        decoder.sliding_window if kind == SLIDING else None for kind in decoder.layer_types
    ]
    return ours


@pytest.mark.parametrize("config", [*MEANINGS, *RELEASED])
def test_a_config_means_what_transformers_says(config: dict[str, Any]) -> None:
    decoder = dense_family(config).decoder(config)
    assert our_meaning(decoder) == meaning(transformers_config(config))
    assert decoder.intermediate_size == transformers_config(config).intermediate_size
    assert decoder.model_type == config["model_type"]


@pytest.mark.parametrize("config", MEANINGS)
def test_the_dense_tensors_are_those_of_transformers(config: dict[str, Any]) -> None:
    assert dense_shapes(dense_family(config).decoder(config)) == model_shapes(config)


@pytest.mark.parametrize("name", BIG)
def test_released_models_have_the_tensors_that_their_fixtures_get(name: str) -> None:
    config = {**big_config(name), "num_hidden_layers": 2}
    shapes = dense_shapes(dense_family(config).decoder(config))
    assert shapes == tensor_shapes(config) == model_shapes(config)


# What becomes of it ------------------------------------------------------------------------------


def convertible(config: dict[str, Any]) -> list[str]:
    decoder = dense_family(config).decoder(config)
    return [t for t in PAIRS[config["model_type"]] if TARGETS[t].refusal(decoder) is None]


def converted(
    config: Mapping[str, Any],
    target: str,
    recipe: Recipe,
    **settings: Any,  # noqa: ANN401
) -> dict[str, Any]:
    decoder = dense_family(config).decoder(config)
    options = {"untie_embeddings": False, "dtype": None} | settings
    resolved = recipe.resolve(TARGETS[target].routings[0])
    return moe_config(config, decoder, TARGETS[target], resolved, **options)


@pytest.mark.parametrize("config", [*MEANINGS, *RELEASED])
def test_the_moe_means_what_the_dense_model_meant(config: dict[str, Any]) -> None:
    """Whatever the target's own defaults are."""
    dense = meaning(transformers_config(config))
    for target in convertible(config):
        moe = converted(config, target, make_recipe("E2G2T2"))
        assert meaning(transformers_config(moe)) == dense, target


EXPLICIT = {
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "attention_dropout",
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "router_aux_loss_coef",
    "output_router_logits",
    "num_experts_per_tok",
}
WINDOW = {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
SPARSE = {"num_experts", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step"} | {
    "mlp_only_layers"
}
OWN = {
    "mixtral": {"sliding_window", "num_local_experts", "router_jitter_noise"},
    "qwen2_moe": WINDOW | SPARSE | {"qkv_bias", "shared_expert_intermediate_size"},
    "qwen3_moe": WINDOW | SPARSE | {"attention_bias"},
}


@pytest.mark.parametrize(("model_type", "target"), ALL_PAIRS)
def test_every_key_is_written_even_from_an_empty_config(model_type: str, target: str) -> None:
    moe = converted({"model_type": model_type}, target, make_recipe("E4G2T4"))
    assert moe.keys() == EXPLICIT | OWN[target]
    assert moe["architectures"] == [TARGETS[target].architecture]
    assert transformers_config(moe).model_type == target


@pytest.mark.parametrize(("model_type", "target"), ALL_PAIRS)
def test_the_recipe_is_in_the_config(model_type: str, target: str) -> None:
    config = tiny_config(model_type)
    for routing in TARGETS[target].routings:
        recipe = make_recipe("E4G3T6", routing)
        theirs = transformers_config(converted(config, target, recipe))
        assert theirs.num_experts == 12
        assert theirs.num_experts_per_tok == 6
        inner = theirs.intermediate_size if target == "mixtral" else theirs.moe_intermediate_size
        assert inner == 12 // 3
        if target != "mixtral":
            assert theirs.norm_topk_prob == (routing is Routing.TOPK_SOFTMAX)
            assert theirs.intermediate_size == 12
        assert config_routing(converted(config, target, recipe), TARGETS[target]) is routing
        # What generation and serving expect, and the paper's coefficient for whoever trains.
        assert theirs.output_router_logits is False
        assert theirs.router_aux_loss_coef == 0.01


def test_routing_of_a_config_that_does_not_say() -> None:
    for name, target in TARGETS.items():
        routing = config_routing({}, target)
        renormalises = getattr(transformers_config({"model_type": name}), "norm_topk_prob", True)
        assert (routing is Routing.TOPK_SOFTMAX) == renormalises


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


# Its tensors -------------------------------------------------------------------------------------

RELEASED_NAMES = {
    # What a transformers-5 module calls its weights, and the released checkpoints.
    "mixtral": ("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
    "qwen2_moe": ("mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
    "qwen3_moe": ("mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
}


def per_expert(shapes: Mapping[str, tuple[int, ...]], target: str) -> dict[str, tuple[int, ...]]:
    """Translate transformers' fused names and shapes into those of the released checkpoints."""
    block, matrices = RELEASED_NAMES[target]
    result: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        match = re.fullmatch(r"(model\.layers\.\d+)\.mlp\.(experts\..*|gate\.weight)", name)
        if match is None:
            result[name] = shape
            continue
        prefix, rest = f"{match[1]}.{block}", match[2]
        if rest == "gate.weight":
            result[f"{prefix}.gate.weight"] = shape
            continue
        for expert in range(shape[0]):
            where = f"{prefix}.experts.{expert}"
            if rest == "experts.gate_up_proj":
                half = (shape[1] // 2, shape[2])
                result[f"{where}.{matrices['gate']}.weight"] = half
                result[f"{where}.{matrices['up']}.weight"] = half
            else:
                assert rest == "experts.down_proj"
                result[f"{where}.{matrices['down']}.weight"] = shape[1:]
    return result


def expected_shapes(
    config: Mapping[str, Any], target: str, name: str, layout: ExpertLayout
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """What the family expects, and what transformers' model has."""
    moe = converted(config, target, make_recipe(name))
    decoder = dense_family(config).decoder(config)
    ours = expected(decoder, moe, TARGETS[target], layout)
    theirs = model_shapes(moe)
    return ours, theirs if layout is ExpertLayout.FUSED else per_expert(theirs, target)


@pytest.mark.parametrize("layout", list(ExpertLayout))
@pytest.mark.parametrize("name", ["E2G1T1", "E2G3T6", "E3G4T4"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("model_type", "target"), ALL_PAIRS)
def test_expected_tensors_are_those_of_transformers(
    model_type: str,
    target: str,
    name: str,
    layout: ExpertLayout,
    *,
    tied: bool,
) -> None:
    config = tiny_config(model_type, tie_word_embeddings=tied)
    ours, theirs = expected_shapes(config, target, name, layout)
    assert ours == theirs


@pytest.mark.parametrize("config", MEANINGS)
def test_expected_tensors_of_every_kind_of_config(config: dict[str, Any]) -> None:
    for target in convertible(config):
        ours, theirs = expected_shapes(config, target, "E2G2T2", ExpertLayout.PER_EXPERT)
        assert ours == theirs, target


@pytest.mark.parametrize("layout", list(ExpertLayout))
@pytest.mark.parametrize("name", BIG)
def test_expected_tensors_at_full_size(name: str, layout: ExpertLayout) -> None:
    config = {**big_config(name), "num_hidden_layers": 2}
    for target in convertible(config):
        ours, theirs = expected_shapes(config, target, "E8G8T8", layout)
        assert ours == theirs, target


# Which target ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "routing", "target"),
    [
        ("llama", None, "mixtral"),
        ("llama", Routing.TOPK_SOFTMAX, "mixtral"),
        ("llama", Routing.SOFTMAX_TOPK, "qwen2_moe"),
        ("mistral", None, "mixtral"),
        ("mistral", Routing.SOFTMAX_TOPK, "qwen2_moe"),
        ("qwen2", None, "qwen2_moe"),
        ("qwen2", Routing.TOPK_SOFTMAX, "qwen2_moe"),
        ("qwen3", None, "qwen3_moe"),
        ("qwen3", Routing.SOFTMAX_TOPK, "qwen3_moe"),
    ],
)
def test_auto_takes_the_first_that_can(
    model_type: str, routing: Routing | None, target: str
) -> None:
    family = choose(tiny_config(model_type), "auto", routing)
    assert family.target is TARGETS[target]
    assert family.dense is DENSE[model_type]
    assert family.decoder == DENSE[model_type].decoder(tiny_config(model_type))


@pytest.mark.parametrize(("model_type", "target"), ALL_PAIRS)
def test_a_target_may_be_named(model_type: str, target: str) -> None:
    assert choose(tiny_config(model_type), target, None).target is TARGETS[target]


def test_the_default_routing_is_that_of_the_released_models() -> None:
    """Every engine implements that one; see the norm_topk_prob of each."""
    defaults = {name: target.routings[0] for name, target in TARGETS.items()}
    assert defaults == {
        "mixtral": Routing.TOPK_SOFTMAX,
        "qwen2_moe": Routing.SOFTMAX_TOPK,
        "qwen3_moe": Routing.TOPK_SOFTMAX,
    }


BIASED = {"attention_bias": True}
MIXED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("config", "target", "routing", "message", "hint"),
    [
        (
            tiny_config("llama"),
            "gpt_moe",
            None,
            "'gpt_moe' is not a target.",
            "llama can become mixtral or qwen2_moe.",
        ),
        (
            tiny_config("qwen2"),
            "mixtral",
            None,
            "qwen2 cannot become mixtral.",
            "It can become qwen2_moe.",
        ),
        (
            tiny_config("llama"),
            "mixtral",
            Routing.SOFTMAX_TOPK,
            "mixtral cannot express this model: it has no softmax-topk routing.",
            "qwen2_moe can: pass --target qwen2_moe.",
        ),
        (
            tiny_config("llama", **BIASED),
            "auto",
            None,
            "mixtral cannot express this model: attention_bias is true, and its o_proj has no "
            "bias. qwen2_moe cannot express this model: attention_bias is true, and its o_proj "
            "has no bias.",
            "No target can yet.",
        ),
        (
            tiny_config("llama", mlp_bias=True),
            "qwen2_moe",
            None,
            "qwen2_moe cannot express this model: mlp_bias is true, and its experts have no bias.",
            "No target can yet.",
        ),
        (
            tiny_config("qwen3", **MIXED),
            "auto",
            None,
            "qwen3_moe cannot express this model: only some layers slide (layer_types), and its "
            "layers all attend alike.",
            "No target can yet.",
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
    ("config", "message"),
    [
        ({}, "config.json has no model_type."),
        ({"model_type": "gpt2"}, "model type 'gpt2' cannot be upcycled yet."),
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
    ],
)
def test_settings_that_mean_nothing(model_type: str, changes: dict[str, Any], message: str) -> None:
    config = tiny_config(model_type, **changes)
    with pytest.raises(UpcycleError, match=re.escape(message)):
        dense_family(config).decoder(config)


# Engines -----------------------------------------------------------------------------------------

RUNS, WRONG = Support.RUNS, Support.WRONG


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


def test_no_layout_helps_where_the_routing_is_another() -> None:
    wrong = engines("qwen2_moe", Routing.TOPK_SOFTMAX, tied=True, fused=True, plain_attention=True)
    assert {Engine("llama.cpp", WRONG), Engine("MLX", WRONG)} <= set(wrong)


@pytest.mark.parametrize("name", ["llama.cpp", "MLX"])
def test_a_tied_head_stops_some_engines_for_qwen2_moe_only(name: str) -> None:
    support = {
        (target, tied): {
            engine.support
            for engine in engines(
                target, TARGETS[target].routings[0], tied=tied, fused=False, plain_attention=True
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
    [(name, routing) for name, target in TARGETS.items() for routing in target.routings],
)
def test_transformers_runs_everything(target: str, routing: Routing) -> None:
    for tied, fused in ((False, False), (True, True)):
        found = engines(target, routing, tied=tied, fused=fused, plain_attention=True)
        assert found[0] == Engine("transformers", RUNS)
