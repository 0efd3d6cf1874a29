"""Text from elsewhere, as a terminal, a shell and JSON get it."""

from __future__ import annotations

import json
import subprocess

import pytest

from upcycle_cli.cli.terminal import json_text
from upcycle_cli.core.text import printable, printable_lines, shell_line

ODDITIES = {
    "escape": ("\x1b[31m", r"\x1b[31m"),
    "bell": ("\x07", r"\x07"),
    "delete": ("\x7f", r"\x7f"),
    "c1": ("\x9b2J", r"\x9b2J"),
    "line feed": ("a\nb", r"a\nb"),
    "carriage return": ("a\rb", r"a\rb"),
    "tab": ("a\tb", r"a\tb"),
    "right to left": ("\u202ea\u202c", r"\u202ea\u202c"),
    "isolate": ("\u2066a\u2069", r"\u2066a\u2069"),
    "zero width": ("a\u200b\u200db\ufeff", r"a\u200b\u200db\ufeff"),
    "line separator": ("a\u2028b\u2029c\x85", r"a\u2028b\u2029c\x85"),
    "tag": ("a\U000e0041", r"a\U000e0041"),
    "no UTF-8": ("a\udcff", r"a\udcff"),
    "half a character": ("\ud800", r"\ud800"),
}
SEEN = ["", "plain", "[red]x[/x] :smile:", "ö, 漢字, é", "a 'b' \"c\" $(d) `e` \\x1b"]


@pytest.mark.parametrize(("text", "shown"), ODDITIES.values(), ids=ODDITIES)
def test_what_cannot_be_seen_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable_lines(f"one\n{text.replace(chr(10), '')}").startswith("one\n")


@pytest.mark.parametrize("text", SEEN)
def test_what_can_be_seen_stays(text: str) -> None:
    assert printable(text) == text


WORDS = [text for text, _ in ODDITIES.values() if text != "\ud800"] + SEEN


@pytest.mark.parametrize("text", SEEN, ids=repr)
def test_a_shell_reads_what_was_meant(text: str) -> None:
    line = shell_line(["printf", "%s", text])
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert done.stdout == text.encode()


@pytest.mark.parametrize("text", WORDS, ids=repr)
def test_json_is_visible_ascii(text: str) -> None:
    value = {text: [text, 1, None]}
    printed = json_text(value)
    assert printed.isascii()
    assert printable_lines(printed) == printed
    if "\udcff" in text:
        value = json.loads(json.dumps(value).replace(r"\udcff", r"\\udcff"))
    assert json.loads(printed) == value
