"""The terminal: what commands say and where, their exit codes, and the signals that stop them.

stdout is data, stderr is talk. Exit codes: 0 done, 1 a verification failed, 2 bad usage or input
or a resource that failed, 70 a bug in upcycle, 129 SIGHUP, 130 SIGINT, 143 SIGTERM.

Nothing that is printed is taken for markup, and nothing that cannot be seen reaches the screen, nor
a password.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from json import dumps
from threading import Lock
from types import FrameType
from typing import Any, NoReturn

import typer
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.text import Text

from upcycle_cli.checkpoint.checkpoint import shortened_file
from upcycle_cli.cli.startup import STOPPED, handle_signals, reserve_descriptors
from upcycle_cli.cli.streams import flush_streams, make_streams_robust
from upcycle_cli.core.errors import UpcycleError, lack_in_words
from upcycle_cli.core.secrets import blotted
from upcycle_cli.core.text import printable, printable_lines

EXIT_VERIFICATION_FAILED = 1
EXIT_ERROR = 2
EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h


def prepare() -> None:
    """Take signals and faults, and let nothing that happens to stdout or stderr end a command."""
    handle_signals(on_signal)
    reserve_descriptors()
    make_streams_robust()
    _handle_faults()


def finish(code: int) -> NoReturn:
    """End the process: the command is over, and a signal that comes now has nothing to stop."""
    # Python would take torch apart for half a second first, and wait for threads that still
    # transfer something after a signal.
    ignored = False
    while not ignored:
        with suppress(StoppedError):
            handle_signals(signal.SIG_IGN)
            ignored = True
    if not _received:
        with suppress(Exception):
            atexit._run_exitfuncs()  # noqa: SLF001 - there is no public way
    lost = flush_streams()
    if lost is not None and code == 0:
        code = EXIT_ERROR
        say_error(f"not all of stdout could be written: {lost.strerror}.")
        flush_streams()
    os._exit(code)


# Signals -----------------------------------------------------------------------------------------


class StoppedError(BaseException):
    """A signal came. No KeyboardInterrupt, of which libraries make something else."""


_received: list[signal.Signals] = []


def on_signal(signum: int, _frame: FrameType | None) -> None:
    """Take a signal: remember it, and raise for it wherever the program is."""
    _received.append(signal.Signals(signum))
    raise_signal()


def raise_signal() -> None:
    """Raise for a signal that came, again where a library that was imported swallowed that."""
    if _received:
        raise StoppedError


def stopped() -> tuple[int, str]:
    """Return the exit code for the first signal that came, and the word for it."""
    return STOPPED[_received[0] if _received else signal.SIGINT]


# Faults ------------------------------------------------------------------------------------------
# A file that is cut short while it is mapped sends whoever reads it a SIGBUS, and a C library that
# gets no memory or no thread may call `exit(1)`. Python hears of neither: its own handlers run only
# once the faulting instruction has ended, which it never does.

_first_fault = Lock()


def _on_sigbus(_signum: int) -> None:
    while not _first_fault.acquire(blocking=False):
        time.sleep(1)  # another thread has read there too, and is saying so
    try:
        message = f"{shortened_file() or 'a file'} was cut short while it was being read."
        say_last_words(message, "Run the command again once nothing writes to it.")
    finally:
        os._exit(EXIT_ERROR)


def _on_exit(_: object) -> None:
    try:
        message = "a library has ended the process; what it said is above."
        say_last_words(message, "It may lack memory or threads (`ulimit -a`).")
    finally:
        os._exit(EXIT_ERROR)


# C functions last as long as somebody holds them.
_C_ON_SIGBUS = ctypes.CFUNCTYPE(None, ctypes.c_int)(_on_sigbus)
_C_ON_EXIT = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_on_exit)


def _handle_faults() -> None:
    """End the process with a message, a hint and an exit code where it would end without."""
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGBUS, _C_ON_SIGBUS)
    # Whatever ends by its own will does so by _exit.
    libc["__cxa_atexit"](_C_ON_EXIT, None, None)


# What is said ------------------------------------------------------------------------------------


class _Console(Console):
    """Prints text as it is: no markup, no emoji codes, and no sign that cannot be seen."""

    def render_str(self, text: str, **options: Any) -> Text:  # noqa: ANN401
        return super().render_str(printable_lines(blotted(text)), **options)


@dataclass
class _Trimmed:
    """A table without the spaces that fill its last column."""

    table: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in console.render_lines(self.table, options, pad=False):
            while line and not line[-1].text.rstrip(" "):
                line.pop()
            if line:
                text, style, _ = line.pop()
                line.append(Segment(text.rstrip(" "), style))
            yield from line
            yield Segment.line()


def stdout(width: int | None = None) -> Console:
    """Return where data goes."""
    return _Console(width=width, highlight=False, markup=False, emoji=False)


def stderr() -> Console:
    """Return where talk goes."""
    return _Console(stderr=True, highlight=False, markup=False, emoji=False)


def show(table: RenderableType, console: Console | None = None) -> None:
    """Print a table to stdout, or to a console."""
    (console or stdout()).print(_Trimmed(table))


def talk(*lines: str) -> None:
    """Say something, line by line."""
    stderr().print(Text("\n".join(printable(blotted(line)) for line in lines)), soft_wrap=True)


def warn(text: str) -> None:
    """Say what is not an error, but should be known."""
    console = stderr()
    note = Text.assemble(("note:", "yellow"), " ", printable(blotted(text)))
    if console.is_terminal:
        show(note, console)
    else:  # a log folds no lines, and whoever searches it wants them whole
        console.print(note, soft_wrap=True)


def say_error(message: str, hint: str | None = None) -> None:
    """Say what went wrong, in a line, and what to do about it."""
    text = Text.assemble(("error:", "bold red"), " ", printable(blotted(message)))
    if hint:
        text.append("\n" + printable_lines(blotted(hint)))
    stderr().print(text, soft_wrap=True)


def print_json(value: dict[str, Any]) -> None:
    """Print a command's one JSON object."""
    sys.stdout.write(json_text(value, sys.stdout.encoding) + "\n")
    sys.stdout.flush()


