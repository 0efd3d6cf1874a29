"""The front matter of a model card that somebody else wrote: what of it a card of ours can keep.

It is YAML, which can hold values of any kind, references that unfold to more than a machine holds,
and nothing that it should. So it is composed, which unfolds nothing, and no value is ever built;
lines of text are taken from it, and whatever else is there is left.
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
_CARRIED = ("license", "license_name", "license_link", "language")
_MOST_CHARACTERS = 1_000_000  # several times what a front matter with long tables of results has
_LONGEST = 500
_MOST_ITEMS = 1000
Value = str | list[str]


@dataclass(frozen=True)
class CardMetadata:
    """What a card takes over from the source's card."""

    values: Mapping[str, Value] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what could not be taken over, in words


def read_card_metadata(directory: Path, name: str) -> CardMetadata:
    """Return what the card of this name says of licence and languages; raises nothing."""
    path = directory / name
    try:
        if not path.is_symlink() and not path.exists():
            return CardMetadata()
        text = read_small(locate(directory, name), MOST_JSON_BYTES).decode()
        found = read_front_matter(text, _CARRIED)
    except (OSError, UpcycleError, ValueError) as error:
        words = error.message if isinstance(error, UpcycleError) else str(error)
        if isinstance(error, UnicodeDecodeError):
            words = "it is not UTF-8."
        return CardMetadata(notes=(f"no licence or language is taken over from {path}: {words}",))
    values = {key: value for key, value in found.items() if value is not None}
    notes = tuple(
        f"{path} has a {key} that is no line of text; the new card has none."
        for key, value in found.items()
        if value is None
    )
    return CardMetadata(values, notes)


def read_front_matter(text: str, keys: Sequence[str]) -> dict[str, Value | None]:
    """Return those of these keys that a card has; None for what is no line nor list of lines.

    Raises UpcycleError when the front matter cannot be read.
    """
    from yaml import MappingNode, SafeLoader, ScalarNode, YAMLError, compose  # type: ignore[import-untyped]

    block = _BLOCK.match(text)
    if block is None:
        return {}
    if len(block[1]) > _MOST_CHARACTERS:
        raise UpcycleError(f"its front matter has {len(block[1]):,} characters.")
    try:
        root = compose(block[1], SafeLoader)
    except RecursionError:
        raise UpcycleError("its front matter is nested too deeply.") from None
    except YAMLError as error:
        raise UpcycleError(f"its front matter is no YAML: {shown(str(error))}.") from error
    if not isinstance(root, MappingNode):
        return {}
    return {
        key.value: _value(value)
        for key, value in root.value
        if isinstance(key, ScalarNode) and key.value in keys
        if value.tag != "tag:yaml.org,2002:null"
    }


def body(card: str) -> str:
    """Return a card without its front matter."""
    block = _BLOCK.match(card)
    return card if block is None else card[block.end() :]


def _value(node: Any) -> Value | None:  # noqa: ANN401 - yaml has no types to name
    from yaml import SequenceNode

    if not isinstance(node, SequenceNode):
        return node.value if _is_line(node) else None
    fits = len(node.value) <= _MOST_ITEMS and all(map(_is_line, node.value))
    return [item.value for item in node.value] if fits else None


def _is_line(node: Any) -> bool:  # noqa: ANN401
    """Whether a node is one printable line of text of a sensible length."""
    text = node.value if node.tag == "tag:yaml.org,2002:str" else None
    return isinstance(text, str) and text.isprintable() and 0 < len(text.strip()) <= _LONGEST


def card_seal(card: str) -> str:
    """Return the comment that ends a card of ours; it tells whether the card was edited since."""
    digest = hashlib.sha256(card.encode()).hexdigest()
    return f"<!-- Made by upcycle; a push replaces this card unless it was edited: {digest} -->"


def is_edited(card: str) -> bool:
    """Whether somebody has written or changed a card since upcycle made it."""
    text, _, seal = card.strip().rpartition("\n\n")
    if seal == card_seal(text):
        return False
    try:
        read_front_matter(card, ())
    except UpcycleError:
        return True  # upcycle writes no card that it cannot read
    # The Hub makes a card of metadata only for a repo with a licence.
    return bool(body(card).strip())
