"""Sources that no model can be made of: one clear message, exit code 2, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REMOVED, MakeDense, clone, read_json, write_json
from refusals import INDEX, WEIGHTS, Refuses, invoke
from verified import edit_tensors

from upcycle_cli import Recipe, UpcycleError, build_plan, open_checkpoint

Damage = Callable[[Path], object]
UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.layers.1.post_attention_layernorm.weight"

# Configs ------------------------------------------------------------------------------------------

WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 8}
Config = tuple[str, dict[str, Any], str]


def each(
    key: str, *values: object, of: str = "llama", word: str = "", **others: object
) -> Iterator[Config]:
    """Yield a row for each value of a key, with the word that the message must have."""
    for value in values:
        yield of, {key: value, **others}, word or key


CONFIGS: tuple[Config, ...] = (
    *each("hidden_size", "32", 32.0, 0, -32, True),
    *each("intermediate_size", "big", {}),
    *each("num_hidden_layers", None, 2.5, 10**9, 10**30),
    *each("num_hidden_layers", 1, word="model.layers.1"),
    *each("vocab_size", None, [260]),
    *each("vocab_size", REMOVED, word="config.json implies"),
    *each("head_dim", "8", 0),
    *each("num_attention_heads", 5, word="num_attention_heads 5", head_dim=None),
    *each("hidden_act", None, ["silu"]),
    *each("rms_norm_eps", None, "1e-6"),
    *each("rope_theta", "1e4", None, [1], rope_parameters=REMOVED),
    *each("rope_scaling", "linear", {"type": ["linear"]}),
    *each("rope_scaling", {"rope_type": "linear", "rope_theta": "x"}, word="rope_theta"),
    *each("rope_parameters", {"full_attention": {"rope_theta": 1e4}}),
    *each("rope_parameters", "x", [1], 7, of="gemma3_text"),
    *each("max_position_embeddings", 2048.5),
    *each("tie_word_embeddings", None, "false"),
    *each("eos_token_id", {"id": 2}, ["</s>"]),
    *each("mlp_bias", "no"),
    *each("model_type", ["llama"], None, 7, {}),
    *each("model_type", "gpt9", word="upcycle families"),
    *each("quantization_config", "fp8", [], {}, word="quantised"),
    *each("use_double_wide_mlp", True, of="gemma4_text", word="one size"),
    *each("activation_sparsity_pattern", [0.5], ["0.5"] * 4, 0.5, of="gemma3n_text"),
    *each("intermediate_size", [48, 40, 48, 48], [], ["48"], of="gemma3n_text"),
    *each("num_hidden_layers", 2.5, of="gemma3n_text"),
    *each("layer_types", [{"kind": "full"}] * 2, ["full_attention"], "full", {}, of="qwen3"),
    *each("layer_types", ["chunked_attention"] * 2, ["sliding_attention"] * 2, of="qwen3"),
    *each("sliding_window", "8", -1, of="qwen3", use_sliding_window=True),
    *each("sliding_window", "8", [8], of="gemma3_text"),
    *each("layer_rope_theta", 7, "x", of="granite_swa"),
    *each("full_attn_idxs", 7, "x", of="lfm2"),
    *each("per_layer_config", 7, [1], {"0": 7}, of="gemma4_text"),
    *each("max_window_layers", None, of="qwen3", layer_types=REMOVED, **WINDOW),
)  # fmt: skip


@pytest.mark.parametrize(("model_type", "changes", "word"), CONFIGS, ids=str)
def test_refuse_a_config(
    make_dense: MakeDense, tmp_path: Path, model_type: str, changes: dict[str, Any], word: str
) -> None:
    dense = clone(make_dense(model_type), tmp_path / "dense", **changes)
    with pytest.raises(UpcycleError) as caught:
        build_plan(Recipe("E2G2T2"), open_checkpoint(dense))
    assert word in str(caught.value)


def test_accept_oddities_that_do_not_matter(llama: Path, tmp_path: Path) -> None:
    odd: dict[str, Any] = {"torch_dtype": 7, "dtype": ["bfloat16"], "architectures": None}
    odd |= {"auto_map": {}, "id2label": {"0": 1}, "transformers_version": 4, "_name_or_path": 7}
    odd |= {"quantization_config": None, "num_experts": 0, "eos_token_id": []}
    dense = clone(llama, tmp_path / "dense", **odd)
    assert build_plan(Recipe("E2G2T2"), open_checkpoint(dense)).promise == "exact"


# Files --------------------------------------------------------------------------------------------


def put(name: str, data: bytes | None) -> Damage:
    """Replace a file by one with this data, or by a directory."""

    def damage(dense: Path) -> None:
        (dense / name).unlink()
        (dense / name).mkdir() if data is None else (dense / name).write_bytes(data)

    return damage


def rename(name: str) -> Damage:
    return lambda dense: (dense / WEIGHTS).rename(dense / name)


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    return lambda dense: edit_tensors(dense, edit)


def cast(dtype: torch.dtype) -> Damage:
    return tensors(lambda held: held.update({UP: held[UP].to(dtype)}))


def raw(edit: Callable[[bytes], bytes]) -> Damage:
    return lambda dense: (dense / WEIGHTS).write_bytes(edit((dense / WEIGHTS).read_bytes()))


def header(text: bytes | Callable[[dict[str, Any]], object]) -> Damage:
    """Replace or edit the header of the weights, and leave their data as it is."""

    def edit(data: bytes) -> bytes:
        start = 8 + int.from_bytes(data[:8], "little")
        new = text
        if not isinstance(new, bytes):
            held = json.loads(data[8:start])
            new(held)
            new = json.dumps(held).encode()
        return len(new).to_bytes(8, "little") + new + data[start:]

    return raw(edit)


def entry(position: int = 0, shift: int = 0, **changes: object) -> Damage:
    """Change the entry of the tensor that lies first in the file, or of a later one."""

    def edit(held: dict[str, Any]) -> None:
        entries = [value for name, value in held.items() if name != "__metadata__"]
        found = sorted(entries, key=lambda each: each["data_offsets"])[position]
        found.update(data_offsets=[at + shift for at in found["data_offsets"]], **changes)

    return header(edit)


def one(**fields: object) -> Damage:
    """Leave one tensor in the header, with these fields."""
    return header(json.dumps({"a": fields}).encode())


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"
OFFSETS, F32 = {"data_offsets": [0, 4]}, {"dtype": "F32"}
FILES: tuple[tuple[str, Damage, str], ...] = (
    ("no source", shutil.rmtree, "does not exist"),
    ("an empty config", put("config.json", b""), "not valid JSON"),
    ("Python", put("config.json", b"{'model_type': 'llama'}"), "not valid JSON"),
    ("a binary config", put("config.json", b"\xff\xfe\x00"), "not valid JSON"),
    ("a deep config", put("config.json", b"[" * 100_000), "not valid JSON"),
    ("a list", put("config.json", b'["llama"]'), "is not a JSON object"),
    ("nothing in it", put("config.json", b"{}"), "model_type"),
    ("a directory", put("config.json", None), "config.json"),
    (
        "a pickle",
        rename("pytorch_model.bin"),
        "pytorch_model.bin|AutoModelForImageTextToText|copy its tokenizer",
    ),
    ("a GGUF", rename("model-Q4_K.gguf"), "GGUF (model-Q4_K.gguf)|gguf_file='FILE'"),
    ("an adapter", rename("adapter_model.safetensors"), f"no {WEIGHTS}"),
    ("a state of training", rename("optimizer.pt"), f"no {WEIGHTS}"),
    ("no weights", lambda dense: (dense / WEIGHTS).unlink(), f"no {WEIGHTS}"),
    ("a directory of weights", put(WEIGHTS, None), WEIGHTS),
    ("a git-lfs pointer", put(WEIGHTS, POINTER), f"{WEIGHTS}|Download"),
    ("a norm of zeros", tensors(lambda t: t[NORM].fill_(0.0)), NORM),
    ("int8", cast(torch.int8), f"{UP}|F32, F16, BF16"),
    ("float64", cast(torch.float64), f"{UP}|F32, F16, BF16"),
    ("truncated", raw(lambda data: data[:-1]), f"{WEIGHTS}|truncated|Download or copy it"),
    ("a surplus", raw(lambda data: data + b"1234567"), "truncated or damaged"),
    ("an overlap", entry(1, shift=-4), f"{WEIGHTS}|do not follow"),
    ("a hole", entry(1, shift=4), f"{WEIGHTS}|do not follow"),
    ("a wrong size", entry(dtype="F16"), "shape or offsets"),
    ("an unknown dtype", entry(dtype="F4"), "'F4'"),
    ("a negative shape", entry(shape=[-1]), "invalid dtype, shape"),
    ("no header", header(b""), "not valid JSON"),
    ("a pickled header", header(b"\x80\x02}q\x00."), "not valid JSON"),
    ("a header of a list", header(b"[]"), "not a JSON object"),
    ("a number for a tensor", header(b'{"a": 1}'), "a has an invalid"),
    ("an empty header", header(b"{}"), "truncated or damaged"),
    ("no dtype", one(), "dtype"),
    ("no shape", one(**F32), "shape"),
    ("no offsets", one(**F32, shape=[1]), "offsets"),
    ("a list of dtypes", one(dtype=["F32"], shape=[1], **OFFSETS), "dtype"),
    ("half a row", one(**F32, shape=[1.0], **OFFSETS), "shape"),
    ("a true row", one(**F32, shape=[True], **OFFSETS), "shape"),
    ("offsets of text", one(**F32, shape=[1], data_offsets=["0", "4"]), "offsets"),
    ("offsets backwards", one(**F32, shape=[1], data_offsets=[4, 0]), "offsets"),
)


@pytest.mark.parametrize(("damage", "words"), [row[1:] for row in FILES], ids=[r[0] for r in FILES])
def test_refuse_damaged_files(
    llama: Path, tmp_path: Path, refuses: Refuses, damage: Damage, words: str
) -> None:
    dense = clone(llama, tmp_path / "dense")
    damage(dense)
    message = refuses(dense, *words.split("|"))
    assert "hf download" not in message  # an absolute path is no repo


def test_refuse_to_fuse_experts_of_two_dtypes(
    llama: Path, tmp_path: Path, refuses: Refuses
) -> None:
    dense = clone(llama, tmp_path / "dense")
    cast(torch.bfloat16)(dense)
    arguments = ("--recipe", "E2G2T2", "--expert-layout", "fused")
    refuses(dense, "one tensor cannot hold", "--dtype", arguments=arguments)
    done = invoke("convert", dense, tmp_path / "moe", *arguments, "--dtype", "float32", "--quiet")
    assert done.exit_code == 0, done.stderr


# Sharded checkpoints ------------------------------------------------------------------------------


@pytest.fixture
def sharded(make_dense: MakeDense, tmp_path: Path) -> Path:
    path = clone(make_dense("llama", max_shard_size="40KB"), tmp_path / "dense")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


LAST = "model.norm.weight"


def places(edit: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(sharded: Path) -> None:
        index = read_json(sharded / INDEX)
        edit(index["weight_map"])
        write_json(sharded / INDEX, index)

    return damage


def place(value: object) -> Damage:
    return places(lambda files: files.update({LAST: value}))


def copy_shard(sharded: Path) -> None:
    shard = read_json(sharded / INDEX)["weight_map"][LAST]
    shutil.copyfile(sharded / shard, sharded / "copy.safetensors")
    places(lambda files: files.update(another="copy.safetensors"))(sharded)


def misplace(files: dict[str, str]) -> None:
    files[LAST] = next(file for file in files.values() if file != files[LAST])


def lose_shard(sharded: Path) -> None:
    sorted(sharded.glob("*.safetensors"))[1].unlink()


OUTSIDE = "not a file of this directory"
ELSEWHERE = ("sub/../../x.safetensors", "/etc/passwd", "", "sub\\x", "nul\0byte", None, ["a"])
SHARDS: tuple[tuple[str, Damage, str], ...] = (
    ("a missing shard", lose_shard, "missing|Download or copy it again"),
    ("no index", lambda dense: (dense / INDEX).unlink(), INDEX),
    ("an empty index", put(INDEX, b""), INDEX),
    ("an index without places", put(INDEX, b'{"weight_map": {}}'), INDEX),
    *((f"placed in {value!r}", place(value), OUTSIDE) for value in ELSEWHERE),
    ("a shard that is not there", place("model-00099-of-00099.safetensors"), "missing"),
    ("a tensor in another shard", places(misplace), f"{INDEX}|{LAST}"),
    ("a tensor that is not there", places(lambda p: p.update(x=p[LAST])), f"{INDEX}|x"),
    (
        "a tensor left out",
        places(lambda files: files.pop(LAST)),
        f"{INDEX}|{LAST} in no file",
    ),
    ("a tensor twice", copy_shard, "is in both|copy.safetensors"),
)


@pytest.mark.parametrize(("damage", "words"), [r[1:] for r in SHARDS], ids=[r[0] for r in SHARDS])
def test_refuse_damaged_shards(sharded: Path, refuses: Refuses, damage: Damage, words: str) -> None:
    damage(sharded)
    refuses(sharded, *words.split("|"))
