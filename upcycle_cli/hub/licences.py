"""What a licence asks of whoever publishes a model that was made from another.

Only the licences that rule names or cards: a reminder for the person who publishes, not legal
advice. Sources: llama.com/llama3/license, llama.com/llama3_1/license and the later ones (section
1.b), ai.meta.com/llama/license (Llama 2, section 1.b), ai.google.dev/gemma/terms (section 3.1).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple


class _Rule(NamedTuple):
    """What has to be where; an empty string asks for nothing."""

    licence: str
    pattern: str  # of `license`, or of `license_name` where the licence is "other"
    notice: str  # what a text file named Notice must say
    prefix: str = ""  # what the model's name must begin with
    phrase: str = ""  # what the card must say


_META = "Meta Platforms, Inc. All Rights Reserved."
_RULES = (
    _Rule(
        licence="Llama 2 Community License",
        pattern=r"llama-?2\b.*",
        notice=f"Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) {_META}",
    ),
    _Rule(
        licence="Meta Llama 3 Community License",
        pattern=r"llama-?3",
        prefix="Llama 3",
        phrase="Built with Meta Llama 3",
        notice="Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © "
        + _META,
    ),
    _Rule(
        licence="Llama Community License",
        pattern=r"llama-?(3\.\d|4)\b.*",
        prefix="Llama",
        phrase="Built with Llama",
        notice="Llama 3.1 (or the version at hand) is licensed under the Llama 3.1 Community "
        f"License, Copyright © {_META}",
    ),
    _Rule(
        licence="Gemma Terms of Use",
        pattern=r"gemma.*",
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms",
    ),
)


def reminders(
    metadata: Mapping[str, Any], card: str, repo: str, files: Collection[str]
) -> tuple[str, ...]:
    """Return what the licence in a card's metadata asks for and card, repo and files lack."""
    named = (metadata.get("license_name"), metadata.get("license"))
    names = [name.lower() for name in named if isinstance(name, str)]
    for rule in _RULES:
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
