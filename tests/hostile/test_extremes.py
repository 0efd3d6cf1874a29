"""Files of sizes and kinds that no model has: a message within seconds, and bounded memory."""

from __future__ import annotations

import os
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


def ends(words: str, *arguments: str | Path, code: int = 2) -> None:
    """Run a command that must end with this code and these words, in short."""
    done = forked.run(arguments, program=PROGRAM, seconds=PATIENCE)
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    assert words in (done.stdout + done.stderr).replace("\n", "")
    assert len(done.stderr) < 5_000


HUGE = "1" + "0" * 4000


def entry(shape: str = "[1]", offsets: str = "[0, 4]") -> str:
    return f'{{"x": {{"dtype": "F32", "shape": {shape}, "data_offsets": {offsets}}}}}'


HEADERS: tuple[tuple[str, str, str], ...] = (
    ("a name very often", "{" + ", ".join([entry()[1:-1]] * 300_000) + "}", "'x' appears twice"),
    ("a huge number", entry(f"[{HUGE}]"), "invalid dtype, shape or offsets"),
    ("a number too long to read", entry(f"[{HUGE * 2}]"), "not valid JSON"),
    ("many dimensions", entry(str([1] * 100_000)), "invalid dtype, shape or offsets"),
    ("huge offsets", entry(offsets=f"[{HUGE}, {HUGE}]"), "invalid dtype, shape or offsets"),
    ("deep", "[" * 1_000_000, "not valid JSON"),
)


@pytest.mark.parametrize(("header", "words"), [r[1:] for r in HEADERS], ids=[r[0] for r in HEADERS])
def test_headers(llama: Path, tmp_path: Path, header: str, words: str) -> None:
    dense = clone(llama, tmp_path / "dense")
    with (dense / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + 4)
    ends(words, "inspect", dense)


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
    words = next(iter(changes))
    ends(words, "verify", llama, path, "--checks", "directory,outputs", code=1)


@pytest.mark.parametrize("kind", ["pipe", "sparse"])
@pytest.mark.parametrize(
    ("name", "code"),
    [("config.json", 1), ("model.safetensors", 1), ("upcycle.json", 2), ("tokenizer.json", 1)],
)
def test_files_of_an_moe(
    llama: Path, e2g2t2: Path, tmp_path: Path, name: str, code: int, kind: str
) -> None:
    path = clone(e2g2t2, tmp_path / "moe")
    (path / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path / name)
    else:
        with (path / name).open("wb") as file:
            file.truncate(30_000_000_000)
    ends(name, "verify", llama, path, "--checks", "directory", code=code)


def test_pipes_for_weights_and_prompts(llama: Path, e2g2t2: Path, tmp_path: Path) -> None:
    dense = clone(llama, tmp_path / "dense")
    pipe = dense / "model.safetensors"
    pipe.unlink()
    os.mkfifo(pipe)
    for arguments in ((dense, e2g2t2), (llama, e2g2t2, "--prompts", pipe)):
        ends("not a regular file", "verify", *arguments)


def test_quotes_of_a_file_are_cut_short(llama: Path, tmp_path: Path) -> None:
    long = ["x" * 500_000] * 5
    dense = clone(llama, tmp_path / "dense", hidden_act=long, eos_token_id=long)
    ends("hidden_act", "convert", dense, tmp_path / "out", "-r", "E2G2T2")
