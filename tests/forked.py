"""Processes that begin where torch and transformers are imported, which takes a processor seconds.

One process imports them and forks for each program. Of upcycle it imports nothing: a program may
change the system first. For tests of what a command does, not of how it starts.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

SERVER = """
import json, os, sys
import torch
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, MixtralForCausalLM,
    PreTrainedTokenizerFast,
)
import transformers.models.llama.tokenization_llama, transformers.modeling_gguf_pytorch_utils

for line in sys.stdin:
    wanted = json.loads(line)
    child = os.fork()
    if not child:
        break
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
else:
    sys.exit()

for descriptor, name in enumerate([os.devnull, wanted["stdout"], wanted["stderr"]]):
    opened = os.open(name, os.O_RDWR | os.O_CREAT)
    os.dup2(opened, descriptor)
    os.close(opened)
sys.argv[1:] = wanted["arguments"]
exec(wanted["program"], {"__name__": "__main__"})
"""

MAIN = "from upcycle_cli.__main__ import main\nmain()\n"
"""The program that is the tool itself."""


class Forking:
    """Runs programs, one at a time, in processes that have torch and transformers."""

    def __init__(self, server: subprocess.Popen[str], folder: Path) -> None:
        self._server, self._folder = server, folder

    def run(
        self, arguments: Sequence[str | Path], *, program: str = MAIN, seconds: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run a program; TimeoutError where it takes longer, and all of it ends then."""
        words = list(map(str, arguments))
        files = [self._folder / "stdout", self._folder / "stderr"]
        for file in files:
            file.unlink(missing_ok=True)
        wanted = {"program": program, "arguments": words}
        wanted |= {file.name: str(file) for file in files}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(wanted) + "\n")
        self._server.stdin.flush()
        if not select.select([self._server.stdout], [], [], seconds)[0]:
            raise TimeoutError(f"{words} takes more than {seconds} s")
        code = int(self._server.stdout.readline())
        stdout, stderr = (file.read_text(encoding="utf-8") for file in files)
        return subprocess.CompletedProcess(words, code, stdout, stderr)


@contextmanager
def forking(**variables: str) -> Iterator[Forking]:
    """Start the process that forks; it and what it runs have these in their environment."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"} | variables
    with (
        TemporaryDirectory() as folder,
        subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        ) as server,
    ):
        try:
            yield Forking(server, Path(folder))
        finally:
            os.killpg(server.pid, signal.SIGKILL)  # and what it forked, if that still runs
