"""Weights that are missing, damaged, or other than their config says: nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense, clone, read_json, write_json
from refusals import INDEX, WEIGHTS, Refuses, invoke, save_tensors

from upcycle_cli import UpcycleError, open_checkpoint

Damage = Callable[[Path], object]
UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.layers.1.post_attention_layernorm.weight"


def rename(name: str) -> Damage:
    return lambda dense: (dense / WEIGHTS).rename(dense / name)


def replace(make: Callable[[Path], object]) -> Damage:
    def damage(dense: Path) -> None:
        (dense / WEIGHTS).unlink()
        make(dense / WEIGHTS)

    return damage


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    return lambda dense: save_tensors(dense, edit)


def bytes_of(edit: Callable[[bytes], bytes]) -> Damage:
    return lambda dense: (dense / WEIGHTS).write_bytes(edit((dense / WEIGHTS).read_bytes()))


def header(edit: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the file's header and leave its data as it is."""

    def changed(raw: bytes) -> bytes:
        length = int.from_bytes(raw[:8], "little")
        held = json.loads(raw[8 : 8 + length])
        edit(held)
        return with_header(raw, json.dumps(held).encode())

    return bytes_of(changed)


def with_header(raw: bytes, text: bytes) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def entry(held: dict[str, Any], position: int = 0) -> dict[str, Any]:
    """Return the entry that lies first in the file, or a later one."""
    entries = [value for name, value in held.items() if name != "__metadata__"]
    found: dict[str, Any] = sorted(entries, key=lambda each: each["data_offsets"])[position]
    return found


def shift(held: dict[str, Any], position: int, by: int) -> None:
    entry(held, position).update(
        data_offsets=[offset + by for offset in entry(held, position)["data_offsets"]]
    )


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"
DAMAGES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "a pickle": (rename("pytorch_model.bin"), ("pickle", "pytorch_model.bin", "from_pretrained")),
    "an adapter": (rename("adapter_model.safetensors"), (f"no {WEIGHTS}",)),
    "nothing": (replace(lambda path: None), (f"no {WEIGHTS}",)),  # noqa: ARG005
    "a directory": (replace(Path.mkdir), (WEIGHTS,)),
    "a git-lfs pointer": (replace(lambda path: path.write_text(POINTER)), (WEIGHTS, "Download")),
    "another shape": (tensors(lambda t: t.update({UP: t[UP].T.contiguous()})), (UP, "[32, 48]")),
    "a missing tensor": (tensors(lambda t: t.pop(UP)), (f"lacks {UP}",)),
    "an unknown tensor": (tensors(lambda t: t.update(vision=torch.zeros(3))), ("unknown tensor",)),
    "a norm of zeros": (tensors(lambda t: t[NORM].fill_(0.0)), (NORM,)),
    "truncated": (bytes_of(lambda raw: raw[:-1]), (WEIGHTS, "truncated", "Download or copy it")),
    "a surplus": (bytes_of(lambda raw: raw + b"1234567"), ("bytes after the last tensor",)),
    "an overlap": (header(lambda held: shift(held, 1, -4)), (WEIGHTS, "overlaps")),
    "a hole": (header(lambda held: shift(held, 1, 4)), (WEIGHTS, "leaves a hole")),
    "a wrong size": (header(lambda held: entry(held).update(dtype="F16")), ("its offsets span",)),
    "an unknown dtype": (header(lambda held: entry(held).update(dtype="F4")), ("'F4'",)),
    "a negative shape": (header(lambda held: entry(held).update(shape=[-1])), ("invalid shape",)),
    **{
        f"{dtype}": (
            tensors(lambda t, dtype=dtype: t.update({UP: t[UP].to(dtype)})),  # type: ignore[misc]
            (UP, "F32, F16, BF16"),
        )
        for dtype in (torch.int8, torch.float64)
    },
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_refuse_damaged_weights(llama: Path, tmp_path: Path, refuses: Refuses, kind: str) -> None:
    damage, words = DAMAGES[kind]
    dense = clone(llama, tmp_path / "dense")
    damage(dense)
    refuses(dense, *words)


