"""What configs mean, by transformers' own account, and what becomes of them.

A key that is absent means the default of its model type; here transformers' config classes say
what that is, and its models, on the meta device, which tensors there are. What holds of every row
of the tables is in test_contracts.py; here is what a grid of settings shows of one or a few.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from statistics import median
from typing import Any

import find_families
import pytest
from configs import FULL, SIZES, SLIDING, converted, dense_model, model_shapes, transformers_config
from conftest import sizes_of
from shapes import BIG, big_config, make_recipe, tensor_shapes, tiny_config

from upcycle_cli import UpcycleError
from upcycle_cli.models import dense_rows
from upcycle_cli.models.choose import choose
from upcycle_cli.models.dense import DenseModel
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.engines import Support, engines
from upcycle_cli.models.families import dense_family, is_moe, is_target, targets_of
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.models.overview import becomes, overview
from upcycle_cli.models.refused import REFUSED
from upcycle_cli.models.shipped_row import shipped
from upcycle_cli.models.trainers import trainers
from upcycle_cli.recipe.recipe import SHIPPED, ExpertLayout, Routing

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


# What a config means -----------------------------------------------------------------------------

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
        case "qwen2" | "qwen3" | "qwen2_moe" | "dots1" | "mellum":
            window = theirs.sliding_window if theirs.layer_types[layer] == SLIDING else None
        case "mistral" | "mixtral" | "qwen3_moe":
            window = theirs.sliding_window
        case other:
            raise AssertionError(other)
    return window


def meaning(theirs: Any) -> dict[str, Any]:  # noqa: ANN401
    """What a forward pass reads, from transformers' own config object."""
    rope = dict(theirs.rope_parameters)
    if FULL in rope:  # by kinds of layers, of which all have the same
        rope, other = dict(rope[FULL]), rope[SLIDING]
        assert rope == other
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
        assert getattr(theirs, row.keys.top_k) == 6
        assert getattr(theirs, row.keys.expert_size) == 48 // 3
        assert row.routing(moe) is routing
        if row.keys.scale is not None:
            assert getattr(theirs, row.keys.scale) == 3.0
        if target in ("qwen2_moe", "qwen3_moe", "mellum"):
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


def test_most_rows_of_dense_models_are_one_line() -> None:
    """What is usual is said by `DenseFamily`, once."""
    tree = ast.parse(inspect.getsource(dense_rows))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    rows = [node for node in calls if ast.unparse(node.func) == "DenseFamily"]
    assert len(rows) == len(DENSE)
    assert median((row.end_lineno or 0) - row.lineno + 1 for row in rows) == 1


# What transformers has ---------------------------------------------------------------------------


def test_every_dense_decoder_is_a_row_or_refused_with_a_reason() -> None:
    """`python tests/find_families.py` prints what a row of the others would say.

    They are found without a look at the tables, so that each name which is taken out is missed.
    """
    known = DENSE.keys() | REFUSED.keys()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(find_families, "DENSE", {})
        patch.setattr(find_families, "REFUSED", {})
        assert {*find_families.dense_decoders()} == known
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
    # Each was run in something besides transformers, or it is said why not.
    assert [target.name for target in listed.targets if not target.trainers] == []
    alone = {target.name for target in listed.targets if set(target.engines) == {"transformers"}}
    assert alone == {"qwen3_5_moe_text", SHIPPED}
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
    assert found["mixtral"].scaled_by == ("weights",)
    assert found["solar_open"].scaled_by == ("routed_scaling_factor", "weights")
    biased = becomes({**tiny_config("llama"), "mlp_bias": True}, ())
    assert [target.name for target in biased if target.refusal is None] == [SHIPPED]
    assert "MLPs have biases" in str(biased[0].refusal)
    # Heads that do not make up the hidden size were run in transformers alone.
    odd = becomes({**tiny_config("llama"), "head_dim": 24}, ())
    assert {engine for target in odd for engine in target.engines} == {"transformers"}


@pytest.mark.parametrize("name", [name for name, row in DENSE.items() if row.targets])
def test_the_default_runs_in_most_engines_and_is_accounted_for(name: str) -> None:
    family = DENSE[name]
    text = Path(__file__).parent.parent.joinpath("docs", "families.md").read_text("utf-8")
    section = text.split("## Which target is the default")[1].split("\n## ")[0]
    reasons = [reason.partition(":") for reason in section.split("\n- ")]
    (why,) = (why for who, _, why in reasons if name in re.findall(r"\w+", who))
    assert family.targets[0] in why or family.targets == (name,)

    def counted(target: str) -> tuple[int, bool, int]:
        row = NATIVE[target] if target in NATIVE else shipped(family, "silu", biased=False)
        fused, scaled = row.layout(None) is ExpertLayout.FUSED, row.keys.scale is not None
        facts: Any = {"tied": False, "fused": fused}
        runs = engines(row.title, row.routings[0], plain_attention=True, scaled=scaled, **facts)
        trains = trainers(row, row.routings[0], **facts)
        run, trained = (
            sum(each.support is Support.RUNS for each in found) for found in (runs, trains)
        )
        return run, target != SHIPPED, trained

    targets = targets_of(family)
    assert counted(targets[0]) == max(map(counted, targets))


def test_a_base_of_rotary_embeddings_where_each_kind_of_layer_has_its_own() -> None:
    """Some released configs have the older key alone, which nothing else goes with."""
    config = {"model_type": "gemma3_text", **sizes_of("gemma3_text"), "rope_theta": 1e6}
    moe = converted(config, "upcycled", make_recipe("E2G2T2"))
    assert moe["rope_theta"] == 1e6
    assert "rope_scaling" not in moe
