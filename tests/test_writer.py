"""What is on disk after writing: read back by safetensors, and by hand where that is blind."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import LAYOUTS
from engine_fixtures import opened_workspace
from safetensors import safe_open
from shapes import (
    PAIRS,
    TORCH,
    make_recipe,
    same_bits,
    tensor_shapes,
    tiny_config,
    value_of,
    write_model,
)

from upcycle_cli import Options, UpcycleError, build_plan, open_checkpoint
from upcycle_cli.core.dir_handle import Folder
from upcycle_cli.plan.expressions import Expr, contiguous_source, leaves
from upcycle_cli.plan.output import Role
from upcycle_cli.plan.plan import Plan
from upcycle_cli.recipe.recipe import ExpertLayout, Routing
from upcycle_cli.write import evaluate as arithmetic
from upcycle_cli.write import writer
from upcycle_cli.write.evaluate import Read, evaluate
from upcycle_cli.write.record import write_index, write_json
from upcycle_cli.write.writer import WriteOptions, write_weights

INDEX = "model.safetensors.index.json"
SHARDED = Options(max_shard_bytes=700)
Make = Callable[..., Plan]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def plan(
        recipe: str = "E2G2T2",
        *,
        model_type: str = "llama",
        dtype: str = "BF16",
        target: str = "auto",
        options: Options | None = None,
        **config: Any,  # noqa: ANN401
    ) -> Plan:
        path = write_model(tmp_path / "dense", tiny_config(model_type, **config), dtype=dtype)
        source = open_checkpoint(path)
        return build_plan(make_recipe(recipe), source, target=target, options=options)

    return plan


@pytest.fixture
def output(tmp_path: Path) -> Path:
    path = tmp_path / "moe"
    path.mkdir()
    return path


def write(
    plan: Plan, directory: Path, progress: Callable[[int], None] = lambda _: None
) -> dict[str, str]:
    options = WriteOptions(fsync=False, workers=1)  # one part at a time, to be counted
    with opened_workspace(plan, directory) as workspace:
        written = write_weights(plan, plan.shards, workspace, progress=progress, options=options)
        write_index(plan, workspace.folder)
    return written.routers


def header(path: Path) -> tuple[dict[str, Any], bytes, int]:
    """The header of a file: parsed, as it is, and where the data begins."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[8:start], start


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [Options(), SHARDED], ids=["one file", "sharded"])
@pytest.mark.parametrize(
    ("model_type", "target"), [(dense, t) for dense, targets in PAIRS.items() for t in targets]
)
def test_safetensors_reads_what_the_expressions_say(
    make: Make,
    output: Path,
    model_type: str,
    target: str,
    options: Options,
    layout: ExpertLayout,
) -> None:
    options = Options(expert_layout=layout, max_shard_bytes=options.max_shard_bytes)
    plan = make("E2G3T3", model_type=model_type, target=target, options=options)
    write(plan, output)
    shards = sorted(path.name for path in output.glob("*.safetensors"))
    assert shards == sorted(shard.name for shard in plan.shards)
    with plan.source.reader() as reader:
        for shard in plan.shards:
            with safe_open(output / shard.name, framework="pt") as file:
                assert set(file.keys()) == {tensor.name for tensor in shard.tensors}
                assert file.metadata() == {"format": "pt"}
                for tensor in shard.tensors:
                    # Whole, where the writer takes joined tensors apart.
                    value = value_of(tensor.expr, reader.tensor)
                    assert same_bits(file.get_tensor(tensor.name), value)


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize("wanted", [None, "float32", "float16", "bfloat16"])
def test_dtypes(make: Make, output: Path, dtype: str, wanted: str | None) -> None:
    plan = make(dtype=dtype, options=Options(dtype=wanted))
    write(plan, output)
    found = {entry.dtype for entry in entries(output)}
    assert found == {dtype if wanted is None else plan.options.storage_dtype}


def entries(path: Path) -> list[Any]:
    (path / "config.json").write_text("{}")
    return list(open_checkpoint(path).tensors.values())


