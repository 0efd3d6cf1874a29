"""Configs that mean nothing, or nothing that a mixture of experts could have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import REMOVED, MakeDense, clone
from shapes import make_recipe

from upcycle_cli import UpcycleError, build_plan, open_checkpoint

if TYPE_CHECKING:
    from refusals import Refuses

FIVE_HEADS = {"num_attention_heads": 5, "head_dim": None}
WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 8}
NO_DICT = {"rope_parameters": REMOVED}


def refuse(source: Path, *words: str, recipe: str = "E2G2T2", target: str = "auto") -> None:
    """Check that a plan is refused with all of `words`."""
    with pytest.raises(UpcycleError) as caught:
        build_plan(make_recipe(recipe), open_checkpoint(source), target=target)
    message = f"{caught.value.message} {caught.value.hint}"
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not valid JSON"),
        (b"{'model_type': 'llama'}", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'["llama"]', "is not a JSON object"),
        (b"{}", "model_type"),
        (None, "config.json"),
    ],
    ids=["empty", "python", "binary", "deep", "list", "nothing", "directory"],
)
def test_refuse_a_config_that_is_none(
    llama: Path, tmp_path: Path, refuses: Refuses, text: bytes | None, words: str
) -> None:
    config = clone(llama, tmp_path / "dense") / "config.json"
    config.unlink()
    if text is None:
        config.mkdir()
    else:
        config.write_bytes(text)
    refuses(config.parent, words)


def each(
    key: str, *values: object, word: str | None = None, others: Mapping[str, object] | None = None
) -> list[tuple[dict[str, Any], str]]:
    """Return a row for each value of a key, with the word that the message must have."""
    return [({key: value, **(others or {})}, word or key) for value in values]


WRONG: list[tuple[dict[str, Any], str]] = [
    *each("hidden_size", "32", 32.0, 0, -32, True),
    *each("intermediate_size", "big", {}),
    *each("num_hidden_layers", None, 2.5, 10**9, 10**30),
    *each("vocab_size", None, [260]),
    *each("head_dim", "8", 0),
    *each("hidden_act", None, ["silu"]),
    *each("rms_norm_eps", None, "1e-6"),
    *each("rope_theta", "1e4", None, [1], others=NO_DICT),
    *each("rope_scaling", "linear", {"type": ["linear"]}),
    *each("tie_word_embeddings", None, "false"),
    *each("eos_token_id", {"id": 2}, ["</s>"]),
    *each("model_type", ["llama"], None, 7, {}),
    ({"vocab_size": REMOVED}, "config.json implies"),
    ({"num_hidden_layers": 1}, "model.layers.1"),
    (FIVE_HEADS, "num_attention_heads 5"),
    ({"max_position_embeddings": 2048.5}, "max_position_embeddings"),
    ({"rope_scaling": {"rope_type": "linear", "rope_theta": "x"}}, "rope_theta"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters"),
    ({"mlp_bias": "no"}, "mlp_bias"),
    ({"model_type": "gpt9"}, "upcycle families"),
    *each("quantization_config", "fp8", [], {}, word="quantised"),
]


def label(value: object) -> str:
    return json.dumps(value, default=lambda _: "removed")[:60]


@pytest.mark.parametrize(("changes", "word"), WRONG, ids=label)
def test_refuse_values_that_make_no_sense(
    llama: Path, tmp_path: Path, changes: dict[str, Any], word: str
) -> None:
    refuse(clone(llama, tmp_path / "dense", **changes), word)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        *each("layer_types", [{"kind": "full"}] * 2, ["full_attention"], "full_attention", {}),
        *each("layer_types", ["chunked_attention"] * 2, ["sliding_attention"] * 2),
        *each("sliding_window", "8", -1, others={"use_sliding_window": True}),
        (WINDOW | {"max_window_layers": None, "layer_types": REMOVED}, "max_window_layers"),
    ],
    ids=label,
)
def test_refuse_windows_that_make_no_sense(
    make_dense: MakeDense, tmp_path: Path, changes: dict[str, Any], word: str
) -> None:
    refuse(clone(make_dense("qwen3"), tmp_path / "dense", **changes), word)


ATTENTION_BIAS, MLP_BIAS = {"attention_bias": True}, {"mlp_bias": True}
MIXED_WINDOWS = {**WINDOW, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("model_type", "config", "target", "words"),
    [
        *(
            ("llama", config, target, (f"{target} cannot express", "--target upcycled", word))
            for target in ("mixtral", "glm4_moe")
            for config, word in ((ATTENTION_BIAS, "attention_bias"), (MLP_BIAS, "experts"))
        ),
        ("gemma4_text", {"use_double_wide_mlp": True}, "auto", ("use_double_wide_mlp", "one size")),
        ("qwen2", {}, "mixtral", ("cannot become mixtral", "qwen2_moe")),
        ("qwen3", MIXED_WINDOWS, "qwen3_moe", ("qwen3_moe cannot express", "layer_types")),
    ],
    ids=str,
)
def test_refuse_what_the_target_cannot_express(
    make_dense: MakeDense,
    model_type: str,
    config: dict[str, Any],
    target: str,
    words: tuple[str, ...],
) -> None:
    refuse(make_dense(model_type, **config), *words, target=target)


@pytest.mark.parametrize(
    "changes",
    [
        *({"torch_dtype": "weird"}, {"torch_dtype": 7, "dtype": None}, {"dtype": ["bfloat16"]}),
        *({"architectures": None}, {"architectures": "LlamaForCausalLM"}, {"auto_map": {}}),
        {"id2label": {"0": 1}, "transformers_version": 4},
        *({"_name_or_path": 7}, {"quantization_config": None}, {"num_experts": 0}),
        {"eos_token_id": []},
    ],
    ids=json.dumps,
)
def test_accept_oddities_that_do_not_matter(
    llama: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    dense = clone(llama, tmp_path / "dense", **changes)
    assert build_plan(make_recipe("E2G2T2"), open_checkpoint(dense)).promise == "exact"
