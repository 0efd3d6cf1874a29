"""Text from elsewhere, as a terminal and JSON get it."""

from __future__ import annotations

import json

import pytest

from upcycle_cli.cli.terminal import print_json
from upcycle_cli.core.text import printable, printable_lines

TEXTS = {
    "\x1b[31m": r"\x1b[31m",
    "\x07\x7f\x9b2J": r"\x07\x7f\x9b2J",
    "a\nb\rc\td": r"a\nb\rc\td",
    "\u202ea\u202c\u2066b\u2069": r"\u202ea\u202c\u2066b\u2069",
    "a\u200b\u200db\ufeff": r"a\u200b\u200db\ufeff",
    "a\u2028b\u2029c\x85": r"a\u2028b\u2029c\x85",
    "a\U000e0041": r"a\U000e0041",
    "a\udcff": r"a\udcff",
    "": "",
    "[red]x[/x] :smile:": "[red]x[/x] :smile:",
    "ö, 漢字, é 'b' \"c\" $(d) `e` \\x1b": "ö, 漢字, é 'b' \"c\" $(d) `e` \\x1b",
}


@pytest.mark.parametrize(("text", "shown"), TEXTS.items())
def test_a_terminal_and_json_show_invisible_characters(
    text: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printable(text) == shown
    print_json({text: [text, 1, None]})
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert printable_lines(printed) == printed
    read = text.replace("\udcff", r"\udcff")
    assert json.loads(printed) == {read: [read, 1, None]}
