"""Settings of sources and options, end to end: the logits are those of the dense model.

What holds of every family is in test_contracts.py; here are grids of settings, of one or two. Both
models are run by transformers' own code in float64. Its routers and norms compute in float32 all
the same, so gates that are not powers of two leave a difference of about 1e-6; a setting that is
lost on the way leaves 1e-2 and more, since the models' weights are large.
"""

from __future__ import annotations

import shutil
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
    write_json,
)

from upcycle_cli import Options, Recipe, convert, inspect, verify
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.recipe.recipe import Routing, parse_recipe_name
from upcycle_cli.verification.result import Status

ROUNDING = 1e-5
EXACT_PAIRS = [("llama", "mixtral"), ("qwen2", "qwen2_moe")]
SOFT_PAIRS = [("llama", "qwen2_moe"), ("qwen3", "qwen3_moe")]
ROUTED_PAIRS = [
    *((*pair, Routing.TOPK_SOFTMAX) for pair in EXACT_PAIRS),
    *((*pair, Routing.SOFTMAX_TOPK) for pair in SOFT_PAIRS),
    ("llama", "glm4_moe", Routing.SIGMOID_TOPK),
]
MAX_LAYERS = 3


def recipe(
    name: str,
    routing: Routing | None = Routing.TOPK_SOFTMAX,
    **settings: Any,  # noqa: ANN401
) -> Recipe:
    expansion, granularity, top_k = parse_recipe_name(name)
    return Recipe(
        expansion=expansion, granularity=granularity, top_k=top_k, routing=routing, **settings
    )


def assert_equal_logits(dense: Path, moe: Path, *, target: str, length: int = 24) -> None:
    """Convert with whole groups and gates of exactly 1/2, and compare."""
    convert(dense, moe, recipe("E2G2T2"), target=target)
    ids = random_ids(length)
    # Gates and factors are powers of two here, so that only the order of summation differs.
    assert difference(logits(moe, ids), logits(dense, ids)) < 1e-10


@pytest.mark.parametrize(("model_type", "target"), EXACT_PAIRS)
@pytest.mark.parametrize("name", ["E4G1T2", "E2G4T4", "E2G3T6", "E1G1T1"])
@pytest.mark.parametrize("logit_std", [None, 4.0])
def test_renormalised_gates_are_exact_for_any_router(
    make_dense: MakeDense,
    tmp_path: Path,
    model_type: str,
    target: str,
    name: str,
    logit_std: float | None,
) -> None:
    dense, ids = make_dense(model_type), random_ids()
    convert(dense, tmp_path / "moe", recipe(name, router_logit_std=logit_std), target=target)
    assert difference(logits(tmp_path / "moe", ids), logits(dense, ids)) < ROUNDING


@pytest.mark.parametrize(("model_type", "target"), SOFT_PAIRS)
@pytest.mark.parametrize("name", ["E4G1T2", "E2G2T2", "E2G3T3"])
def test_plain_gates_are_close_and_closer_for_a_flatter_router(
    make_dense: MakeDense, tmp_path: Path, model_type: str, target: str, name: str
) -> None:
    dense, ids = make_dense(model_type), random_ids()
    expected = logits(dense, ids)
    routing = Routing.SOFTMAX_TOPK
    errors = []
    for logit_std in (0.1, None):  # None is the default, 0.001
        moe = tmp_path / str(logit_std)
        convert(dense, moe, recipe(name, routing, router_logit_std=logit_std), target=target)
        errors.append(difference(logits(moe, ids), expected))
    # The error is of first order in the logits: a hundredth of them, a hundredth of it.
    assert errors[1] < 1e-2
    assert 50 < errors[0] / errors[1] < 200


@pytest.mark.parametrize(("model_type", "target"), EXACT_PAIRS)
def test_an_inexact_recipe_really_differs(
    make_dense: MakeDense, tmp_path: Path, model_type: str, target: str
) -> None:
    """Or else the comparisons of this file could not fail."""
    dense, ids = make_dense(model_type), random_ids()
    convert(dense, tmp_path / "moe", recipe("E2G2T1", allow_inexact=True), target=target)
    assert difference(logits(tmp_path / "moe", ids), logits(dense, ids)) > 0.1


