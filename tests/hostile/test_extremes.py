"""Files of sizes and kinds that no model has: a message within seconds, and bounded memory."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import clone

from upcycle_cli import Recipe, convert

PATIENCE = 60  # seconds; a hang would take forever
MEMORY = 4_000_000_000
RECIPE = Recipe(expansion=2, granularity=2, top_k=2)


@pytest.fixture(scope="module")
def moe(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe") / "moe"
    convert(llama, path, RECIPE)
    return path


PROGRAM = f"""
import resource
resource.setrlimit(resource.RLIMIT_DATA, ({MEMORY}, {MEMORY}))
from upcycle_cli.__main__ import main
main()
"""


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return forked.run(arguments, program=PROGRAM, seconds=PATIENCE)


def assert_refused(done: subprocess.CompletedProcess[str], *words: str, code: int = 2) -> None:
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stdout + done.stderr
    assert len(done.stderr) < 5_000


def write_header(path: Path, header: bytes, data: int = 0) -> None:
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + data)


ENTRY = '"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
HUGE = "1" + "0" * 4000
HEADERS: tuple[tuple[str, str, str], ...] = (
    ("a name very often", "{" + ", ".join([ENTRY] * 300_000) + "}", "'x' appears twice"),
    (
        "many names, one of them twice",
        "{"
        + ", ".join(f'"n{i}": {{"dtype": "F32"}}' for i in range(500_000))
        + ', "n0": {"dtype": "F32"}}',
        "'n0' appears twice",
    ),
    (
        "a huge number",
        f'{{"x": {{"dtype": "F32", "shape": [{HUGE}], "data_offsets": [0, 4]}}}}',
        "has an invalid shape",
    ),
    (
        "a number too long to read",
        f'{{"x": {{"dtype": "F32", "shape": [{HUGE * 2}], "data_offsets": [0, 4]}}}}',
        "not valid JSON",
    ),
    (
        "many dimensions",
        f'{{"x": {{"dtype": "F32", "shape": {[1] * 100_000}, "data_offsets": [0, 4]}}}}',
        "has an invalid shape",
    ),
    (
        "huge offsets",
        f'{{"x": {{"dtype": "F32", "shape": [1], "data_offsets": [{HUGE}, {HUGE}]}}}}',
        "has invalid offsets",
    ),
    ("deep", "[" * 1_000_000, "not valid JSON"),
)


@pytest.mark.parametrize(
    ("header", "words"), [row[1:] for row in HEADERS], ids=[row[0] for row in HEADERS]
)
def test_headers(llama: Path, tmp_path: Path, header: str, words: str) -> None:
    dense = clone(llama, tmp_path / "dense")
    write_header(dense / "model.safetensors", header.encode(), 4)
    assert_refused(run("inspect", dense), words)


COUNTS: tuple[dict[str, Any], ...] = (
    {"num_hidden_layers": 10**6},
    {"num_hidden_layers": 10**18},
    {"num_local_experts": 10**9},
    {"num_experts_per_tok": 10**30},
    {"intermediate_size": 10**18},
    {"vocab_size": 10**18, "hidden_size": 10**18},
    {"head_dim": 4_000_000},
)


@pytest.mark.parametrize("changes", COUNTS, ids=str)
def test_sizes_in_an_moe(llama: Path, moe: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    path = clone(moe, tmp_path / "moe", **changes)
    done = run("verify", llama, path, "--checks", "directory,outputs")
    assert_refused(done, next(iter(changes)) if len(changes) == 1 else "structure", code=1)
    done = run("inspect", path, "--weights")
    assert done.returncode in (0, 2), done
    assert "Traceback" not in done.stderr


PLACES = ("config.json", "model.safetensors", "upcycle.json", "tokenizer.json", "SHA256SUMS")


@pytest.mark.parametrize("kind", ["pipe", "sparse"])
@pytest.mark.parametrize("name", PLACES)
def test_files_of_an_moe(llama: Path, moe: Path, tmp_path: Path, name: str, kind: str) -> None:
    path = clone(moe, tmp_path / "moe")
    (path / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path / name)
    else:
        with (path / name).open("wb") as file:
            file.truncate(30_000_000_000)
    done = run("verify", llama, path, "--checks", "directory")
    assert done.returncode in (1, 2), done
    assert "Traceback" not in done.stderr
    assert name in (done.stdout + done.stderr).replace("\n", "")
    done = run("inspect", path)
    assert done.returncode in (0, 2), done
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "LICENSE"])
def test_pipes_in_a_dense_model(llama: Path, moe: Path, tmp_path: Path, name: str) -> None:
    dense = clone(llama, tmp_path / "dense")
    (dense / name).unlink()
    os.mkfifo(dense / name)
    assert_refused(run("verify", dense, moe), name, "a pipe")
    assert_refused(run("convert", dense, tmp_path / "out", "-r", "E2G2T2"), name, "a pipe")


@pytest.mark.parametrize("where", ["/dev/zero", "pipe"])
def test_prompts(llama: Path, moe: Path, tmp_path: Path, where: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    done = run("verify", llama, moe, "--prompts", tmp_path / where)
    assert_refused(done, "not a regular file")


def test_values_that_are_long(llama: Path, tmp_path: Path) -> None:
    """What a message quotes of a file is cut short."""
    long = ["x" * 500_000] * 5
    dense = clone(llama, tmp_path / "dense", hidden_act=long, eos_token_id=long)
    assert_refused(run("convert", dense, tmp_path / "out", "-r", "E2G2T2"), "hidden_act")
