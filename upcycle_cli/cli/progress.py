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
    from rich.progress import Progress as Bars

_SECONDS_BETWEEN_LINES = 10.0


class _Display(Progress):
    """Shows each step as a bar or, without bars, as a line every ten seconds."""

    def __init__(self, total: int, bars: Bars | None = None) -> None:
        self.total, self.bars, self.written, self.step = total, bars, 0, ""

    def advance(self, num_bytes: int) -> None:
        if self.step != "writing":
            self.begins("writing")
        self.written += num_bytes
        self.checked(self.written, self.total, "bytes")

    def begins(self, what: str) -> None:
        raise_signal()
        self.step, self.started, self.shown = what, time.monotonic(), time.monotonic()
        if self.bars is not None:
            for task in self.bars.task_ids:
                self.bars.remove_task(task)
            self.task = self.bars.add_task(what, total=None, amount="")
        elif what != "writing":
            stderr().print(what)

    def checked(self, done: int, total: int, unit: str) -> None:
        raise_signal()
        amount, now = f"{done} of {total} {unit}", time.monotonic()
        if unit == "bytes":
            speed = done / max(now - self.started, 1e-3)
            amount = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {speed / 1e9:.2f} GB/s"
        if self.bars is not None:
            self.bars.update(self.task, completed=done, total=total, amount=amount)
        elif now - self.shown >= _SECONDS_BETWEEN_LINES:
            left = (total - done) / done * (now - self.started) if done else 0.0
            stderr().print(f"{self.step}: {amount}, {left:.0f} s left")
            self.shown = now


@contextmanager
def progress_bar(*, total: int = 0, silent: bool) -> Iterator[Progress]:
    """Show the progress of writing `total` bytes and of checks, until the context ends."""
    console = stderr()
    if silent:
        yield Progress()
    elif not console.is_terminal:
        yield _Display(total)
    else:
        import rich.progress as bars

        name = bars.TextColumn("{task.description}", markup=False)
        amount = bars.TextColumn("{task.fields[amount]}", markup=False)
        columns = (name, bars.BarColumn(), amount, bars.TimeRemainingColumn())
        with bars.Progress(*columns, console=console, transient=True) as progress:
            yield _Display(total, progress)
