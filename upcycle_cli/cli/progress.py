"""Progress on stderr: a bar on a terminal, an occasional plain line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import rich.progress as bars
from rich.text import Text

from upcycle_cli.core.callbacks import Progress

if TYPE_CHECKING:
    from rich.console import Console

_SECONDS_BETWEEN_LINES = 10.0


class _Bar(Progress):
    def __init__(self, progress: bars.Progress, total: int) -> None:
        self._progress, self._total = progress, total
        self._task = self._writing()

    def _writing(self) -> bars.TaskID:
        total = self._total
        return self._progress.add_task("writing", total=total, unit="bytes", visible=total > 0)

    def advance(self, num_bytes: int) -> None:
        self._progress.advance(self._task, num_bytes)

    def calibrated(self) -> None:
        self._progress.remove_task(self._task)
        self._task = self._writing()

    def begins(self, what: str) -> None:
        # What is left of one thing says nothing of the next.
        self._progress.remove_task(self._task)
        self._task = self._progress.add_task(what, total=None, unit="")

    def checked(self, done: int, total: int, unit: str) -> None:
        self._progress.update(self._task, completed=done, total=total, unit=unit)


class _Amount(bars.DownloadColumn):
    """How much of how much, in bytes or in what a check counts."""

    def render(self, task: bars.Task) -> Text:
        unit = task.fields["unit"]
        if unit == "bytes":
            return super().render(task)
        done = "" if task.total is None else f"{task.completed:.0f}/{task.total:.0f} {unit}"
        return Text(done, style="progress.download")


class _Speed(bars.TransferSpeedColumn):
    def render(self, task: bars.Task) -> Text:
        return super().render(task) if task.fields["unit"] == "bytes" else Text()


@dataclass
class _Lines(Progress):
    console: Console
    total: int
    name: str = "writing"
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)

    def advance(self, num_bytes: int) -> None:
        self.done += num_bytes
        self.checked(self.done, self.total, "bytes")

    def calibrated(self) -> None:
        self.name = "writing"
        self.started = self.last = time.monotonic()

    def begins(self, what: str) -> None:
        self.name = what
        self.started = self.last = time.monotonic()
        self.console.print(what)

    def checked(self, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        if now - self.last < _SECONDS_BETWEEN_LINES:
            return
        rate = done / (now - self.started)
        amount = f"{done} of {total} {unit}"
        if unit == "bytes":
            amount = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s"
        self.console.print(f"{self.name}: {amount}, {(total - done) / rate:.0f} s left")
        self.last = now


@contextmanager
def progress_bar(console: Console, *, total: int, silent: bool) -> Iterator[Progress]:
    """Show progress for as long as the context lasts: of `total` bytes written, of checks made."""
    if silent:
        yield Progress()
    elif not console.is_terminal:
        yield _Lines(console, total)
    else:
        done = (bars.TextColumn("{task.description}", markup=False), bars.BarColumn())
        rate = (_Amount(), _Speed(), bars.TimeRemainingColumn())
        with bars.Progress(*done, *rate, console=console, transient=True) as progress:
            yield _Bar(progress, total)