def json_text(value: object, encoding: str | None = None) -> str:
    """Return a value as JSON that every terminal and every parser can take."""
    # Escaped is what cannot be seen, or written in `encoding`, and in Python's notation half a
    # character, which no parser takes.
    unicode = (encoding or "utf-8").lower().startswith("utf")

    def escape(found: re.Match[str]) -> str:
        sign = found[0]
        if unicode and sign.isprintable():
            return sign
        escaped = dumps(sign)[1:-1]
        return rf"\{escaped}" if "\ud800" <= sign <= "\udfff" else escaped

    return re.sub(r"[^\n -~]", escape, dumps(_sayable(value), indent=2, ensure_ascii=False))


def _sayable(value: object) -> object:
    """Return a value without passwords, and without the numbers that JSON does not have."""
    match value:
        case dict():
            return {key: _sayable(item) for key, item in value.items()}
        case list() | tuple():
            return [_sayable(item) for item in value]
        case str():
            return blotted(value)
        case float() if not math.isfinite(value):
            return None
    return value


def fail(message: str, code: int, hint: str | None = None) -> NoReturn:
    """Say what went wrong, and end the command."""
    say_error(message, hint)
    raise typer.Exit(code)


# Errors ------------------------------------------------------------------------------------------

_json_wanted: list[bool] = []  # whether the commands that are running were called with --json


@contextmanager
def errors_to_exit_codes(*, as_json: bool, silent: bool = False) -> Iterator[None]:
    """End the command with one message, unless `silent`, and an exit code for a user's errors."""
    _json_wanted.append(as_json)
    code = EXIT_ERROR
    try:
        yield
    except (StoppedError, KeyboardInterrupt):
        code, word = stopped()
        words = UpcycleError(
            f"{word}; what was not complete was not published.",
            "The same command goes on where it stopped.",
        )
    except BaseException as error:
        found = in_words(error)
        if found is None:
            raise
        words = found
    else:
        return
    finally:
        _json_wanted.pop()
    if silent:
        raise typer.Exit(code)
    if as_json:
        print_json(_error_json(words, code))
    fail(words.message, code, words.hint)


def in_words(error: BaseException) -> UpcycleError | None:
    """Say what a person can do about an error; None for one that is a bug."""
    if lack := lack_in_words(error):
        return lack
    hint: str | None = None
    match error:
        case UpcycleError():
            return error
        case RecursionError():
            message = "a value in one of the files is nested too deeply to be read."
        case ImportError() if not (error.name or "").startswith("upcycle_cli"):
            cause = error.__cause__ or error  # numpy's own words are a page of advice
            message = f"a library cannot be imported: {cause}."
            hint = "Install upcycle-cli again, or give it more memory if that is what is missing."
        case OSError():
            where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
            message = f"{where}{error.strerror or error}."
        case SystemError():  # of Python, which loses its own errors where memory is short
            message = f"Python gave up: {error}."
            hint = "It may lack memory (`ulimit -a`)."
        case _ if type(error).__module__ == "pyo3_runtime":  # a panic, which is no Exception
            words = " ".join(str(error).split())[:300].rstrip(".")
            message = f"a library gave up: {words}."
            hint = (
                "A file that it read is damaged, or the system gives it no more memory or threads."
            )
        case _:
            return None
    return UpcycleError(message, hint)


def check_current_directory() -> None:
    """Raise UpcycleError when there is none: libraries end the process for want of it."""
    try:
        os.getcwd()  # noqa: PTH109 - the same call, without an object around it
    except OSError as error:
        words = f"the current directory is gone: {error.strerror}."
        raise UpcycleError(words, "Change to one that is there.") from error


def _error_json(words: UpcycleError, code: int) -> dict[str, Any]:
    return {"status": "error", "exit_code": code, "message": words.message, "hint": words.hint}


def say_last_words(message: str, hint: str) -> None:
    """Say why the process ends, past all buffers: they may be half written."""
    if any(_json_wanted):
        told = json_text(_error_json(UpcycleError(message, hint), EXIT_ERROR))
        os.write(1, f"{told}\n".encode())
    os.write(2, blotted(f"error: {printable(message)}\n{hint}\n").encode())