@pytest.mark.parametrize("options", [Options(), SHARDED, Options(max_shard_bytes=1)])
def test_the_data_is_aligned_and_without_holes(make: Make, output: Path, options: Options) -> None:
    plan = make(options=options)
    write(plan, output)
    lengths = set()
    for shard in plan.shards:
        parsed, raw, start = header(output / shard.name)
        assert start % 8 == 0
        assert raw.rstrip(b" ").endswith(b"}")  # padded with spaces, as the format allows
        lengths.add(len(raw.rstrip(b" ")) % 8)
        assert parsed.pop("__metadata__") == {"format": "pt"}
        offsets = [entry["data_offsets"] for entry in parsed.values()]
        assert [begin for begin, _ in offsets] == [0, *(end for _, end in offsets[:-1])]
        assert (output / shard.name).stat().st_size == start + offsets[-1][1]
        assert offsets[-1][1] == shard.nbytes
    if len(plan.shards) > 8:
        assert lengths - {0}  # or nothing was padded, and this proved nothing


def test_the_index(make: Make, output: Path) -> None:
    plan = make(options=SHARDED)
    write(plan, output)
    index = json.loads((output / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for path in output.glob("*.safetensors")
        for name, entry in header(path)[0].items()
        if name != "__metadata__"
    )
    assert index["weight_map"] == {
        name: path.name
        for path in output.glob("*.safetensors")
        for name in header(path)[0]
        if name != "__metadata__"
    }


def test_one_file_needs_no_index(make: Make, output: Path) -> None:
    write(make(), output)
    assert [path.name for path in output.glob("*.safetensors*") if "note" not in path.name] == [
        "model.safetensors"
    ]


def test_a_tensor_larger_than_a_shard_lies_alone(make: Make, output: Path) -> None:
    plan = make(options=Options(max_shard_bytes=150))  # an embedding has 11 · 8 · 2 = 176
    write(plan, output)
    place = json.loads((output / INDEX).read_text())["weight_map"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert list(place.values()).count(place[name]) == 1
    sizes = [header(path)[0] for path in output.glob("*.safetensors")]
    for parsed in sizes:
        parsed.pop("__metadata__")
        last = max(entry["data_offsets"][1] for entry in parsed.values())
        assert last <= 150 or len(parsed) == 1


@pytest.mark.parametrize("options", [Options(), SHARDED])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_router_digests(make: Make, output: Path, options: Options, layout: ExpertLayout) -> None:
    options = Options(expert_layout=layout, max_shard_bytes=options.max_shard_bytes)
    plan = make("E3G2T4", options=options)
    digests = write(plan, output)
    assert len(digests) == 2
    assert len(set(digests.values())) == 2  # each layer has a router of its own
    for tensor in plan.tensors:
        if tensor.role is Role.ROUTER:
            (shard,) = (shard for shard in plan.shards if tensor in shard.tensors)
            path = output / shard.name
            parsed, _, start = header(path)
            begin, end = parsed[tensor.name]["data_offsets"]
            data = path.read_bytes()[start + begin : start + end]
            assert digests[tensor.name] == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("options", [Options(), SHARDED])
def test_progress_is_every_byte_of_the_tensors(make: Make, output: Path, options: Options) -> None:
    plan = make(options=options)
    written: list[int] = []
    write(plan, output, written.append)
    assert sum(written) == plan.nbytes
    assert all(count > 0 for count in written)


def test_json_is_for_people_too(tmp_path: Path) -> None:
    with Folder.open(tmp_path) as folder:
        write_json(folder, "x.json", {"name": "größer", "sizes": [1]})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert "größer" in text
    assert text.endswith("}\n")
    assert json.loads(text) == {"name": "größer", "sizes": [1]}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.norm.weight", "model.norm.weight"),
        (
            "model.layers.0.mlp.up_proj.weight",
            "model.layers.0.block_sparse_moe.experts.1.w3.weight",
        ),
    ],
)
def test_overflow_is_refused_by_name(
    make: Make, output: Path, tmp_path: Path, name: str, said: str
) -> None:
    from safetensors.torch import load_file, save_file

    plan = make(dtype="F32", options=Options(dtype="float16"))
    recipe, source = plan.recipe, plan.source.path
    file = tmp_path / "dense" / "model.safetensors"
    # Copies: what load_file gives still lies in the file that is about to be replaced.
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors[name].reshape(-1)[-1] = 1e6
    save_file(tensors, file, metadata={"format": "pt"})
    plan = build_plan(recipe, open_checkpoint(source), options=Options(dtype="float16"))
    with pytest.raises(UpcycleError, match="becomes infinite in f16") as caught:
        write(plan, output)
    assert caught.value.message.startswith(f"{said}:")
    assert caught.value.hint == "Use --dtype bfloat16 or float32."


# Once, and one at a time -------------------------------------------------------------------------


