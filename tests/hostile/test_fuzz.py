"""Damaged headers, indexes and configs end in an UpcycleError or a report, and in nothing else.

`UPCYCLE_FUZZ=5000 pytest tests/hostile/test_fuzz.py` looks longer.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import execute, make_dense, plan_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from upcycle_cli import Recipe, UpcycleError, build_plan, inspect, open_checkpoint, verify
from upcycle_cli.write.staging import partial_of
from upcycle_cli.write.writer import WriteOptions

EXAMPLES = int(os.environ.get("UPCYCLE_FUZZ", "150"))
HANG_SECONDS = 30
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, RECORD = "config.json", "upcycle.json"
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize="UPCYCLE_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
RECIPE = Recipe("E2G2T2")
QUICKLY = WriteOptions(fsync=False, workers=1)
Change = Callable[[Any], Any]


class Models:
    """Small models to damage, and everything that is done with one that is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        dense = make_dense(folder / "dense", hidden=8, inner=16, vocab=8)
        execute(plan_of(dense, "E2G2T2"), folder / "moe", writing=QUICKLY)
        fused = plan_of(dense, "E2G2T2", expert_layout="fused")
        execute(fused, folder / "fused", writing=QUICKLY)
        sharded = Path(shutil.copytree(dense, folder / "sharded"))
        weights = (sharded / WEIGHTS).rename(sharded / "part.safetensors")
        index = {"weight_map": dict.fromkeys(load_file(weights), weights.name)}
        (sharded / INDEX).write_text(json.dumps(index))
        for name in ("dense", "moe"):  # so that imports are no part of what is measured
            self.use(name, lambda _: None)

    def use(self, name: str, damage: Callable[[Path], object]) -> None:
        """Do everything that takes such a model, damaged; only UpcycleError may end it."""
        with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)  # a hang is a crash
            stack.callback(faulthandler.cancel_dump_traceback_later)
            path = Path(directory) / "damaged"
            shutil.copytree(self.folder / name, path)
            damage(path)
            is_dense = name in ("dense", "sharded")
            pair = (path, self.folder / "moe") if is_dense else (self.folder / "dense", path)
            for action in (
                lambda: inspect(path),
                lambda: inspect(path, RECIPE),
                lambda: inspect(pair[1], weights=True, dense=pair[0]),
                lambda: verify(*pair, checks=["directory", "weights"]),
            ):
                with suppress(UpcycleError):
                    action()
            if is_dense:
                self._convert(path)

    def _convert(self, path: Path) -> None:
        output, before = path.with_name("output"), listing(path)
        try:
            plan = build_plan(RECIPE, open_checkpoint(path))
            execute(plan, output, writing=QUICKLY)
        except UpcycleError:
            assert not output.exists()
            assert not partial_of(output).exists()
        else:
            # What it took for a model, it has also written as one.
            assert open_checkpoint(output).nbytes == plan.nbytes
        assert listing(path) == before


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("fuzz"))


def listing(path: Path) -> list[tuple[str, int, int]]:
    """What a directory holds, without reading it: some of it is long, and a hole."""
    stats = ((file.name, file.lstat()) for file in sorted(path.rglob("*")))
    return [(name, status.st_size, status.st_mtime_ns) for name, status in stats]


# Damage --------------------------------------------------------------------------------------

VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([0, -1, 1, 2, 3, 2**31, 2**32, 2**53, 2**63, 2**64, 2**70, -(2**63), "", "/"])
    | st.sampled_from(["..", "../x", "\0", "\ud800", "x" * 300, "F64", "I4", "mixtral", "llama"])
    | st.sampled_from([[], {}, [1], [None], {"a": 1}, ["full_attention"], ["sliding_attention"]])
)


def changed(whole: Any, steps: list[int], kind: str, value: object) -> Any:  # noqa: ANN401
    """Replace, remove or rename something in a JSON value, as deep as the steps lead."""
    if not steps or not isinstance(whole, dict | list) or not whole:
        return value
    number, *deeper = steps
    keys = sorted(whole) if isinstance(whole, dict) else range(len(whole))
    key, result = keys[number % len(keys)], copy.copy(whole)
    held = result.pop(key)
    if deeper or kind == "replace" or isinstance(result, list):
        new = changed(held, deeper, kind, value)
        result.insert(key, new) if isinstance(result, list) else result.update({key: new})
    elif kind == "rename":
        result[str(value)] = held
    return result


@st.composite
def json_changes(draw: st.DrawFn) -> Change:
    steps = draw(st.lists(st.integers(0, 10_000), max_size=4))
    kind, value = draw(st.sampled_from(["replace", "replace", "remove", "rename"])), draw(VALUES)
    return lambda whole: changed(whole, steps, kind, value)


JSON_DAMAGE = st.lists(json_changes(), min_size=1, max_size=3)
BYTE_DAMAGE = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=8
)
PLACES = st.sampled_from(
    [
        *((model, WEIGHTS) for model in ("dense", "dense", "moe", "moe", "fused")),
        *(("sharded", INDEX), ("sharded", CONFIG), ("fused", CONFIG)),
        *((model, file) for model in ("moe", "moe") for file in (CONFIG, RECORD)),
    ]
)


def start_of_data(file: bytes | bytearray) -> int:
    return 8 + int.from_bytes(file[:8], "little")


@fuzz
@given(edits=BYTE_DAMAGE, place=PLACES)
def test_other_bytes(models: Models, edits: list[tuple[int, int]], place: tuple[str, str]) -> None:
    def damage(path: Path) -> None:
        data = bytearray((path / place[1]).read_bytes())
        # Most of a header's padding is not interesting.
        most = min(3000, start_of_data(data)) if place[1] == WEIGHTS else 1 << 16
        for position, value in edits:
            data[position % min(most, len(data))] = value
        (path / place[1]).write_bytes(data)

    models.use(place[0], damage)


@fuzz
@given(changes=JSON_DAMAGE, place=PLACES)
def test_other_json(models: Models, changes: list[Change], place: tuple[str, str]) -> None:
    def damage(path: Path) -> None:
        data = (path / place[1]).read_bytes()
        start = start_of_data(data) if place[1] == WEIGHTS else len(data)
        value = json.loads(data[8:start] if place[1] == WEIGHTS else data)
        for change in changes:
            value = change(value)
        text = json.dumps(value).encode()
        if place[1] == WEIGHTS:
            text = len(text).to_bytes(8, "little") + text + data[start:]
        (path / place[1]).write_bytes(text)

    models.use(place[0], damage)
