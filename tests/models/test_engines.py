"""How facts of engines are combined; tests/interoperability holds each to what was measured."""

from __future__ import annotations

from typing import Any

import pytest

from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.engines import Engine, Support, engines, support_lines
from upcycle_cli.models.moe_config import has_plain_attention
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.recipe.recipe import Routing

RUNS, WRONG, UNTIED = Support.RUNS, Support.WRONG, Support.UNTIED_ONLY
NEITHER = {"transformers 4": Support.REFUSES, "vLLM": WRONG}
SPLIT, BALANCED = Support.PER_EXPERT_ONLY, Support.BALANCED_OR_WRONG


@pytest.mark.parametrize(
    ("target", "routing", "facts", "wanted"),
    [
        ("mixtral", "topk-softmax", {}, {"vLLM": RUNS, "llama.cpp": RUNS, "MLX": RUNS}),
        # Only transformers was tested with other attention, but a failure is reported there too.
        ("mixtral", "topk-softmax", {"plain_attention": False}, {}),
        ("lfm2_moe", "sigmoid-topk", {"plain_attention": False}, NEITHER),
        (
            "qwen3_moe",
            "topk-softmax",
            {"fused": True},
            {"transformers 4": SPLIT, "vLLM": RUNS, "llama.cpp": RUNS, "MLX": SPLIT},
        ),
        (
            "qwen2_moe",
            "softmax-topk",
            {"tied": True},
            {"vLLM": RUNS, "llama.cpp": UNTIED, "MLX": UNTIED},
        ),
        # llama.cpp ignores the factor on gates.
        (
            "lfm2_moe",
            "sigmoid-topk",
            {"tied": True, "scaled": True},
            {**NEITHER, "llama.cpp": BALANCED, "MLX": RUNS},
        ),
        ("granitemoe", "topk-softmax", {"every_layer": False}, {}),  # untested
    ],
)
def test_engines_of_a_target(
    target: str, routing: str, facts: dict[str, Any], wanted: dict[str, Support]
) -> None:
    usual = {"tied": False, "fused": False, "plain_attention": True}
    first, *others = engines(target, Routing(routing), **{**usual, **facts})
    assert first == Engine("transformers", RUNS)
    found = {engine.name: engine.support for engine in others}
    assert found == wanted


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