class Watch:
    """Looks on while the writer computes: how often, how large, and what is still alive then."""

    def __init__(self) -> None:
        self.computed: list[Expr] = []
        self.largest_bytes = 0
        self.most_alive = 0
        self._results: list[weakref.ref[memoryview]] = []

    def evaluate(self, expr: Expr, read: Read, *_: object) -> memoryview:
        alive = sum(result() is not None for result in self._results)
        value = evaluate(expr, read)
        if contiguous_source(expr) is None:
            self.computed.append(expr)
            self.most_alive = max(self.most_alive, alive)
            self.largest_bytes = max(self.largest_bytes, value.nbytes)
            self._results.append(weakref.ref(value))
        return value


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    looking = Watch()
    monkeypatch.setattr(arithmetic, "evaluate", looking.evaluate)
    return looking


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_are_computed_once(
    make: Make, output: Path, watch: Watch, layout: ExpertLayout
) -> None:
    plan = make("E8G3T6", options=Options(expert_layout=layout), tie_word_embeddings=True)
    write(plan, output)
    assert len(watch.computed) == len(set(watch.computed))
    parts = {leaf for tensor in plan.tensors for leaf in leaves(tensor.expr)}
    copied = {part for part in parts if contiguous_source(part)}
    assert set(watch.computed) == parts - copied
    # One router per layer, and each of three matrices in three shards: scaled or not, by columns
    # or by rows.
    assert len(parts) == len(tensor_shapes(plan.source.config)) - 2 * 3 + 2 * (1 + 3 * 3)


def test_what_is_only_copied_is_not_touched_by_arithmetic(
    make: Make, output: Path, watch: Watch
) -> None:
    plan = make("E4G1T2")
    write(plan, output)
    routers = [tensor for tensor in plan.tensors if tensor.role is Role.ROUTER]
    assert watch.computed == [tensor.expr for tensor in routers]


