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


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("tool inspect dense --recipe E2G2T2 --json | cat", 0),
        ("tool inspect dense >/dev/full 2>&-", 2),
        ("FORCE_COLOR=1 TERM=xterm tool convert --seed x", 2),
    ],
)
def test_a_forked_process_says_the_same(llama: Path, tmp_path: Path, line: str, code: int) -> None:
    (tmp_path / "dense").symlink_to(llama)
    answers = []
    for tool in ([sys.executable, "-m", "upcycle_cli"], forked.command()):
        shell = f'set -o pipefail; tool() {{ {shlex.join(tool)} "$@"; }}; {line}'
        variables = os.environ | {"COLUMNS": "70"}
        done = subprocess.run(
            ["bash", "-c", shell],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=variables,
        )
        answers.append((done.returncode, done.stdout, done.stderr))
    assert answers[0] == answers[1]
    assert answers[0][0] == code


def test_a_program_may_be_killed_or_take_too_long() -> None:
    ends = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    assert forked.run([], program=ends).returncode == -signal.SIGKILL
    with pytest.raises(TimeoutError):
        forked.run([], program="import time\ntime.sleep(100)", seconds=0.5)
