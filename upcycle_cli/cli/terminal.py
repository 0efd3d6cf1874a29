"""What commands print, and the exit codes of their errors.

Data goes to stdout, talk to stderr. Exit codes: 0 done, 1 a verification failed, 2 bad usage, input
or resource, 70 a bug in upcycle, 129 SIGHUP, 130 SIGINT, 143 SIGTERM. Everything printed is plain
text: markup is not interpreted, control characters are escaped, passwords are left out.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from json import dumps
from typing import Any, NoReturn

import typer
from rich.console import Console, RenderableType
from rich.table import Table  # noqa: TC002 - see RenderableType
from rich.text import Text

from upcycle_cli.cli.options import with_flags
from upcycle_cli.cli.process import EXIT_ERROR, StoppedError, stopped
from upcycle_cli.core import display
from upcycle_cli.core.errors import UpcycleError, lack_in_words
from upcycle_cli.core.text import blotted, printable, printable_lines

EXIT_VERIFICATION_FAILED = 1


# Text ---------------------------------------------------------------------------------------------


class _Console(Console):
    """Prints text as it is: no markup, no emoji codes, control characters escaped."""

    def render_str(self, text: str, **options: Any) -> Text:  # noqa: ANN401
        return super().render_str(printable_lines(blotted(text)), **options)


def stdout(width: int | None = None) -> Console:
    """Return the console for data."""
    return _Console(width=width, highlight=False, markup=False, emoji=False)


def stderr() -> Console:
    """Return the console for talk."""
    return _Console(stderr=True, highlight=False, markup=False, emoji=False)


def rows_table(rows: Iterable[display.Row]) -> Table:
    """Return a table of labels, each with the lines that describe it, with flags for arguments."""
    return display.rows_table((label, [*map(with_flags, lines)]) for label, lines in rows)


def show(*parts: RenderableType | display.Result, to: Console | None = None) -> None:
    """Print tables and results to stdout, or to another console, with empty lines between them.

    Lines get no spaces at their ends.
    """
    console = to or stdout()
    tables: list[RenderableType] = []
    for part in parts:
        tables += map(rows_table, part.tables()) if isinstance(part, display.Result) else [part]
    for number, table in enumerate(tables):
        if number:
            console.print()
        for pieces in console.render_lines(table, pad=False):
            line = Text.assemble(*((piece.text, piece.style or "") for piece in pieces))
            line.rstrip()
            console.print(line, soft_wrap=True)


def talk(*lines: str) -> None:
    """Print lines to stderr."""
    stderr().print(Text("\n".join(printable(blotted(line)) for line in lines)), soft_wrap=True)


def warn(*texts: str) -> None:
    """Print notes to stderr: they are not errors, but the user should know them."""
    console = stderr()
    for text in texts:
        note = Text.assemble(("note:", "yellow"), " ", printable(blotted(with_flags(text))))
        console.print(note, soft_wrap=True)


def say_error(message: str, hint: str | None = None) -> None:
    """Print an error and its hint to stderr."""
    text = Text.assemble(("error:", "bold red"), " ", printable(blotted(message)))
    if hint:
        text.append("\n" + printable_lines(blotted(hint)))
    stderr().print(text, soft_wrap=True)


def fail(message: str, code: int, hint: str | None = None) -> NoReturn:
    """Print an error, and end the command."""
    say_error(message, hint)
    raise typer.Exit(code)


# JSON ---------------------------------------------------------------------------------------------


def print_json(value: dict[str, Any]) -> None:
    """Print the one JSON object of a command, in ASCII for every terminal and parser."""
    text = dumps(_json_value(value), indent=2).replace("\x7f", r"\u007f")
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_error_json(message: str, code: int, hint: str | None) -> None:
    """Print the JSON object of a command that stops with an error."""
    print_json({"status": "error", "exit_code": code, "message": message, "hint": hint})


def _json_value(value: object) -> object:
    """Return a value without passwords, and with None for numbers that JSON does not have."""
    match value:
        case dict():
            return {
                _valid(key): _json_value(with_flags(item) if key == "detail" else item)
                for key, item in value.items()
            }
        case list() | tuple():
            return [_json_value(item) for item in value]
        case str():
            return _valid(blotted(value))
        case float() if not math.isfinite(value):
            return None
    return value


def _valid(text: str) -> str:
    """Return a text without half surrogate pairs, which are not valid JSON."""
    return text.encode(errors="backslashreplace").decode()


# Errors -------------------------------------------------------------------------------------------


@contextmanager
def errors_to_exit_codes(
    *, as_json: bool, silent: bool = False, resumes: bool = False
) -> Iterator[None]:
    """Print errors that a user can fix, unless `silent`, and end the command with an exit code.

    `resumes` means that the same command continues after a signal.
    """
    code = EXIT_ERROR
    try:
        yield
        return  # noqa: TRY300
    except (StoppedError, KeyboardInterrupt):
        code, word = stopped()
        found = UpcycleError(f"{word}.")
        if resumes:
            words = f"{word}; incomplete output was not published."
            found = UpcycleError(words, "The same command resumes where it stopped.")
    except BaseException as error:
        if (known := in_words(error)) is None:
            raise
        found = known
    if silent:
        raise typer.Exit(code)
    message, hint = with_flags(found.message), with_flags(found.hint or "") or None
    if as_json:
        print_error_json(message, code, hint)
    fail(message, code, hint)


def in_words(error: BaseException) -> UpcycleError | None:
    """Return the message and the hint for an error; None for a bug."""
    match lack_in_words(error) or error:
        case UpcycleError() as known:
            return known
        case RecursionError():
            return UpcycleError("a value in one of the files is nested too deeply.")
        case ImportError(name=name) if not (name or "").startswith("upcycle_cli"):
            cause = error.__cause__ or error  # numpy's own message is a page of advice
            hint = "Reinstall upcycle-cli, or give it more memory if that is what it lacks."
            return UpcycleError(f"a library cannot be imported: {cause}.", hint)
        case OSError(filename=path, strerror=reason):
            where = f"{os.fsdecode(path)}: " if path else ""
            return UpcycleError(f"{where}{reason or error}.")
        case _ if type(error).__module__ == "pyo3_runtime":  # a panic of safetensors or tokenizers
            panic = " ".join(str(error).split())[:300].rstrip(".")
            return UpcycleError(f"a library failed: {panic}.", "A file that it read is damaged.")
        case _:
            return None
