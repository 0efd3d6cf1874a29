"""What a licence asks of whoever publishes a model that was made from another.

Only the licences that rule names or cards: a reminder for the person who publishes, not legal
advice. `licences.json` has a rule for each. Sources: llama.com/llama3/license,
llama.com/llama3_1/license and the later ones (section 1.b), ai.meta.com/llama/license (Llama 2,
section 1.b), ai.google.dev/gemma/terms (section 3.1).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple


class _Rule(NamedTuple):
    """What has to be where; an empty string asks for nothing."""

    licence: str
    pattern: str  # of `license`, or of `license_name` where the licence is "other"
    notice: str  # what a text file named Notice must say
    prefix: str = ""  # what the model's name must begin with
    phrase: str = ""  # what the card must say


@cache
def _rules() -> Sequence[_Rule]:
    text = (files("upcycle_cli.publish") / "licences.json").read_text("utf-8")
    return [_Rule(**rule) for rule in json.loads(text)]


def reminders(
    metadata: Mapping[str, Any], card: str, repo: str, files: Collection[str]
) -> tuple[str, ...]:
    """Return what the licence in a card's metadata asks for and card, repo and files lack."""
    named = (metadata.get("license_name"), metadata.get("license"))
    names = [name.lower() for name in named if isinstance(name, str)]
    for rule in _rules():
        if any(re.fullmatch(rule.pattern, name) for name in names):
            return tuple(_missing(rule, card, repo, files))
    return ()


def _missing(rule: _Rule, card: str, repo: str, files: Collection[str]) -> Iterator[str]:
    model_name = repo.rsplit("/", maxsplit=1)[-1]
    if not _squeezed(model_name).startswith(_squeezed(rule.prefix)):
        yield (
            f'the {rule.licence} wants the name of the model to begin with "{rule.prefix}"; '
            f'"{model_name}" does not.'
        )
    if rule.phrase.lower() not in card.lower():
        yield f'the {rule.licence} wants the model card to say "{rule.phrase}".'
    if not any(name.upper().startswith("NOTICE") for name in files):
        yield (
            f'the {rule.licence} wants a file "Notice" that says: "{rule.notice}". Put it beside '
            "the weights."
        )
    if not any(name.upper().startswith(("LICENSE", "LICENCE")) for name in files):
        yield f"the {rule.licence} wants a copy of itself beside the weights."


def _squeezed(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
