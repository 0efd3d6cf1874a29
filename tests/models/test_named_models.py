"""What upcycle says of released models, by the values in their configs; nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from shapes import FIXTURES, wrapper_shapes, write_hollow

from upcycle_cli import Recipe, inspect
from upcycle_cli.models.wrappers import WRAPPERS

MODELS: Mapping[str, dict[str, Any]] = json.loads((FIXTURES / "named_models.json").read_text())
PLAIN, WIDE = "plain", "head_dim × heads ≠ hidden size"
LLAMA3, SOME = "llama3 rope scaling", "sliding window on some layers"
_LLAMA = dict.fromkeys(("mixtral", "qwen2_moe", "glm4_moe", "solar_open", "upcycled"), LLAMA3)
_QWEN3 = {"qwen3_moe": WIDE, "glm4_moe": f"QK norm, {WIDE}", "upcycled": WIDE}
_MIXTRAL = dict.fromkeys(("mixtral", "qwen2_moe", "upcycled"), PLAIN)
_WIDE_MIXTRAL, _SHIPPED = {"mixtral": WIDE, "upcycled": WIDE}, {"upcycled": PLAIN}
_QWEN2_MOE = dict.fromkeys(("qwen2_moe", "upcycled"), PLAIN)
ATTENTION: Mapping[str, Mapping[str, str]] = {
    "Llama 3.1 8B": _LLAMA,
    "Llama 3.2 1B": _LLAMA,
    "Llama 3.2 3B": _LLAMA,
    "Llama 3.3 70B": _LLAMA,
    "Qwen2.5 7B": {"qwen2_moe": PLAIN, "glm4_moe": "attention biases", "upcycled": PLAIN},
    "Qwen3 0.6B": _QWEN3,
    "Qwen3 4B": _QWEN3,
    "Qwen3 8B": {"qwen3_moe": PLAIN, "glm4_moe": "QK norm"},
    "Qwen3 32B": _QWEN3,
    "Mistral 7B v0.3": {"mixtral": PLAIN, "qwen2_moe": PLAIN},
    "Mistral Nemo": {"mixtral": WIDE, "glm4_moe": WIDE},
    "Mistral Small 24B": {"mixtral": WIDE, "glm4_moe": WIDE},
    "Ministral 8B": {"mixtral": PLAIN, "upcycled": PLAIN},
    "Phi-4": {"mixtral": PLAIN, "upcycled": PLAIN},
    "Phi-4-mini": {
        "mixtral": "",
        "upcycled": "longrope rope scaling, partial rotary",
        "glm4_moe": "longrope rope scaling, partial rotary",
    },
    "Gemma 2 9B": {"upcycled": f"{WIDE}, {SOME}, soft caps"},
    "Gemma 3 1B": {"upcycled": f"{WIDE}, {SOME}"},
    "Gemma 3 4B": {"upcycled": f"{WIDE}, linear rope scaling, {SOME}"},
    "SmolLM2 1.7B": {"mixtral": PLAIN, "glm4_moe": PLAIN},
    "SmolLM3 3B": {"upcycled": "layers without rope"},
    "OLMo 2 7B": {"flex_olmo": PLAIN},
    "OLMo 3 7B": {"upcycled": f"{SOME}, yarn rope scaling"},
    "Granite 3.3 8B": {"granitemoe": PLAIN, "granitemoehybrid": PLAIN},
    "Minitron 4B": {"upcycled": "partial rotary"},
    "Nemotron-H 8B": {"nemotron_h": PLAIN},
    **dict.fromkeys(("Janus Pro 1B", "LLaVA 1.6 Mistral 7B", "LLaVA-NeXT-Video 7B"), _MIXTRAL),
    **dict.fromkeys(("SmolVLM2 500M", "Video-LLaVA 7B", "ViP-LLaVA 7B", "Idefics3 8B"), _MIXTRAL),
    **dict.fromkeys(("DeepSeek-VL 1.3B", "DeepSeek-VL 7B"), _MIXTRAL),
    **dict.fromkeys(("Pixtral 12B", "Mistral Small 3.1 24B"), _WIDE_MIXTRAL),
    **dict.fromkeys(("LLaVA-OneVision 7B", "Ovis2 1B", "PP-Chart2Table"), _QWEN2_MOE),
    **dict.fromkeys(("VideoLLaMA 3 2B", "GOT-OCR 2.0", "InternVL3 1B"), _QWEN2_MOE),
    **dict.fromkeys(("PaliGemma 3B", "Qwen2-VL 7B", "Qwen2.5-VL 7B"), _SHIPPED),
    "LFM2-VL 450M": {"lfm2_moe": PLAIN, "upcycled": PLAIN},
    "LightOnOCR 1B": {"qwen3_moe": WIDE, "upcycled": WIDE},
    "PaliGemma 2 3B": {"upcycled": f"{WIDE}, {SOME}, soft caps"},
    "Perception LM 1B": dict.fromkeys(("mixtral", "qwen2_moe", "upcycled"), LLAMA3),
    "Aya Vision 8B": {"upcycled": SOME},
    "Command A Vision": {"cohere2_moe": SOME, "upcycled": SOME},
    "Fuyu 8B": {"upcycled": "QK norm, partial rotary"},
    "Idefics2 8B": {"qwen2_moe": "sliding window", "upcycled": "sliding window"},
    "PaddleOCR-VL 0.9B": {"upcycled": WIDE},
    "HunyuanOCR 1B": {"upcycled": f"{WIDE}, xdrope rope scaling"},
    "Muse Glimmer 30B": {"upcycled": f"{WIDE}, layers without rope, {SOME}, soft caps"},
    "Granite Docling 500M": _SHIPPED,
    "Gemma 4 12B": {"upcycled": f"{WIDE}, shared keys and values, {SOME}, soft caps"},
    "GLM-4.1V 9B": {"upcycled": "attention biases"},
    "Gemma 3n E2B": {"upcycled": f"shared keys and values, {SOME}, soft caps"},
    "Qwen3-VL 4B": {"qwen3_vl_moe_text": WIDE, "upcycled": WIDE},
}
"""By model and target; the default target comes first, "" if the model cannot become it."""


@pytest.mark.parametrize("name", MODELS)
def test_the_attention_of_released_models(name: str, tmp_path: Path) -> None:
    found = {facts.name: facts.attention for facts in inspect(hollow(tmp_path, name)).becomes}
    expected = ATTENTION[name]
    assert {target: found[target] for target in expected} == expected
    assert next(iter(found)) == next(iter(expected))


@pytest.mark.parametrize(
    ("name", "change", "attention"),
    [
        pytest.param("Mistral 7B v0.3", {"head_dim": None}, PLAIN, id="head_dim null"),
        pytest.param("Mistral 7B v0.3", {"head_dim": 128}, PLAIN, id="head_dim as it is"),
        pytest.param("Mistral 7B v0.3", {"sliding_window": 4096}, "sliding window", id="window"),
        pytest.param("Qwen2.5 7B", {"use_sliding_window": True}, PLAIN, id="no layer slides"),
        pytest.param(
            *("Qwen2.5 7B", {"use_sliding_window": True, "max_window_layers": 0}, PLAIN),
            id="window as long as the text",
        ),
        pytest.param(
            "Ministral 8B",
            {"layer_types": ["full_attention", "sliding_attention"] * 18},
            PLAIN,
            id="mistral does not read layer_types",
        ),
        pytest.param("Llama 3.1 8B", {"rope_scaling": None}, PLAIN, id="Llama 3"),
        pytest.param(
            "Gemma 3 1B", {"layer_types": ["full_attention"] * 26}, WIDE, id="no window is used"
        ),
    ],
)
def test_keys_that_mislead(
    name: str, change: dict[str, Any], attention: str, tmp_path: Path
) -> None:
    path = hollow(tmp_path, name, **change)
    assert inspect(path).becomes[0].attention == attention


def test_shipped_code_has_the_defaults_of_the_dense_model(tmp_path: Path) -> None:
    """The config says nothing of the text model, not even how many layers it has."""
    found = inspect(hollow(tmp_path, "Granite Docling 500M"), Recipe("E2G1T2"))
    assert "engines          transformers" in found.summary()


def hollow(path: Path, name: str, **changes: object) -> Path:
    """Write a released model without its weights."""
    config = {**MODELS[name], **changes}
    shapes = wrapper_shapes(config) if config["model_type"] in WRAPPERS else None
    return write_hollow(path / "dense", config, shapes=shapes)
