"""What the licence of a source asks of whoever publishes a model made from it.

Only the licences that have rules about names or cards, each with a rule in `licences.json`: a
reminder for the person who publishes, not legal advice. Sources: llama.com/llama3/license,
llama.com/llama3_1/license and later ones (section 1.b), ai.meta.com/llama/license (Llama 2, section
1.b), ai.google.dev/gemma/terms (section 3.1).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple


class _Rule(NamedTuple):
    """What a licence requires; an empty string requires nothing."""

    licence: str
    pattern: str  # for `license`, or for `license_name` where the licence is "other"
    notice: str  # what a text file named Notice must say
    prefix: str = ""  # how the model's name must begin
    phrase: str = ""  # what the card must say


@cache
def _rules() -> Sequence[_Rule]:
    text = (files("upcycle_cli.publish") / "licences.json").read_text("utf-8")
    return [_Rule(**rule) for rule in json.loads(text)]


def reminders(
    metadata: Mapping[str, Any], card: str, repo: str, files: Collection[str]
) -> tuple[str, ...]:
    """Return what the licence named in the card's metadata requires and the repo does not have."""
    named = (metadata.get("license_name"), metadata.get("license"))
    names = [name.lower() for name in named if isinstance(name, str)]
    for rule in _rules():
        if any(re.fullmatch(rule.pattern, name) for name in names):
            return tuple(_missing(rule, card, repo, files))
    return ()


def _missing(rule: _Rule, card: str, repo: str, files: Collection[str]) -> Iterator[str]:
    model_name = repo.rsplit("/", maxsplit=1)[-1]
    if not _letters(model_name).startswith(_letters(rule.prefix)):
        yield (
            f'the {rule.licence} wants the name of the model to begin with "{rule.prefix}"; '
            f'"{model_name}" does not.'
        )
    if rule.phrase.lower() not in card.lower():
        yield f'the {rule.licence} wants the model card to say "{rule.phrase}".'
    if not any(name.upper().startswith("NOTICE") for name in files):
        yield (
            f'the {rule.licence} wants a file "Notice" in the repo that says: "{rule.notice}". '
            f"Add it with `hf upload {repo} Notice`."
        )
    if not any(name.upper().startswith(("LICENSE", "LICENCE")) for name in files):
        yield (
            f"the {rule.licence} wants a copy of itself in the repo. Add it with "
            f"`hf upload {repo} LICENSE`."
        )


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
