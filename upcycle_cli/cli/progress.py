"""Progress on stderr: a bar on a terminal, an occasional line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import rich.progress as bars
from rich.text import Text

from upcycle_cli.core.callbacks import Progress

if TYPE_CHECKING:
    from rich.console import Console

_SECONDS_BETWEEN_LINES = 10.0


class _Shown(Progress):
    """Tracks one task at a time: writing `total` bytes, calibrating, or a check."""

    def __init__(self, total: int) -> None:
        self.total, self.written = total, 0
        self.start("writing", total or None)

    def start(self, name: str, total: int | None) -> None:
        """Show another task instead of the current one."""
        raise NotImplementedError

    def advance(self, num_bytes: int) -> None:
        self.written += num_bytes
        self.checked(self.written, self.total, "bytes")

    def calibrated(self) -> None:
        self.start("writing", self.total)

    def begins(self, what: str) -> None:
        self.start(what, None)


class _Bar(_Shown):
    def __init__(self, progress: bars.Progress, total: int) -> None:
        self.progress, self.task = progress, bars.TaskID(0)
        super().__init__(total)

    def start(self, name: str, total: int | None) -> None:
        # A new task, since the speed of the last one means nothing for this one.
        if self.progress.tasks:
            self.progress.remove_task(self.task)
        visible = total is not None or name != "writing"
        self.task = self.progress.add_task(name, total=total, unit="bytes", visible=visible)

    def checked(self, done: int, total: int, unit: str) -> None:
        self.progress.update(self.task, completed=done, total=total, unit=unit)


class _Amount(bars.DownloadColumn):
    """The amount that is done, in bytes or in the unit of a check."""

    def render(self, task: bars.Task) -> Text:
        unit = task.fields["unit"]
        if unit == "bytes" and task.total is not None:
            return super().render(task)
        done = "" if task.total is None else f"{task.completed:.0f}/{task.total:.0f} {unit}"
        return Text(done, style="progress.download")


class _Speed(bars.TransferSpeedColumn):
    def render(self, task: bars.Task) -> Text:
        return super().render(task) if task.fields["unit"] == "bytes" else Text()


class _Lines(_Shown):
    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        super().__init__(total)

    def start(self, name: str, total: int | None) -> None:
        self.name = name
        self.started = self.last = time.monotonic()
        if total is None and name != "writing":
            self.console.print(name)

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
    """Show the progress of writing `total` bytes and of checks, until the context ends."""
    if silent:
        yield Progress()
    elif not console.is_terminal:
        yield _Lines(console, total)
    else:
        done = (bars.TextColumn("{task.description}", markup=False), bars.BarColumn())
        rate = (_Amount(), _Speed(), bars.TimeRemainingColumn())
        with bars.Progress(*done, *rate, console=console, transient=True) as progress:
            yield _Bar(progress, total)