@pytest.mark.parametrize(("model_type", "target", "routing"), ROUTED_PAIRS)
def test_both_layouts_are_the_same_model(
    make_dense: MakeDense, tmp_path: Path, model_type: str, target: str, routing: Routing
) -> None:
    dense, ids = make_dense(model_type), random_ids()
    for layout in NATIVE[target].layouts:
        options = Options(expert_layout=layout)
        convert(dense, tmp_path / layout, recipe("E2G2T2", routing), target=target, options=options)
        assert inspect(tmp_path / layout).expert_layout == layout
    per_expert, fused = (logits(tmp_path / layout, ids) for layout in NATIVE[target].layouts)
    assert torch.equal(per_expert, fused)


@pytest.mark.parametrize(("model_type", "target"), EXACT_PAIRS)
@pytest.mark.parametrize("untie", [False, True])
def test_a_tied_head_stays_tied_or_is_written_out(
    make_dense: MakeDense, tmp_path: Path, model_type: str, target: str, *, untie: bool
) -> None:
    dense, ids = make_dense(model_type, tie_word_embeddings=True), random_ids()
    options = Options(untie_embeddings=untie)
    convert(dense, tmp_path / "moe", recipe("E2G2T2"), target=target, options=options)
    assert ("lm_head.weight" in read_tensors(tmp_path / "moe")) is untie
    assert read_json(tmp_path / "moe" / "config.json")["tie_word_embeddings"] is not untie
    assert difference(logits(tmp_path / "moe", ids), logits(dense, ids)) < 1e-10


@pytest.mark.parametrize(("model_type", "target"), EXACT_PAIRS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_key_value_heads": 4},  # ungrouped
        {"num_key_value_heads": 1},
        {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"rms_norm_eps": 0.5},  # so large that the target's default would show
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}},
    ],
    ids="-".join,
)
def test_minimal_configs(
    make_dense: MakeDense, tmp_path: Path, model_type: str, target: str, sizes: dict[str, Any]
) -> None:
    dense = make_dense(model_type, minimal=True, **sizes)
    # The helper that leaves keys out must not have changed the model itself.
    full, ids = make_dense(model_type, **sizes), random_ids()
    assert len(read_json(dense / "config.json")) < len(read_json(full / "config.json"))
    assert torch.equal(logits(dense, ids), logits(full, ids))
    assert_equal_logits(dense, tmp_path / "moe", target=target)


SHARED_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "attention_dropout",
    "max_position_embeddings",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@pytest.mark.parametrize(("model_type", "target"), EXACT_PAIRS)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_what_the_source_leaves_unsaid_is_stated(
    make_dense: MakeDense, tmp_path: Path, model_type: str, target: str, dropout: float
) -> None:
    """Also what no logits of a short text show, for transformers and everybody else."""
    from transformers import AutoConfig

    original = make_dense(model_type, minimal=True, attention_dropout=dropout)
    dense = clone(original, tmp_path / "dense", max_position_embeddings=REMOVED)
    convert(dense, tmp_path / "moe", recipe("E2G2T2"), target=target)
    meant = AutoConfig.from_pretrained(dense)
    written = read_json(tmp_path / "moe" / "config.json")
    assert {key: written[key] for key in SHARED_SETTINGS} == {
        key: getattr(meant, key) for key in SHARED_SETTINGS
    }
    assert AutoConfig.from_pretrained(tmp_path / "moe").rope_parameters == meant.rope_parameters


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("head_dim", [16, None, REMOVED], ids=["explicit", "null", "absent"])
def test_head_dim(
    make_dense: MakeDense, tmp_path: Path, model_type: str, target: str, head_dim: object
) -> None:
    explicit: dict[str, Any] = {"head_dim": head_dim} if isinstance(head_dim, int) else {}
    original = make_dense(model_type, **explicit)
    dense = clone(original, tmp_path / "dense", head_dim=head_dim)
    assert_equal_logits(dense, tmp_path / "moe", target=target)


