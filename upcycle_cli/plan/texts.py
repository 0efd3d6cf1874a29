"""The texts that a model is run on, as files hold them, and the digest that identifies them."""

from __future__ import annotations

import codecs
import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.safe_files import open_regular
from upcycle_cli.core.text import printable

BUILTIN = "builtin"
_MOST_BYTES = 1_000_000

Text = str | list[dict[str, Any]]
"""A text, or the messages of a chat."""


@dataclass(frozen=True)
class CalibrationText:
    """Texts, their name, and the digest that identifies them."""

    name: str
    """`builtin`, or the name of the file without its directory."""
    texts: tuple[Text, ...]

    @property
    def digest(self) -> str:
        """The SHA-256 of all texts."""
        return hashlib.sha256(json.dumps(self.texts, sort_keys=True).encode()).hexdigest()


def calibration_text(place: str | Path, what: str = "the calibration text") -> CalibrationText:
    """Return the built-in text, or the text of a file; error messages call the file `what`.

    Raises UpcycleError for a file that cannot be read or that holds no text.
    """
    if str(place) == BUILTIN:
        return CalibrationText(BUILTIN, tuple(builtin_texts()))
    path = Path(place)
    return CalibrationText(printable(path.name), tuple(read_texts(path, what)))


def read_texts(path: Path, what: str) -> list[Text]:
    """Return the texts of a file, a text or one a line as JSON; UpcycleError when it has none.

    A line of JSON Lines has a `text`, a `prompt` or the `messages` of a chat. Errors call the file
    by `what` it is, such as "the prompts". Of a large file only the beginning is read.
    """
    try:
        with open_regular(path) as file:
            data = file.read(_MOST_BYTES)
            whole = not file.read(1)
        text = codecs.getincrementaldecoder("utf-8")().decode(data, final=whole)
    except OSError as error:
        raise UpcycleError(f"cannot read {what} {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UpcycleError(f"{what} {path}: it is not UTF-8 text.") from error
    if path.suffix == ".jsonl":
        lines = text.splitlines() if whole else text.splitlines()[:-1]
        found = [
            _of_line(f"{what} {path}", number, line) for number, line in enumerate(lines, 1) if line
        ]
    else:
        found = [text] if text.strip() else []
    if not found:
        raise UpcycleError(f"{what} {path}: there is no text in it.", "Give a file with some.")
    return found


def _of_line(where: str, number: int, line: str) -> Text:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UpcycleError(f"{where}: line {number} is not JSON.") from error
    held = item if isinstance(item, dict) else {}
    text = held.get("text", held.get("prompt"))
    messages = held.get("messages")
    if isinstance(text, str) and text.strip():
        return text
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        return messages
    raise UpcycleError(
        f"{where}: line {number} has neither text nor messages.",
        'A line is {"text": "…"}, {"prompt": "…"} or {"messages": [{"role": …, "content": …}]}.',
    )


def builtin_texts() -> list[Text]:
    """Return English, other scripts, code, mathematics and two chats."""
    texts = files("upcycle_cli.plan") / "builtin_texts"
    names = ("english", "scripts", "code", "mathematics")
    found: list[Text] = [(texts / f"{name}.txt").read_text(encoding="utf-8") for name in names]
    chats = (texts / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    return found + [json.loads(line)["messages"] for line in chats]