def test_refuse_to_fuse_experts_of_two_dtypes(
    llama: Path, tmp_path: Path, refuses: Refuses
) -> None:
    dense = clone(llama, tmp_path / "dense")
    save_tensors(dense, lambda held: held.update({UP: held[UP].bfloat16()}))
    arguments = ("--recipe", "E2G2T2", "--expert-layout", "fused")
    refuses(dense, "dtypes", "--dtype", arguments=arguments)
    done = invoke("convert", dense, tmp_path / "moe", *arguments, "--dtype", "float32", "--quiet")
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not valid JSON"),
        (b"\x80\x02}q\x00.", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b'{"a": 1}', "a is not described"),
        (b'{"a": {}}', "dtype"),
        (b'{"a": {"dtype": "F32"}}', "shape"),
        (b'{"a": {"dtype": "F32", "shape": [1]}}', "offsets"),
        (b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}', "dtype"),
        (b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}', "shape"),
        (b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', "shape"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}', "offsets"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', "offsets"),
        (b"{}", "after the last tensor"),
    ],
)
def test_refuse_headers_that_are_none(llama: Path, tmp_path: Path, text: bytes, words: str) -> None:
    path = clone(llama, tmp_path / "dense") / WEIGHTS
    path.write_bytes(with_header(path.read_bytes(), text))
    with pytest.raises(UpcycleError, match=WEIGHTS) as caught:
        open_checkpoint(path.parent)
    assert words in caught.value.message


# Sharded checkpoints ------------------------------------------------------------------------------


@pytest.fixture
def sharded(make_dense: MakeDense, tmp_path: Path) -> Path:
    path = clone(make_dense("llama", max_shard_size="40KB"), tmp_path / "dense")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def index_of(edit: Callable[[dict[str, str]], object]) -> Damage:
    def damage(sharded: Path) -> None:
        index = read_json(sharded / INDEX)
        edit(index["weight_map"])
        write_json(sharded / INDEX, index)

    return damage


def place(value: object) -> Damage:
    return index_of(lambda places: places.update({"model.norm.weight": value}))  # type: ignore[dict-item]


def move_out(sharded: Path) -> None:
    """Move a whole shard out of the directory, and say so in the index."""
    shard = read_json(sharded / INDEX)["weight_map"]["model.norm.weight"]
    (sharded / shard).rename(sharded.parent / "elsewhere.safetensors")
    there = "../elsewhere.safetensors"
    index_of(lambda places: places.update({n: there for n, f in places.items() if f == shard}))(
        sharded
    )


def copy_shard(sharded: Path) -> None:
    shard = read_json(sharded / INDEX)["weight_map"]["model.norm.weight"]
    shutil.copyfile(sharded / shard, sharded / "copy.safetensors")
    index_of(lambda places: places.update(another="copy.safetensors"))(sharded)


def misplace(places: dict[str, str]) -> None:
    shards = sorted({*places.values()})
    places["model.norm.weight"] = next(s for s in shards if s != places["model.norm.weight"])


def second(sharded: Path) -> Path:
    return sorted(sharded.glob("*.safetensors"))[1]


ELSEWHERE: tuple[object, ...] = (
    *("sub/../../elsewhere.safetensors", "/etc/passwd", "", "sub\\shard.safetensors"),
    *("nul\0byte", None, ["a.safetensors"]),
)
OUTSIDE = "not a file of this directory"
SHARD_DAMAGES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "a missing shard": (lambda d: second(d).unlink(), ("missing", "Download or copy it again")),
    "no index": (lambda d: (d / INDEX).unlink(), (INDEX,)),
    "an empty index": (lambda d: (d / INDEX).write_text(""), (INDEX,)),
    "an index without places": (lambda d: (d / INDEX).write_text('{"weight_map": {}}'), (INDEX,)),
    **{f"placed in {value!r}": (place(value), (OUTSIDE,)) for value in ELSEWHERE},
    "a shard outside": (move_out, ("elsewhere.safetensors", OUTSIDE)),
    "a shard that is not there": (place("model-00099-of-00099.safetensors"), ("missing",)),
    "a tensor in another shard": (index_of(misplace), (INDEX, "model.norm.weight")),
    "a tensor that is not there": (
        index_of(lambda places: places.update({"x": [*places.values()][0]})),  # noqa: RUF015
        (INDEX, "x"),
    ),
    "a tensor left out": (
        index_of(lambda places: places.pop("model.norm.weight")),
        (INDEX, "does not list model.norm.weight"),
    ),
    "a tensor twice": (copy_shard, ("is in both", "copy.safetensors")),
}


@pytest.mark.parametrize("kind", SHARD_DAMAGES)
def test_refuse_damaged_shards_and_indices(sharded: Path, refuses: Refuses, kind: str) -> None:
    damage, words = SHARD_DAMAGES[kind]
    damage(sharded)
    refuses(sharded, *words)
