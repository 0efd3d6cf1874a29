"""Who takes part: upcycle, a raw pwrite as the limit, and the ways there are without upcycle."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]

UPCYCLE_SMALL = "upcycle E8G1T2"
UPCYCLE_FINE = "upcycle E8G8T8"
UPCYCLE_SHUFFLED = "upcycle E8G8T8, shuffled"
PWRITE = "pwrite of the same bytes"
MERGEKIT = "mergekit-moe, 8 experts"
TRANSFORMERS = "transformers script"


@dataclass(frozen=True)
class Contestant:
    """A name, how durable its output is, and the command that makes an output."""

    name: str
    fsync: bool
    command: Callable[[Path], list[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    max_rounds: int | None = None
    """How often it runs at most; None for as often as the others."""

    @property
    def key(self) -> str:
        """Tell it from the others."""
        return f"{self.name}, {'fsync' if self.fsync else 'no fsync'}"


def upcycle(
    dense: Path, recipe: str, *, fsync: bool, name: str = "", order: str = "sliced"
) -> Contestant:
    """Return the conversion to Mixtral by this very checkout."""
    path = os.environ.get("PYTHONPATH")
    return Contestant(
        name or f"upcycle {recipe}",
        fsync,
        lambda output: [
            *(sys.executable, "-m", "upcycle_cli", "convert", "--quiet", str(dense), str(output)),
            *("--recipe", recipe, "--target", "mixtral", "--neuron-order", order),
            *(() if fsync else ("--no-fsync",)),
        ],
        {"PYTHONPATH": f"{REPOSITORY}:{path}" if path else str(REPOSITORY)},
    )


def raw_pwrite(dense: Path, nbytes: int, *, fsync: bool, name: str = PWRITE) -> Contestant:
    """Return the plain Python program that writes `nbytes` from a mapping of the dense weights."""
    return Contestant(
        name,
        fsync,
        lambda output: raw_pwrite_command(dense / "model.safetensors", output, nbytes, fsync=fsync),
    )


def raw_pwrite_command(source: Path, output: Path, nbytes: int, *, fsync: bool) -> list[str]:
    """Return the command that writes `nbytes` from a mapping of one file to another."""
    return [
        *(sys.executable, "-S", str(HERE / "raw_pwrite.py")),
        *(str(source), str(output), str(nbytes), "fsync" if fsync else "no-fsync"),
    ]


def by_transformers(dense: Path, max_rounds: int) -> Contestant:
    """Return the script that goes through two models in memory."""
    return Contestant(
        TRANSFORMERS,
        fsync=False,
        command=lambda output: [
            *(sys.executable, str(HERE / "by_transformers.py"), str(dense), str(output))
        ],
        environment={"HF_HUB_OFFLINE": "1"},
        max_rounds=max_rounds,
    )


def mergekit(dense: Path, python: Path, max_rounds: int) -> Contestant:
    """Return mergekit-moe with eight experts that are all the dense model, routers random."""
    config = dense / "mergekit-moe.yml"
    expert = f"  - source_model: {dense}\n    positive_prompts: []\n"
    config.write_text(
        f"base_model: {dense}\ngate_mode: random\ndtype: bfloat16\nexperts_per_token: 2\n"
        f"experts:\n{expert * 8}",
        encoding="utf-8",
    )
    return Contestant(
        MERGEKIT,
        fsync=False,
        command=lambda output: [
            *(str(python.with_name("mergekit-moe")), "--quiet", str(config), str(output))
        ],
        environment={"HF_HUB_OFFLINE": "1"},
        max_rounds=max_rounds,
    )


class NotInstalledError(Exception):
    """pip could not install a peer; the message says why."""


def install_mergekit() -> Path:
    """Return the Python of a virtual environment that holds mergekit, made on first use.

    Raises NotInstalledError.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "upcycle-benchmark" / "mergekit"
    python = folder / "bin" / "python"
    if not python.with_name("mergekit-moe").exists():
        venv.create(folder, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "mergekit"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            lines = result.stderr.strip().splitlines() or ["no message"]
            raise NotInstalledError(f"pip install mergekit: {lines[-1]}")
    return python


def versions(python: Path) -> str:
    """Return what a peer's environment holds, for the record."""
    program = (
        "from importlib.metadata import version as v;"
        "print(*(f'{n} {v(n)}' for n in ('mergekit', 'torch', 'transformers')), sep=', ')"
    )
    result = subprocess.run(
        [str(python), "-c", program], capture_output=True, text=True, check=True
    )
    return result.stdout.strip()