def test_qwen2_with_a_head_dim_of_its_own(make_dense: MakeDense, tmp_path: Path) -> None:
    """qwen2's config has no such field, but its model reads the key when it is there."""
    dense = make_dense("qwen2", head_dim=16)
    assert_equal_logits(dense, tmp_path / "moe", target="qwen2_moe")


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(("model_type", "target"), EXACT_PAIRS)
@pytest.mark.parametrize("style", ["rope_parameters", "rope_scaling", "type", "both"])
def test_llama3_rope_in_old_and_new_keys(
    make_dense: MakeDense, tmp_path: Path, model_type: str, target: str, style: str
) -> None:
    original = make_dense(model_type, rope_parameters=LLAMA3_ROPE | {"rope_theta": 500.0})
    scaling: dict[str, Any] = dict(LLAMA3_ROPE)
    if style == "type":  # how it was spelt before rope_type
        scaling["type"] = scaling.pop("rope_type")
    changes: dict[str, Any] = {"rope_theta": 500.0, "rope_scaling": scaling}
    if style == "rope_parameters":
        changes = {}
    elif style != "both":
        changes["rope_parameters"] = REMOVED
    dense, ids = clone(original, tmp_path / "dense", **changes), random_ids(48)
    assert torch.equal(logits(dense, ids), logits(original, ids))
    assert_equal_logits(dense, tmp_path / "moe", target=target, length=48)

    # What transformers 4 and other engines read is there whatever the source has.
    config = read_json(tmp_path / "moe" / "config.json")
    assert config["rope_theta"] == 500.0
    assert config["rope_scaling"].items() >= LLAMA3_ROPE.items()
    if "rope_parameters" in config:
        assert config["rope_parameters"].items() >= (LLAMA3_ROPE | {"rope_theta": 500.0}).items()


def test_rotary_embeddings_that_are_said_by_kinds_of_layers(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    """Of an architecture whose kinds may differ, all have those of the dense model."""
    dense = make_dense("qwen3")
    convert(dense, tmp_path / "moe", recipe("E2G2T2"), target="mellum")
    config = read_json(tmp_path / "moe" / "config.json")
    kinds, other = config["rope_parameters"], {"rope_type": "default", "rope_theta": 5.0}
    assert kinds["full_attention"] == kinds["sliding_attention"]
    for name, change in {
        "nothing": {},
        "one kind": {"rope_parameters": kinds | {"full_attention": other}},
        "all kinds": {"rope_parameters": dict.fromkeys(kinds, other)},
        "the older key": {"rope_theta": 5.0},
    }.items():
        changed = clone(tmp_path / "moe", tmp_path / name, **change)
        assert verify(dense, changed, checks=["directory"]).accepted is (not change), name


@pytest.mark.parametrize(("model_type", "target"), EXACT_PAIRS)
def test_only_an_old_rope_theta(
    make_dense: MakeDense, tmp_path: Path, model_type: str, target: str
) -> None:
    rope = {"rope_type": "default", "rope_theta": 100.0}
    original, ids = make_dense(model_type, rope_parameters=rope), random_ids()
    dense = clone(original, tmp_path / "dense", rope_parameters=REMOVED, rope_theta=100.0)
    assert torch.equal(logits(dense, ids), logits(original, ids))
    assert_equal_logits(dense, tmp_path / "moe", target=target)


@pytest.mark.parametrize(("model_type", "target"), EXACT_PAIRS)
def test_yarn_rope(make_dense: MakeDense, tmp_path: Path, model_type: str, target: str) -> None:
    rope = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 500.0,
    }
    dense = make_dense(model_type, rope_parameters=rope)
    assert_equal_logits(dense, tmp_path / "moe", target=target, length=48)


