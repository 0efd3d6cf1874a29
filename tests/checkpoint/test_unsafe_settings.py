"""Refuse sources that run foreign code, read other files, or have settings that no model has."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDense, clone, contents, read_json, snapshot

from upcycle_cli import Recipe, UpcycleError, convert, inspect, verify
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


OTHER = {"auths": {"docker.io": {"auth": "hf_secret"}}, "type": "user", "access_token": "hf_secret"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("LICENSE", kind) for kind in ("pipe", "device", "gone", "circle")),
        *(("config.json", kind) for kind in ("secret", "json", "process", "folder", "device")),
        *(("tokenizer.json", kind) for kind in ("secret", "json", "process", "circle")),
        *(("model.safetensors", kind) for kind in ("secret", "json", "device", "gone")),
        *((name, "json") for name in ("generation_config.json", "vocab.json", "tekken.json")),
        *((name, "secret") for name in ("merges.txt", "tokenizer.model", "a.tiktoken")),
        *((name, "pipe") for name in ("tokenizer_config.json", "chat_template.jinja")),
        *((name, "folder") for name in ("tokenizer.json", "processor_config.json")),
    ],
)
def test_refuse_links_to_other_things(llama: Path, tmp_path: Path, name: str, kind: str) -> None:
    dense = clone(llama, tmp_path / "dense")
    path = dense / name
    path.unlink(missing_ok=True)
    (tmp_path / "folder").mkdir()
    (tmp_path / "secret").write_text("HF_TOKEN=hf_secret\n" * 200)
    (tmp_path / "json").write_text(json.dumps(OTHER))
    os.mkfifo(tmp_path / "pipe")
    others = {"process": Path("/proc/self/environ"), "device": Path("/dev/zero"), "circle": path}
    path.symlink_to(others.get(kind, tmp_path / kind))
    before = snapshot(tmp_path)
    with pytest.raises(UpcycleError, match=name) as caught:
        convert(dense, tmp_path / "moe", RECIPE)
    assert "hf_secret" not in str(caught.value)
    assert snapshot(tmp_path) == before


TEXTS = ("LICENSE", "Notice.txt", "chat_template.jinja", "additional_chat_templates/rag.jinja")


def linked_to(directory: Path, store: Path) -> Path:
    """Return a directory with a link to each of the other's files, which are in a store now."""
    for file in [file for file in directory.rglob("*") if file.is_file()]:
        place = store / file.relative_to(directory)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.rename(place)
        file.symlink_to(place)
    return directory


def test_follow_links_to_what_is_parsed(llama: Path, tmp_path: Path) -> None:
    """A directory of links converts like one of files; only free texts stay behind."""
    plain = clone(llama, tmp_path / "plain" / "dense")
    vocabulary = "".join(f"QUJD {number}\n" for number in range(100))
    for name, text in {
        **dict.fromkeys(TEXTS, "free"),
        "merges.txt": "#version: 0.2\na b\n",
        "tokenizer.model": "\n\x0e\n\x05<unk>\x15\0\0\0\0",
        "tiktoken.model": vocabulary,
        "vocab.json": '{"a": 0, "b": 1}',
        "added_tokens.json": "{}",
        "tekken.json": '{"config": {}, "vocab": []}',
        "preprocessor_config.json": '{"image_mean": [0.5], "image_std": [0.5]}',
        "video_preprocessor_config.json": '{"video_processor_type": "x"}',
    }.items():
        add(plain, name, text)
    links = linked_to(clone(plain, tmp_path / "linked" / "dense"), tmp_path / "store")
    for source in (plain, links):
        made = convert(source, source.with_name("moe"), RECIPE, verify=True)
        assert made.report is not None
        assert made.report.passed
        notes = [text for text in made.warnings if "not copied" in text]
        assert bool(notes) == (source is links)
        assert all(name in text for name in TEXTS for text in notes)
    all_files, parsed = (contents(source.with_name("moe")) for source in (plain, links))
    assert all_files.keys() - parsed.keys() == {*TEXTS}
    for name in ("upcycle.json", "README.md"):  # they list the files
        del parsed[name]
    assert parsed.items() <= all_files.items()
    assert not any(file.is_symlink() for file in links.with_name("moe").rglob("*"))


def test_verify_an_moe_of_links(llama: Path, tmp_path: Path) -> None:
    add(dense := clone(llama, tmp_path / "dense"), "LICENSE")
    moe = linked_to(convert(dense, tmp_path / "moe", RECIPE).output, tmp_path / "store")
    [check] = verify(dense, moe, checks=["directory"]).checks
    assert re.search("LICENSE is a link to .*; it is not followed[.]( |$)", check.detail)


@pytest.mark.parametrize("folder", ["blobs", "models--org--tiny/blobs", "elsewhere", "blobs/org"])
def test_follow_links_into_the_hub_cache(llama: Path, tmp_path: Path, folder: str) -> None:
    """A snapshot has links to its repo's blobs, and those may be links to shared ones."""
    snapshot_path = tmp_path / "models--org--tiny" / "snapshots" / "0"
    add(clone(llama, snapshot_path), "LICENSE")
    linked_to(snapshot_path, tmp_path / folder)
    assert convert(snapshot_path, tmp_path / "moe", RECIPE).published
    assert (tmp_path / "moe" / "LICENSE").exists() == (folder != "elsewhere")
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
