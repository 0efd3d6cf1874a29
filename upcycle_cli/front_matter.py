"""The front matter of a model card that somebody else wrote: what of it a card of ours can keep.

It is YAML, which can hold values of any kind, references that unfold to more than a machine holds,
and nothing that it should. So it is composed, which unfolds nothing, and no value is ever built;
lines of text are taken from it, and whatever else is there is left.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from upcycle_cli.errors import UpcycleError, shown
from upcycle_cli.files import MOST_JSON_BYTES, locate, read_small

_BLOCK = re.compile(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_CARRIED = ("license", "license_name", "license_link", "language")
_MOST_CHARACTERS = 1_000_000
"""Of a front matter: several times what those with long tables of results have."""
_LONGEST = 500
_MOST_ITEMS = 1000
_STRING = "tag:yaml.org,2002:str"

Value = str | list[str]


@dataclass(frozen=True)
class Carried:
    """What a card takes over from the source's card."""

    values: Mapping[str, Value] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What could not be taken over, in words."""


def carried_over(directory: Path, name: str) -> Carried:
    """Return what the card of this name says of licence and languages; raises nothing."""
    path = directory / name
    try:
        if not path.is_symlink() and not path.exists():
            return Carried()
        text = read_small(locate(directory, name), MOST_JSON_BYTES).decode()
        found = read_front_matter(text, _CARRIED)
    except (OSError, UpcycleError, ValueError) as error:
        reason = "it is not UTF-8." if isinstance(error, UnicodeDecodeError) else error
        words = reason.message if isinstance(reason, UpcycleError) else reason
        return Carried(notes=(f"no licence or language is taken over from {path}: {words}",))
    values = {key: value for key, value in found.items() if value is not None}
    notes = tuple(
        f"{path} has a {key} that is no line of text; the new card has none."
        for key, value in found.items()
        if value is None
    )
    return Carried(values, notes)


def read_front_matter(text: str, keys: Sequence[str]) -> dict[str, Value | None]:
    """Return those of these keys that a card's front matter has.

    Each is a line of text, or a list of such lines; None where it is something else. Raises
    UpcycleError when the front matter cannot be read.
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
        if isinstance(key, ScalarNode) and key.value in keys and not _is_null(value)
    }


def body(card: str) -> str:
    """Return a card without its front matter."""
    block = _BLOCK.match(card)
    return card if block is None else card[block.end() :]


def _is_null(node: object) -> bool:
    return getattr(node, "tag", None) == "tag:yaml.org,2002:null"


def _value(node: object) -> Value | None:
    from yaml import SequenceNode

    if not isinstance(node, SequenceNode):
        return _line(node)
    lines = [_line(item) for item in node.value[:_MOST_ITEMS]]
    kept = [line for line in lines if line is not None]
    return kept if len(kept) == len(node.value) else None


def _line(node: object) -> str | None:
    """Return the text of a node that is one printable line of a sensible length."""
    if getattr(node, "tag", None) != _STRING:
        return None
    text = getattr(node, "value", None)
    fits = isinstance(text, str) and text.isprintable() and 0 < len(text.strip()) <= _LONGEST
    return text if fits else None
