"""Weights that are missing, damaged, or other than their config says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense, clone, read_json, write_json
from refusals import INDEX, WEIGHTS, Refuses, assert_refused, invoke, save_tensors

Edit = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles(llama: Path, tmp_path: Path, refuses: Refuses, name: str) -> None:
    dense = clone(llama, tmp_path / "dense")
    (dense / WEIGHTS).rename(dense / name)
    refuses(dense, "pickle", name, "save_pretrained", "from_pretrained")


def test_no_weights(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    dense = clone(llama, tmp_path / "dense")
    (dense / WEIGHTS).unlink()
    refuses(dense, f"no {WEIGHTS}")


def test_weights_under_another_name(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    dense = clone(llama, tmp_path / "dense")
    (dense / WEIGHTS).rename(dense / "adapter_model.safetensors")
    refuses(dense, f"no {WEIGHTS}")


def test_weights_that_are_a_directory(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    dense = clone(llama, tmp_path / "dense")
    (dense / WEIGHTS).unlink()
    (dense / WEIGHTS).mkdir()
    refuses(dense, WEIGHTS)


def test_a_dangling_link_to_weights(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    dense = clone(llama, tmp_path / "dense")
    (dense / WEIGHTS).unlink()
    (dense / WEIGHTS).symlink_to(tmp_path / "blobs" / "gone")
    refuses(dense, WEIGHTS)


def test_a_git_lfs_pointer(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    """What a clone without git-lfs leaves in the place of the weights."""
    dense = clone(llama, tmp_path / "dense")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"
    (dense / WEIGHTS).write_text(pointer)
    refuses(dense, WEIGHTS, "Download")


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.float8_e4m3fn, torch.uint8, torch.int32, torch.float64]
)
def test_weights_of_a_dtype_that_is_not_for_training(
    llama: Path, tmp_path: Path, refuses: Refuses, dtype: torch.dtype
) -> None:
    dense = clone(llama, tmp_path / "dense")
    save_tensors(dense, lambda tensors: tensors.update({UP: tensors[UP].to(dtype)}))
    refuses(dense, UP, "F32, F16, BF16")


def test_a_tensor_that_contradicts_the_config(
    llama: Path, tmp_path: Path, refuses: Refuses
) -> None:
    dense = clone(llama, tmp_path / "dense")
    save_tensors(dense, lambda tensors: tensors.update({UP: tensors[UP].T.contiguous()}))
    refuses(dense, UP, "[32, 48]", "[48, 32]")


@pytest.mark.parametrize("name", [UP, "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor(llama: Path, tmp_path: Path, refuses: Refuses, name: str) -> None:
    dense = clone(llama, tmp_path / "dense")
    save_tensors(dense, lambda tensors: tensors.pop(name))
    refuses(dense, f"lacks {name}")


def test_many_missing_tensors_are_counted(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    dense = clone(llama, tmp_path / "dense")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[f"language_model.{name}"] = tensors.pop(name)

    save_tensors(dense, rename)
    message = refuses(dense, "lacks", "more tensors")
    assert len(message) < 500


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.7.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.lora_A.weight",
        "vision_tower.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq.extra",
        "",
        "[bold]markup[/bold]",
    ],
)
def test_an_unknown_tensor(llama: Path, tmp_path: Path, refuses: Refuses, name: str) -> None:
    dense = clone(llama, tmp_path / "dense")
    save_tensors(dense, lambda tensors: tensors.update({name: torch.zeros(3)}))
    refuses(dense, "unknown tensor", name)


def test_a_value_that_overflows(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    dense = clone(llama, tmp_path / "dense")
    save_tensors(dense, lambda tensors: tensors[UP].__setitem__((40, 5), 1e10))
    # Row 40 of 48 is in the second shard.
    name = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    arguments = ("--recipe", "E2G2T2", "--dtype", "float16")
    refuses(dense, name, "infinite", "f16", "--dtype", arguments=arguments)


def test_a_copied_value_that_overflows(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    dense = clone(llama, tmp_path / "dense")
    save_tensors(dense, lambda tensors: tensors["lm_head.weight"].__setitem__((0, 0), -1e10))
    arguments = ("--recipe", "E2G2T2", "--dtype", "float16")
    refuses(dense, "lm_head.weight", "infinite", arguments=arguments)


def test_a_scaled_value_that_overflows(
    make_dense: MakeDense, tmp_path: Path, refuses: Refuses
) -> None:
    dense = clone(make_dense("llama", dtype="bfloat16"), tmp_path / "dense")
    save_tensors(dense, lambda tensors: tensors[UP].__setitem__((0, 0), 3e38))
    refuses(dense, "model.layers.1.block_sparse_moe.experts.0.w3.weight", "infinite", "bf16")


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_norm_that_no_router_can_be_drawn_for(
    llama: Path, tmp_path: Path, refuses: Refuses, value: float
) -> None:
    dense = clone(llama, tmp_path / "dense")
    name = "model.layers.1.post_attention_layernorm.weight"
    save_tensors(dense, lambda tensors: tensors[name].fill_(value))
    refuses(dense, name)


def test_fused_experts_of_two_dtypes(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    dense = clone(llama, tmp_path / "dense")
    save_tensors(dense, lambda tensors: tensors.update({UP: tensors[UP].bfloat16()}))
    arguments = ("--recipe", "E2G2T2", "--expert-layout", "fused")
    refuses(dense, "dtypes", "--dtype", arguments=arguments)
    done = invoke("convert", dense, tmp_path / "moe", *arguments, "--dtype", "float32", "--quiet")
    assert done.exit_code == 0, done.stderr


# Damaged safetensors files ------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 5, 8, 100, -1, -5000])
def test_a_truncated_file(llama: Path, tmp_path: Path, refuses: Refuses, kept: int) -> None:
    dense = clone(llama, tmp_path / "dense")
    data = (dense / WEIGHTS).read_bytes()
    (dense / WEIGHTS).write_bytes(data[:kept])
    refuses(dense, WEIGHTS, "truncated", "Download or copy it again")


def test_a_file_with_more_at_its_end(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    dense = clone(llama, tmp_path / "dense")
    with (dense / WEIGHTS).open("ab") as file:
        file.write(b"1234567")
    refuses(dense, WEIGHTS, "7 bytes after the last tensor")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 200_000_000])
def test_a_huge_header(llama: Path, tmp_path: Path, refuses: Refuses, length: int) -> None:
    dense = clone(llama, tmp_path / "dense")
    data = (dense / WEIGHTS).read_bytes()
    (dense / WEIGHTS).write_bytes(length.to_bytes(8, "little") + data[8:])
    refuses(dense, WEIGHTS, "header")


def test_a_huge_header_in_a_file_that_has_it(llama: Path, tmp_path: Path) -> None:
    dense = clone(llama, tmp_path / "dense")
    with (dense / WEIGHTS).open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)  # a hole: it takes no space
    # snapshot() would read it all.
    result = invoke("convert", dense, tmp_path / "moe", "--recipe", "E2G2T2")
    assert_refused(result, WEIGHTS, "header of 200,000,000 bytes")
    assert not list(tmp_path.glob("moe*"))


def edit_header(path: Path, edit: Edit) -> None:
    """Change a shard's header, leaving its data as it is."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    write_header(path, json.dumps(header).encode())


