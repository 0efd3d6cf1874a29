"""Two models that run side by side, a layer at a time.

Each runs in a thread of its own, which waits after every layer; only one of them runs at any time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

_PATIENCE = 1.0
"""Seconds that a thread has to notice that nobody waits for it any more."""


class _AbandonedError(BaseException):
    """Ends a thread whose result nobody wants; nothing may catch it."""


class Steps:
    """Work that pauses where it calls `pause`, and goes on when `advance` is called."""

    def __init__(self, work: Callable[[Callable[[], None]], None]) -> None:
        self._work = work
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._abandoned = False
        self._error: BaseException | None = None
        self.done = False

    def advance(self) -> None:
        """Run to the next pause, or to the end; raises what the work raises."""
        if self.done:
            return
        if self._thread.ident is None:
            self._thread.start()
        self._go.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._abandoned = True
        self._go.release()
        if self._thread.ident is not None:
            self._thread.join(_PATIENCE)

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                self._work(self.pause)
        except _AbandonedError:
            pass
        except BaseException as error:  # noqa: BLE001 - it is raised again where it is waited for
            self._error = error
        self.done = True
        self._paused.release()

    def pause(self) -> None:
        """Wait for the next `advance`; called by the work, in its thread."""
        self._paused.release()
        self._go.acquire()
        self.check()

    def check(self) -> None:
        """End the work when nobody waits for it any more; called by the work."""
        if self._abandoned:
            raise _AbandonedError
