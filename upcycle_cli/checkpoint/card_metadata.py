"""Model cards: the licence and languages of a source's card, and the seal on the cards we write.

A source's card is written by somebody else. Its YAML front matter is parsed into nodes, which
expands no references and constructs no objects, and only lines of text are taken from it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.safe_files import MOST_JSON_BYTES, locate, read_small

_BLOCK = re.compile(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_INHERITED = ("license", "license_name", "license_link", "language")
_MAX_LINE = 500
Value = str | list[str]


@dataclass(frozen=True)
class CardMetadata:
    """What a new card inherits from the source's card."""

    values: Mapping[str, Value] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what could not be inherited, and why


def read_card_metadata(directory: Path, name: str) -> CardMetadata:
    """Return the licence and languages that a card names; never raises."""
    path = directory / name
    try:
        if not path.is_symlink() and not path.exists():
            return CardMetadata()
        text = read_small(locate(directory, name), MOST_JSON_BYTES).decode()
        found = read_front_matter(text, _INHERITED)
    except (OSError, UpcycleError, ValueError) as error:
        words = error.message if isinstance(error, UpcycleError) else str(error)
        if isinstance(error, UnicodeDecodeError):
            words = "it is not UTF-8."
        return CardMetadata(notes=(f"no licence or language is copied from {path}: {words}",))
    values = {key: value for key, value in found.items() if value is not None}
    notes = tuple(
        f"{path}: {key} is not a line of text, so the new card has none."
        for key, value in found.items()
        if value is None
    )
    return CardMetadata(values, notes)


def read_front_matter(text: str, keys: Sequence[str]) -> dict[str, Value | None]:
    """Return the given keys of a card; None for values that are not a line or a list of lines.

    Raises UpcycleError when the front matter cannot be read.
    """
    from yaml import MappingNode, SafeLoader, ScalarNode, YAMLError, compose  # type: ignore[import-untyped]

    block = _BLOCK.match(text)
    if block is None:
        return {}
    try:
        root = compose(block[1], SafeLoader)
    except (RecursionError, YAMLError) as error:
        raise UpcycleError(f"its front matter is not YAML: {shown(str(error))}.") from error
    if not isinstance(root, MappingNode):
        return {}
    return {
        key.value: _value(value)
        for key, value in root.value
        if isinstance(key, ScalarNode) and key.value in keys
        if value.tag != "tag:yaml.org,2002:null"
    }


def _value(node: Any) -> Value | None:  # noqa: ANN401 - yaml has no type stubs
    from yaml import SequenceNode

    if not isinstance(node, SequenceNode):
        return node.value if _is_line(node) else None
    return [item.value for item in node.value] if all(map(_is_line, node.value)) else None


def _is_line(node: Any) -> bool:  # noqa: ANN401
    """Whether a node is one printable line of text of a sensible length."""
    text = node.value if node.tag == "tag:yaml.org,2002:str" else None
    return isinstance(text, str) and text.isprintable() and 0 < len(text.strip()) <= _MAX_LINE


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
