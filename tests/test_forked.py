"""A process that is forked answers as one that is started."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest

from upcycle_cli import Recipe, convert

STARTED = [sys.executable, "-m", "upcycle_cli"]


@pytest.fixture(scope="module")
def place(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("place")
    (path / "dense").symlink_to(llama)
    convert(llama, path / "moe", Recipe(expansion=2, granularity=2, top_k=2))
    convert(llama, path / "broken", Recipe(expansion=2, granularity=2, top_k=2))
    with (path / "broken" / "model.safetensors").open("r+b") as file:
        file.seek(-9, os.SEEK_END)
        file.write(b"\0" * 9)
    return path


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("tool inspect dense --recipe E2G2T2 --tensors", 0),
        ("tool inspect moe --json | cat", 0),
        ("tool inspect dense --tensors | true", 0),
        ("tool inspect dense >&-", 2),
        ("tool inspect dense >/dev/full 2>&-", 2),
        ("tool verify dense broken --checks weights <&- >&- 2>&-", 1),
        ("tool verify dense broken 2>&1", 1),
        ("tool convert absent out --recipe E2G2T2", 2),
        ("FORCE_COLOR=1 TERM=xterm tool convert --seed x", 2),
        ("tool", 2),
    ],
)
def test_it_says_the_same(place: Path, line: str, code: int) -> None:
    def answer(tool: list[str]) -> tuple[int, str, str]:
        shell = f'set -o pipefail; tool() {{ {shlex.join(tool)} "$@"; }}; {line}'
        done = subprocess.run(
            ["bash", "-c", shell],
            capture_output=True,
            text=True,
            check=False,
            cwd=place,
            env=os.environ | {"COLUMNS": "70"},
        )
        return done.returncode, done.stdout, done.stderr

    started = answer(STARTED)
    assert answer(forked.command()) == started
    assert started[0] == code


def test_programs_that_do_not_end_by_themselves() -> None:
    ends = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    assert forked.run([], program=ends).returncode == -signal.SIGKILL
    with pytest.raises(TimeoutError):
        forked.run([], program="import time\ntime.sleep(100)", seconds=0.5)
