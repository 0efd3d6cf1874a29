"""Progress on stderr: a bar on a terminal, an occasional line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from upcycle_cli.cli.process import raise_signal
from upcycle_cli.cli.terminal import stderr
from upcycle_cli.core.callbacks import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars

_SECONDS_BETWEEN_LINES = 10.0


class _Lines(Progress):
    """Prints a line when a step begins, and its progress every ten seconds."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.written, self.step = console, total, 0, ""

    def advance(self, num_bytes: int) -> None:
        if self.step != "writing":
            self.begins("writing")
        self.written += num_bytes
        self.checked(self.written, self.total, "bytes")

    def begins(self, what: str) -> None:
        raise_signal()
        self.step, self.started, self.shown = what, time.monotonic(), time.monotonic()
        if what != "writing":
            self.console.print(what)

    def checked(self, done: int, total: int, unit: str) -> None:
        raise_signal()
        seconds = time.monotonic() - self.started
        amount = f"{done} of {total} {unit}"
        if unit == "bytes":
            speed = done / max(seconds, 1e-3)
            amount = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {speed / 1e9:.2f} GB/s"
        self.show(done, total, amount)

    def show(self, done: int, total: int, amount: str) -> None:
        """Show how much of the step is done, also in words."""
        now = time.monotonic()
        if now - self.shown >= _SECONDS_BETWEEN_LINES:
            left = (total - done) / done * (now - self.started) if done else 0.0
            self.console.print(f"{self.step}: {amount}, {left:.0f} s left")
            self.shown = now


class _Bar(_Lines):
    """Shows the current step as a bar."""

    def __init__(self, progress: Bars, total: int) -> None:
        super().__init__(progress.console, total)
        self.progress = progress

    def begins(self, what: str) -> None:
        raise_signal()
        self.step, self.started = what, time.monotonic()
        for task in self.progress.task_ids:
            self.progress.remove_task(task)
        self.task = self.progress.add_task(what, total=None, amount="")

    def show(self, done: int, total: int, amount: str) -> None:
        self.progress.update(self.task, completed=done, total=total, amount=amount)


@contextmanager
def progress_bar(*, total: int = 0, silent: bool) -> Iterator[Progress]:
    """Show the progress of writing `total` bytes and of checks, until the context ends."""
    console = stderr()
    if silent:
        yield Progress()
    elif not console.is_terminal:
        yield _Lines(console, total)
    else:
        import rich.progress as bars

        name = bars.TextColumn("{task.description}", markup=False)
        amount = bars.TextColumn("{task.fields[amount]}", markup=False)
        columns = (name, bars.BarColumn(), amount, bars.TimeRemainingColumn())
        with bars.Progress(*columns, console=console, transient=True) as progress:
            yield _Bar(progress, total)
