"""Progress on stderr: a bar on a terminal, an occasional plain line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import rich.progress as bars

from upcycle_cli.hooks import Progress

if TYPE_CHECKING:
    from rich.console import Console

_SECONDS_BETWEEN_LINES = 10.0


class _Bar(Progress):
    def __init__(self, progress: bars.Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("writing", total=total)

    def advance(self, num_bytes: int) -> None:
        self._progress.advance(self._task, num_bytes)

    def checking(self, name: str) -> None:
        self._progress.update(self._task, description=f"checking {name}")


@dataclass
class _Lines(Progress):
    console: Console
    total: int
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)

    def advance(self, num_bytes: int) -> None:
        self.done += num_bytes
        now = time.monotonic()
        if now - self.last >= _SECONDS_BETWEEN_LINES:
            rate = self.done / (now - self.started)
            left = (self.total - self.done) / rate
            self.console.print(
                f"writing: {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, "
                f"{rate / 1e9:.2f} GB/s, {left:.0f} s left"
            )
            self.last = now

    def checking(self, name: str) -> None:
        self.console.print(f"checking {name}")


@contextmanager
def progress_bar(console: Console, *, total: int, silent: bool) -> Iterator[Progress]:
    """Show progress towards `total` bytes for as long as the context lasts."""
    if silent:
        yield Progress()
    elif not console.is_terminal:
        yield _Lines(console, total)
    else:
        done = (bars.TextColumn("{task.description}", markup=False), bars.BarColumn())
        rate = (bars.DownloadColumn(), bars.TransferSpeedColumn(), bars.TimeRemainingColumn())
        with bars.Progress(*done, *rate, console=console, transient=True) as progress:
            yield _Bar(progress, total)
