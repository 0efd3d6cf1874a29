"""`--help` as plain text in two levels: `--help-all` has the options that few people need, too.

Words stay whole at any width. Typer's own help draws boxes, which leave little of a narrow screen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.text import Text
from typer.core import TyperGroup

from upcycle_cli.cli import terminal

FLAGS = ["-h", "--help", "--help-all"]
_WIDEST = 100
_FIRST, _LAST = "Arguments", "Options"


class PlainHelp:
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
        more = f"{len(rows) - len(shown)} more options: {ctx.command_path} --help-all"
        parts: list[Any] = [Text(usage), Text(ctx.command.help), terminal.rows_table(table[1:])]
        parts += [Text(more)] if len(shown) < len(rows) else []
        console = terminal.stdout()
        console.width = min(console.width, _WIDEST)
        with console.capture() as captured:
            terminal.show(*parts, to=console)
        formatter.write(captured.get())


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
