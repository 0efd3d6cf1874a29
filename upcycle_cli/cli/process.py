"""The process around a command: signals, standard streams that never fail, and how it ends.

Imports nothing large, since a signal can arrive while the rest of the command line is imported.
Writing to stdout or stderr never raises: a full disk or a closed pipe would otherwise end a command
with some library's own exit code, often 1, which here means that a verification failed.
"""

from __future__ import annotations

import atexit
import errno
import io
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

EXIT_ERROR = 2
EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h

STOPPED = {
    signal.SIGHUP: (129, "hung up"),
    signal.SIGINT: (130, "interrupted"),
    signal.SIGTERM: (143, "terminated"),
}
"""The signals that stop a command, each with its exit code and a word for it."""


class StoppedError(BaseException):
    """A signal arrived. Libraries catch KeyboardInterrupt, so this is an exception of our own."""


_received: list[signal.Signals] = []


def start() -> None:
    """Handle signals and protect the standard streams."""
    _handle_signals(on_signal)
    _protect_streams()
    # Importing numpy would start threads for its BLAS, which upcycle does not use.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # torch's threads wait for each other after each operation. On a busy machine, spinning threads
    # would take most of the processor time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # huggingface_hub's warnings announce retries; a final failure is raised.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def on_signal(signum: int, _frame: FrameType | None) -> None:
    """Remember a signal, and raise StoppedError wherever the program is."""
    _received.append(signal.Signals(signum))
    raise_signal()


def raise_signal() -> None:
    """Raise StoppedError if a signal arrived, for code that may have swallowed the first one."""
    if _received:
        raise StoppedError


def stopped() -> tuple[int, str]:
    """Return the exit code for the first signal, and the word for it."""
    return STOPPED[_received[0] if _received else signal.SIGINT]


def finish(code: int) -> NoReturn:
    """End the process; ignore signals from here on, since there is nothing left to stop."""
    ignored = False
    while not ignored:
        with suppress(StoppedError):
            _handle_signals(signal.SIG_IGN)
            ignored = True
    if not _received:
        with suppress(Exception):
            atexit._run_exitfuncs()  # noqa: SLF001 - there is no public way
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    lost = _sinks[0].lost if _sinks else None
    # A reader that closed the pipe had read enough.
    if lost is not None and lost.errno != errno.EPIPE and code == 0:
        code = EXIT_ERROR
        print_error(f"could not write all of stdout: {lost.strerror}.")
    # Python would spend half a second on tearing torch down, and wait for threads of a download.
    os._exit(code)


def print_error(message: str) -> None:
    """Print an error without rich, which may not be imported, or may lack memory."""
    with suppress(OSError):
        os.write(2, f"error: {message}\n".encode(errors="backslashreplace"))


def _handle_signals(handler: signal.Handlers | object) -> None:
    for signum in STOPPED:
        # nohup ignores SIGHUP, and so do we then.
        if signum != signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, handler)  # type: ignore[arg-type]


class _Sink(io.FileIO):
    """A descriptor to which writing never fails; `lost` is the first error."""

    lost: OSError | None = None

    def write(self, data: Any) -> int:  # noqa: ANN401 - any buffer
        try:
            return super().write(data)
        except OSError as error:
            self.lost = self.lost or error
            return memoryview(data).nbytes


_sinks: list[_Sink] = []


def _protect_streams() -> None:
    """Make stdout and stderr write to sinks.

    A closed descriptor is replaced by one to which writing fails, too. Otherwise the next file that
    is opened would get its number, and messages would end up in that file.
    """
    while (descriptor := os.open(os.devnull, os.O_RDONLY)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        old, sink = getattr(sys, name), _Sink(descriptor, "wb", closefd=False)
        _sinks.append(sink)
        stream = io.TextIOWrapper(
            io.BufferedWriter(sink),
            encoding="utf-8" if old is None else old.encoding,
            errors="backslashreplace",  # what the terminal cannot show must not end a conversion
            line_buffering=name == "stderr" or sink.isatty(),
            write_through=old is not None and old.write_through,
        )
        setattr(sys, name, stream)