def test_a_source_that_is_cut_off_meanwhile_is_noticed(
    make: Make, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make("E2G1T2", vocab_size=3 * mmap.PAGESIZE)
    source = plan.source.path / "model.safetensors"
    real = os.pwrite

    def cut(*arguments: Any) -> int:  # noqa: ANN401
        if source.stat().st_size > mmap.PAGESIZE:
            os.truncate(source, mmap.PAGESIZE)
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", cut)
    with pytest.raises(UpcycleError, match=r"model\.safetensors changed while it was being read"):
        write(plan, output)


def test_two_files_are_written_at_once(
    make: Make, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make("E2G1T2", options=SHARDED)
    real, both = os.pwrite, threading.Event()
    unfinished: set[str] = set()

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        unfinished.add(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        if len(unfinished) == 2:
            both.set()
        assert both.wait(30), "a file waits for the one before"
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    options = WriteOptions(fsync=False, workers=2)
    with opened_workspace(plan, output) as workspace:
        write_weights(plan, plan.shards, workspace, progress=lambda _: None, options=options)


def test_what_fails_in_one_file_is_said_of_that_file(
    make: Make, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other files stop for it, and what they have to say is no news."""
    plan = make("E2G1T2", options=SHARDED)
    real = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if plan.shards[1].name in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    options = WriteOptions(fsync=False, workers=2)
    with (
        opened_workspace(plan, output) as workspace,
        pytest.raises(OSError, match="Disk quota exceeded") as caught,
    ):
        write_weights(plan, plan.shards, workspace, progress=lambda _: None, options=options)
    assert caught.value.filename == str(output / plan.shards[1].name)
    assert not (output / plan.shards[1].name).exists()


def test_a_piece_goes_to_all_its_places_before_the_next(
    make: Make, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make("E4G1T2")
    real, written = os.pwrite, list[tuple[int, bytes]]()

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        written.append((offset, bytes(data)))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(writer, "_PIECE_BYTES", 48)
    write(plan, output)
    gates = [tensor for tensor in plan.tensors if tensor.holds == ("gate",)]
    tensors, _, data_start = header(output / "model.safetensors")
    begins = [data_start + tensors[tensor.name]["data_offsets"][0] for tensor in gates[:4]]
    offsets = [offset for offset, _ in written]
    at = offsets.index(begins[0])
    assert offsets[at : at + 8] == [*begins, *(begin + 48 for begin in begins)]
    assert {data for _, data in written[at : at + 4]} == {written[at][1]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copied_group_is_shared_in_one_call(
    make: Make, output: Path, monkeypatch: pytest.MonkeyPatch, layout: ExpertLayout
) -> None:
    calls = []

    def share(source: int, start: int, target: int, offset: int, nbytes: int) -> bool:
        calls.append(nbytes)
        os.pwrite(target, os.pread(source, nbytes, start), offset)
        return True

    monkeypatch.setattr(Folder, "can_share", lambda _: True)
    monkeypatch.setattr(writer, "share", share)
    block = {"hidden_size": 64, "intermediate_size": 64}  # each shard of a matrix is one
    plan = make("E4G2T2", options=Options(expert_layout=layout), **block)
    write(plan, output)
    # Three copies in each of two layers; the two fused tensors of a layer are not neighbours.
    parts = [6] * 6 if layout is ExpertLayout.PER_EXPERT else [4, 4, 4, 2, 2, 2] * 2
    assert calls == [4096 * number for number in parts]
    with plan.source.reader() as reader, safe_open(output / "model.safetensors", "pt") as file:
        for tensor in plan.tensors:
            value = value_of(tensor.expr, reader.tensor)
            assert same_bits(file.get_tensor(tensor.name), value)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from upcycle_cli.__main__ import main
main()
"""


@pytest.mark.parametrize("options", [[], ["--verify"]], ids=" ".join)
def test_converting_needs_no_torch(make: Make, output: Path, options: list[str]) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, "convert", str(make().source.path)]
    command += [str(output / "new"), "--recipe", "E2G2T2", "--dtype", "float16", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # Verifying shows that torch is not to be had.
    assert (done.returncode == 0) == (not options), done.stderr
    assert ("import of torch halted" in done.stderr) == bool(options)


def test_a_head_that_is_the_embedding_is_computed_once(
    make: Make, output: Path, watch: Watch
) -> None:
    options = Options(untie_embeddings=True, dtype="float32")
    write(make(options=options, tie_word_embeddings=True), output)
    assert sum("embed_tokens" in repr(expr) for expr in watch.computed) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_does_not_grow_with_layers_or_experts(
    make: Make, output: Path, watch: Watch, layout: ExpertLayout
) -> None:
    """One part at a time, none larger than a dense tensor: the bound is the largest of them."""
    options = Options(expert_layout=layout, dtype="float32")
    largest = []
    for number, (layers, recipe) in enumerate([(1, "E2G2T2"), (6, "E2G2T2"), (2, "E32G2T2")]):
        (output / str(number)).mkdir()
        watch.largest_bytes = 0
        write(make(recipe, options=options, num_hidden_layers=layers), output / str(number))
        largest.append(watch.largest_bytes)
    assert largest[0] == largest[1] == 4 * 11 * 8  # the embedding
    assert largest[2] == 4 * 64 * 8  # with 64 experts the router is larger than that
    assert watch.most_alive == 0  # the part before is gone when the next is computed


def test_routing_is_no_matter_to_the_writer(make: Make, output: Path) -> None:
    """qwen2_moe's parts that do nothing yet: a shared expert that can learn, and zero biases."""
    plan = make("E2G1T2", target="qwen2_moe")
    assert plan.recipe.routing is Routing.SOFTMAX_TOPK
    write(plan, output)
    with safe_open(output / "model.safetensors", framework="pt") as file:
        for matrix in ("gate", "up", "down"):
            name = f"model.layers.0.mlp.shared_expert.{matrix}_proj.weight"
            assert file.get_tensor(name).any() == (matrix != "down")
        for matrix in "qkv":
            assert not file.get_tensor(f"model.layers.1.self_attn.{matrix}_proj.bias").any()
        # llama.cpp computes this gate as silu(x)/x.
        assert file.get_tensor("model.layers.0.mlp.shared_expert_gate.weight").all()


def test_a_failure_to_flush_is_not_lost(
    make: Make, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system reports that the disk refused some bytes once, to the first who asks."""
    asked = threading.Event()

    def refuse(_: int) -> None:
        asked.set()
        raise OSError(errno.EIO, "Input/output error")

    plan = make()
    monkeypatch.setattr(writer, "_FLUSH_SECONDS", 0)
    monkeypatch.setattr(os, "fdatasync", refuse)
    path = output / plan.shards[0].name
    with (
        opened_workspace(plan, output) as workspace,
        pytest.raises(OSError, match="Input/output error") as caught,
    ):
        write_weights(
            plan,
            plan.shards,
            workspace,
            progress=lambda _: assert_set(asked),
            options=WriteOptions(),
        )
    assert caught.value.filename == str(path)
    assert not path.exists()


def assert_set(event: threading.Event) -> None:
    assert event.wait(30)
