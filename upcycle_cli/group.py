"""The group of commands, which says what cannot be parsed as everything else is said."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from upcycle_cli.terminal import EXIT_ERROR, errors_to_exit_codes, say_error

UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "UsageError")
"""Typer's own or click's, depending on its version."""


class Commands(TyperGroup):
    """The commands; each ends the process with its exit code, and a library does not."""

    def main(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        *,
        standalone_mode: bool = True,
        **options: Any,  # noqa: ANN401 - as typer has them
    ) -> Any:  # noqa: ANN401
        """Run a command; in standalone mode, end the process with its exit code."""
        run = functools.partial(super().main, args, **options, standalone_mode=False)
        if not standalone_mode:
            return run()
        code = 0
        try:
            with errors_to_exit_codes(as_json=False):
                code = run() or 0
        except typer.Exit as ending:
            code = ending.exit_code
        except UsageError as error:
            code = _refuse_usage(error)
        except SystemExit as ending:  # of a library, whose 1 says nothing of a verification
            code = EXIT_ERROR if ending.code else 0
        sys.exit(code)


def _refuse_usage(error: Any) -> int:  # noqa: ANN401 - see above
    """Say what is wrong with the command line; return the exit code."""
    if type(error).__name__ == "NoArgsIsHelpError":  # the help is there already
        return EXIT_ERROR
    words, context = " ".join(error.format_message().split()), error.ctx
    hint = context and f"{context.get_usage()}\n`{context.command_path} --help` says more."
    say_error(words, hint)
    return EXIT_ERROR
