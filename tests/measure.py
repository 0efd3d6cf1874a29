"""Run a command and measure it: wall time, processor time, peak anonymous memory.

Memory is RssAnon (what a process cannot give back without swapping), sampled every 10 ms and
summed over the process and its descendants. The maximum resident size would count the pages of the
mapped checkpoint too, which belong to the page cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread


@dataclass(frozen=True)
class Run:
    """What one run of one command took."""

    wall_seconds: float
    cpu_seconds: float
    """User and system time of the process and of the descendants it waited for."""
    peak_anon_bytes: int


def measure(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> Run:
    """Run a command to its end. Raises CalledProcessError when its exit code is not 0."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            list(map(str, command)),
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        # When memory runs out, the kernel must end this process and not its neighbours.
        Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000", encoding="ascii")
        stop, peaks = Event(), [0]
        sampler = Thread(target=_sample, args=(process.pid, stop, peaks))
        sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        stop.set()
        sampler.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, stderr=errors.read())
    return Run(wall, usage.ru_utime + usage.ru_stime, max(peaks))


def importing(module: str, python: Path | str = sys.executable) -> Run:
    """Measure an interpreter that only imports a module, which every program has to do."""
    # It stays a while, so that at least one sample sees it complete.
    run = measure([python, "-c", f"import {module}, time; time.sleep(0.2)"])
    return Run(run.wall_seconds - 0.2, run.cpu_seconds, run.peak_anon_bytes)


def descendants(pid: int) -> Iterator[int]:
    """Yield the processes that a process has started, and theirs."""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, task.read_text(encoding="ascii").split()):
                yield child
                yield from descendants(child)


def read_into_cache(files: Iterable[Path]) -> None:
    """Read files, so that the page cache holds them."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def drop_from_cache(files: Iterable[Path]) -> None:
    """Make the page cache forget files; it keeps pages that were not written yet, so sync first."""
    os.sync()
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sample(pid: int, stop: Event, peaks: list[int]) -> None:
    while not stop.wait(0.01):
        peaks.append(sum(map(_anon_bytes, (pid, *descendants(pid)))))


def _anon_bytes(pid: int) -> int:
    # A process that has just ended has no such file or no such line any more.
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
