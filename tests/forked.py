"""Processes that begin where torch and transformers are imported, which takes a processor seconds.

A server (fork_server.py) imports them once for all workers of a run, and forks for each program.
For tests of what a command does. How it starts, what it imports, what it takes of memory and how a
signal ends it, only a process of its own can show.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile, mkdtemp

from fork_client import ask

HERE = Path(__file__).parent
FOLDER = "FORK_SERVERS"
"""The variable for where the servers' sockets are, the same for all workers."""
HUB = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_", "HOME")
"""Variables that huggingface_hub and transformers read while they are imported."""
OWN = ("PYTHON", "LC_", "LANG", "OMP_")
"""Variables that are read when a process starts."""

_ENVIRONMENT: dict[str, str] = {}
"""What it was when the tests began: that of the servers, whatever a test has set since."""


def provide_folder() -> None:
    """Say where servers are to be, before there are workers; they end with this process."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = f"{os.getpid()}:{mkdtemp(prefix='forks-')}"
        atexit.register(shutil.rmtree, os.environ[FOLDER].partition(":")[2])
    _ENVIRONMENT.update(os.environ)


@functools.cache
def server(kind: str = "") -> str:
    """Return the socket of the server, which is started by whoever needs it first."""
    master, _, folder = os.environ[FOLDER].partition(":")
    place = Path(folder) / f"socket{kind}"
    with (Path(folder) / f"lock{kind}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            words = [sys.executable, str(HERE / "fork_server.py"), str(place), master, kind]
            # No Popen, which would miss it at the end.
            null = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1)]
            pid = os.posix_spawn(words[0], words, _ENVIRONMENT, file_actions=null, setsid=True)
            while not place.exists():
                assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the server does not start"
                time.sleep(0.05)
    return str(place)


def command(environment: Mapping[str, str] | None = None) -> list[str]:
    """The tool in a forked process, as words for a shell that has this environment."""
    client = HERE / "fork_client.py"
    return [sys.executable, "-I", "-S", str(client), server(_kind(environment or os.environ))]


def run(
    arguments: Sequence[str | Path],
    *,
    program: str = "",
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    seconds: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run a program, by default the tool; TimeoutError where it takes longer, and it ends then."""
    environment = environment or os.environ | {"COLUMNS": "80"}
    words = list(map(str, arguments))
    with (
        Path(os.devnull).open() as stdin,
        TemporaryFile("w+") as stdout,
        TemporaryFile("w+") as stderr,
    ):
        code = ask(
            server(_kind(environment)),
            words,
            {number: file.fileno() for number, file in enumerate((stdin, stdout, stderr))},
            program=program,
            folder=cwd or ".",
            environment=environment,
            seconds=seconds,
        )
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(words, code, stdout.read(), stderr.read())


def _kind(environment: Mapping[str, str]) -> str:
    """Which server fits: the one that has imported a Hub's client, or the one that has not."""
    names = {name for name in (*environment, *_ENVIRONMENT) if name.startswith(HUB)}
    return "hub" if any(environment.get(n) != _ENVIRONMENT.get(n) for n in names) else ""
