"""The first moments of a process, before anything large is imported.

Importing the command line takes a while, in which a signal may come, and it opens files, which must
not become somebody's standard output.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn

STOPPED = {
    signal.SIGHUP: (129, "hung up"),
    signal.SIGINT: (130, "interrupted"),
    signal.SIGTERM: (143, "terminated"),
}
"""The signals that stop a command: its exit code then, and the word for it."""


def begin() -> None:
    """Take signals, and see that the three standard descriptors are taken."""
    handle_signals(_end_at_once)
    reserve_descriptors()
    # Nothing here multiplies matrices by numpy, whose BLAS would start threads while it is
    # imported and, where it may not, send the process a SIGINT.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def handle_signals(handler: signal.Handlers | object) -> None:
    """Let a function handle the signals that stop a command."""
    for signum in STOPPED:
        # A wish of nohup's is kept.
        if signum != signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, handler)  # type: ignore[arg-type]


def reserve_descriptors() -> None:
    """Put something in the place of closed standard descriptors, to which writing fails as before.

    Else the next file that is opened gets the number, and what a library says is written into it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDONLY)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def give_up(error: Exception) -> NoReturn:
    """End the process: what the command line consists of cannot be imported."""
    words = str(error) or f"there is no room for it ({type(error).__name__})"
    _say_and_exit(2, f"upcycle does not start: {words.rstrip('.')}")


def _end_at_once(signum: int, _frame: FrameType | None) -> None:
    """End the process: nothing has begun, so nothing is to be given back."""
    _say_and_exit(*STOPPED[signal.Signals(signum)])


def _say_and_exit(code: int, words: str) -> NoReturn:
    try:
        os.write(2, f"error: {words}.\n".encode(errors="backslashreplace"))
    finally:
        os._exit(code)
