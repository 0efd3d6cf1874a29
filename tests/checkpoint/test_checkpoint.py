"""Read a checkpoint: headers, values on demand, and whether a file changed meanwhile.

Damaged files are in hostile/test_bad_sources.py.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MakeDense, clone, snapshot
from safetensors.torch import load_file
from shapes import TORCH, same_bits, tiny_config, write_model

from upcycle_cli import UpcycleError, open_checkpoint
from upcycle_cli.checkpoint.checkpoint import raw_bytes
from upcycle_cli.checkpoint.header import ITEM_BYTES
from upcycle_cli.checkpoint.storage import COMPANIONS as PATTERNS
from upcycle_cli.core.safe_files import matches
from upcycle_cli.models.dense_rows import DENSE

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
    """Write a safetensors file by hand: data in the given order, the header in `order`."""
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


def test_a_checkpoint_has_the_digests_of_its_header_and_config(dense: Path) -> None:
    checkpoint, raw = open_checkpoint(dense), (dense / WEIGHTS).read_bytes()
    header = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    (shard,) = checkpoint.shards
    assert (shard.name, shard.size) == (WEIGHTS, len(raw))
    assert shard.digest == hashlib.sha256(header).hexdigest()
    config = (dense / "config.json").read_bytes()
    assert checkpoint.config_digest == hashlib.sha256(config).hexdigest()
    assert checkpoint.config == CONFIG


def test_read_every_dtype_in_any_order_and_headers_with_padding(tmp_path: Path) -> None:
    tensors = {
        dtype: (dtype, [3, 5], bytes([number]) * 15 * size)
        for number, (dtype, size) in enumerate(ITEM_BYTES.items())
    } | {"none": ("F32", [0, 7], b""), "scalar": ("U8", [], b"\1")}
    path = write_raw(tmp_path / "d", tensors, order=sorted(tensors), padding=37)
    checkpoint = open_checkpoint(path, as_stored=True)
    data = (path / WEIGHTS).read_bytes()
    for name, (_, _, content) in tensors.items():
        entry = checkpoint.tensors[name]
        assert data[entry.offset : entry.offset + entry.nbytes] == content
    assert checkpoint.num_parameters == 15 * len(ITEM_BYTES) + 1


# Shards ------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(make_dense: MakeDense, tmp_path: Path) -> Path:
    """The model `llama` in several files."""
    return clone(make_dense("llama", max_shard_size="40KB"), tmp_path / "sharded")


def test_read_shards_as_one_checkpoint(llama: Path, sharded: Path) -> None:
    one, other = open_checkpoint(llama), open_checkpoint(sharded)
    assert len(other.shards) > 2
    assert one.tensors.keys() == other.tensors.keys()
    assert one.nbytes == other.nbytes
    with one.reader() as whole, other.reader() as parts:
        for name in one.tensors:
            assert same_bits(whole.tensor(name), parts.tensor(name))


def test_prefer_a_single_file_to_an_index_like_transformers(llama: Path, sharded: Path) -> None:
    shutil.copy(llama / WEIGHTS, sharded)
    assert [shard.name for shard in open_checkpoint(sharded).shards] == [WEIGHTS]


# Values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(TORCH))
def test_read_the_values_that_the_library_reads(tmp_path: Path, dtype: str) -> None:
    path = write_model(tmp_path / "dense", CONFIG, dtype=dtype)
    checkpoint = open_checkpoint(path, as_stored=True)
    data = (path / WEIGHTS).read_bytes()
    with checkpoint.reader() as reader:
        for name, tensor in load_file(path / WEIGHTS).items():
            entry = checkpoint.tensors[name]
            assert same_bits(reader.tensor(name), tensor)
            stored = data[entry.offset : entry.offset + entry.nbytes]
            assert bytes(raw_bytes(reader.tensor(name))) == stored


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_read_values_at_odd_offsets(tmp_path: Path, dtype: str, shift: int) -> None:
    """The format does not guarantee alignment."""
    values = torch.arange(12).reshape(3, 4).to(TORCH[dtype]) - 5.5
    tensors = {
        "spacer": ("U8", [shift], bytes(shift)),
        "values": (dtype, [3, 4], bytes(raw_bytes(values))),
        "scalar": (dtype, [], bytes(raw_bytes(values[0, 1]))),
    }
    path = write_raw(tmp_path / "dense", tensors)
    with open_checkpoint(path).reader() as reader:
        assert same_bits(reader.tensor("values"), values)
        # x86 would forgive a missing alignment, other processors not.
        assert reader.tensor("values").data_ptr() % values.element_size() == 0
        assert same_bits(reader.tensor("scalar"), values[0, 1])


def test_keep_the_file_when_a_tensor_is_written_to(dense: Path) -> None:
    before = snapshot(dense)
    with open_checkpoint(dense).reader() as reader:
        for name in load_file(dense / WEIGHTS):
            reader.tensor(name).add_(1)
        gc.collect()
    assert snapshot(dense) == before


# Unchanged ---------------------------------------------------------------------------------------


def touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def append(path: Path) -> None:
    status = path.stat()
    with path.open("ab") as file:
        file.write(b"\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # only the size differs


@pytest.mark.parametrize("name", ["model-00002-of-", "tokenizer.json"])
@pytest.mark.parametrize("change", [touch, append])
def test_notice_a_change(sharded: Path, name: str, change: Callable[[Path], None]) -> None:
    checkpoint = open_checkpoint(sharded)
    name = next(path.name for path in sharded.iterdir() if path.name.startswith(name))
    (sharded / "notes.txt").write_text("not a file of the checkpoint")
    checkpoint.check_unchanged()
    change(sharded / name)
    with pytest.raises(UpcycleError, match=f"{name} changed while it was being read"):
        checkpoint.check_unchanged()
    (sharded / name).unlink()
    with pytest.raises(UpcycleError, match=f"{name} is missing"):
        checkpoint.check_unchanged()


# Companions and names ----------------------------------------------------------------------------

COMPANIONS = (
    *("LICENSE", "LICENCE.txt", "NOTICE", "USE_POLICY.md", "added_tokens.json", "merges.txt"),
    *("additional_chat_templates/tool_use.jinja", "chat_template.jinja", "chat_template.json"),
    *("generation_config.json", "qwen.tiktoken", "special_tokens_map.json", "tokenizer.json"),
    *("tokenizer.model", "tokenizer.model.v3", "tokenizer_config.json", "vocab.json", "vocab.txt"),
    *("License.txt", "MODEL_LICENSE", "Notice", "license", "emoji.json", "tekken.json"),
    *("tiktoken.model", "SYSTEM_PROMPT.txt", "sentencepiece.bpe.model"),
)
OTHERS = (
    *("README.md", "config.json", "modeling_llama.py", "pytorch_model.bin", ".gitattributes"),
    *("consolidated.safetensors", "model.safetensors.index.json.bak", "training_args.bin"),
    *("original/tokenizer.model", "upcycle.json"),
)


def test_find_companions(dense: Path) -> None:
    for name in (*COMPANIONS, *OTHERS):
        (dense / name).parent.mkdir(exist_ok=True)
        if name != "config.json":
            (dense / name).write_text(f"this is {name}")
    (dense / "tokenizer_of_a_kind.json").mkdir()  # a directory is not a companion
    found = open_checkpoint(dense).companions
    assert [file.name for file in found] == sorted(COMPANIONS)
    for file in found:
        status = (dense / file.name).stat()
        assert (file.size, file.mtime_ns) == (status.st_size, status.st_mtime_ns)
        assert file.digest is None


def test_every_file_of_a_tokenizer_is_a_companion() -> None:
    import transformers
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES as NAMES

    classes = [getattr(transformers, NAMES[kind] or "") for kind in {*DENSE} & {*NAMES}]
    read = {name for each in classes for name in each.vocab_files_names.values()}
    assert {name for name in read if not matches(name, PATTERNS)} == set()


@pytest.mark.parametrize(
    ("folder", "name"),
    [("models--HuggingFaceTB--SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"), ("models--gpt", "gpt")],
)
def test_name_a_snapshot_by_its_repo(dense: Path, tmp_path: Path, folder: str, name: str) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    blobs, snapshot_path = (tmp_path / folder / part for part in ("blobs", f"snapshots/{commit}"))
    blobs.mkdir(parents=True)
    snapshot_path.mkdir(parents=True)
    for file in dense.iterdir():  # the cache has links to files named by digests
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blobs / digest)
        (snapshot_path / file.name).symlink_to(f"../../blobs/{digest}")
    checkpoint = open_checkpoint(snapshot_path)
    assert (checkpoint.name, checkpoint.revision) == (name, commit)
    checkpoint.check_unchanged()
    (tmp_path / "link").symlink_to(snapshot_path)
    assert open_checkpoint(tmp_path / "link").name == name
