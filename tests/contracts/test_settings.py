"""Settings of sources, end to end: the MoE's logits are the dense model's.

Both models run by transformers' own code in float64, with gates and factors that are powers of two,
so that only the order of summation differs. A setting that is lost on the way leaves 1e-2 and more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    REMOVED,
    MakeDense,
    clone,
    difference,
    logits,
    random_ids,
    read_json,
    read_tensors,
)
from safetensors.torch import load_file, save_file

from upcycle_cli import Options, Recipe, convert, verify
from upcycle_cli.recipe.recipe import Routing, parse_recipe_name

EXACT = 1e-10
PAIRS = (("llama", "mixtral"), ("qwen2", "qwen2_moe"))


def recipe(name: str = "E2G2T2", **settings: Any) -> Recipe:  # noqa: ANN401
    expansion, granularity, top_k = parse_recipe_name(name)
    sizes = {"expansion": expansion, "granularity": granularity, "top_k": top_k}
    return Recipe(**sizes | {"routing": Routing.TOPK_SOFTMAX} | settings)


def assert_equal_logits(dense: Path, moe: Path, target: str, length: int = 24) -> None:
    convert(dense, moe, recipe(), target=target)
    ids = random_ids(length)
    assert difference(logits(moe, ids), logits(dense, ids)) < EXACT


ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
HEADS = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}
UNUSED_WINDOW = {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}
STRAY = {
    "decoder_sparse_step": 2,
    "mlp_only_layers": [0],
    "router_jitter_noise": 0.5,
    "norm_topk_prob": False,
    "shared_expert_intermediate_size": 8,
    "output_router_logits": True,
}


def rope(**values: object) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 500.0, **values}}


SETTINGS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    # what it shows, settings of the dense model, changes of its config.json
    ("one key head", {"num_key_value_heads": 1}, {}),
    ("other heads", HEADS, {}),
    ("a large epsilon", {"rms_norm_eps": 0.5}, {}),
    ("a small theta", rope(rope_type="default", rope_theta=100.0), {}),
    ("yarn", rope(**YARN), {}),
    ("llama3 rope", rope(**ROPE_LLAMA3), {}),
    (
        "old rope",
        rope(**ROPE_LLAMA3),
        {"rope_parameters": REMOVED, "rope_theta": 500.0, "rope_scaling": ROPE_LLAMA3},
    ),
    ("a window that is off", {}, UNUSED_WINDOW),
    ("keys of the target", {}, STRAY),
    ("many files, tied", {"max_shard_size": "40KB", "tie_word_embeddings": True}, {}),
)


@pytest.mark.parametrize(("model_type", "target"), PAIRS)
@pytest.mark.parametrize(
    ("sizes", "changes"), [r[1:] for r in SETTINGS], ids=[r[0] for r in SETTINGS]
)
def test_a_setting_of_the_source_keeps_its_meaning(
    make_dense: MakeDense,
    tmp_path: Path,
    model_type: str,
    target: str,
    sizes: dict[str, Any],
    changes: dict[str, Any],
) -> None:
    original = make_dense(model_type, minimal=True, **sizes)
    dense = clone(original, tmp_path / "dense", **changes)
    ids = random_ids(48)
    assert torch.equal(logits(dense, ids), logits(original, ids))  # the change means nothing else
    assert_equal_logits(dense, tmp_path / "moe", target, 48)
    config = read_json(tmp_path / "moe" / "config.json")
    if "rope_parameters" in sizes:
        # What transformers 4 and other engines read is there whatever the source has.
        assert config["rope_theta"] == sizes["rope_parameters"]["rope_theta"]
    assert config["output_router_logits"] is False


MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
WINDOW: dict[str, Any] = {"sliding_window": 8, "use_sliding_window": True, "num_hidden_layers": 3}


@pytest.mark.parametrize(
    ("window", "hides"),  # whether 8 tokens hide what is before them
    [({"max_window_layers": 0}, True), ({"max_window_layers": 3}, False), (MIXED, True)],
)
def test_windows_keep_their_layers(
    make_dense: MakeDense, tmp_path: Path, window: dict[str, Any], *, hides: bool
) -> None:
    dense, ids = make_dense("qwen2", minimal=True, **WINDOW, **window), random_ids(32)
    without = clone(dense, tmp_path / "without", sliding_window=None, layer_types=REMOVED)
    assert (difference(logits(dense, ids), logits(without, ids)) > 1e-2) is hides
    assert_equal_logits(dense, tmp_path / "moe", "qwen2_moe", 32)


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize(
    ("model_type", "changes", "written"),
    [
        ("llama", {"head_dim": None}, {}),
        ("mistral", {"sliding_window": REMOVED}, {"sliding_window": 4096}),
        ("llama", {"sliding_window": 8, "use_sliding_window": True}, {}),
    ],
    ids=["null", "mistral's own window", "a window that llama does not read"],
)
def test_what_the_source_leaves_unsaid(
    make_dense: MakeDense,
    tmp_path: Path,
    model_type: str,
    target: str,
    changes: dict[str, Any],
    written: dict[str, Any],
) -> None:
    dense = clone(make_dense(model_type, minimal=True), tmp_path / "dense", **changes)
    assert_equal_logits(dense, tmp_path / "moe", target, 32)
    assert read_json(tmp_path / "moe" / "config.json").items() >= written.items()


@pytest.mark.parametrize(
    ("model_type", "target", "sizes", "biases"),
    [
        ("llama", "mixtral", {"attention_bias": False, "mlp_bias": False}, 0),
        ("llama", "qwen2_moe", {"attention_bias": False, "mlp_bias": False}, 6),  # for vLLM
        ("qwen3", "qwen3_moe", {"attention_bias": True}, 8),
        ("qwen2", "qwen2_moe", {"head_dim": 16}, 6),
    ],
)
def test_biases_that_are_off_or_on(
    make_dense: MakeDense,
    tmp_path: Path,
    model_type: str,
    target: str,
    sizes: dict[str, Any],
    biases: int,
) -> None:
    assert_equal_logits(make_dense(model_type, **sizes), tmp_path / "moe", target)
    names = read_tensors(tmp_path / "moe")
    assert len([name for name in names if name.endswith("bias")]) == biases


Tensors = dict[str, torch.Tensor]


def head(held: Tensors) -> None:
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()


def frequencies(held: Tensors) -> None:
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


def wide_norms(held: Tensors) -> None:
    held |= {name: tensor.double().float() for name, tensor in held.items() if "norm" in name}


@pytest.mark.parametrize(
    ("sizes", "edit"),
    [({"tie_word_embeddings": True}, head), ({}, frequencies), ({"dtype": "bfloat16"}, wide_norms)],
    ids=["a tied head that is stored", "rotary frequencies", "several dtypes"],
)
def test_tensors_of_older_checkpoints(
    make_dense: MakeDense, tmp_path: Path, sizes: dict[str, Any], edit: Callable[[Tensors], None]
) -> None:
    dense = clone(make_dense("llama", **sizes), tmp_path / "dense")
    held = load_file(dense / "model.safetensors")
    edit(held)
    save_file(held, dense / "model.safetensors", metadata={"format": "pt"})
    assert_equal_logits(dense, tmp_path / "moe", "mixtral")
    assert verify(dense, tmp_path / "moe", checks=["directory", "weights"]).accepted


@pytest.mark.parametrize("untie", [False, True])
def test_a_tied_head_stays_tied_or_is_written_out(
    make_dense: MakeDense, tmp_path: Path, *, untie: bool
) -> None:
    dense, ids = make_dense("llama", tie_word_embeddings=True), random_ids()
    convert(dense, tmp_path / "moe", recipe(), options=Options(untie_embeddings=untie))
    assert ("lm_head.weight" in read_tensors(tmp_path / "moe")) is untie
    assert read_json(tmp_path / "moe" / "config.json")["tie_word_embeddings"] is not untie
    assert difference(logits(tmp_path / "moe", ids), logits(dense, ids)) < EXACT


@pytest.mark.parametrize(
    ("dtype", "wanted"), [("bfloat16", None), ("bfloat16", "float32"), ("float32", "float16")]
)
def test_dtypes(make_dense: MakeDense, tmp_path: Path, dtype: str, wanted: str | None) -> None:
    dense, moe, ids = make_dense("llama", dtype=dtype), tmp_path / "moe", random_ids()
    convert(dense, moe, recipe(), options=Options(dtype=wanted))
    result = wanted or dtype
    assert {str(tensor.dtype) for tensor in read_tensors(moe).values()} == {f"torch.{result}"}
    assert read_json(moe / "config.json")["dtype"] == result
    # Whatever is lost by rounding is lost in the dense model in that dtype, too.
    reference = clone(dense, tmp_path / "reference")
    path = reference / "model.safetensors"
    cast = {name: held.to(getattr(torch, result)) for name, held in load_file(path).items()}
    save_file(cast, path, metadata={"format": "pt"})
    assert difference(logits(moe, ids), logits(reference, ids)) < EXACT


@pytest.mark.parametrize(("model_type", "target"), [("llama", "qwen2_moe"), ("qwen3", "qwen3_moe")])
@pytest.mark.parametrize("name", ["E4G1T2", "E2G2T2", "E2G3T3"])
def test_plain_gates_are_closer_for_a_flatter_router(
    make_dense: MakeDense, tmp_path: Path, model_type: str, target: str, name: str
) -> None:
    dense, ids, errors = make_dense(model_type), random_ids(), []
    for std in (0.1, None):  # None is the default, 0.001
        soft = recipe(name, routing=Routing.SOFTMAX_TOPK, router_logit_std=std)
        convert(dense, tmp_path / str(std), soft, target=target)
        errors.append(difference(logits(tmp_path / str(std), ids), logits(dense, ids)))
    # The error is of first order in the logits: a hundredth of them, a hundredth of it.
    assert errors[1] < 1e-2
    assert 50 < errors[0] / errors[1] < 200


def test_an_inexact_recipe_differs(llama: Path, tmp_path: Path) -> None:
    """Or else the comparisons of this file could not fail; keys that are not ours survive."""
    unknown = {"my_key": 1, "nested": {"a": [1, None, "ä"]}, "initializer_range": 0.123}
    dense = clone(llama, tmp_path / "dense", **unknown)
    convert(dense, tmp_path / "moe", recipe("E2G2T1", allow_inexact=True))
    ids = random_ids()
    assert difference(logits(tmp_path / "moe", ids), logits(dense, ids)) > 0.1
    assert read_json(tmp_path / "moe" / "config.json").items() >= unknown.items()


FOR_ENGINES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("qwen3", "hy_v3", {"first_k_dense_replace": 1, "expert_hidden_dim": 24, "qk_norm": True}),
    ("llama", "solar_open", {"first_k_dense_replace": 0, "partial_rotary_factor": 1.0}),
)


@pytest.mark.parametrize(("model_type", "target", "keys"), FOR_ENGINES, ids=str)
def test_keys_that_engines_ask_for(
    make_dense: MakeDense, tmp_path: Path, model_type: str, target: str, keys: dict[str, Any]
) -> None:
    """transformers does not read them, so no comparison of outputs shows them."""
    layers = "1-" if target == "hy_v3" else None
    wanted = recipe(routing=Routing.SIGMOID_TOPK, layers=layers)
    convert(make_dense(model_type), tmp_path / "moe", wanted, target=target)
    assert read_json(tmp_path / "moe" / "config.json").items() >= keys.items()
