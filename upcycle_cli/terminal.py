"""The terminal: what commands say and where, their exit codes, and the signals that stop them.

stdout is data, stderr is talk. Exit codes: 0 done, 1 a verification failed, 2 bad usage or input
or a resource that failed, 70 a bug in upcycle, 130 SIGINT, 143 SIGTERM.
"""

from __future__ import annotations

import atexit
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from json import dumps
from typing import Any, NoReturn, TextIO

import typer
from rich.console import Console
from rich.markup import escape

from upcycle_cli.errors import UpcycleError
from upcycle_cli.team import launched_rank

EXIT_VERIFICATION_FAILED = 1
EXIT_ERROR = 2
EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


def prepare() -> None:
    """Take signals, and let stdout and stderr survive a name that they cannot show."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, on_signal)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup's wish is kept
        signal.signal(signal.SIGHUP, on_signal)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name or sign that the terminal cannot show must not end a conversion.
            stream.reconfigure(errors="backslashreplace")


def finish() -> None:
    """End the process: the command is over, and a signal that comes now has nothing to stop.

    Python would take torch apart for half a second first, and wait for threads that still transfer
    something after a signal.
    """
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    ending = sys.exc_info()[1]
    if not isinstance(ending, SystemExit) or not isinstance(ending.code, int):
        return
    if not _received:
        atexit._run_exitfuncs()  # noqa: SLF001 - there is no public way
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        return  # Python has its own exit code for output that is lost
    os._exit(ending.code)


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM or SIGHUP came; it unwinds as SIGINT does: files are closed, locks given back."""


_received: list[int] = []


def on_signal(signum: int, _frame: object) -> None:
    """Take a signal: remember it, and raise for it wherever the program is."""
    _received.append(signum)
    raise_signal()


def raise_signal() -> None:
    """Raise for a signal that came, even when a library swallowed the exception it raised then.

    Some do, while they are being imported: the command would go on as if nothing had been.
    """
    if _received:
        raise KeyboardInterrupt if _received[0] == signal.SIGINT else _TerminatedError


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # rich would exit with 1, which means here that a verification failed.
        _stop_printing(sys.stderr if self.stderr else sys.stdout)


def _stop_printing(stream: TextIO) -> None:
    """Whoever read this has seen enough: the command goes on to its end and its exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def stdout(width: int | None = None) -> Console:
    """Return where data goes."""
    return _Console(width=width, highlight=False)


def stderr() -> Console:
    """Return where talk goes."""
    return _Console(stderr=True, highlight=False)


def talk(text: str) -> None:
    """Say something, as it is."""
    stderr().print(escape(text), soft_wrap=True)


def warn(text: str) -> None:
    """Say what is not an error, but should be known."""
    stderr().print(f"[yellow]note:[/yellow] {escape(text)}", highlight=False)


def print_json(value: dict[str, Any]) -> None:
    """Print a command's one JSON object; of several ranks, rank 0 does."""
    if launched_rank() > 0:
        return
    try:
        typer.echo(dumps(value, indent=2, ensure_ascii=False))
    except BrokenPipeError:
        _stop_printing(sys.stdout)


def fail(message: str, code: int) -> NoReturn:
    """Say what went wrong, and end the command."""
    if launched_rank() > 0:  # rank 0 says it, once
        raise typer.Exit(code)
    stderr().print(f"[bold red]error:[/bold red] {escape(message)}", soft_wrap=True)
    raise typer.Exit(code)


def _end(error: UpcycleError, code: int, *, as_json: bool) -> NoReturn:
    """End a command that could not do its work, for people and for programs."""
    if as_json:
        print_json(
            {
                "status": "error",
                "exit_code": code,
                "message": error.message,
                "hint": error.hint,
            }
        )
    fail(str(error), code)


@contextmanager
def errors_to_exit_codes(*, as_json: bool) -> Iterator[None]:
    """End the command with one message and an exit code for whatever a user can cause or cure."""
    try:
        yield
    except UpcycleError as error:
        _end(error, EXIT_ERROR, as_json=as_json)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        failed = UpcycleError(f"{where}{error.strerror or error}.")
        _end(failed, EXIT_ERROR, as_json=as_json)
    except KeyboardInterrupt as signal_error:
        terminated = isinstance(signal_error, _TerminatedError)
        stopped = UpcycleError(
            f"{'terminated' if terminated else 'interrupted'}; what was not complete was not "
            "published.",
            "The same command goes on where it stopped.",
        )
        _end(stopped, EXIT_SIGTERM if terminated else EXIT_SIGINT, as_json=as_json)
