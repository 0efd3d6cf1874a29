"""How results look: rows of text in a terminal, a table in a notebook, and one line as a repr."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from enum import StrEnum
from html import escape
from io import StringIO
from reprlib import Repr
from typing import TYPE_CHECKING

from upcycle_cli.core.text import printable

if TYPE_CHECKING:
    from rich.table import Table

Row = tuple[str, Sequence[str]]
"""A property, and the lines that describe it."""

_STATUS_STYLES = {
    "passed": "green",
    "failed": "bold red",
    "measured": "yellow",
    "skipped": "yellow",
}
_SHORT = Repr()
_SHORT.maxlevel = _SHORT.maxtuple = _SHORT.maxlist = _SHORT.maxdict = 3
_SHORT.maxstring = _SHORT.maxother = 80


class Compact:
    """A dataclass whose repr is one line, without defaults; decorate it with `repr=False`."""

    __slots__ = ()

    def __repr__(self) -> str:
        parts = []
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is not field.default:
                text = _SHORT.repr(str(value) if isinstance(value, StrEnum) else value)
                parts.append(f"{field.name}={text}")
        return f"{type(self).__name__}({', '.join(parts)})"


class Result(Compact):
    """What a public function returns: its summary in words, also in a notebook."""

    def tables(self) -> Iterator[Iterable[Row]]:
        """Yield tables of rows, each a property and the lines that describe it."""
        raise NotImplementedError

    def summary(self) -> str:
        """Return the tables that the command prints, as plain text of 80 columns."""
        from rich.console import Console

        file = StringIO()
        console = Console(file=file, width=80, color_system=None, markup=False, emoji=False)
        for table in self.tables():
            console.print(rows_table(table))
            console.print()
        return "\n".join(line.rstrip() for line in file.getvalue().rstrip().splitlines())

    def _repr_html_(self) -> str:
        return "\n".join(f"<table>{''.join(map(_html, table))}</table>" for table in self.tables())


def _html(row: Row) -> str:
    label, *lines = (escape(printable(text)) for text in (row[0], *row[1]))
    left = 'style="text-align:left"'
    return f"<tr><th {left}>{label}</th><td {left}>{'<br>'.join(lines)}</td></tr>"


def rows_table(rows: Iterable[Row]) -> Table:
    """Return rows as a table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, lines in rows:
        name = Text(printable(label))
        for status, style in _STATUS_STYLES.items():
            name.highlight_regex(rf"  ({status})$", style)
        table.add_row(name, Text("\n".join(map(printable, lines))))
    return table
