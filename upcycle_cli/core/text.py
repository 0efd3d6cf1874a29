"""Text for terminals, logs and shells.

A name in a header, a config or an answer of the Hub can hold escape sequences, characters that
reverse a line, or line breaks that forge a line of ours. All text from elsewhere goes through here.
The address of a proxy or a mirror can hold a password, and libraries quote addresses in errors.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SHORTEST = 4  # a shorter token is part of words
_IN_ADDRESS = re.compile(r"(?<=://)[^\s/?#\"'<>]+@")


def printable(text: str) -> str:
    r"""Return a text as one line, unprintable characters in Python's notation, such as \x1b."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """Return a text with its line breaks, unprintable characters in Python's notation."""
    return "\n".join(map(printable, text.split("\n")))


def shell_line(words: Iterable[str]) -> str:
    """Return a command as one line for a shell."""
    return printable(shlex.join(words))


def blotted(text: str) -> str:
    """Return a text without the token of this process and the user part of any address."""
    for name in _TOKENS:
        token = os.environ.get(name, "").strip()
        text = text.replace(token, "…") if len(token) >= _SHORTEST else text
    return _IN_ADDRESS.sub("", text)


def any_of(names: Iterable[object], word: str = "or") -> str:
    """Return a choice in words, such as 1, 2 or 4; with another word, a list."""
    *others, last = map(str, names)
    return f"{', '.join(others)} {word} {last}" if others else last


def did_you_mean(value: str, choices: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return a question about the choice closest to a mistyped one; empty if none is close."""
    found = get_close_matches(value, [*choices], n=1, cutoff=cutoff)
    return f"Did you mean {found[0]}?" if found else ""


def listed(values: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    """Return names or paths as a list; a caller may give a single one."""
    return [values] if isinstance(values, str | Path) else values


def choose_from(value: object, choices: Iterable[str]) -> str:
    """Return the advice for a wrong choice: the closest one, and all."""
    names = [*choices]
    return f"{did_you_mean(str(value), names)} Choose from {', '.join(names)}.".strip()


def counted(number: int, noun: str) -> str:
    """Return a count in words: 1 shard, 12 shards."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def parameter_text(number: int, billion: str = "B") -> str:
    """Return a number of parameters such as 8.03B or 134.5M; `billion` is G for FLOPs."""
    for limit, unit in ((1e12, "T"), (1e9, billion), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.{1 if unit in 'MK' else 2}f}{unit}"
    return str(number)


def size_text(num_bytes: float) -> str:
    """Return a size in decimal units, such as 16.06 GB."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.2f} {unit}"
    return f"{num_bytes:.0f} bytes"
