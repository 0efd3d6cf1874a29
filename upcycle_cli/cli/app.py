"""The group of all commands, their help, and errors as messages and exit codes.

`--help` is plain text in two levels; `--help-all` has the options that few people need, too. Words
stay whole at any width: typer's own help draws boxes, which leave little of a narrow screen.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from upcycle_cli.cli import process, terminal
from upcycle_cli.core.text import counted, did_you_mean

_COMMANDS = ("convert", "inspect", "verify", "push", "families", "clean", "demo")
_HELP_FLAGS = ["-h", "-help", "--help", "--help-all"]
_WIDEST = 100
_FIRST, _LAST = "Arguments", "Options"

# Typer's own or click's, depending on its version.
_UsageError: Any = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError"
)


class _PlainHelp:
    """The usage line and the help of a command or a group."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:  # noqa: ANN401 - as typer has them
        """Note whether --help-all was given, which is a name of --help."""
        ctx.meta["help_all"] = "--help-all" in args
        return super().parse_args(ctx, args)  # type: ignore[misc]

    def collect_usage_pieces(self, ctx: Any) -> list[str]:  # noqa: ANN401
        """Return the usage line after the command."""
        names = [name for panel, name, *_ in _rows(self, ctx) if panel == _FIRST]
        return ["[OPTIONS]", *(["COMMAND ..."] if isinstance(self, TyperGroup) else names)]

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        """Write the help; typer calls this for --help, and where a command is missing."""
        rows, table = [*_rows(self, ctx)], []
        shown = [row for row in rows if ctx.meta["help_all"] or not row[3]]
        for name in sorted(dict.fromkeys(panel for panel, *_ in shown), key=_LAST.__eq__):
            table += [("", [""]), (f"{name}:", [""])]
            table += [(f"  {flags}", [words]) for panel, flags, words, _ in shown if panel == name]
        usage = " ".join(["Usage:", ctx.command_path, *self.collect_usage_pieces(ctx)])
        more = f"{counted(len(rows) - len(shown), 'more option')}: {ctx.command_path} --help-all"
        parts: list[Any] = [Text(usage), Text(ctx.command.help), terminal.rows_table(table[1:])]
        parts += [Text(more)] if len(shown) < len(rows) else []
        console = terminal.stdout()
        console.width = min(console.width, _WIDEST)
        with console.capture() as captured:
            terminal.show(*parts, to=console)
        formatter.write(captured.get())


class Command(_PlainHelp, TyperCommand):
    """A command whose errors are printed and become exit codes."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - as typer has them
        """Run the command."""
        as_json = ctx.params["json"] or ctx.params.get("json_full", False)
        if as_json or ctx.params.get("quiet") or not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        with terminal.errors_to_exit_codes(as_json=as_json):
            return super().invoke(ctx)


class Commands(_PlainHelp, TyperGroup):
    """The commands, each imported when it is called; errors become exit codes."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - as typer has them
        commands: Any = dict.fromkeys(_COMMANDS)
        super().__init__(**options | {"commands": commands})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ANN401 - as typer has them
        """Import a command and its options."""
        if cmd_name in self.commands and not self.commands[cmd_name]:
            module = import_module(f"upcycle_cli.cli.commands.{cmd_name}")
            alone = typer.Typer(add_completion=False, rich_markup_mode=None)
            alone.command(cls=Command)(getattr(module, cmd_name))
            self.commands[cmd_name] = typer.main.get_command(alone)
        return super().get_command(ctx, cmd_name)

    def main(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        *,
        standalone_mode: bool = True,
        **options: Any,  # noqa: ANN401 - as typer has them
    ) -> Any:  # noqa: ANN401
        """Run a command; in standalone mode, exit with its code."""
        run = functools.partial(super().main, args, **options, standalone_mode=False)
        if not standalone_mode:
            return run()
        code, as_json = 0, "--json" in (sys.argv if args is None else args)
        try:
            with terminal.errors_to_exit_codes(as_json=as_json):
                code = run() or 0
        except typer.Exit as ending:
            code = ending.exit_code
        except _UsageError as error:
            code = process.EXIT_ERROR
            if type(error).__name__ == "NoArgsIsHelpError":
                typer.echo(error.format_message(), err=True)
            else:
                words, context = _mistake(error).strip(), error.ctx
                usage = context and f"{context.get_usage()}\nSee `{context.command_path} --help`."
                words = words[:1].lower() + words[1:]
                if as_json:
                    terminal.print_error_json(words, code, usage)
                terminal.say_error(words, usage)
        except SystemExit as ending:  # a library's 1 does not mean that a verification failed
            code = process.EXIT_ERROR if ending.code else 0
        sys.exit(code)


def _rows(command: Any, ctx: Any) -> Iterator[tuple[str, str, str, bool]]:  # noqa: ANN401
    """Yield panel, name and description of everything, and whether it is for --help-all."""
    for name in command.list_commands(ctx) if isinstance(command, TyperGroup) else ():
        yield "Commands", name, command.get_command(ctx, name).help.split("\n")[0], False
    for each in command.get_params(ctx):
        panel, words = getattr(each, "rich_help_panel", None) or _LAST, each.help
        if each.param_type_name == "argument":
            yield _FIRST, each.metavar, words, False
        elif "--help" in each.opts:
            yield _LAST, "-h, --help", "Show this help; --help-all has every option.", False
        else:
            name = ", ".join(sorted(filter(str.strip, each.opts or each.secondary_opts), key=len))
            name = name.replace("--", "--[no-]") if each.opts and each.secondary_opts else name
            name += "" if each.is_flag else f" {each.metavar}"
            yield panel, name, words, each.hidden


def _mistake(error: Any) -> str:  # noqa: ANN401 - a _UsageError
    """Return what is wrong with a command line, with the closest option or command."""
    words = " ".join(error.format_message().split())
    if type(error).__name__ == "NoSuchOption":
        params = error.ctx.command.params
        flags = [flag for each in params for flag in (*each.opts, *each.secondary_opts)]
        flags = [flag for flag in flags if flag[0] == "-"]  # an argument has a name, too
        closest = did_you_mean(error.option_name, flags, cutoff=0.75)
        return f"there is no option {error.option_name}. {closest}"
    pattern = r"Invalid value for '([^']+)'.*: Input should be a valid (\w+).*"  # pydantic's words
    return re.sub(pattern, r"\1 must be a valid \2.", words)


app = typer.Typer(
    name="upcycle",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": _HELP_FLAGS},
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Turn a dense Hugging Face checkpoint into a Mixture of Experts, and prove it.

    Start with `upcycle demo`, which needs no model and no network.

    Environment variables can set options, such as UPCYCLE_CONVERT_RECIPE=E8G1T2.
    """
    # Options can be set as UPCYCLE_CONVERT_RECIPE; UPCYCLE_VERSION is left alone, since other
    # tools are likely to set it.
    context.auto_envvar_prefix = context.auto_envvar_prefix or "UPCYCLE"
    if version:
        from upcycle_cli.core.version import __version__

        terminal.stdout().print(f"upcycle {__version__}")
        raise typer.Exit
