"""Programs that start where torch is imported already, which takes seconds.

They run in forks of a server that each pytest worker has. For tests of what a command does: how it
starts, what it imports and how a signal ends it, only a process of its own can show.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

CONTEXT = get_context("forkserver")
# Nothing of ours, which programs may change, and nothing that reads the variables of a Hub.
CONTEXT.set_forkserver_preload(
    [
        *("torch", "torch._dynamo", "safetensors.torch", "tokenizers", "numpy.random", "yaml"),
        *("matplotlib.backends.backend_svg", "jinja2", "rich.progress", "typer", "regex"),
    ]
)
TOOL = "from upcycle_cli.__main__ import main\nmain()\n"


def run(
    arguments: Sequence[str | Path],
    *,
    program: str = TOOL,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    seconds: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run a program, by default the tool; TimeoutError if it takes longer."""
    words = list(map(str, arguments))
    variables = dict(environment or os.environ | {"COLUMNS": "80"})
    with TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        place = Path(cwd or ".").absolute()
        process = CONTEXT.Process(target=_run, args=(program, words, outputs, place, variables))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{words} takes more than {seconds} s")
        stdout, stderr = (output.read_text("utf-8") for output in outputs)
        return subprocess.CompletedProcess(words, process.exitcode, stdout, stderr)


def _run(
    program: str, words: list[str], outputs: list[Path], folder: Path, variables: dict[str, str]
) -> None:
    for descriptor, path in enumerate([Path(os.devnull), *outputs]):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = ["-c", *words]
    exec(program, {"__name__": "__main__"})  # noqa: S102 - which is what it is there for
