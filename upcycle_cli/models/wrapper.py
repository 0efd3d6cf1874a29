"""Text models inside a wrapper: a vision model's config and tensors around one of the families.

A wrapper is a row of data, composed with the rows of its text model and of the target: tensor names
get another prefix, and the text model's settings move to `text_config`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from upcycle_cli.models.shipped import UPCYCLED_PREFIX

MODEL_PREFIX = "model."
"""The prefix of all tensors but the head, in memory of transformers 5."""
LAYER_PREFIX = MODEL_PREFIX + "layers.{layer}."
HEAD = "lm_head.weight"


def replace_parts(name: str, renamed: tuple[tuple[str, str], ...]) -> str:
    """Return a tensor name with parts replaced, in order; each pair is (old, new)."""
    for old, new in renamed:
        name = name.replace(old, new)
    return name


@dataclass(frozen=True)
class NamePrefixes:
    """How tensor names of a wrapper begin, in one kind of checkpoint."""

    text: str
    """The prefix of the text model's tensors, except its head."""
    head: str
    """The full name of the head."""
    rest: str
    """The prefix of all other tensors."""


IN_MEMORY_PREFIXES = NamePrefixes("model.language_model.", HEAD, MODEL_PREFIX)
"""What transformers 5 has in memory for every wrapper, and also reads."""


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """A model type around a text model: a row of `WRAPPERS`."""

    model_type: str
    texts: tuple[str, ...]
    """The model types it may hold; the first is the default of a config without a type."""
    class_prefix: str
    """The prefix of its class names in transformers."""
    released: NamePrefixes = IN_MEMORY_PREFIXES
    natives: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Targets that a wrapper of transformers can hold, with that one's model type and classes."""
    has_balancing_loss: bool = True
    """Whether its native classes add the text model's auxiliary loss in training."""
    tied: bool = False
    """Whether the head is tied to the embedding if its config does not say."""
    ties_by_text: bool = False
    """Whether the head is also tied if the text model's config says so."""
    is_flat: bool = False
    """Whether its config may hold the text model's settings at the top level."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Parts of released tensor names with their in-memory replacement."""
    parts: tuple[str, ...] = ("text_config", "vision_config")
    """The keys of nested configs."""

    @property
    def classes(self) -> tuple[str, str, str]:
        """Its config, base model and full model in transformers."""
        name = self.class_prefix
        return f"{name}Config", f"{name}Model", f"{name}ForConditionalGeneration"

    @property
    def types(self) -> tuple[str, ...]:
        """The model types of its configs, before and after upcycling."""
        others = (native for native, _ in self.natives.values())
        return tuple(dict.fromkeys((self.model_type, *others, self.upcycled)))

    @property
    def upcycled(self) -> str:
        """Its model type once it has shipped code."""
        return f"{UPCYCLED_PREFIX}{self.model_type}"

    def prefixes_in(self, names: Collection[str]) -> NamePrefixes:
        """Return the prefixes that a checkpoint's tensor names have."""
        # In-memory names first: released prefixes may match them too.
        for prefixes in (IN_MEMORY_PREFIXES, self.released):
            if any(name.startswith(prefixes.text) for name in names):
                return prefixes
        return self.released


@dataclass(frozen=True)
class Inside:
    """The position of a text model: its wrapper, and the prefixes of names in its checkpoint."""

    wrapper: Wrapper
    prefixes: NamePrefixes

    def wrapped(self, name: str) -> str:
        """Return the name here of a tensor that a standalone text model calls `name`."""
        if name == HEAD:
            return self.prefixes.head
        return self.prefixes.text + name.removeprefix(MODEL_PREFIX)

    def is_text(self, name: str) -> bool:
        """Whether a tensor belongs to the text model."""
        return name.startswith(self.prefixes.text) or name == self.prefixes.head

    def in_memory(self, name: str) -> str:
        """Map a checkpoint name to its in-memory name."""
        moved = self.moved(name, Inside(self.wrapper, IN_MEMORY_PREFIXES))
        return replace_parts(moved, self.wrapper.renamed)

    def moved(self, name: str, other: Inside) -> str:
        """Map a name of this checkpoint to its name in another one.

        `renamed` parts stay: transformers 4 reads only the old names, and 5 reads both.
        """
        before, after = self.prefixes, other.prefixes
        if name == before.head:
            return after.head
        for old, new in ((before.text, after.text), (before.rest, after.rest)):
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name
