"""The weight files: what is in them, where it lies, and that each part is computed once."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import engine_fixtures as engine
import pytest
from conftest import LAYOUTS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shapes import PAIRS, same_bits, tensor_shapes, tiny_config, value_of, write_model

from upcycle_cli import Options, Recipe, UpcycleError, build_plan, open_checkpoint
from upcycle_cli.core import platform
from upcycle_cli.core.platform import BLOCK_BYTES
from upcycle_cli.plan.expressions import Expr, describe, leaves
from upcycle_cli.plan.output import Role
from upcycle_cli.plan.plan import Plan
from upcycle_cli.recipe.recipe import ExpertLayout
from upcycle_cli.write import evaluate as evaluation
from upcycle_cli.write import writer
from upcycle_cli.write.evaluate import evaluate
from upcycle_cli.write.file_layout import lay_out
from upcycle_cli.write.record import index_of
from upcycle_cli.write.staging import new_of
from upcycle_cli.write.writer import WriteOptions, write_weights

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
        return build_plan(Recipe(recipe), source, target=target, options=options)

    return plan


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """The folder that `write` fills."""
    return new_of(tmp_path / "moe")


def write(
    plan: Plan,
    directory: Path,
    progress: Callable[[int], None] = lambda _: None,
    options: WriteOptions | None = None,
) -> dict[str, str]:
    options = options or WriteOptions(fsync=False, workers=1)  # one part at a time, to be counted
    staging = engine.staging_in(plan, directory.parent.with_suffix(""))
    return write_weights(plan, plan.shards, staging, progress=progress, options=options).routers


def header(path: Path) -> tuple[dict[str, Any], int]:
    """The tensors in the header of a file, and where the data begins."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    assert entries.pop("__metadata__") == {"format": "pt"}  # transformers refuses a file without
    return entries, start


def assert_holds(plan: Plan, directory: Path) -> None:
    """The files hold the values of the expressions."""
    with plan.source.reader() as reader:
        for shard in plan.shards:
            with safe_open(directory / shard.name, framework="pt") as file:
                assert set(file.keys()) == {tensor.name for tensor in shard.tensors}
                for tensor in shard.tensors:
                    # Evaluated whole, where the writer takes joined tensors apart.
                    value = value_of(tensor.expr, reader.tensor)
                    assert same_bits(file.get_tensor(tensor.name), value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shard_bytes", [10**9, 700, 150])
@pytest.mark.parametrize(
    ("model_type", "target"), [(dense, t) for dense, targets in PAIRS.items() for t in targets]
)
def test_safetensors_reads_the_values_of_the_expressions(
    make: Make, output: Path, model_type: str, target: str, shard_bytes: int, layout: ExpertLayout
) -> None:
    options = Options(expert_layout=layout, max_shard_bytes=shard_bytes)
    plan = make("E2G3T3", model_type=model_type, target=target, options=options)
    told: list[int] = []
    digests = write(plan, output, told.append)
    assert_holds(plan, output)
    assert sum(told) == plan.nbytes
    found = {}
    for shard in plan.shards:
        entries, start = header(output / shard.name)
        offsets = [entry["data_offsets"] for entry in entries.values()]
        assert [begin for begin, _ in offsets] == [0, *(end for _, end in offsets[:-1])]
        assert start % BLOCK_BYTES == 0
        assert (output / shard.name).stat().st_size == start + offsets[-1][1]
        # A tensor that is larger than a shard lies alone.
        assert offsets[-1][1] <= shard_bytes or len(entries) == 1
        data = (output / shard.name).read_bytes()
        for name in digests.keys() & entries.keys():
            begin, end = entries[name]["data_offsets"]
            found[name] = hashlib.sha256(data[start + begin : start + end]).hexdigest()
    routers = {tensor.name for tensor in plan.tensors if tensor.role is Role.ROUTER}
    assert digests == found
    assert digests.keys() == routers
    index = index_of(plan)
    if len(plan.shards) == 1:
        assert index is None
    else:
        assert index is not None
        assert index["metadata"]["total_size"] == plan.nbytes
        assert index["weight_map"] == {
            name: shard.name for shard in plan.shards for name in header(output / shard.name)[0]
        }


def test_overflow_is_refused_by_name(make: Make, output: Path) -> None:
    options = Options(dtype="float16")
    source = make(dtype="F32", options=options).source.path
    tensors = {k: v.clone() for k, v in load_file(source / "model.safetensors").items()}
    tensors["model.layers.0.mlp.up_proj.weight"].reshape(-1)[-1] = 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    plan = build_plan(Recipe("E2G2T2"), open_checkpoint(source), options=options)
    name = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    with pytest.raises(UpcycleError, match=f"{name}: a finite .* becomes infinite in f16"):
        write(plan, output)


# Each part once, and one at a time ----------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_are_computed_once(
    make: Make, output: Path, monkeypatch: pytest.MonkeyPatch, layout: ExpertLayout
) -> None:
    computed: list[Expr] = []

    def watched(expr: Expr, *arguments: Any) -> memoryview:  # noqa: ANN401
        computed.append(expr)
        return evaluate(expr, *arguments)

    monkeypatch.setattr(evaluation, "evaluate", watched)
    plan = make("E8G3T6", options=Options(expert_layout=layout), tie_word_embeddings=True)
    write(plan, output)
    parts = {leaf for tensor in plan.tensors for leaf in leaves(tensor.expr)}
    assert sorted(map(describe, computed)) == sorted(map(describe, parts))
    # One router per layer, and each of three matrices in three shards.
    assert len(parts) == len(tensor_shapes(plan.source.config)) - 2 * 3 + 2 * (1 + 3 * 3)


