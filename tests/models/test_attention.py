"""The attention class of configs in the style of released models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from upcycle_cli.models.attention import attention_class
from upcycle_cli.models.lookup import choose
from upcycle_cli.models.moe_config import moe_text_config

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "interoperability"))

from interop.conclusions import dense_config  # noqa: E402
from interop.conversions import cases  # noqa: E402

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
LLAMA = {"hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 131072}
NEMO = {**LLAMA, "model_type": "mistral", "hidden_size": 5120, "head_dim": 128}
QWEN = {"hidden_size": 1024, "num_attention_heads": 16, "head_dim": 128, "num_hidden_layers": 28}
LONG = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
GEMMA3 = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
}
WIDE, SOME = "head_dim × heads ≠ hidden size", "sliding window on some layers"


@pytest.mark.parametrize(
    ("model_type", "settings", "wanted"),
    [
        ("mixtral", LLAMA, "plain"),
        ("mixtral", {**LLAMA, "rope_scaling": LLAMA3}, "llama3 rope scaling"),
        ("mixtral", {**LLAMA, "rope_parameters": LLAMA3}, "llama3 rope scaling"),
        (
            "mixtral",
            {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2}},
            "linear rope scaling",
        ),
        ("mixtral", {**LLAMA, "rope_scaling": {"type": "longrope"}}, "longrope rope scaling"),
        ("mixtral", {**LLAMA, "sliding_window": 4096}, "sliding window"),
        # No text is longer than the window.
        ("mixtral", {**LLAMA, "sliding_window": 262144}, "plain"),
        ("mixtral", NEMO, WIDE),
        ("qwen3_moe", QWEN, WIDE),
        (
            "glm4_moe",
            {**QWEN, "use_qk_norm": True, "partial_rotary_factor": 1.0},
            f"QK norm, {WIDE}",
        ),
        ("glm4_moe", LLAMA, "partial rotary"),
        ("glm4_moe", {**LLAMA, "rope_parameters": {"partial_rotary_factor": 1.0}}, "plain"),
        (
            "glm4_moe",
            {**LLAMA, "partial_rotary_factor": 1.0, "attention_bias": True},
            "attention biases",
        ),
        ("qwen2_moe", {**LLAMA, "sliding_window": 4096}, "plain"),  # use_sliding_window is false
        (
            "qwen2_moe",
            {**LLAMA, "use_sliding_window": True, "max_window_layers": 0},
            "sliding window",
        ),
        (
            "qwen2_moe",
            {**LLAMA, "use_sliding_window": True, "max_window_layers": 1, "num_hidden_layers": 2},
            SOME,
        ),
        ("mellum", {**LLAMA, "head_dim": 128, "layer_types": ["full_attention"] * 2}, "plain"),
        (
            "granitemoe_swa",
            {**LLAMA, "layer_rope_theta": [1e4, 0.0]},
            f"layers without rope, {SOME}",
        ),
        ("granitemoehybrid", {**LLAMA, "position_embedding_type": "nope"}, "layers without rope"),
        ("granitemoehybrid", {**LLAMA, "position_embedding_type": "rope"}, "plain"),
        ("deepseek_v3", {**LLAMA, "head_dim": 64}, "plain"),
        ("upcycled_smollm3", {**LLAMA, "no_rope_layers": [1, 1, 1, 0]}, "layers without rope"),
        ("upcycled_smollm3", {**LLAMA, "no_rope_layers": [1, 1]}, "plain"),
        (
            "upcycled_phi3",
            {**LLAMA, "rope_scaling": LONG, "partial_rotary_factor": 0.75},
            "longrope rope scaling, partial rotary",
        ),
        ("upcycled_gemma2", {**LLAMA, "head_dim": 128}, f"{SOME}, soft caps"),
        (
            "upcycled_gemma3_text",
            {**LLAMA, "head_dim": 256, "rope_parameters": GEMMA3},
            f"{WIDE}, linear rope scaling, {SOME}",
        ),
        ("upcycled_ministral", {**LLAMA, "sliding_window": 4096}, "sliding window"),
        ("upcycled_falcon", {**LLAMA, "alibi": True, "bias": True}, "ALiBi, attention biases"),
    ],
)
def test_the_attention_class_of_a_config(
    model_type: str, settings: dict[str, Any], wanted: str
) -> None:
    assert attention_class({**settings, "model_type": model_type}) == wanted


def test_the_class_of_a_saved_model_is_that_of_its_sizes() -> None:
    """transformers writes many more keys into a config than the sizes of a tiny model."""
    from transformers import AutoConfig

    for dense, target in sorted({(case.dense, case.target) for case in cases()}):
        config = dense_config(dense)
        if "text_config" in config:
            continue
        model_type = config.pop("model_type")
        saved = AutoConfig.for_model(model_type, **config).to_dict()
        found = [
            attention_class(moe_text_config(each, choose(each, target, None)))
            for each in ({**config, "model_type": model_type}, saved)
        ]
        assert found[0] == found[1], (dense, target)
