"""How facts of engines are combined; tests/interoperability holds each to what was measured."""

from __future__ import annotations

import pytest

from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.engines import Engine, Support, engines, has_plain_attention, support_lines
from upcycle_cli.recipe.recipe import Routing

RUNS, WRONG, UNTIED = Support.RUNS, Support.WRONG, Support.UNTIED_ONLY
NEITHER = {"transformers 4": Support.REFUSES, "vLLM": WRONG}
SCALED = {**NEITHER, "llama.cpp": Support.BALANCED_OR_WRONG, "MLX": RUNS}
SPLIT = Support.PER_EXPERT_ONLY


@pytest.mark.parametrize(
    ("target", "routing", "properties", "wanted"),
    [
        ("mixtral", "topk-softmax", "", {"vLLM": RUNS, "llama.cpp": RUNS, "MLX": RUNS}),
        # Only transformers was tested with other attention, but a failure is reported there too.
        ("mixtral", "topk-softmax", "untested attention", {}),
        ("lfm2_moe", "sigmoid-topk", "untested attention", NEITHER),
        (
            "qwen3_moe",
            "topk-softmax",
            "fused",
            {"transformers 4": SPLIT, "vLLM": RUNS, "llama.cpp": RUNS, "MLX": SPLIT},
        ),
        ("qwen2_moe", "softmax-topk", "tied", {"vLLM": RUNS, "llama.cpp": UNTIED, "MLX": UNTIED}),
        # llama.cpp ignores the factor on gates.
        ("lfm2_moe", "sigmoid-topk", "tied, scaled", SCALED),
        ("granitemoe", "topk-softmax", "some layers", {}),  # untested
    ],
)
def test_engines_of_a_target(
    target: str, routing: str, properties: str, wanted: dict[str, Support]
) -> None:
    held = {*properties.split(", ")}
    plain = "untested attention" not in held
    first, *others = engines(target, Routing(routing), held, plain_attention=plain)
    assert first == Engine("transformers", RUNS)
    assert {engine.name: engine.support for engine in others} == wanted


def test_plain_attention() -> None:
    own = {name for name in DENSE if has_plain_attention({"model_type": name, "sliding_window": 8})}
    assert own == {"gemma3_text", "gemma4_text"}
    assert has_plain_attention({"model_type": "upcycled_gemma3_text", "sliding_window": 8})
    for kind, plain in (("default", True), ("yarn", False)):
        rope = {"full_attention": {"rope_type": kind, "rope_theta": 5.0}}
        assert has_plain_attention({"model_type": "mellum", "rope_parameters": rope}) is plain
    for saved in ({"rope_parameters": {"partial_rotary_factor": 0.25}}, {}):
        assert not has_plain_attention({"model_type": "glm4_moe", **saved})
        assert has_plain_attention({"model_type": "mixtral", **saved})
    assert has_plain_attention({"model_type": "glm4_moe", "partial_rotary_factor": 1.0})


def test_the_verb_agrees_with_the_number_of_engines() -> None:
    rows = (("vLLM", "RUNS"), ("MLX", "WRONG"), ("llama.cpp", "REFUSES"), ("lm-eval", "REFUSES"))
    assert support_lines(Engine(name, Support[support]) for name, support in rows) == [
        "vLLM",
        "MLX: loads, computes something else",
        "llama.cpp, lm-eval: do not load it",
    ]
