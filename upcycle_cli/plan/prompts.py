"""Prompts for each model of a merge, from whose hidden states router rows are made.

The file is YAML or JSON and maps each model to its prompts, or it is a mergekit-moe file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.text import printable
from upcycle_cli.plan.mergekit import place_of, read_yaml

_KINDS = ("positive_prompts", "negative_prompts")
_FORM = (
    'Write {"MODEL": ["a prompt", …]} for each, or {"MODEL": {"positive_prompts": […], '
    '"negative_prompts": […]}}.'
)


@dataclass(frozen=True)
class ModelPrompts:
    """The prompts that a model is for, and those that it is not for."""

    model: str
    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()

    def means(self, model: Checkpoint) -> bool:
        """Whether `model` is meant: by its path, its name or the last part of its name."""
        name = self.model.partition("@")[0]
        return name in (model.name, model.name.rpartition("/")[2]) or (
            Path(name).resolve() == model.path.resolve()
        )


@dataclass(frozen=True)
class Prompts:
    """The prompts of each model, and the name of their file."""

    name: str
    models: tuple[ModelPrompts, ...]

    @property
    def digest(self) -> str:
        """The SHA-256 of all prompts."""
        said = [asdict(model) for model in self.models]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def of_groups(self, models: Sequence[Checkpoint]) -> tuple[ModelPrompts, ...]:
        """Return the prompts of each group from the groups' models; UpcycleError if some lack any.

        A model with several groups needs as many entries, in the order of the groups.
        """
        left, found = list(self.models), []
        for model in models:
            fits = next((each for each in left if each.means(model)), None)
            if fits is None:
                named = ", ".join(each.model for each in left) or "no other"
                raise UpcycleError(
                    f"{self.name} has no prompts for {model.name}; there is {named}.",
                    "Each group needs prompts of its own, or some would be chosen alike.",
                )
            left.remove(fits)
            found.append(fits)
        if left:
            raise UpcycleError(f"{self.name} has prompts for {left[0].model}, and no group is its.")
        return tuple(found)


def read_prompts(path: Path) -> Prompts:
    """Return the prompts of a file; UpcycleError for a file of another form."""
    content = read_yaml(path)
    if isinstance(content, dict) and isinstance(content.get("experts"), list):
        items = [
            (place_of(each.get("source_model"), path), {key: each.get(key) for key in _KINDS})
            for each in content["experts"]
            if isinstance(each, dict)
        ]
    elif isinstance(content, dict):
        items = [(str(model), said) for model, said in content.items()]
    else:
        raise UpcycleError(f"{path} has no prompts of models.", _FORM)
    return Prompts(printable(path.name), tuple(_read(path, items)))


def _read(path: Path, items: Sequence[tuple[str, Any]]) -> Iterator[ModelPrompts]:
    for model, said in items:
        held = said if isinstance(said, dict) else {"positive_prompts": said}
        if odd := held.keys() - {*_KINDS}:
            raise UpcycleError(f"{path}: {model} has {shown(min(odd))}, which is unknown.", _FORM)
        positive, negative = (_texts(path, model, key, held.get(key)) for key in _KINDS)
        if not positive:
            raise UpcycleError(f"{path}: {model} has no positive prompts.", _FORM)
        yield ModelPrompts(model, positive, negative)


def _texts(path: Path, model: str, key: str, value: object) -> tuple[str, ...]:
    texts = [] if value is None else value
    if not isinstance(texts, list) or not all(isinstance(t, str) and t.strip() for t in texts):
        raise UpcycleError(f"{path}: {key} of {model} must be a list of texts.", _FORM)
    return tuple(texts)
