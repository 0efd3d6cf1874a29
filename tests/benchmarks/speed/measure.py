"""Runs a command and measures it: wall time, CPU time, peak anonymous memory.

Memory is RssAnon (what the process cannot give back without swapping), sampled every 10 ms and
summed over the process and its descendants. The maximum resident size would count the pages of the
mapped checkpoint too, which belong to the page cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

_SAMPLE_SECONDS = 0.01


class FailedError(Exception):
    """The command did not end well; the message says why."""


@dataclass(frozen=True)
class Run:
    """What one run of one command took."""

    wall_seconds: float
    cpu_seconds: float
    """User and system time of the process and of the descendants it waited for."""
    peak_anon_bytes: int
    disk_bytes: int = 0
    """What the output takes on the disk."""


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Run:
    """Run a command to its end. Raises FailedError when its exit code is not 0."""
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        # When memory runs out, the kernel is to end this process and not its neighbours.
        Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000", encoding="ascii")
        stop, peak = Event(), [0]
        sampler = Thread(target=_sample, args=(process.pid, stop, peak))
        sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        stop.set()
        sampler.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise FailedError(_reason(process.returncode, errors.read().decode(errors="replace")))
    return Run(wall, usage.ru_utime + usage.ru_stime, peak[0])


def importing(module: str, python: str = sys.executable) -> Run:
    """Measure an interpreter that imports a module and nothing else: what a program starts from."""
    # It stays a while, so that at least one sample sees it complete.
    run = measure([python, "-c", f"import {module}, time; time.sleep(0.2)"])
    return Run(run.wall_seconds - 0.2, run.cpu_seconds, run.peak_anon_bytes)


def disk_bytes(path: Path) -> int:
    """Return what a file or a directory takes on the disk, as du would, without shared extents."""
    files = [path] if path.is_file() else list(path.rglob("*"))
    return sum(file.lstat().st_blocks * 512 for file in files)


def _sample(pid: int, stop: Event, peak: list[int]) -> None:
    while not stop.wait(_SAMPLE_SECONDS):
        peak[0] = max(peak[0], sum(_anon_bytes(member) for member in _family(pid)))


def _family(pid: int) -> Iterator[int]:
    """Yield a process and its descendants, as far as they are still there."""
    yield pid
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return
    for thread in threads:
        try:
            members = (thread / "children").read_text(encoding="ascii").split()
        except OSError:
            continue
        for child in members:
            yield from _family(int(child))


def _anon_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    # A process that has just ended has no such line any more.
    lines = (line for line in status.splitlines() if line.startswith("RssAnon:"))
    return next((int(line.split()[1]) * 1024 for line in lines), 0)


def _reason(code: int, errors: str) -> str:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    last = lines[-1][:200] if lines else "no message"
    return f"killed by signal {-code} ({last})" if code < 0 else f"exit code {code}: {last}"
