"""The files of the engine: where their bytes are, and that nothing about the run changes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_fixtures import Advance, contents, make_dense, plan_of
from safetensors import safe_open
from shapes import value_of

from upcycle_cli.api import execute
from upcycle_cli.core.platform import BLOCK_BYTES
from upcycle_cli.plan.expressions import leaves
from upcycle_cli.write.file_layout import lay_out, unique_bytes
from upcycle_cli.write.writer import WriteOptions

OPTIONS = [
    {},
    {"expert_layout": "fused"},
    {"max_shard_bytes": 60_000},
    {"expert_layout": "fused", "max_shard_bytes": 100_000},
    {"dtype": "float32"},
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 50 columns: some parts are whole blocks, some are not.
    return make_dense(tmp_path_factory.mktemp("layout") / "dense", hidden=64, inner=256, vocab=50)


def header(path: Path) -> tuple[dict[str, Any], int]:
    """The entries of a file, and where its data begins."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    assert entries.pop("__metadata__") == {"format": "pt"}
    return entries, start


@pytest.mark.parametrize("recipe", ["E4G1T2", "E2G4T4"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_files_hold_what_the_expressions_say(
    dense: Path, tmp_path: Path, recipe: str, options: dict[str, Any]
) -> None:
    plan = plan_of(dense, recipe, **options)
    execute(plan, tmp_path / "moe")
    with plan.source.reader() as reader:
        for shard in plan.shards:
            with safe_open(tmp_path / "moe" / shard.name, framework="pt") as file:
                assert set(file.keys()) == {tensor.name for tensor in shard.tensors}
                for tensor in shard.tensors:
                    wanted = value_of(tensor.expr, reader.tensor)
                    found = file.get_tensor(tensor.name)
                    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
                    assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_whole_blocks_come_first_and_start_on_a_boundary(
    dense: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    plan = plan_of(dense, "E2G4T4", **options)
    execute(plan, tmp_path / "moe")
    whole_seen = broken_seen = False
    for shard in plan.shards:
        path = tmp_path / "moe" / shard.name
        entries, start = header(path)
        assert start % BLOCK_BYTES == 0
        position = 0
        whole = True
        for entry in entries.values():
            begin, end = entry["data_offsets"]
            assert begin == position
            position = end
            is_whole = (end - begin) % BLOCK_BYTES == 0
            assert whole or not is_whole  # once a tensor is not of whole blocks, no other is
            whole = is_whole
            whole_seen |= is_whole
            broken_seen |= not is_whole
        assert path.stat().st_size == start + position
    assert whole_seen
    assert broken_seen


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_equal_part_is_laid_out_once_with_all_its_places(
    dense: Path, options: dict[str, Any]
) -> None:
    plan = plan_of(dense, "E4G2T2", **options)
    for shard in plan.shards:
        layout = lay_out(shard)
        assert len({part.expr for part in layout.parts}) == len(layout.parts)
        covered = sorted((offset, part.nbytes) for part in layout.parts for offset in part.offsets)
        ends = [offset + nbytes for offset, nbytes in covered]
        assert [offset for offset, _ in covered] == [len(layout.header), *ends[:-1]]
        assert ends[-1] == layout.nbytes
        places = sum(len(list(leaves(tensor.expr))) for tensor in shard.tensors)
        assert len(covered) == places


def test_unique_bytes_are_the_dense_model_and_the_routers(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", hidden=64, inner=512, vocab=64)
    plan = plan_of(dense, "E8G1T2")
    routers = sum(tensor.nbytes for tensor in plan.tensors if tensor.role == "router")
    assert unique_bytes(plan.shards) == plan.source.nbytes + routers


@pytest.mark.parametrize(
    "writing",
    [
        WriteOptions(workers=1),
        WriteOptions(workers=2),
        WriteOptions(workers=7),
        WriteOptions(reflink=False),
        WriteOptions(fsync=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [OPTIONS[2], OPTIONS[3]], ids=str)
def test_how_it_is_written_does_not_change_a_byte(
    dense: Path, tmp_path: Path, options: dict[str, Any], writing: WriteOptions
) -> None:
    plan = plan_of(dense, "E2G4T4", **options)
    progress: list[int] = []
    execute(plan, tmp_path / "one")
    execute(plan, tmp_path / "other", writing=writing, hooks=Advance(progress.append))
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    assert sum(progress) == plan.nbytes
