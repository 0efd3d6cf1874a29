"""What the licence of a source requires from people who publish a model made from it.

`licences.json` has licences with rules about names or cards: reminders, not legal advice. Sources:
llama.com/llama3/license, llama.com/llama3_1/license and later ones (section 1.b),
ai.meta.com/llama/license (Llama 2, section 1.b), ai.google.dev/gemma/terms (section 3.1).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from importlib.resources import files as resources

from upcycle_cli.checkpoint.card_metadata import read_front_matter
from upcycle_cli.core.errors import UpcycleError


def reminders(card: str, repo: str, files: Collection[str]) -> tuple[str, ...]:
    """Return what the licence named in a card requires and the repo does not have."""
    try:
        named = read_front_matter(card, ("license_name", "license")).values()
    except UpcycleError:
        return ()
    names = [name.lower() for name in named if isinstance(name, str)]
    rules = json.loads((resources(__package__) / "licences.json").read_text("utf-8"))
    for rule in rules:
        # The pattern is for `license`, or for `license_name` where the licence is "other".
        if any(re.fullmatch(rule["pattern"], name) for name in names):
            return tuple(_missing(rule, card, repo, files))
    return ()


def _missing(
    rule: Mapping[str, str], card: str, repo: str, files: Collection[str]
) -> Iterator[str]:
    wants, name = f"the {rule['licence']} requires", repo.rsplit("/", maxsplit=1)[-1]
    prefix, phrase = rule.get("prefix", ""), rule.get("phrase", "")
    if not _letters(name).startswith(_letters(prefix)):
        yield f'{wants} the name of the model to begin with "{prefix}"; "{name}" does not.'
    if phrase.lower() not in card.lower():
        yield f'{wants} the model card to say "{phrase}".'
    if not any(name.upper().startswith("NOTICE") for name in files):
        words = f'{wants} a file "Notice" in the repo that says: "{rule["notice"]}".'
        yield f"{words} Add it with `hf upload {repo} Notice`."
    if not any(name.upper().startswith(("LICENSE", "LICENCE")) for name in files):
        yield f"{wants} a copy of itself in the repo. Add it with `hf upload {repo} LICENSE`."


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
