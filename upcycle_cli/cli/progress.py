"""Progress on stderr: a bar on a terminal, elsewhere a line every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import TYPE_CHECKING

from upcycle_cli.cli.process import raise_signal
from upcycle_cli.cli.terminal import stderr
from upcycle_cli.core.callbacks import Hooks

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

_SECONDS_BETWEEN_LINES = 10.0
_SHOWN_BY_THE_HUB = ("downloading", "pushing")
"""On a terminal, huggingface_hub shows its own bars for these steps."""
_LOADS_FIRST = ("calibrating", "checking outputs", "checking load")
"""These steps load models before the first layer is done."""


class Display(Hooks):
    """Notes the current step and how much of it is done; shows a bar if it has `bars`."""

    def __init__(self) -> None:
        self.bars: Bars | None = None
        self.total = self.written = 0
        self.ends()

    def ends(self) -> None:
        """Note that no step is running, so that commands can print."""
        self.step, self.amount, self.share, self.started = "", "", 0.0, time.monotonic()
        if self.bars is not None and self.bars.live.is_started:
            self.bars.stop()

    def begins(self, what: str) -> None:
        """Note a step, and end the one before it."""
        raise_signal()
        self.ends()
        self.step, self.amount = what, "loading" if what in _LOADS_FIRST else ""
        if self.bars is not None and what not in _SHOWN_BY_THE_HUB:
            for task in self.bars.task_ids:
                self.bars.remove_task(task)
            self.task = self.bars.add_task(what, total=None, amount=self.amount)
            self.bars.start()

    def advance(self, num_bytes: int) -> None:
        """Note bytes that were written."""
        if self.step != "writing":
            self.begins("writing")
        self.written += num_bytes
        self.checked(self.written, self.total, "bytes")

    def checked(self, done: int, total: int, unit: str) -> None:
        """Note how much of the step is done."""
        raise_signal()
        self.share, self.amount = done / max(total, 1), f"{done} of {total} {unit}"
        if unit == "bytes":
            speed = done / max(time.monotonic() - self.started, 1e-3)
            self.amount = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {speed / 1e9:.2f} GB/s"
        if self.bars is not None:
            self.bars.update(self.task, completed=done, total=total, amount=self.amount)

    def line(self) -> str:
        """Return the step, how much of it is done, and how long it takes."""
        seconds = time.monotonic() - self.started
        words = [self.step + ":", self.amount and self.amount + ",", f"{seconds:.0f} s"]
        if 0 < self.share < 1:
            words.append(f"(about {seconds / self.share - seconds:.0f} s left)")
        return " ".join(filter(None, words))


def print_lines(display: Display, ended: Event) -> None:
    """Print a line every ten seconds while a step runs, until the event is set."""
    while not ended.wait(_SECONDS_BETWEEN_LINES):
        if display.step:
            stderr().print(display.line(), soft_wrap=True)


@contextmanager
def progress_bar(display: Display | None = None, *, silent: bool) -> Iterator[Display]:
    """Show the progress of the steps that begin, until the context ends."""
    console, display, ended = stderr(), display or Display(), Event()
    if console.is_terminal and not silent:
        import rich.progress as bars

        name = bars.TextColumn("{task.description}", markup=False)
        amount = bars.TextColumn("{task.fields[amount]}", markup=False)
        columns = (name, bars.BarColumn(), amount, bars.TimeRemainingColumn())
        display.bars = bars.Progress(*columns, console=console, transient=True)
    elif not silent:
        # A thread, since a download, an upload or a large layer reports nothing while it runs.
        Thread(target=print_lines, args=(display, ended), daemon=True).start()
    try:
        yield display
    finally:
        ended.set()
        display.ends()
