"""Model cards: the licence and languages of a source's card, and the seal on the cards we write.

A source's card is untrusted, so only lines of text are taken from its front matter.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from upcycle_cli.checkpoint.storage import CARD_NAME
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.safe_files import locate, read_small

_BLOCK = re.compile(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_INHERITED = ("license", "license_name", "license_link", "language")
_NULLS = ("", "~", "null")
_MAX_LINE = 500
Value = str | list[str]


@dataclass(frozen=True)
class CardMetadata:
    """What a new card inherits from the source's card."""

    values: Mapping[str, Value] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what could not be inherited, and why


def read_card_metadata(directory: Path) -> CardMetadata:
    """Return the licence and languages that a card names; never raises."""
    path = directory / CARD_NAME
    if not os.path.lexists(path):
        return CardMetadata()
    try:
        text = read_small(locate(directory, CARD_NAME)).decode()
        found = read_front_matter(text, _INHERITED)
    except (OSError, UpcycleError, ValueError) as error:
        words = error.message if isinstance(error, UpcycleError) else f"{error}."
        return CardMetadata(notes=(f"no licence or language is copied from {path}: {words}",))
    return CardMetadata(found)


def read_front_matter(text: str, keys: Sequence[str]) -> dict[str, Value]:
    """Return the given keys of a card, each a line of text or a list of lines.

    Raises UpcycleError when the front matter cannot be read, or a value is something else.
    """
    import yaml  # type: ignore[import-untyped]

    block = _BLOCK.match(text)
    try:
        # BaseLoader constructs text, lists and dictionaries only, and merges nothing.
        found = yaml.load(block[1], yaml.BaseLoader) if block else None  # noqa: S506
    except (RecursionError, yaml.YAMLError) as error:
        raise UpcycleError(f"its front matter is not YAML: {shown(str(error))}.") from error
    given = found if isinstance(found, dict) else {}
    values = {key: given[key] for key in keys if given.get(key, "") not in _NULLS}
    for key, value in values.items():
        for line in value if isinstance(value, list) else [value]:
            words = line.strip() if isinstance(line, str) and line.isprintable() else ""
            if not 0 < len(words) <= _MAX_LINE:
                raise UpcycleError(f"{key} is not a line of text.")
    return values


def sealed(card: str) -> str:
    """Return a card with a digest at its end, by which `is_edited` recognises changes."""
    return f"{card}\n\n{_seal(card)}\n"


def unsealed(card: str) -> str:
    """Return a card without its last paragraph, which is the seal."""
    return card.strip().rpartition("\n\n")[0]


def is_edited(card: str) -> bool:
    """Whether somebody wrote the card, or changed it after upcycle wrote it."""
    text, _, seal = card.strip().rpartition("\n\n")
    if seal == _seal(text):
        return False
    try:
        read_front_matter(card, ())
    except UpcycleError:
        return True  # upcycle writes valid front matter
    # The Hub creates a card with metadata only when a repo is created with a licence.
    block = _BLOCK.match(card)
    return bool((card if block is None else card[block.end() :]).strip())


def _seal(card: str) -> str:
    digest = hashlib.sha256(card.encode()).hexdigest()
    return f"<!-- Made by upcycle; a push replaces this card unless it was edited: {digest} -->"