def test_a_process_takes_no_more_memory_for_more_layers(tmp_path: Path) -> None:
    measures = []
    for layers in (4, 22):
        dense = engine.make_dense(
            tmp_path / f"dense{layers}", hidden=512, inner=4096, layers=layers, hollow=True
        )
        output = tmp_path / f"moe{layers}"
        # Slices of columns and factors: everything that needs a buffer.
        options = ("--no-fsync", "--workers", "2")
        command = engine.convert_command(dense, output, *options, recipe="E2G2T2")
        measures.append(partial(engine.peak_of_a_new, output, command))
    engine.assert_equal_peaks(measures)


# Threads and failures -----------------------------------------------------------------------------


def test_a_source_that_is_truncated_meanwhile_is_noticed(
    make: Make, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make("E2G1T2")

    def fail(*_: object) -> None:
        os.truncate(plan.source.path / "model.safetensors", 4096)
        raise OSError(errno.EFAULT, "Bad address")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(UpcycleError, match=r"model\.safetensors changed while it was being read"):
        write(plan, output)


def test_an_error_names_the_file_that_failed(
    make: Make, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make("E2G1T2", options=SHARDED)
    real = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if plan.shards[1].name in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return real(descriptor, data[:3], offset)  # POSIX lets a write do less than asked

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="Disk quota exceeded") as caught:
        write(plan, output, options=WriteOptions(fsync=False, workers=2))
    assert caught.value.filename == str(output / plan.shards[1].name)
    assert not (output / plan.shards[1].name).exists()


def test_a_failure_to_flush_is_not_lost(
    make: Make, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system reports once that the disk refused some bytes, to the first who asks."""
    asked = threading.Event()

    def refuse(_: int) -> None:
        asked.set()
        raise OSError(errno.EIO, "Input/output error")

    def wait(_: int) -> None:
        assert asked.wait(30)

    plan = make()
    monkeypatch.setattr(writer, "_FLUSH_SECONDS", 0)
    monkeypatch.setattr(os, "fdatasync", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        write(plan, output, wait, WriteOptions())
    assert not (output / plan.shards[0].name).exists()


# Layout and shared extents ------------------------------------------------------------------------

LAID_OUT: list[dict[str, Any]] = [
    {},
    {"expert_layout": "fused", "max_shard_bytes": 100_000},
    {"max_shard_bytes": 60_000},
    {"dtype": "float32"},
]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 50 columns: some parts are whole blocks, some are not.
    return engine.make_dense(
        tmp_path_factory.mktemp("layout") / "dense", hidden=64, inner=256, vocab=50
    )


@pytest.mark.parametrize("options", LAID_OUT, ids=str)
def test_equal_parts_are_laid_out_once_and_whole_blocks_come_first(
    blocks: Path, options: dict[str, Any]
) -> None:
    plan = engine.plan_of(blocks, "E4G2T2", **options)
    for shard in plan.shards:
        layout = lay_out(shard)
        assert len({part.expr for part in layout.parts}) == len(layout.parts)
        covered = sorted((offset, part.nbytes) for part in layout.parts for offset in part.offsets)
        ends = [offset + nbytes for offset, nbytes in covered]
        assert [offset for offset, _ in covered] == [len(layout.header), *ends[:-1]]
        assert ends[-1] == layout.nbytes
        assert len(covered) == sum(len([*leaves(tensor.expr)]) for tensor in shard.tensors)
        tensors = json.loads(layout.header[8:])
        del tensors["__metadata__"]
        sizes = [end - begin for begin, end in (t["data_offsets"] for t in tensors.values())]
        partial_blocks = [size % BLOCK_BYTES != 0 for size in sizes]
        assert partial_blocks == sorted(partial_blocks)


@pytest.mark.parametrize("options", LAID_OUT[1:3], ids=str)
def test_threads_and_fsync_do_not_change_a_byte(
    blocks: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    plan, told = engine.plan_of(blocks, "E2G4T4", **options), list[int]()
    engine.execute(plan, tmp_path / "one")
    assert_holds(plan, tmp_path / "one")
    for number, writing in enumerate(
        [WriteOptions(workers=1), WriteOptions(workers=7), WriteOptions(fsync=False)]
    ):
        engine.execute(
            plan, tmp_path / str(number), writing=writing, hooks=engine.Advance(told.append)
        )
        assert engine.contents(tmp_path / "one") == engine.contents(tmp_path / str(number))
    assert sum(told) == 3 * plan.nbytes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_are_shared(
    make: Make, output: Path, monkeypatch: pytest.MonkeyPatch, layout: ExpertLayout
) -> None:
    calls = []

    def share(source: int, start: int, target: int, offset: int, nbytes: int) -> bool:
        calls.append(nbytes)
        os.pwrite(target, os.pread(source, nbytes, start), offset)
        return True

    monkeypatch.setattr(platform, "can_share", lambda _: True)
    monkeypatch.setattr(platform, "share", share)
    block = {"hidden_size": 64, "intermediate_size": 64}  # each shard of a matrix is one
    plan = make("E4G2T2", options=Options(expert_layout=layout), **block)
    write(plan, output)
    # Three copies of each of two shards, three matrices and two layers.
    assert [nbytes for nbytes in calls if nbytes >= BLOCK_BYTES] == [BLOCK_BYTES] * 36
    assert_holds(plan, output)
