"""What is known of the inference engines that run the result."""

from __future__ import annotations

from typing import Any

import pytest

from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.engines import Engine, Support, engines, support_lines
from upcycle_cli.models.moe_config import has_plain_attention
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.recipe.recipe import Routing

RUNS, WRONG, REFUSES = Support.RUNS, Support.WRONG, Support.REFUSES
SPLIT, UNTIED = Support.PER_EXPERT_ONLY, Support.UNTIED_ONLY
RENORMALISED, SOFTMAX, SIGMOID = (
    Routing.TOPK_SOFTMAX,
    Routing.SOFTMAX_TOPK,
    Routing.SIGMOID_TOPK,
)


def support(target: str, routing: Routing, **facts: Any) -> dict[str, Support]:  # noqa: ANN401
    usual = {"tied": False, "fused": False, "plain_attention": True}
    found = engines(target, routing, **{**usual, **facts})
    assert found[0] == Engine("transformers", RUNS)
    return {engine.name: engine.support for engine in found[1:]}


@pytest.mark.parametrize(
    ("target", "routing", "facts", "wanted"),
    [
        ("mixtral", RENORMALISED, {}, {"vLLM": RUNS, "llama.cpp": RUNS, "MLX": RUNS}),
        ("qwen2_moe", SOFTMAX, {}, {"vLLM": RUNS, "llama.cpp": RUNS, "MLX": RUNS}),
        # llama.cpp and MLX never renormalise for qwen2moe; llama.cpp always does for qwen3moe.
        ("qwen2_moe", RENORMALISED, {}, {"vLLM": RUNS, "llama.cpp": WRONG, "MLX": WRONG}),
        ("qwen3_moe", SOFTMAX, {}, {"vLLM": RUNS, "llama.cpp": WRONG, "MLX": RUNS}),
        ("qwen3_moe", RENORMALISED, {}, {"vLLM": RUNS, "llama.cpp": RUNS, "MLX": RUNS}),
        # Only transformers was tested with other attention.
        ("mixtral", RENORMALISED, {"plain_attention": False}, {}),
        (
            "mixtral",
            RENORMALISED,
            {"fused": True},
            {"transformers 4": SPLIT, "vLLM": SPLIT, "llama.cpp": SPLIT, "MLX": SPLIT},
        ),
        (
            "qwen3_moe",
            RENORMALISED,
            {"fused": True},
            {"transformers 4": SPLIT, "vLLM": RUNS, "llama.cpp": RUNS, "MLX": SPLIT},
        ),
        ("qwen2_moe", SOFTMAX, {"tied": True}, {"vLLM": RUNS, "llama.cpp": UNTIED, "MLX": UNTIED}),
        (
            "qwen3_moe",
            RENORMALISED,
            {"tied": True},
            dict.fromkeys(("vLLM", "llama.cpp", "MLX"), RUNS),
        ),
    ],
)
def test_engines_of_a_target(
    target: str, routing: Routing, facts: dict[str, Any], wanted: dict[str, Support]
) -> None:
    assert support(target, routing, **facts) == wanted


@pytest.mark.parametrize(
    ("target", "name", "wanted"),
    [
        ("qwen3_moe", "vLLM", RUNS),
        ("qwen3_moe", "llama.cpp", REFUSES),
        ("granitemoe", "vLLM", None),  # untested
        ("glm4_moe", "MLX", RUNS),
        ("upcycled_nemotron", "vLLM", RUNS),
        ("nemotron_h", "llama.cpp", REFUSES),
    ],
)
def test_models_that_keep_dense_layers(target: str, name: str, wanted: Support | None) -> None:
    routing = SIGMOID if target == "glm4_moe" else RENORMALISED
    assert support(target, routing, every_layer=False).get(name) == wanted


def test_an_engine_that_ignores_the_factor_on_gates_needs_it_in_the_weights() -> None:
    by_config = support("lfm2_moe", SIGMOID, tied=True, scaled=True)
    by_experts = support("lfm2_moe", SIGMOID, tied=True)
    assert by_config["llama.cpp"] is Support.BALANCED_OR_WRONG
    assert (by_experts["llama.cpp"], by_experts["vLLM"]) == (RUNS, WRONG)
    # A failure is reported for untested attention too.
    odd = support("lfm2_moe", SIGMOID, tied=True, plain_attention=False)
    assert RUNS not in odd.values()
    assert odd["vLLM"] is WRONG


def test_plain_attention() -> None:
    own = {name for name in DENSE if has_plain_attention({"model_type": name, "sliding_window": 8})}
    assert own == {"gemma3_text", "gemma4_text"}
    assert has_plain_attention({"model_type": "upcycled_gemma3_text", "sliding_window": 8})
    for kind, plain in (("default", True), ("yarn", False)):
        rope = {"full_attention": {"rope_type": kind, "rope_theta": 5.0}}
        assert has_plain_attention({"model_type": "mellum", "rope_parameters": rope}) is plain


def test_the_rotary_share_of_an_moe() -> None:
    saved = {"rope_parameters": {"partial_rotary_factor": 0.25}}
    assert NATIVE["glm4_moe"].rotary_share(saved) == 0.25
    assert NATIVE["glm4_moe"].rotary_share({"partial_rotary_factor": 0.5}) == 0.5
    assert NATIVE["mixtral"].rotary_share(saved) == 1.0


def test_the_verb_agrees_with_the_number_of_engines() -> None:
    rows = (("vLLM", "RUNS"), ("MLX", "WRONG"), ("llama.cpp", "REFUSES"), ("lm-eval", "REFUSES"))
    assert support_lines(Engine(name, Support[support]) for name, support in rows) == [
        "vLLM",
        "MLX: loads, computes something else",
        "llama.cpp, lm-eval: do not load it",
    ]