def write_header(path: Path, text: bytes) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not valid JSON"),
        (b"\x80\x02}q\x00.", "not valid JSON"),
        (b'{"a": ', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b'"x"', "not a JSON object"),
        (b'{"a": 1}', "a is not described"),
        (b'{"a": null}', "a is not described"),
        (b'{"a": {}}', "dtype"),
        (b'{"a": {"dtype": "F32"}}', "shape"),
        (b'{"a": {"dtype": "F32", "shape": [1]}}', "offsets"),
        (b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}', "dtype"),
        (b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}', "shape"),
        (b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}', "shape"),
        (b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', "shape"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', "offsets"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}', "offsets"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}', "offsets"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', "offsets"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": {"0": 4}}}', "offsets"),
        (b"{}", "after the last tensor"),
        (b'{"a": {}, "a": {}}', "'a' appears twice"),
        (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', "shape"),
    ],
)
def test_headers_that_are_none(
    llama: Path, tmp_path: Path, refuses: Refuses, text: bytes, words: str
) -> None:
    dense = clone(llama, tmp_path / "dense")
    write_header(dense / WEIGHTS, text)
    refuses(dense, WEIGHTS, words)


def first(header: dict[str, Any], position: int = 0) -> dict[str, Any]:
    """The entry that lies first in the file, or a later one."""
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    found: dict[str, Any] = sorted(tensors, key=lambda entry: entry["data_offsets"])[position]
    return found


def shift(entry: dict[str, Any], by: int) -> None:
    entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda header: first(header, 1).update(data_offsets=[0, 0]), "its offsets span"),
        (lambda header: shift(first(header, 1), -4), "overlaps"),
        (lambda header: shift(first(header, 1), 4), "leaves a hole"),
        (lambda header: shift(first(header), 4), "leaves a hole after the header"),
        (lambda header: shift(first(header, -1), 10**15), "leaves a hole"),
        (lambda header: first(header).update(dtype="F16"), "its offsets span"),
        (lambda header: first(header).update(dtype="F4"), "unknown dtype 'F4'"),
        (lambda header: first(header).update(dtype="float32"), "unknown dtype"),
        (lambda header: first(header).update(shape=[-260, -32]), "invalid shape"),
        (lambda header: first(header).update(shape=[2**62, 2**62]), "invalid shape"),
        (lambda header: first(header).update(data_offsets=[-4, 0]), "invalid offsets"),
        (lambda header: first(header).update(shape=[]), "its offsets span"),
    ],
    ids=[
        "empty-offsets",
        "overlap",
        "hole",
        "hole-at-start",
        "past-the-end",
        "wrong-size",
        "unknown-dtype",
        "torch-dtype",
        "negative-shape",
        "overflowing-shape",
        "negative-offset",
        "scalar",
    ],
)
def test_headers_that_lie(
    llama: Path, tmp_path: Path, refuses: Refuses, edit: Edit, words: str
) -> None:
    dense = clone(llama, tmp_path / "dense")
    edit_header(dense / WEIGHTS, edit)
    refuses(dense, WEIGHTS, words)


