"""Configs that mean nothing, or nothing that a mixture of experts could have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import REMOVED, MakeDense, clone
from refusals import WEIGHTS, Refuses, invoke

from upcycle_cli import Recipe, convert


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not valid JSON"),
        (b"{'model_type': 'llama'}", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'["llama"]', "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b"{}", "model_type"),
    ],
    ids=["empty", "python", "binary", "deep", "list", "null", "nothing"],
)
def test_configs_that_are_none(
    llama: Path, tmp_path: Path, refuses: Refuses, text: bytes, words: str
) -> None:
    dense = clone(llama, tmp_path / "dense")
    (dense / "config.json").write_bytes(text)
    refuses(dense, words)


def test_a_config_that_is_a_directory(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    dense = clone(llama, tmp_path / "dense")
    (dense / "config.json").unlink()
    (dense / "config.json").mkdir()
    refuses(dense, "config.json")


def test_an_unknown_model_type(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    dense = clone(llama, tmp_path / "dense", model_type="gpt9")
    refuses(dense, "gpt9", "upcycle families")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mixtral", "num_local_experts": 4},
        {"model_type": "qwen3_moe"},
        {"model_type": "deepseek_v3", "n_routed_experts": 64},
        {"model_type": "llama", "num_experts": 8},
    ],
    ids=lambda changes: changes["model_type"],
)
def test_a_mixture_of_experts(
    llama: Path, tmp_path: Path, refuses: Refuses, changes: dict[str, Any]
) -> None:
    dense = clone(llama, tmp_path / "dense", **changes)
    refuses(dense, "mixture of experts already", changes["model_type"])


def test_the_output_of_a_conversion(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    convert(llama, tmp_path / "first", Recipe(expansion=2, granularity=1, top_k=1))
    refuses(tmp_path / "first", "mixture of experts already")


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe", "glm4_moe"])
@pytest.mark.parametrize(
    ("bias", "words"),
    [("attention_bias", ("o_proj", "attention_bias")), ("mlp_bias", ("experts",))],
)
def test_llama_with_biases(
    make_dense: MakeDense, refuses: Refuses, target: str, bias: str, words: tuple[str, ...]
) -> None:
    arguments = ("--recipe", "E2G2T2", "--target", target)
    settings: dict[str, Any] = {bias: True}
    dense = make_dense("llama", **settings)
    refuses(dense, *words, f"{target} cannot express", "--target upcycled", arguments=arguments)


def test_gemma4_with_mlps_of_two_sizes(make_dense: MakeDense, refuses: Refuses) -> None:
    settings: dict[str, Any] = {"use_double_wide_mlp": True}
    refuses(make_dense("gemma4_text", **settings), "use_double_wide_mlp", "one size")


def test_what_gemma4_text_cannot_express(make_dense: MakeDense, refuses: Refuses) -> None:
    arguments = ("--target", "gemma4_text", "--recipe")
    alike, dense = (*arguments, "E2G2T2"), make_dense("gemma4_text")
    refuses(make_dense("lfm2"), "lfm2 cannot become gemma4_text.", arguments=alike)
    refuses(dense, "all its layers are", arguments=(*alike, "--layers", "1"))
    sharing = (*arguments, "E2G3T2", "--shared-experts", "1")
    refuses(dense, "norms of their own", arguments=sharing)


def test_qwen2_to_mixtral(make_dense: MakeDense, refuses: Refuses) -> None:
    arguments = ("--recipe", "E2G2T2", "--target", "mixtral")
    refuses(make_dense("qwen2"), "cannot become mixtral", "qwen2_moe", arguments=arguments)


def test_qwen3_with_two_kinds_of_layers(make_dense: MakeDense, refuses: Refuses) -> None:
    window: dict[str, Any] = {
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    }
    arguments = ("--recipe", "E2G2T2", "--target", "qwen3_moe")
    dense = make_dense("qwen3", **window)
    refuses(dense, "qwen3_moe cannot express", "layer_types", arguments=arguments)


def test_a_routing_that_the_target_lacks(llama: Path, refuses: Refuses) -> None:
    arguments = ("--recipe", "E2G2T2", "--routing", "softmax-topk", "--target", "mixtral")
    refuses(llama, "no softmax-topk routing", "--target qwen2_moe", arguments=arguments)


@pytest.mark.parametrize("method", [{"quant_method": "gptq", "bits": 4}, "fp8", [], {}])
def test_a_quantised_model(llama: Path, tmp_path: Path, refuses: Refuses, method: object) -> None:
    dense = clone(llama, tmp_path / "dense", quantization_config=method)
    message = refuses(dense, "quantised")
    assert not isinstance(method, dict) or method.get("quant_method", "") in message


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": 32.0}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": -32}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 10**30}, "config.json implies"),
        ({"intermediate_size": 10**30}, "config.json implies"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": [260]}, "vocab_size"),
        ({"vocab_size": REMOVED}, "config.json implies"),
        ({"intermediate_size": "big"}, "intermediate_size"),
        ({"intermediate_size": {}}, "intermediate_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"num_hidden_layers": 1}, "model.layers.1"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": 5, "head_dim": None}, "num_attention_heads 5"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads"),
        ({"head_dim": "8"}, "head_dim"),
        ({"head_dim": 0}, "head_dim"),
        ({"hidden_act": None}, "hidden_act"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"attention_dropout": "none"}, "attention_dropout"),
        ({"max_position_embeddings": 2048.5}, "max_position_embeddings"),
        ({"rope_theta": "1e4", "rope_parameters": REMOVED}, "rope_theta"),
        ({"rope_theta": None, "rope_parameters": REMOVED}, "rope_theta"),
        ({"rope_theta": [1], "rope_parameters": REMOVED}, "rope_theta"),
        ({"rope_scaling": ["linear", 2]}, "rope_scaling"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear", "rope_theta": "x"}}, "rope_theta"),
        ({"rope_parameters": 10000.0}, "rope_parameters"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"attention_bias": 0}, "attention_bias"),
        ({"mlp_bias": "no"}, "mlp_bias"),
        ({"bos_token_id": "<s>"}, "bos_token_id"),
        ({"eos_token_id": {"id": 2}}, "eos_token_id"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id"),
        ({"pad_token_id": 1.5}, "pad_token_id"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"model_type": 7}, "model_type"),
        ({"model_type": {}}, "model_type"),
        ({"model_type": ""}, "cannot be upcycled"),
    ],
    ids=lambda value: (
        json.dumps(value, default=lambda _: "removed") if isinstance(value, dict) else ""
    ),
)
def test_values_of_the_wrong_kind(
    llama: Path, tmp_path: Path, refuses: Refuses, changes: dict[str, Any], word: str
) -> None:
    refuses(clone(llama, tmp_path / "dense", **changes), word)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"layer_types": [{"kind": "full"}] * 2}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types"),
        ({"layer_types": {}}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ({"layer_types": [["full_attention"], ["full_attention"]]}, "layer_types"),
        ({"use_sliding_window": None}, "use_sliding_window"),
        ({"use_sliding_window": 1}, "use_sliding_window"),
        ({"use_sliding_window": True, "sliding_window": "8"}, "sliding_window"),
        ({"use_sliding_window": True, "sliding_window": -1}, "sliding_window"),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": None,
                "layer_types": REMOVED,
            },
            "max_window_layers",
        ),
    ],
    ids=lambda value: (
        json.dumps(value, default=lambda _: "removed") if isinstance(value, dict) else ""
    ),
)
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_windows_of_the_wrong_kind(
    make_dense: MakeDense,
    tmp_path: Path,
    refuses: Refuses,
    model_type: str,
    changes: dict[str, Any],
    word: str,
) -> None:
    refuses(clone(make_dense(model_type), tmp_path / "dense", **changes), word)


def test_mistral_with_a_window_of_the_wrong_kind(
    make_dense: MakeDense, tmp_path: Path, refuses: Refuses
) -> None:
    for number, window in enumerate(("8", 0, [8], True)):
        dense = clone(make_dense("mistral"), tmp_path / str(number), sliding_window=window)
        refuses(dense, "sliding_window")


def test_qwen3_without_a_head_dim(make_dense: MakeDense, tmp_path: Path, refuses: Refuses) -> None:
    """Absent means 128 there, and null is an error in transformers too."""
    original = make_dense("qwen3")
    refuses(clone(original, tmp_path / "null", head_dim=None), "head_dim")
    refuses(clone(original, tmp_path / "absent", head_dim=REMOVED), "config.json implies [128]")


@pytest.mark.parametrize(
    "changes",
    [
        {"torch_dtype": "weird"},
        {"torch_dtype": 7, "dtype": None},
        {"dtype": ["bfloat16"]},
        {"architectures": None},
        {"architectures": "LlamaForCausalLM"},
        {"id2label": {"0": 1}, "transformers_version": 4},
        {"_name_or_path": 7},
        {"_name_or_path": None},
        {"auto_map": {}},
        {"quantization_config": None},
        {"num_experts": 0},
        {"eos_token_id": []},
    ],
    ids=json.dumps,
)
def test_oddities_that_do_not_matter(llama: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    dense = clone(llama, tmp_path / "dense", **changes)
    result = invoke("convert", dense, tmp_path / "moe", "--recipe", "E2G2T2", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "moe" / WEIGHTS).is_file()
