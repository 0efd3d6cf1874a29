"""Reading a checkpoint: headers, values on demand, and proof that nothing changed meanwhile.

What a damaged file is answered is in test_bad_weights.py.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import snapshot
from safetensors.torch import load_file, save_file
from shapes import TORCH, same_bits, tiny_config, write_hollow, write_model

from upcycle_cli import UpcycleError, open_checkpoint
from upcycle_cli.checkpoint.checkpoint import Checkpoint, raw_bytes
from upcycle_cli.checkpoint.header import ITEM_BYTES, TensorEntry

WEIGHTS = "model.safetensors"
CONFIG = tiny_config("llama")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return write_model(tmp_path / "dense", CONFIG)


def write_raw(
    path: Path,
    tensors: dict[str, tuple[str, list[int], bytes]],
    *,
    order: list[str] | None = None,
    padding: int = 0,
) -> Path:
    """Write a safetensors file by hand: data in the order given, header in `order`."""
    entries: dict[str, object] = {}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        offsets = [position, position + len(data)]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        position += len(data)
    header = json.dumps({name: entries[name] for name in order or entries}).encode()
    header += b" " * padding
    body = b"".join(data for _, _, data in tensors.values())
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + body)
    return path


# Headers -----------------------------------------------------------------------------------------


def test_every_tensor_is_described(dense: Path) -> None:
    checkpoint = open_checkpoint(dense)
    by_library = load_file(dense / WEIGHTS)
    assert {name: entry.shape for name, entry in checkpoint.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in by_library.items()
    }
    assert {entry.dtype for entry in checkpoint.tensors.values()} == {"BF16"}
    assert {entry.shard for entry in checkpoint.tensors.values()} == {WEIGHTS}
    assert checkpoint.num_parameters == sum(t.numel() for t in by_library.values())
    assert checkpoint.nbytes == 2 * checkpoint.num_parameters
    assert checkpoint.config == CONFIG


def test_digests_are_of_the_config_and_of_the_header(dense: Path) -> None:
    checkpoint = open_checkpoint(dense)
    raw = (dense / WEIGHTS).read_bytes()
    header = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    (shard,) = checkpoint.shards
    assert shard.digest == hashlib.sha256(header).hexdigest()
    assert (shard.name, shard.size) == (WEIGHTS, len(raw))
    config = (dense / "config.json").read_bytes()
    assert checkpoint.config_digest == hashlib.sha256(config).hexdigest()


@pytest.mark.parametrize("dtype", list(ITEM_BYTES))
def test_sizes_of_every_dtype_of_the_format(tmp_path: Path, dtype: str) -> None:
    size = ITEM_BYTES[dtype]
    tensors = {"x": (dtype, [3, 5], bytes(15 * size)), "y": (dtype, [], bytes(size))}
    checkpoint = open_checkpoint(write_raw(tmp_path / "dense", tensors))
    assert checkpoint.tensors["x"].nbytes == 15 * size
    assert checkpoint.tensors["y"].num_elements == 1
    assert checkpoint.num_parameters == 16


def test_entries_may_come_in_any_order_and_headers_may_end_in_spaces(tmp_path: Path) -> None:
    tensors = {
        "one": ("U8", [2], b"\1\2"),
        "none": ("F32", [0, 7], b""),
        "two": ("U8", [3], b"\3\4\5"),
    }
    path = write_raw(tmp_path / "d", tensors, order=["two", "none", "one"], padding=37)
    checkpoint = open_checkpoint(path)
    data = (path / WEIGHTS).read_bytes()
    for name, (_, _, content) in tensors.items():
        entry = checkpoint.tensors[name]
        assert data[entry.offset : entry.offset + entry.nbytes] == content


def test_the_librarys_metadata_is_no_tensor(dense: Path) -> None:
    assert b"__metadata__" in (dense / WEIGHTS).read_bytes()[:1000]
    assert "__metadata__" not in open_checkpoint(dense).tensors


def test_a_hollow_file_of_any_size_opens(tmp_path: Path) -> None:
    """Only headers are read: 96 GB that are not there do no harm."""
    config = tiny_config("llama", intermediate_size=10**9)
    checkpoint = open_checkpoint(write_hollow(tmp_path / "dense", config))
    assert checkpoint.nbytes > 2 * 3 * 2 * 8 * 10**9
    assert len(checkpoint.shards) > 1
    assert sum((tmp_path / "dense" / s.name).stat().st_blocks for s in checkpoint.shards) < 1000


# Shards ------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(dense: Path, tmp_path: Path) -> Path:
    """The checkpoint `dense` in three files."""
    path = tmp_path / "sharded"
    path.mkdir()
    shutil.copy(dense / "config.json", path)
    tensors = load_file(dense / WEIGHTS)
    weight_map: dict[str, str] = {}
    for i in range(3):
        names = sorted(tensors)[i::3]
        file_name = f"model-{i + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names}, path / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def test_shards_are_one_checkpoint(dense: Path, sharded: Path) -> None:
    one, other = open_checkpoint(dense), open_checkpoint(sharded)
    assert [shard.name for shard in other.shards] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    assert one.tensors.keys() == other.tensors.keys()
    assert one.nbytes == other.nbytes
    with one.reader() as whole, other.reader() as parts:
        for name in one.tensors:
            assert same_bits(whole.tensor(name), parts.tensor(name))


def test_a_single_file_wins_over_an_index_as_in_transformers(dense: Path, sharded: Path) -> None:
    shutil.copy(dense / WEIGHTS, sharded)
    assert [shard.name for shard in open_checkpoint(sharded).shards] == [WEIGHTS]


# Values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(TORCH))
def test_values_are_those_that_the_library_reads(tmp_path: Path, dtype: str) -> None:
    path = write_model(tmp_path / "dense", CONFIG, dtype=dtype)
    with open_checkpoint(path).reader() as reader:
        for name, tensor in load_file(path / WEIGHTS).items():
            assert same_bits(reader.tensor(name), tensor)


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_values_at_odd_offsets(tmp_path: Path, dtype: str, shift: int) -> None:
    """The format does not promise that a float lies where a CPU would like it."""
    values = torch.arange(12).reshape(3, 4).to(TORCH[dtype]) - 5.5
    tensors = {
        "spacer": ("U8", [shift], bytes(shift)),
        "values": (dtype, [3, 4], bytes(raw_bytes(values))),
        "scalar": (dtype, [], bytes(raw_bytes(values[0, 1]))),
    }
    path = write_raw(tmp_path / "dense", tensors)
    with open_checkpoint(path).reader() as reader:
        assert same_bits(reader.tensor("values"), values)
        # An x86 forgives what others do not.
        assert reader.tensor("values").data_ptr() % values.element_size() == 0
        assert same_bits(reader.tensor("scalar"), values[0, 1])


def test_tensors_without_elements(tmp_path: Path) -> None:
    tensors = {
        "rows": ("BF16", [0, 4], b""),
        "between": ("BF16", [1], b"\x80\x3f"),
        "columns": ("F32", [4, 0], b""),
    }
    with open_checkpoint(write_raw(tmp_path / "dense", tensors)).reader() as reader:
        assert reader.tensor("rows").shape == (0, 4)
        assert reader.tensor("between").tolist() == [1.0]
        assert reader.tensor("columns").shape == (4, 0)
        assert reader.tensor("columns").dtype is torch.float32


def test_nothing_but_empty_tensors(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "dense", {"x": ("F32", [0], b"")})
    with open_checkpoint(path).reader() as reader:
        assert reader.tensor("x").numel() == 0


def test_a_tensor_is_not_there(dense: Path) -> None:
    with open_checkpoint(dense).reader() as reader, pytest.raises(KeyError):
        reader.tensor("model.layers.9.mlp.up_proj.weight")


def test_reading_changes_nothing(dense: Path) -> None:
    """Neither does writing to what was read: the mapping is private."""
    before = snapshot(dense)
    with open_checkpoint(dense).reader() as reader:
        for name in load_file(dense / WEIGHTS):
            reader.tensor(name).add_(1)
        gc.collect()
    assert snapshot(dense) == before


def test_a_source_that_cannot_be_written_can_be_read(dense: Path) -> None:
    for file in dense.iterdir():
        file.chmod(0o444)
    dense.chmod(0o555)
    try:
        with open_checkpoint(dense).reader() as reader:
            assert reader.tensor("model.norm.weight").shape == (8,)
    finally:
        dense.chmod(0o755)


@pytest.mark.parametrize("dtype", list(TORCH))
def test_raw_bytes_are_the_files_bytes(tmp_path: Path, dtype: str) -> None:
    path = write_model(tmp_path / "dense", CONFIG, dtype=dtype)
    data = (path / WEIGHTS).read_bytes()
    checkpoint = open_checkpoint(path)
    with checkpoint.reader() as reader:
        for entry in checkpoint.tensors.values():
            stored = data[entry.offset : entry.offset + entry.nbytes]
            assert bytes(raw_bytes(reader.tensor(entry.name))) == stored


def test_raw_bytes_of_a_view_are_those_of_its_values() -> None:
    matrix = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    assert bytes(raw_bytes(matrix[:, 1:3])) == bytes(raw_bytes(matrix[:, 1:3].clone()))
    assert bytes(raw_bytes(matrix.T)) != bytes(raw_bytes(matrix))
    assert len(raw_bytes(torch.zeros(0, 4))) == 0


# Unchanged ---------------------------------------------------------------------------------------


def touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def append(path: Path) -> None:
    status = path.stat()
    with path.open("ab") as file:
        file.write(b"\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # the size alone tells


def test_an_unchanged_checkpoint_is_unchanged(sharded: Path) -> None:
    (sharded / "tokenizer.json").write_text("{}")
    checkpoint = open_checkpoint(sharded)
    (sharded / "notes.txt").write_text("not a file that anybody reads")
    checkpoint.check_unchanged()


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("change", [touch, append])
def test_a_change_is_noticed(sharded: Path, name: str, change: Callable[[Path], None]) -> None:
    (sharded / "tokenizer.json").write_text("{}")
    checkpoint = open_checkpoint(sharded)
    change(sharded / name)
    with pytest.raises(UpcycleError, match=f"{name} changed while it was being read"):
        checkpoint.check_unchanged()


def test_a_file_that_went_away_is_noticed(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    (sharded / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(UpcycleError, match=r"model-00001-of-00003.safetensors is missing"):
        checkpoint.check_unchanged()


# Companions and names ----------------------------------------------------------------------------

TAKEN = (
    "LICENSE",
    "LICENCE.txt",
    "NOTICE",
    "USE_POLICY.md",
    "added_tokens.json",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "qwen.tiktoken",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
LEFT = (
    "README.md",
    "config.json",
    "modeling_llama.py",
    "pytorch_model.bin",
    "consolidated.safetensors",
    "model.safetensors.index.json.bak",
    "original/tokenizer.model",
    ".gitattributes",
    "training_args.bin",
    "upcycle.json",
)


def test_companions_are_what_a_model_is_used_with(dense: Path) -> None:
    for name in (*TAKEN, *LEFT):
        (dense / name).parent.mkdir(exist_ok=True)
        if name != "config.json":
            (dense / name).write_text(f"this is {name}")
    (dense / "tokenizer_of_a_kind.json").mkdir()  # a directory is no companion
    found = open_checkpoint(dense).companions
    assert [file.name for file in found] == sorted(TAKEN)
    for file in found:
        status = (dense / file.name).stat()
        assert (file.size, file.mtime_ns) == (status.st_size, status.st_mtime_ns)
        assert file.digest is None


def test_a_directory_is_called_by_its_name(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(dense)
    assert (checkpoint.name, checkpoint.revision) == ("dense", None)
    monkeypatch.chdir(dense)
    assert open_checkpoint(Path()).name == "dense"


@pytest.mark.parametrize(
    ("folder", "name"),
    [("models--HuggingFaceTB--SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"), ("models--gpt", "gpt")],
)
def test_a_snapshot_of_the_hub_cache_is_called_by_its_repo(
    dense: Path, tmp_path: Path, folder: str, name: str
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    blobs, snapshot_path = (tmp_path / folder / part for part in ("blobs", f"snapshots/{commit}"))
    blobs.mkdir(parents=True)
    snapshot_path.mkdir(parents=True)
    for file in dense.iterdir():  # the cache holds links to files named by their digests
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blobs / digest)
        (snapshot_path / file.name).symlink_to(f"../../blobs/{digest}")
    checkpoint = open_checkpoint(snapshot_path)
    assert (checkpoint.name, checkpoint.revision) == (name, commit)
    checkpoint.check_unchanged()
    (tmp_path / "link").symlink_to(snapshot_path)
    assert open_checkpoint(tmp_path / "link").name == name


@pytest.mark.parametrize(
    "path", ["snapshots/abc", "other--a--b/snapshots/abc", "models--a--b/x/abc"]
)
def test_a_directory_that_only_looks_like_the_cache(dense: Path, tmp_path: Path, path: str) -> None:
    shutil.copytree(dense, tmp_path / path)
    checkpoint = open_checkpoint(tmp_path / path)
    assert (checkpoint.name, checkpoint.revision) == ("abc", None)


def test_entries_are_values() -> None:
    entry = TensorEntry("x", "F16", (2, 3), WEIGHTS, 100)
    assert entry == TensorEntry("x", "F16", (2, 3), WEIGHTS, 100)
    assert (entry.num_elements, entry.nbytes) == (6, 12)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: None, "does not exist"),
        (lambda path: path.write_text("x"), "is not a directory"),
        (lambda path: path.mkdir(), "has no config.json"),
    ],
)
def test_no_checkpoint_at_all(tmp_path: Path, make: Callable[[Path], Any], words: str) -> None:
    make(tmp_path / "dense")
    with pytest.raises(UpcycleError, match=words):
        open_checkpoint(tmp_path / "dense")


def test_checkpoints_are_frozen(dense: Path) -> None:
    checkpoint: Checkpoint = open_checkpoint(dense)
    with pytest.raises(AttributeError):
        checkpoint.config_digest = "another"  # type: ignore[misc]
