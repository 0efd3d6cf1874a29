"""What sends a loader elsewhere, and settings that no model has are refused up front."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDense, clone, read_json, snapshot, write_json
from transformers.activations import ACT2CLS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from upcycle_cli import Recipe, UpcycleError, convert, inspect
from upcycle_cli.models.defaults import known_names
from upcycle_cli.plan.warnings import warnings

RECIPE = Recipe(expansion=2, granularity=2, top_k=2)
NESTED = {"model_type": "qwen2", "hidden_size": 8}
KEYS: tuple[dict[str, Any], ...] = (
    {"transformers_weights": "other.safetensors"},
    {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}},
    {"configuration_files": ["config.4.0.0.json"]},
    {"attn_implementation": "kernels-community/flash-attn"},
    {"attn_implementation": {"": "org/kernel@main:attention"}},
    {"_attn_implementation": 7},
    {"experts_implementation": "org/kernel"},
    {"compression_config": {"format": "pack-quantized"}},
    {"per_layer_config": {"0": {"num_key_value_heads": 1}}},
    {"fusion_config": {"patch_embeddings": True}},
    {"distributed_config": {"tp_plan": "auto"}},
    {"attribute_map": {"rms_norm_eps": "attention_dropout"}},
    {"text_config": NESTED},
)
"""Keys of a config.json that change what is loaded, or run."""
FILES = ("adapter_config.json", "modeling_mine.py", "custom_generate/generate.py")
HARMLESS: tuple[dict[str, Any], ...] = (
    {"attn_implementation": "sdpa", "experts_implementation": None},
    {"attn_implementation": {"": "eager"}},
    {"transformers_weights": None, "auto_map": {}},
    {"my_own": {"what": "a note"}},
)


def add(directory: Path, name: str, text: str = "{}") -> None:
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_text(text)


def assert_refused(source: Path, tmp_path: Path, *words: str) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(UpcycleError) as caught:
        convert(source, tmp_path / "moe", RECIPE)
    assert all(word in str(caught.value) for word in words), caught.value
    assert snapshot(tmp_path) == before
    with pytest.raises(UpcycleError):
        inspect(source, RECIPE)


@pytest.mark.parametrize("changes", KEYS, ids="-".join)
def test_keys(llama: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    assert_refused(clone(llama, tmp_path / "dense", **changes), tmp_path, *changes)


def test_heads_that_differ_from_layer_to_layer(make_dense: MakeDense, tmp_path: Path) -> None:
    """gemma4_text says so by itself; of its MLPs it must not."""
    dense = make_dense("gemma4_text")
    layers = read_json(dense / "config.json")["per_layer_config"]
    assert {key for changed in layers.values() for key in changed} == {"head_dim"}
    assert convert(dense, tmp_path / "moe", RECIPE).published
    layers["0"] = {"intermediate_size": 24}
    odd = clone(dense, tmp_path / "dense", per_layer_config=layers)
    (tmp_path / "odd").mkdir()
    assert_refused(odd, tmp_path / "odd", "per_layer_config", "from layer to layer")


@pytest.mark.parametrize("key", ["auto_map", "fast_tokenizer_files"])
def test_keys_of_the_tokenizer(llama: Path, tmp_path: Path, key: str) -> None:
    dense = clone(llama, tmp_path / "dense")
    path = dense / "tokenizer_config.json"
    write_json(path, read_json(path) | {key: ["tokenizer.4.0.0.json", None]})
    assert_refused(dense, tmp_path, "tokenizer_config.json", key)


@pytest.mark.parametrize("name", FILES)
def test_files(llama: Path, tmp_path: Path, name: str) -> None:
    dense = clone(llama, tmp_path / "dense")
    add(dense, name)
    assert_refused(dense, tmp_path, name)


@pytest.mark.parametrize("changes", HARMLESS, ids=str)
def test_what_sends_nobody_elsewhere(llama: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    dense = clone(llama, tmp_path / "dense", **changes)
    add(dense, "notes.txt")
    add(dense, "scripts/train.py")
    assert convert(dense, tmp_path / "moe", RECIPE).published


def test_code_that_transformers_has_had_since(make_dense: MakeDense, tmp_path: Path) -> None:
    """Of some model types the released models carry code; nobody runs it unless they trust it."""
    code = {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"}
    dense = clone(make_dense("nemotron_h"), tmp_path / "dense", auto_map=code)
    add(dense, "configuration_nemotron_h.py", "raise SystemExit(3)")
    made = convert(dense, tmp_path / "moe", RECIPE, verify=True)
    assert made.report is not None
    assert made.report.passed
    assert "auto_map" not in read_json(tmp_path / "moe" / "config.json")
    assert not [path.name for path in (tmp_path / "moe").glob("*.py")]
    assert any("auto_map" in warning for warning in warnings(made.plan))
    # What sends loaders elsewhere in another way is refused all the same.
    add(dense, "custom_generate/generate.py")
    assert_refused(dense, tmp_path, "custom_generate/generate.py")


# Links --------------------------------------------------------------------------------------------

NAMES = (
    "config.json",
    "model.safetensors",
    "LICENSE",
    "tokenizer.json",
    "tokenizer_config.json",
    "additional_chat_templates/rag.jinja",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["secret", "environment", "pipe", "device", "gone", "circle"])
def test_what_is_not_a_file_of_the_source(
    llama: Path, tmp_path: Path, name: str, kind: str
) -> None:
    dense = clone(llama, tmp_path / "dense")
    path = dense / name
    add(dense, name)
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        targets = {
            "secret": tmp_path / "secret",
            "environment": Path("/proc/self/environ"),
            "device": Path("/dev/zero"),
            "gone": tmp_path / "gone",
            "circle": path,
        }
        path.symlink_to(targets[kind])
    (tmp_path / "secret").write_text("HF_TOKEN=hf_secret")
    with pytest.raises(UpcycleError, match=name):
        convert(dense, tmp_path / "moe", RECIPE)
    assert not (tmp_path / "moe").exists()
    assert not (tmp_path / "moe.partial").exists()


@pytest.mark.parametrize("folder", ["blobs", "models--org--tiny/blobs", "elsewhere"])
def test_links_of_the_hub_cache(llama: Path, tmp_path: Path, folder: str) -> None:
    """A snapshot is links to its repo's blobs, and those can be links to what repos share."""
    snapshot_path = tmp_path / "models--org--tiny" / "snapshots" / "0"
    store = tmp_path / folder
    snapshot_path.mkdir(parents=True)
    store.mkdir()
    for file in llama.iterdir():
        (store / file.name).write_bytes(file.read_bytes())
        (snapshot_path / file.name).symlink_to(store / file.name)
    if folder == "elsewhere":
        with pytest.raises(UpcycleError, match="not followed"):
            convert(snapshot_path, tmp_path / "moe", RECIPE)
    else:
        assert convert(snapshot_path, tmp_path / "moe", RECIPE).published
        assert not (tmp_path / "moe" / "LICENSE").is_symlink()