def test_a_last_tensor_past_the_end(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    dense = clone(llama, tmp_path / "dense")

    def grow(header: dict[str, Any]) -> None:
        last = first(header, -1)
        last["shape"][0] += 1
        last["data_offsets"][1] += last["shape"][1] * 4 if len(last["shape"]) > 1 else 4

    edit_header(dense / WEIGHTS, grow)
    refuses(dense, WEIGHTS, "truncated")


# Sharded checkpoints ------------------------------------------------------------------------------


@pytest.fixture
def sharded(make_dense: MakeDense, tmp_path: Path) -> Path:
    path = clone(make_dense("llama", max_shard_size="40KB"), tmp_path / "dense")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def test_a_missing_shard(sharded: Path, refuses: Refuses) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refuses(sharded, shard.name, "missing", "Download or copy it again")


def test_a_truncated_shard(sharded: Path, refuses: Refuses) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    refuses(sharded, shard.name, "truncated")


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": []}']
)
def test_an_index_that_is_none(sharded: Path, refuses: Refuses, text: bytes) -> None:
    (sharded / INDEX).write_bytes(text)
    refuses(sharded, INDEX)


def test_a_missing_index(sharded: Path, refuses: Refuses) -> None:
    (sharded / INDEX).unlink()
    refuses(sharded, INDEX)


@pytest.mark.parametrize(
    "place",
    [
        "../elsewhere.safetensors",
        "sub/../../elsewhere.safetensors",
        "/etc/passwd",
        "",
        ".",
        "..",
        "sub\\shard.safetensors",
        "nul\0byte",
        None,
        3,
        ["model-00001.safetensors"],
        {},
        "x" * 5000,
    ],
    ids=repr,
)
def test_an_index_that_points_elsewhere(sharded: Path, refuses: Refuses, place: object) -> None:
    index = read_json(sharded / INDEX)
    index["weight_map"]["model.norm.weight"] = place
    write_json(sharded / INDEX, index)
    # A name that is only too long for the system is no way out of the directory.
    too_long = isinstance(place, str) and len(place) > 255
    refuses(sharded, "missing or unreadable" if too_long else "not a file of this directory")


@pytest.mark.parametrize("absolute", [False, True])
def test_a_shard_outside_of_the_directory(
    sharded: Path, tmp_path: Path, refuses: Refuses, *, absolute: bool
) -> None:
    """Even one that is there and fits: an index from the Hub must not reach other files."""
    index = read_json(sharded / INDEX)
    shard = index["weight_map"]["model.norm.weight"]
    (sharded / shard).rename(tmp_path / "elsewhere.safetensors")
    place = str(tmp_path / "elsewhere.safetensors") if absolute else "../elsewhere.safetensors"
    index["weight_map"] = {
        name: place if file == shard else file for name, file in index["weight_map"].items()
    }
    write_json(sharded / INDEX, index)
    refuses(sharded, "elsewhere.safetensors", "not a file of this directory")


def test_an_index_naming_a_file_that_is_not_there(sharded: Path, refuses: Refuses) -> None:
    index = read_json(sharded / INDEX)
    index["weight_map"]["model.norm.weight"] = "model-00099-of-00099.safetensors"
    write_json(sharded / INDEX, index)
    refuses(sharded, "model-00099-of-00099.safetensors", "missing")


@pytest.mark.parametrize("name", ["model.extra.weight", "model.norm.weight"])
def test_an_index_that_places_a_tensor_where_it_is_not(
    sharded: Path, refuses: Refuses, name: str
) -> None:
    index = read_json(sharded / INDEX)
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"][name] = next(s for s in shards if s != index["weight_map"].get(name))
    write_json(sharded / INDEX, index)
    refuses(sharded, INDEX, name)


def test_an_index_that_leaves_out_a_tensor(sharded: Path, refuses: Refuses) -> None:
    index = read_json(sharded / INDEX)
    del index["weight_map"]["model.norm.weight"]
    write_json(sharded / INDEX, index)
    refuses(sharded, INDEX, "does not list model.norm.weight")


def test_a_tensor_in_two_shards(sharded: Path, refuses: Refuses) -> None:
    index = read_json(sharded / INDEX)
    shard = index["weight_map"]["model.norm.weight"]
    shutil.copyfile(sharded / shard, sharded / "copy.safetensors")
    index["weight_map"]["another"] = "copy.safetensors"
    write_json(sharded / INDEX, index)
    refuses(sharded, "is in both", "copy.safetensors")
