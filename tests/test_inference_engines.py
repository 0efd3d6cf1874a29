"""What is known of the inference engines that run the result."""

from __future__ import annotations

from typing import Any

import pytest
from configs import converted
from conftest import sizes_of
from shapes import make_recipe

from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.engines import Engine, Support, engines
from upcycle_cli.models.moe_config import has_plain_attention
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.models.overview import becomes
from upcycle_cli.recipe.recipe import SHIPPED, Routing

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


def test_attention_of_its_own_is_plain_where_all_models_of_a_type_have_it() -> None:
    own = {name for name in DENSE if has_plain_attention({"model_type": name, "sliding_window": 8})}
    assert own == {"gemma3_text", "gemma4_text"}
    assert has_plain_attention({"model_type": "upcycled_gemma3_text", "sliding_window": 8})
    for kind, plain in (("default", True), ("yarn", False)):
        rope = {"full_attention": {"rope_type": kind, "rope_theta": 5.0}}
        assert has_plain_attention({"model_type": "mellum", "rope_parameters": rope}) is plain


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


def test_attention_that_all_models_of_a_type_have_was_tried() -> None:
    """Half of the layers have a window, in the models that were tried as well."""
    of_gemma4 = becomes({"model_type": "gemma4_text", **sizes_of("gemma4_text")}, ())
    engines_of = {row.name: {*row.engines} for row in of_gemma4}
    assert engines_of == {
        SHIPPED: {"transformers", "vLLM"},
        "gemma4_text": {"transformers", "vLLM", "MLX"},
    }


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
    by_config = engines("lfm2_moe", routing, **facts, scaled=True)
    by_experts = engines("lfm2_moe", routing, **facts)
    assert Engine("llama.cpp", Support.BALANCED_OR_WRONG) in by_config
    assert Engine("llama.cpp", RUNS) in by_experts
    assert Engine("vLLM", WRONG) in by_experts
    # With other attention only transformers was tried; what is wrong without it is so with it.
    odd = engines("lfm2_moe", routing, **{**facts, "plain_attention": False})
    assert {engine.name for engine in odd if engine.support is RUNS} == {"transformers"}
    assert {engine for engine in by_experts if engine.support is not RUNS} < set(odd)
    assert Engine("vLLM", WRONG) in odd


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