def test_links_inside_the_source(llama: Path, tmp_path: Path) -> None:
    dense = clone(llama, tmp_path / "dense")
    (dense / "store").mkdir()
    for name in ("config.json", "model.safetensors", "LICENSE"):
        (dense / name).rename(dense / "store" / name)
        (dense / name).symlink_to(Path("store") / name)
    (tmp_path / "link").symlink_to(dense)
    assert convert(tmp_path / "link", tmp_path / "moe", RECIPE).published


# Sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors.index.json", "tokenizer_config.json", "LICENSE"],
)
def test_gigabytes_in_the_place_of_kilobytes(llama: Path, tmp_path: Path, name: str) -> None:
    dense = clone(llama, tmp_path / "dense")
    if "index" in name:
        (dense / "model.safetensors").rename(dense / "model-00001-of-00001.safetensors")
    with (dense / name).open("wb") as file:
        file.truncate(40_000_000_000)  # sparse
    with pytest.raises(UpcycleError, match=f"{name}.*40,000,000,000 bytes"):
        convert(dense, tmp_path / "moe", RECIPE)


def test_a_key_that_appears_twice(llama: Path, tmp_path: Path) -> None:
    """Python takes the last value, and other readers the first."""
    dense = clone(llama, tmp_path / "dense")
    text = (dense / "config.json").read_text()
    (dense / "config.json").write_text(text.replace("{", '{"hidden_act": "relu",', 1))
    assert_refused(dense, tmp_path, "config.json is not valid JSON: 'hidden_act' appears twice")


# Settings that no model has -----------------------------------------------------------------------

NAN, INFINITY = float("nan"), float("inf")
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
SETTINGS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"rms_norm_eps": NAN}, "rms_norm_eps must be a finite number"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps must be a finite number and at least 0"),
    ({"rms_norm_eps": INFINITY}, "rms_norm_eps"),
    ({"attention_dropout": 1.5}, "attention_dropout must be less than 1"),
    ({"attention_dropout": -0.1}, "attention_dropout"),
    ({"hidden_act": "silou"}, "hidden_act must be an activation"),
    ({"hidden_act": "prelu"}, "hidden_act"),  # has weights of its own
    ({"rope_parameters": {"rope_theta": 0, "rope_type": "default"}}, "rope_theta 0"),
    ({"rope_parameters": {"rope_theta": NAN, "rope_type": "default"}}, "rope_theta nan"),
    ({"rope_parameters": {"rope_theta": -1e4, "rope_type": "default"}}, "rope_theta -10000"),
    ({"rope_parameters": None, "rope_theta": 0}, "rope_theta must be larger than 0"),
    ({"rope_parameters": None, "rope_theta": INFINITY}, "rope_theta"),
    ({"rope_parameters": YARN | {"factor": 0}}, "factor 0"),
    ({"rope_parameters": YARN | {"factor": NAN}}, "factor nan"),
    ({"rope_parameters": YARN | {"factor": "4"}}, "factor '4'"),
    ({"rope_parameters": YARN | {"original_max_position_embeddings": -1}}, "embeddings -1"),
    ({"rope_parameters": YARN | {"rope_type": "longrope", "long_factor": [1, NAN]}}, "long_factor"),
    ({"rope_parameters": YARN | {"rope_type": "yarrn"}}, "rope_type, one of default, dynamic"),
    ({"num_hidden_layers": 10**18}, "num_hidden_layers must be at most"),
)


@pytest.mark.parametrize(("changes", "words"), SETTINGS, ids=lambda value: str(value)[:50])
def test_settings(llama: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    assert_refused(clone(llama, tmp_path / "dense", **changes), tmp_path, words)


def test_the_names_are_those_of_transformers() -> None:
    with_weights = {"prelu", "xielu"}
    assert {*known_names("activations")} == {*ACT2CLS} - with_weights
    assert {*known_names("rope_kinds")} >= {*ROPE_INIT_FUNCTIONS} - {"proportional"}
