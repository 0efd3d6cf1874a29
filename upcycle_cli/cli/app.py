"""The command line: its commands in a group, and how a process that runs one ends."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from upcycle_cli.cli import terminal
from upcycle_cli.cli.shared_options import option

_COMMANDS = ("convert", "inspect", "verify", "push", "families", "clean", "demo")

# Typer's own or click's, depending on its version.
_UsageError: Any = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError"
)


class Commands(TyperGroup):
    """The commands; each ends the process with its exit code, and a library does not."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - as typer has them
        commands: Any = dict.fromkeys(_COMMANDS)
        super().__init__(**options | {"commands": commands})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ANN401 - as typer has them
        """Return a command, imported with its options when it is asked for."""
        if cmd_name in self.commands and not self.commands[cmd_name]:
            alone = typer.Typer(add_completion=False, rich_markup_mode="rich")
            alone.command()(
                getattr(import_module(f"upcycle_cli.cli.commands.{cmd_name}"), cmd_name)
            )
            self.commands[cmd_name] = typer.main.get_command(alone)
        return super().get_command(ctx, cmd_name)

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
            with terminal.errors_to_exit_codes(as_json=False):
                code = run() or 0
        except typer.Exit as ending:
            code = ending.exit_code
        except _UsageError as error:
            code = terminal.EXIT_ERROR
            if type(error).__name__ != "NoArgsIsHelpError":  # the help is there already
                words, context = " ".join(error.format_message().split()), error.ctx
                hint = (
                    context and f"{context.get_usage()}\n`{context.command_path} --help` says more."
                )
                terminal.say_error(words, hint)
        except SystemExit as ending:  # of a library, whose 1 says nothing of a verification
            code = terminal.EXIT_ERROR if ending.code else 0
        sys.exit(code)


app = typer.Typer(
    name="upcycle",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, option("--version", help="Print the version.")] = False,
) -> None:
    """Turn a dense Hugging Face checkpoint into a Mixture of Experts, and prove it.

    Start with [bold]upcycle demo[/bold], which needs no model and no network.
    """
    # UPCYCLE_CONVERT_RECIPE and so on; not UPCYCLE_VERSION, which is likely to be somebody's own.
    context.auto_envvar_prefix = context.auto_envvar_prefix or "UPCYCLE"
    if version:
        from importlib.metadata import version as installed

        terminal.stdout().print(f"upcycle {installed('upcycle-cli')}")
        raise typer.Exit
    if context.invoked_subcommand is not None:
        terminal.check_current_directory()


def main() -> None:
    """Run the command line."""
    code = terminal.EXIT_BUG  # and not 1, which would mean that a verification failed
    try:
        terminal.prepare()
        app(prog_name="upcycle")
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else terminal.EXIT_BUG
    except terminal.StoppedError:  # before a command began, or while another signal was answered
        code, word = terminal.stopped()
        terminal.say_error(f"{word}.")
    except BaseException as error:  # noqa: BLE001 - whatever it is
        words = terminal.in_words(error)  # memory that was lacking for saying so, most likely
        if words is not None:
            code = terminal.EXIT_ERROR
            terminal.say_last_words(words.message, words.hint or "")
        else:
            terminal.talk(*traceback.format_exc().splitlines())
            terminal.talk("", "This is a bug in upcycle. Please report it with the lines above.")
    finally:
        terminal.finish(code)
