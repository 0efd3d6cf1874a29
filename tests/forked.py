"""Run programs in processes that begin with torch and transformers imported, which takes seconds.

A server (fork_server.py) imports them once and forks for each program. This is for tests of what a
command does. How it starts, what it imports, and how much memory it takes needs a new process.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

HUB = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_", "HOME")
"""Variables that huggingface_hub and transformers read while they are imported."""
OWN = ("PYTHON", "LC_", "LANG", "OMP_")
"""Variables that Python or torch read when a process starts."""
ENVIRONMENT: dict[str, str] = {}
"""The environment of the servers, whatever a test has set since."""


@functools.cache
def _server(kind: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(Path(__file__).with_name("fork_server.py")), kind]
    pipe = subprocess.PIPE
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0, env=ENVIRONMENT)
    atexit.register(server.communicate)  # it ends with its input
    return server


def run(
    arguments: Sequence[str | Path],
    *,
    program: str = "",
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    seconds: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run a program, by default upcycle itself; TimeoutError if it takes longer."""
    environment = dict(environment or os.environ | {"COLUMNS": "80"})
    names = {name for name in (*environment, *ENVIRONMENT) if name.startswith(HUB)}
    changed = any(environment.get(name) != ENVIRONMENT.get(name) for name in names)
    server, words = _server("hub" if changed else ""), list(map(str, arguments))
    assert server.stdin is not None
    assert server.stdout is not None
    with TemporaryDirectory() as folder:
        job = {
            "arguments": words,
            "program": program,
            "cwd": str(cwd or Path.cwd()),
            "environment": environment,
            "folder": folder,
        }
        server.stdin.write(json.dumps(job).encode() + b"\n")
        pid = int(server.stdout.readline())
        late = not select.select([server.stdout], [], [], seconds)[0]
        if late:
            os.kill(pid, signal.SIGKILL)
        code = int(server.stdout.readline())
        if late:
            raise TimeoutError
        stdout, stderr = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(words, code, stdout, stderr)