@pytest.mark.parametrize(
    ("model_type", "target", "window"),
    [
        ("mistral", "mixtral", {"sliding_window": 8}),
        ("mistral", "qwen2_moe", {"sliding_window": 8}),
        # 0 means from the first layer on; 1 of 3 mixes both kinds of layers.
        ("qwen2", "qwen2_moe", {"max_window_layers": 0}),
        ("qwen2", "qwen2_moe", {"max_window_layers": 1}),
        ("qwen2", "qwen2_moe", {"max_window_layers": 3}),
        (
            "qwen2",
            "qwen2_moe",
            {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        ),
        ("qwen3", "qwen3_moe", {"max_window_layers": 0}),
        ("qwen3", "qwen3_moe", {"max_window_layers": 3}),
    ],
)
@pytest.mark.parametrize("minimal", [False, True])
def test_windows(
    make_dense: MakeDense,
    tmp_path: Path,
    model_type: str,
    target: str,
    window: dict[str, Any],
    *,
    minimal: bool,
) -> None:
    window = {"sliding_window": 8, **window}
    if model_type != "mistral":
        window["use_sliding_window"] = True
    sizes = {"num_hidden_layers": MAX_LAYERS, **window}
    dense, ids = make_dense(model_type, minimal=minimal, **sizes), random_ids(32)
    without = clone(dense, tmp_path / "without", sliding_window=None, layer_types=REMOVED)
    sees_it = window.get("max_window_layers") != MAX_LAYERS
    # The sequence is longer than the window, so the window shows in the dense logits.
    assert (difference(logits(dense, ids), logits(without, ids)) > 1e-2) is sees_it
    assert_equal_logits(dense, tmp_path / "moe", target=target, length=32)
    if "max_window_layers" in window and "max_window_layers" in read_json(dense / "config.json"):
        # transformers 5 goes by layer_types; others by the older key.
        config = read_json(tmp_path / "moe" / "config.json")
        assert config["max_window_layers"] == window["max_window_layers"]


@pytest.mark.parametrize(("model_type", "target"), [("qwen2", "qwen2_moe"), ("qwen3", "qwen3_moe")])
def test_a_window_that_is_not_used(
    make_dense: MakeDense, tmp_path: Path, model_type: str, target: str
) -> None:
    original = make_dense(model_type, minimal=True)
    # As in the released Qwen2.5 models: a window, and a switch that turns it off.
    unused = {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}
    dense, ids = clone(original, tmp_path / "dense", **unused), random_ids(32)
    assert torch.equal(logits(dense, ids), logits(original, ids))
    assert_equal_logits(dense, tmp_path / "moe", target=target, length=32)


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe"])
def test_mistral_without_the_key_has_a_window_of_4096(
    make_dense: MakeDense, tmp_path: Path, target: str
) -> None:
    original = make_dense("mistral", minimal=True)
    dense = clone(original, tmp_path / "dense", sliding_window=REMOVED)
    assert_equal_logits(dense, tmp_path / "moe", target=target)
    # Too long a sequence for a test to see it; mixtral's own default is no window.
    assert read_json(tmp_path / "moe" / "config.json")["sliding_window"] == 4096


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe"])
def test_llama_ignores_a_window_and_so_does_its_moe(
    make_dense: MakeDense, tmp_path: Path, target: str
) -> None:
    original = make_dense("llama", minimal=True)
    dense = clone(original, tmp_path / "dense", sliding_window=8, use_sliding_window=True)
    assert_equal_logits(dense, tmp_path / "moe", target=target, length=32)


@pytest.mark.parametrize(("model_type", "target"), EXACT_PAIRS)
def test_keys_of_the_target_in_the_source_mean_nothing(
    make_dense: MakeDense, tmp_path: Path, model_type: str, target: str
) -> None:
    """The dense model never read them, and the MoE must not start to."""
    stray = {
        "decoder_sparse_step": 2,
        "mlp_only_layers": [0],
        "router_jitter_noise": 0.5,
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": 8,
        "output_router_logits": True,
    }
    dense = clone(make_dense(model_type), tmp_path / "dense", **stray)
    assert_equal_logits(dense, tmp_path / "moe", target=target)
    # Serving engines fail on router logits that they did not ask for.
    assert read_json(tmp_path / "moe" / "config.json")["output_router_logits"] is False


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe"])
def test_biases_off_is_not_biases_absent(
    make_dense: MakeDense, tmp_path: Path, target: str
) -> None:
    dense = make_dense("llama", attention_bias=False, mlp_bias=False)
    assert_equal_logits(dense, tmp_path / "moe", target=target)
    biases = [name for name in read_tensors(tmp_path / "moe") if name.endswith("bias")]
    # vLLM reads q, k and v biases of qwen2_moe without asking the config.
    assert len(biases) == (6 if target == "qwen2_moe" else 0)


@pytest.mark.parametrize("minimal", [False, True])
def test_qwen3_with_biases(make_dense: MakeDense, tmp_path: Path, *, minimal: bool) -> None:
    dense = make_dense("qwen3", attention_bias=True, minimal=minimal)
    biases = {name for name in read_tensors(dense) if name.endswith("bias")}
    assert any("o_proj" in name for name in biases)
    assert_equal_logits(dense, tmp_path / "moe", target="qwen3_moe")
    assert biases <= read_tensors(tmp_path / "moe").keys()


@pytest.mark.parametrize(("model_type", "target"), EXACT_PAIRS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_sharded_source(
    make_dense: MakeDense, tmp_path: Path, model_type: str, target: str, *, tied: bool
) -> None:
    dense = make_dense(model_type, max_shard_size="40KB", tie_word_embeddings=tied)
    assert len(list(dense.glob("*.safetensors"))) > 1
    assert_equal_logits(dense, tmp_path / "moe", target=target)


@pytest.mark.parametrize(("model_type", "target"), EXACT_PAIRS)
def test_a_sharded_output(
    make_dense: MakeDense, tmp_path: Path, model_type: str, target: str
) -> None:
    dense, ids = make_dense(model_type), random_ids()
    options = Options(max_shard_bytes=20_000)
    convert(dense, tmp_path / "moe", recipe("E2G2T2"), target=target, options=options)
    index = read_json(tmp_path / "moe" / "model.safetensors.index.json")
    shards = sorted(tmp_path.glob("moe/*.safetensors"))
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert len(shards) > 2
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in read_tensors(tmp_path / "moe").values()
    )
    assert difference(logits(tmp_path / "moe", ids), logits(dense, ids)) < 1e-10


def test_a_tied_checkpoint_that_carries_its_head(make_dense: MakeDense, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    dense = clone(make_dense("llama", tie_word_embeddings=True), tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    assert_equal_logits(dense, tmp_path / "moe", target="mixtral")


def test_an_old_checkpoint_with_rotary_frequencies(make_dense: MakeDense, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    original = make_dense("llama")
    dense = clone(original, tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        tensors[name] = torch.ones(4)
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    done = convert(dense, tmp_path / "moe", recipe("E2G2T2"))
    assert len(done.plan.dropped) == 2
    assert not any("inv_freq" in name for name in read_tensors(tmp_path / "moe"))
    ids = random_ids()
    assert difference(logits(tmp_path / "moe", ids), logits(original, ids)) < 1e-10


def test_a_snapshot_in_the_hub_cache(make_dense: MakeDense, tmp_path: Path) -> None:
    """The cache holds symlinks into a folder of blobs named by their hashes."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--some-org--some-model"
    snapshot, blobs = repo / "snapshots" / commit, repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(make_dense("llama").iterdir())):
        shutil.copyfile(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:064x}")

    assert_equal_logits(snapshot, tmp_path / "moe", target="mixtral")
    source = read_json(tmp_path / "moe" / "upcycle.json")["source"]
    assert (source["name"], source["revision"]) == ("some-org/some-model", commit)
    assert not any(file.is_symlink() for file in (tmp_path / "moe").iterdir())
    assert "base_model: some-org/some-model" in (tmp_path / "moe" / "README.md").read_text()


@pytest.mark.parametrize(("model_type", "target"), EXACT_PAIRS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("wanted", [None, "bfloat16", "float16", "float32"])
def test_dtypes(
    make_dense: MakeDense,
    tmp_path: Path,
    model_type: str,
    target: str,
    dtype: str,
    wanted: str | None,
) -> None:
    dense, moe, ids = make_dense(model_type, dtype=dtype), tmp_path / "moe", random_ids()
    convert(dense, moe, recipe("E2G2T2"), target=target, options=Options(dtype=wanted))
    result = wanted or dtype
    assert {str(tensor.dtype) for tensor in read_tensors(moe).values()} == {f"torch.{result}"}
    config = read_json(moe / "config.json")
    assert config["dtype"] == result
    assert wanted is None or config["torch_dtype"] == result

    # The dense model in the output's dtype, and what is stored there read as float64: whatever is
    # lost by rounding is lost in both.
    reference = clone(dense, tmp_path / "reference")
    from safetensors.torch import load_file, save_file

    cast = {
        name: tensor.to(getattr(torch, result))
        for name, tensor in load_file(reference / "model.safetensors").items()
    }
    save_file(cast, reference / "model.safetensors", metadata={"format": "pt"})
    assert difference(logits(moe, ids), logits(reference, ids)) < 1e-10


def test_tensors_of_different_dtypes_keep_their_own(make_dense: MakeDense, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    dense = clone(make_dense("llama", dtype="bfloat16"), tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    mixed = {name: t.float() if "norm" in name else t for name, t in tensors.items()}
    save_file(mixed, dense / "model.safetensors", metadata={"format": "pt"})
    assert_equal_logits(dense, tmp_path / "moe", target="mixtral")
    written = read_tensors(tmp_path / "moe")
    assert all(written[name].dtype == mixed[name].dtype for name in written.keys() & mixed.keys())


@pytest.mark.parametrize(("model_type", "target"), EXACT_PAIRS)
def test_unknown_keys_survive(
    make_dense: MakeDense, tmp_path: Path, model_type: str, target: str
) -> None:
    unknown = {"my_key": 1, "nested": {"a": [1, None, "ä"]}, "initializer_range": 0.123}
    dense = clone(make_dense(model_type), tmp_path / "dense", **unknown)
    convert(dense, tmp_path / "moe", recipe("E2G2T2"), target=target)
    config = read_json(tmp_path / "moe" / "config.json")
    assert config.items() >= unknown.items()
    assert config["model_type"] == target
    assert read_json(dense / "config.json").keys() <= config.keys()


@pytest.mark.parametrize(("model_type", "target"), EXACT_PAIRS)
def test_generation_is_the_same_greedy_text(
    make_dense: MakeDense, tmp_path: Path, model_type: str, target: str
) -> None:
    """The cache of keys and values, and the special tokens, take part in generation only."""
    from transformers import AutoModelForCausalLM

    # Float32, since the experts' own kernels know no float64; the model is small enough.
    sizes = {"bos_token_id": 0, "eos_token_id": [1, 5], "pad_token_id": 1}
    dense = clone(make_dense(model_type, minimal=True), tmp_path / "dense", **sizes)
    convert(dense, tmp_path / "moe", recipe("E2G2T2"), target=target)
    ids, texts = random_ids(6, rows=1), []
    for path in (dense, tmp_path / "moe"):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        assert model.config.eos_token_id == [1, 5]
        plain = {"do_sample": False, "temperature": None, "top_p": None}
        texts.append(model.generate(ids, max_new_tokens=12, pad_token_id=1, **plain))
    assert torch.equal(texts[0], texts[1])


def test_a_record_of_the_conversion_is_enough_to_repeat_it(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make_dense("qwen2")
    wanted = recipe("E4G2T4", Routing.TOPK_SOFTMAX, seed=7, router_logit_std=0.5)
    convert(dense, tmp_path / "one", wanted)
    said = read_json(tmp_path / "one" / "upcycle.json")["recipe"]
    said.pop("name")
    again = Recipe(**said | {"routing": Routing(said["routing"])})
    write_json(tmp_path / "recipe.json", said)
    convert(dense, tmp_path / "two", again)
    one, two = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


FOR_ENGINES = (
    ("youtu", "deepseek_v3", {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}),
    (
        "qwen3",
        "hy_v3",
        {"first_k_dense_replace": 1, "expert_hidden_dim": 24, "qk_norm": True, "route_norm": True},
    ),
    ("llama", "solar_open", {"first_k_dense_replace": 0, "partial_rotary_factor": 1.0}),
)
"""Keys that no class of transformers reads, and an engine asks for."""
OTHER_VALUES: dict[str, Any] = {
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "first_k_dense_replace": 2,
    "expert_hidden_dim": 48,
    "qk_norm": False,
    "route_norm": False,
    "partial_rotary_factor": 0.5,
}


@pytest.mark.parametrize(("model_type", "target", "keys"), FOR_ENGINES, ids=str)
def test_what_engines_ask_for(
    make_dense: MakeDense, tmp_path: Path, model_type: str, target: str, keys: dict[str, Any]
) -> None:
    """It is said, transformers does not mind, and saying something else is found."""
    dense, moe = make_dense(model_type), tmp_path / "moe"
    layers = "1-" if target == "hy_v3" else None
    convert(dense, moe, recipe("E2G2T2", Routing.SIGMOID_TOPK, layers=layers), target=target)
    written = read_json(moe / "config.json")
    assert written.items() >= keys.items()
    assert verify(dense, moe).passed
    for key in keys:
        write_json(moe / "config.json", written | {key: OTHER_VALUES[key]})
        report = verify(dense, moe, checks=("structure",))
        assert report.checks[0].status is Status.FAILED, (key, report)


def test_a_dense_layer_behind_experts_is_not_said_to_be_the_first(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, moe = make_dense("qwen3"), tmp_path / "moe"
    convert(dense, moe, recipe("E2G2T2", Routing.SIGMOID_TOPK, layers="0"), target="hy_v3")
    written = read_json(moe / "config.json")
    assert "first_k_dense_replace" not in written
    write_json(moe / "config.json", written | {"first_k_dense_replace": 1})
    report = verify(dense, moe, checks=("structure",))
    assert report.checks[0].status is Status.FAILED
