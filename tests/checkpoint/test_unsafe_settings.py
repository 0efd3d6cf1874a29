"""Refuse sources that run foreign code, read other files, or have settings that no model has."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDense, clone, read_json, snapshot

from upcycle_cli import Recipe, UpcycleError, convert, inspect
from upcycle_cli.plan.facts import warnings

RECIPE = Recipe("E2G2T2")
CODE = {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"}


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


# Code and other files ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
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
        {"text_config": {"model_type": "qwen2", "hidden_size": 8}},
    ],
    ids="-".join,
)
def test_refuse_keys_that_change_what_is_loaded(
    llama: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert_refused(clone(llama, tmp_path / "dense", **changes), tmp_path, *changes)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adapter_config.json", "adapter"),
        ("modeling_mine.py", "code"),
        ("custom_generate/generate.py", "code"),
        ("tokenizer_config.json", "fast_tokenizer_files"),
        ("tokenizer_config.json", "auto_map"),
    ],
)
def test_refuse_files_that_loaders_read_or_run(
    llama: Path, tmp_path: Path, name: str, words: str
) -> None:
    dense = clone(llama, tmp_path / "dense")
    add(dense, name, json.dumps({words: ["tokenizer.4.0.0.json", None]}))
    assert_refused(dense, tmp_path, name, words)


def test_convert_with_harmless_keys_and_files(llama: Path, tmp_path: Path) -> None:
    harmless: dict[str, Any] = {
        "attn_implementation": {"": "eager"},
        "experts_implementation": None,
        "transformers_weights": None,
        "auto_map": {},
        "my_own": {"what": "a note"},
    }
    dense = clone(llama, tmp_path / "dense", **harmless)
    add(dense, "notes.txt")
    add(dense, "scripts/train.py")
    assert convert(dense, tmp_path / "moe", RECIPE).published


@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma4_unified_text"])
def test_allow_gemma4_only_other_heads_by_layer(
    make_dense: MakeDense, tmp_path: Path, model_type: str
) -> None:
    dense = make_dense(model_type)
    layers = read_json(dense / "config.json")["per_layer_config"]
    assert {key for changed in layers.values() for key in changed} == {"head_dim"}
    assert convert(dense, tmp_path / "moe", RECIPE).published
    layers["0"] = {"intermediate_size": 24}
    odd = clone(dense, tmp_path / "dense", per_layer_config=layers)
    (tmp_path / "odd").mkdir()
    assert_refused(odd, tmp_path / "odd", "per_layer_config", "from layer to layer")


def test_ignore_code_of_a_type_that_transformers_has(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = clone(make_dense("nemotron_h"), tmp_path / "dense", auto_map=CODE)
    add(dense, "configuration_nemotron_h.py", "raise SystemExit(3)")
    made = convert(dense, tmp_path / "moe", RECIPE, verify=True)
    assert made.report is not None
    assert made.report.passed
    assert "auto_map" not in read_json(tmp_path / "moe" / "config.json")
    assert not list((tmp_path / "moe").glob("*.py"))
    assert any("auto_map" in warning for warning in warnings(made.plan))
    add(dense, "custom_generate/generate.py")
    assert_refused(dense, tmp_path, "custom_generate/generate.py")


# Links and sizes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("LICENSE", kind) for kind in ("secret", "process", "pipe", "device", "gone", "circle")),
        *((name, "secret") for name in ("config.json", "model.safetensors", "tokenizer.json")),
        ("tokenizer_config.json", "pipe"),
        ("additional_chat_templates/rag.jinja", "process"),
    ],
)
def test_refuse_what_is_not_a_file_of_the_source(
    llama: Path, tmp_path: Path, name: str, kind: str
) -> None:
    dense = clone(llama, tmp_path / "dense")
    path = dense / name
    add(dense, name)
    path.unlink()
    (tmp_path / "secret").write_text("HF_TOKEN=hf_secret")
    targets = {
        "secret": tmp_path / "secret",
        "process": Path("/proc/self/environ"),
        "device": Path("/dev/zero"),
        "gone": tmp_path / "gone",
        "circle": path,
    }
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(targets[kind])
    with pytest.raises(UpcycleError, match=name):
        convert(dense, tmp_path / "moe", RECIPE)
    assert {entry.name for entry in tmp_path.iterdir()} == {"dense", "secret"}


@pytest.mark.parametrize("folder", ["blobs", "models--org--tiny/blobs", "elsewhere"])
def test_follow_links_into_the_hub_cache_only(llama: Path, tmp_path: Path, folder: str) -> None:
    """A snapshot has links to its repo's blobs, and those may be links to shared ones."""
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


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "tokenizer_config.json", "LICENSE"]
)
def test_refuse_gigabytes_in_place_of_kilobytes(llama: Path, tmp_path: Path, name: str) -> None:
    dense = clone(llama, tmp_path / "dense")
    if "index" in name:
        (dense / "model.safetensors").rename(dense / "model-00001-of-00001.safetensors")
    with (dense / name).open("wb") as file:
        file.truncate(40_000_000_000)  # sparse
    with pytest.raises(UpcycleError, match=f"{name}.* bytes"):
        convert(dense, tmp_path / "moe", RECIPE)
