"""`--help`: plain text in two levels. `--help-all` adds the options that few people need.

Whole words at any width, and no panel with a single option. Typer's own help is replaced, since its
boxes leave half of a narrow screen to lines.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from upcycle_cli.cli import options, terminal

FLAGS = ["-h", "--help", "--help-all"]
_WIDEST = 100
_INDENT = 26
"""Where descriptions begin; a longer name stands on a line of its own."""
_FIRST, _LAST = "Arguments", "Options"
"""The last panel has --help, and options that would be alone in theirs."""


class _PlainHelp:
    """The usage line and the help of a command or a group."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:  # noqa: ANN401 - as typer has them
        ctx.meta["help_all"] = "--help-all" in args
        return super().parse_args(ctx, args)  # type: ignore[misc]

    def collect_usage_pieces(self, ctx: Any) -> list[str]:  # noqa: ANN401
        names = [each.metavar for each in self._params(ctx) if _is_argument(each)]
        return ["[OPTIONS]", *(["COMMAND ..."] if isinstance(self, TyperGroup) else names)]

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        console = terminal.stdout()
        with console.capture() as captured:
            for line in self._lines(ctx, min(console.width, _WIDEST)):
                console.print(line, soft_wrap=True)
        formatter.write(captured.get())

    def _params(self, ctx: Any) -> list[Any]:  # noqa: ANN401
        found: list[Any] = self.get_params(ctx)  # type: ignore[attr-defined]
        return found

    def _lines(self, ctx: Any, width: int) -> Iterator[Text]:  # noqa: ANN401
        pieces = " ".join(self.collect_usage_pieces(ctx))
        yield from _paragraph(f"Usage: {ctx.command_path} {pieces}", width)
        for paragraph in self.help.split("\n\n"):  # type: ignore[attr-defined]
            yield Text()
            yield from _paragraph(paragraph, width)
        rows = list(self._rows(ctx))
        shown = [row for row in rows if ctx.meta["help_all"] or not row[3]]
        panels = [panel for panel, *_ in shown]
        order = [name for name in dict.fromkeys(panels) if name == _FIRST or panels.count(name) > 1]
        for name in (*(each for each in order if each != _LAST), _LAST):
            yield Text()
            yield Text(f"{name}:", "bold")
            for panel, flags, words, _ in shown:
                if panel == name or (name == _LAST and panel not in order):
                    yield from _row(flags, words, width)
        if more := len(rows) - len(shown):
            yield Text()
            yield Text(f"{more} more options: {ctx.command_path} --help-all")

    def _rows(self, ctx: Any) -> Iterator[tuple[str, str, str, bool]]:  # noqa: ANN401
        """Yield panel, name and description of everything, and whether it is for --help-all."""
        group: Any = self
        for name in group.list_commands(ctx) if isinstance(self, TyperGroup) else ():
            command = group.get_command(ctx, name)
            yield "Commands", name, command.help.split("\n\n")[0], False
        for each in self._params(ctx):
            if _is_argument(each):
                yield _FIRST, each.metavar, each.help, False
            elif "--help" in each.opts:
                yield _LAST, "-h, --help", "Show this help; --help-all has every option.", False
            else:
                names = [name for name in (*each.opts, *each.secondary_opts) if name.strip()]
                name = ", ".join(sorted(names, key=len))
                name += "" if each.is_flag else f" {each.metavar}"
                rare = options.is_rare(ctx.info_name, each.name)
                yield each.rich_help_panel or _LAST, name, each.help, rare


class PlainCommand(_PlainHelp, TyperCommand):
    """A command with plain help."""


class PlainGroup(_PlainHelp, TyperGroup):
    """A group with plain help."""


def _is_argument(parameter: Any) -> bool:  # noqa: ANN401
    return bool(parameter.param_type_name == "argument")


def _paragraph(text: str, width: int) -> Iterator[Text]:
    """Yield a paragraph in lines; with an indented line, such as an example, line by line."""
    for part in text.split("\n") if "\n  " in text else [text]:
        indent = "  " if part.startswith("  ") else ""
        yield from map(Text, _wrapped(part.strip(), width, indent))


def _row(name: str, words: str, width: int) -> Iterator[Text]:
    first, *rest = _wrapped(words, width, " " * _INDENT)
    if len(name) + 2 > _INDENT - 2:
        yield Text(f"  {name}", "cyan")
        rest = [first, *rest]
    else:
        yield Text.assemble((f"  {name}".ljust(_INDENT), "cyan"), first.lstrip())
    yield from map(Text, rest)


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
