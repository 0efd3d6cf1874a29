"""Damaged headers, indexes and configs end in an UpcycleError or a report, and in nothing else.

`UPCYCLE_FUZZ=5000 pytest tests/test_fuzz.py` looks longer.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
from engine_fixtures import make_dense, plan_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from upcycle_cli import Recipe, UpcycleError, build_plan, inspect, open_checkpoint, verify
from upcycle_cli.api import execute
from upcycle_cli.write.staging import partial_of
from upcycle_cli.write.writer import WriteOptions

EXAMPLES = int(os.environ.get("UPCYCLE_FUZZ", "60"))
HANG_SECONDS = 30
MEMORY_BYTES = 64 << 20
WEIGHTS, INDEX, CONFIG, RECORD = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "upcycle.json",
)
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize="UPCYCLE_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
RECIPE = Recipe(expansion=2, granularity=2, top_k=2)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("fuzz") / "dense", hidden=8, inner=16, vocab=8)


@pytest.fixture(scope="module")
def moe(dense: Path) -> Path:
    path = dense.with_name("moe")
    execute(plan_of(dense, "E2G2T2"), path, writing=WriteOptions(fsync=False))
    return path


@pytest.fixture(scope="module")
def fused(dense: Path) -> Path:
    path = dense.with_name("fused")
    plan = plan_of(dense, "E2G2T2", expert_layout="fused")
    execute(plan, path, writing=WriteOptions(fsync=False))
    return path


@pytest.fixture(scope="module")
def sharded(dense: Path) -> Path:
    """The dense model in two files with an index."""
    path = dense.with_name("sharded")
    shutil.copytree(dense, path)
    data = (path / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    del entries["__metadata__"]
    (path / WEIGHTS).unlink()
    weight_map = {}
    names = list(entries)
    for number, group in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        shard, body = {}, b""
        for name in group:
            begin, end = entries[name]["data_offsets"]
            offsets = [len(body), len(body) + end - begin]
            shard[name] = entries[name] | {"data_offsets": offsets}
            body += data[start + begin : start + end]
            weight_map[name] = f"part-{number}.safetensors"
        write_safetensors(path / f"part-{number}.safetensors", shard, body)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert open_checkpoint(path).tensors.keys() == open_checkpoint(dense).tensors.keys()
    return path


def write_safetensors(path: Path, header: object, body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


# What is done with each damaged directory ----------------------------------------------------


@contextmanager
def no_hang() -> Iterator[None]:
    def fail(_number: int, _frame: object) -> NoReturn:
        raise AssertionError("this takes forever")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(HANG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def damaged(original: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "damaged"
        shutil.copytree(original, path)
        yield path


def use_dense(path: Path, moe: Path) -> None:
    """Do everything that takes a dense model; other errors than UpcycleError pass through."""
    with no_hang():
        for action in (
            lambda: inspect(path),
            lambda: inspect(path, RECIPE),
            lambda: inspect(moe, weights=True, dense=path),
            lambda: verify(path, moe, checks=["directory", "weights"]),
        ):
            with suppress(UpcycleError):
                action()
        output = path.with_name("output")
        before = listing(path)
        try:
            plan = build_plan(RECIPE, open_checkpoint(path))
            execute(plan, output, writing=WriteOptions(fsync=False, workers=1))
        except UpcycleError:
            assert not output.exists()
            assert not partial_of(output).exists()
        else:
            # What it took for a model, it has also written as one.
            assert open_checkpoint(output).nbytes == plan.nbytes
        assert listing(path) == before


def listing(path: Path) -> list[tuple[str, int, int]]:
    """What a directory holds, without reading it: some of it is long, and a hole."""
    stats = ((file.name, file.lstat()) for file in sorted(path.rglob("*")))
    return [(name, status.st_size, status.st_mtime_ns) for name, status in stats]


def use_moe(path: Path, dense: Path) -> None:
    """Do everything that takes an MoE."""
    with no_hang():
        for action in (
            lambda: inspect(path),
            lambda: inspect(path, RECIPE),
            lambda: inspect(path, weights=True),
            lambda: inspect(path, weights=True, dense=dense),
            lambda: verify(dense, path, checks=["directory", "weights"]),
        ):
            with suppress(UpcycleError):
                action()


# Damage --------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 1, 2, 3, 255, 2**31, 2**32, 2**53, 2**63, 2**64, 2**70, -(2**63)])
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        [
            *("", "/", "..", "../x", ".", "\0", "\ud800", "x" * 300),
            *("F32", "F64", "BF16", "I4", "mixtral", "llama", "qwen2_moe"),
            *("config.json", "full_attention", "sliding_attention"),
        ]
    )
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def json_changes(draw: st.DrawFn) -> Callable[[Any], Any]:
    """Replace, remove, rename or copy something, anywhere in a JSON value."""
    steps = draw(st.lists(st.integers(0, 10_000), min_size=1, max_size=4))
    kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "copy"]))
    value, name = draw(VALUES), draw(st.text(max_size=6) | st.just("\udfff"))

    def change(whole: Any) -> Any:  # noqa: ANN401
        result = copy.deepcopy(whole)
        place: Any = {"": result}
        key: Any = ""
        for step in steps:
            inner = place[key]
            if not isinstance(inner, dict | list) or not inner:
                break
            place = inner
            key = sorted(inner)[step % len(inner)] if isinstance(inner, dict) else step % len(inner)
        root = place if key == "" and place.get("") is result else None
        match kind:
            case "remove" if root is None:
                del place[key]
            case "rename" if isinstance(place, dict) and root is None:
                place[name] = place.pop(key)
            case "copy" if isinstance(place, dict) and root is None:
                place[name] = place[key]
            case _:
                place[key] = value
        return place[""] if root is not None else result

    return change


JSON_DAMAGE = st.lists(json_changes(), min_size=1, max_size=3)
BYTE_DAMAGE = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=8
)
PREFIXES = st.sampled_from([0, 1, 7, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1])


def change_json(path: Path, changes: list[Callable[[Any], Any]]) -> None:
    value = json.loads(path.read_text())
    for change in changes:
        value = change(value)
    path.write_text(json.dumps(value))


def change_header(path: Path, changes: list[Callable[[Any], Any]]) -> None:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    for change in changes:
        header = change(header)
    write_safetensors(path, header, data[start:])


def change_bytes(path: Path, edits: list[tuple[int, int]], most: int) -> None:
    data = bytearray(path.read_bytes())
    for position, value in edits:
        data[position % min(most, len(data))] = value
    path.write_bytes(data)


def header_length(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


# The tests -----------------------------------------------------------------------------------


@fuzz
@given(edits=BYTE_DAMAGE)
def test_bytes_of_a_dense_header(dense: Path, moe: Path, edits: list[tuple[int, int]]) -> None:
    with damaged(dense) as path:
        change_bytes(path / WEIGHTS, edits, header_length(path / WEIGHTS))
        use_dense(path, moe)


@fuzz
@given(edits=BYTE_DAMAGE)
def test_bytes_of_an_moe_header(dense: Path, moe: Path, edits: list[tuple[int, int]]) -> None:
    with damaged(moe) as path:
        # Most of the padding is not interesting.
        change_bytes(path / WEIGHTS, edits, 3000)
        use_moe(path, dense)


@fuzz
@given(length=PREFIXES | st.integers(0, 2**64 - 1), cut=st.integers(0, 1 << 16))
def test_the_length_of_a_header_and_of_the_file(
    dense: Path, moe: Path, length: int, cut: int
) -> None:
    for original, use, other in ((dense, use_dense, moe), (moe, use_moe, dense)):
        with damaged(original) as path:
            data = (path / WEIGHTS).read_bytes()
            (path / WEIGHTS).write_bytes(length.to_bytes(8, "little") + data[8:])
            use(path, other)
            (path / WEIGHTS).write_bytes(data[: cut % len(data)])
            use(path, other)


@fuzz
@given(changes=JSON_DAMAGE)
def test_a_dense_header(dense: Path, moe: Path, changes: list[Callable[[Any], Any]]) -> None:
    with damaged(dense) as path:
        change_header(path / WEIGHTS, changes)
        use_dense(path, moe)


@fuzz
@given(changes=JSON_DAMAGE)
def test_an_moe_header(
    dense: Path, moe: Path, fused: Path, changes: list[Callable[[Any], Any]]
) -> None:
    for original in (moe, fused):
        with damaged(original) as path:
            change_header(path / WEIGHTS, changes)
            use_moe(path, dense)


@fuzz
@given(changes=JSON_DAMAGE)
def test_an_index(sharded: Path, moe: Path, changes: list[Callable[[Any], Any]]) -> None:
    with damaged(sharded) as path:
        change_json(path / INDEX, changes)
        use_dense(path, moe)


@fuzz
@given(changes=JSON_DAMAGE)
def test_a_dense_config(dense: Path, moe: Path, changes: list[Callable[[Any], Any]]) -> None:
    with damaged(dense) as path:
        change_json(path / CONFIG, changes)
        use_dense(path, moe)


@fuzz
@given(changes=JSON_DAMAGE, name=st.sampled_from([CONFIG, RECORD]))
def test_an_moe_config_and_record(
    dense: Path, moe: Path, fused: Path, changes: list[Callable[[Any], Any]], name: str
) -> None:
    for original in (moe, fused):
        with damaged(original) as path:
            change_json(path / name, changes)
            use_moe(path, dense)


@fuzz
@given(edits=BYTE_DAMAGE, name=st.sampled_from([CONFIG, INDEX]))
def test_bytes_of_json(sharded: Path, moe: Path, edits: list[tuple[int, int]], name: str) -> None:
    with damaged(sharded) as path:
        change_bytes(path / name, edits, 1 << 16)
        use_dense(path, moe)


SIZES = (
    "num_local_experts",
    "num_experts_per_tok",
    "intermediate_size",
    "num_hidden_layers",
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [0, 1, 3, 5, 2**20, 2**40, 2**70])
def test_sizes_in_configs(dense: Path, moe: Path, fused: Path, key: str, value: int) -> None:
    for original in (dense, moe, fused):
        config = json.loads((original / CONFIG).read_text())
        if key in config:
            with damaged(original) as path:
                (path / CONFIG).write_text(json.dumps(config | {key: value}))
                if original == dense:
                    use_dense(path, moe)
                else:
                    use_moe(path, dense)


@pytest.mark.parametrize("value", [None, [], {}, [1], {"a": 1}, "x", "\ud800", 1.5, True, -1])
def test_every_key_of_an_moe_takes_anything(
    dense: Path, moe: Path, fused: Path, value: object
) -> None:
    for original, name in ((moe, CONFIG), (moe, RECORD), (fused, CONFIG)):
        with damaged(original) as path:
            whole = json.loads((path / name).read_text())
            for key in whole:
                (path / name).write_text(json.dumps(whole | {key: value}))
                use_moe(path, dense)


def test_half_a_character_is_refused_when_it_is_read(dense: Path) -> None:
    with damaged(dense) as path:
        config = json.loads((path / CONFIG).read_text()) | {"note": "\ud800"}
        (path / CONFIG).write_text(json.dumps(config))
        with pytest.raises(UpcycleError, match="not valid JSON"):
            open_checkpoint(path)
        shutil.copy(dense / CONFIG, path / CONFIG)
        change_header(path / WEIGHTS, [lambda header: header | {"\udfff": header.popitem()[1]}])
        with pytest.raises(UpcycleError, match="not valid JSON"):
            open_checkpoint(path)


# Memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_length_is_no_reason_to_take_memory(
    dense: Path, moe: Path, tmp_path: Path, length: int
) -> None:
    spoilt = shutil.copytree(dense, tmp_path / "dense")
    spoilt_moe = shutil.copytree(moe, tmp_path / "moe")
    for path in (spoilt, spoilt_moe):
        with (path / WEIGHTS).open("r+b") as file:
            file.write(length.to_bytes(8, "little"))
            file.truncate(1 << 34)  # as long as that, and a hole
    use_dense(dense, moe)  # so that imports are not counted
    shutil.rmtree(dense.with_name("output"))
    with bounded_memory():
        use_dense(spoilt, moe)
        use_moe(spoilt_moe, dense)


@pytest.mark.parametrize("shape", [[2**62], [2**40, 2**40], [2**70, 0], [1] * 100_000])
def test_a_shape_is_no_reason_to_take_memory(
    dense: Path, moe: Path, tmp_path: Path, shape: list[int]
) -> None:
    spoilt = shutil.copytree(dense, tmp_path / "dense")

    def change(header: dict[str, Any]) -> dict[str, Any]:
        header["model.norm.weight"]["shape"] = shape
        return header

    change_header(spoilt / WEIGHTS, [change])
    with bounded_memory():
        use_dense(spoilt, moe)


@contextmanager
def bounded_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BYTES
    finally:
        tracemalloc.stop()
