"""Files of sizes and kinds that no model has: a message within seconds, and bounded memory."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import forked
import pytest
from conftest import clone

PATIENCE = 60  # seconds; a hang would take forever
MEMORY = 4_000_000_000


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
    assert_survives(done)
    for word in words:
        assert word in done.stdout + done.stderr
    assert len(done.stderr) < 5_000


def assert_survives(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode in (0, 1, 2), done
    assert "Traceback" not in done.stderr


def write_header(path: Path, header: bytes, data: int = 0) -> None:
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + data)


HUGE = "1" + "0" * 4000


def entry(shape: str = "[1]", offsets: str = "[0, 4]") -> str:
    return f'{{"x": {{"dtype": "F32", "shape": {shape}, "data_offsets": {offsets}}}}}'


HEADERS: tuple[tuple[str, str, str], ...] = (
    ("a name very often", "{" + ", ".join([entry()[1:-1]] * 300_000) + "}", "'x' appears twice"),
    ("a huge number", entry(f"[{HUGE}]"), "has an invalid shape"),
    ("a number too long to read", entry(f"[{HUGE * 2}]"), "not valid JSON"),
    ("many dimensions", entry(str([1] * 100_000)), "has an invalid shape"),
    ("huge offsets", entry(offsets=f"[{HUGE}, {HUGE}]"), "has an invalid shape"),
    ("deep", "[" * 1_000_000, "not valid JSON"),
)


@pytest.mark.parametrize(
    ("header", "words"), [row[1:] for row in HEADERS], ids=[row[0] for row in HEADERS]
)
def test_headers(llama: Path, tmp_path: Path, header: str, words: str) -> None:
    dense = clone(llama, tmp_path / "dense")
    write_header(dense / "model.safetensors", header.encode(), 4)
    assert_refused(run("inspect", dense), words)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**6},
        {"num_local_experts": 10**9},
        {"num_experts_per_tok": 10**30},
        {"vocab_size": 10**18, "hidden_size": 10**18},
        {"head_dim": 4_000_000},
    ],
    ids=str,
)
def test_sizes_in_an_moe(
    llama: Path, e2g2t2: Path, tmp_path: Path, changes: dict[str, int]
) -> None:
    path = clone(e2g2t2, tmp_path / "moe", **changes)
    done = run("verify", llama, path, "--checks", "directory,outputs")
    assert_refused(done, next(iter(changes)), code=1)
    assert_survives(run("inspect", path, "--weights"))


@pytest.mark.parametrize("kind", ["pipe", "sparse"])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "upcycle.json", "tokenizer.json"]
)
def test_files_of_an_moe(llama: Path, e2g2t2: Path, tmp_path: Path, name: str, kind: str) -> None:
    path = clone(e2g2t2, tmp_path / "moe")
    (path / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path / name)
    else:
        with (path / name).open("wb") as file:
            file.truncate(30_000_000_000)
    done = run("verify", llama, path, "--checks", "directory")
    assert_survives(done)
    assert done.returncode
    assert name in (done.stdout + done.stderr).replace("\n", "")
    assert_survives(run("inspect", path))


def test_pipes_for_weights_and_prompts(llama: Path, e2g2t2: Path, tmp_path: Path) -> None:
    dense = clone(llama, tmp_path / "dense")
    pipe = dense / "model.safetensors"
    pipe.unlink()
    os.mkfifo(pipe)
    for arguments in ((dense, e2g2t2), (llama, e2g2t2, "--prompts", pipe)):
        assert_refused(run("verify", *arguments), "not a regular file")


def test_quotes_of_a_file_are_cut_short(llama: Path, tmp_path: Path) -> None:
    long = ["x" * 500_000] * 5
    dense = clone(llama, tmp_path / "dense", hidden_act=long, eos_token_id=long)
    assert_refused(run("convert", dense, tmp_path / "out", "-r", "E2G2T2"), "hidden_act")
