"""Wrappers: vision models whose text model is one of the families.

A wrapper is a row of data that is combined with the rows of its text model and of the target.
Tensor names get another prefix, and the text model's settings move to `text_config`. Only the text
model's MLPs become experts; the vision tower and the projector are copied.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.models.defaults import defaults_of
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
"""The names of every wrapper in memory of transformers 5, which also reads them."""


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
    """The targets that a wrapper of transformers can hold, with its model type and class prefix."""
    has_balancing_loss: bool = True
    """Whether its native classes add the text model's auxiliary loss in training."""
    tied: bool = False
    """Whether the head is tied to the embedding by default."""
    ties_by_text: bool = False
    """Whether the text model's config can tie the head, too."""
    is_flat: bool = False
    """Whether its config may hold the text model's settings at the top level."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Parts of released tensor names with their in-memory replacement."""

    @property
    def classes(self) -> tuple[str, str, str]:
        """Its config, base model and full model in transformers."""
        name = self.class_prefix
        return f"{name}Config", f"{name}Model", f"{name}ForConditionalGeneration"

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


_LLAVA: Any = {
    "released": NamePrefixes("language_model.model.", "language_model.lm_head.weight", ""),
    "renamed": ((".vision_tower.vision_model.", ".vision_tower."),),
}
_ROWS: Sequence[Wrapper] = (
    Wrapper(
        model_type="llava",
        texts=("llama", "mistral", "qwen2", "qwen3"),  # it takes any; these were tested
        class_prefix="Llava",
        **_LLAVA,
        natives=dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), ("llava", "Llava")),
        has_balancing_loss=False,
        ties_by_text=True,
    ),
    Wrapper(
        model_type="mistral3",
        texts=("mistral", "ministral3"),
        class_prefix="Mistral3",
        **_LLAVA,
        natives=dict.fromkeys(("mixtral", "qwen2_moe"), ("mistral3", "Mistral3")),
        has_balancing_loss=False,
        tied=True,
    ),
    Wrapper(
        model_type="gemma3", texts=("gemma3_text",), class_prefix="Gemma3", **_LLAVA, tied=True
    ),
    Wrapper(
        model_type="qwen2_5_vl",
        texts=("qwen2_5_vl_text",),
        class_prefix="Qwen2_5_VL",
        released=NamePrefixes("model.", "lm_head.weight", ""),
        ties_by_text=True,
        is_flat=True,
    ),
    Wrapper(
        model_type="qwen3_vl",
        texts=("qwen3_vl_text",),
        class_prefix="Qwen3VL",
        natives={"qwen3_vl_moe_text": ("qwen3_vl_moe", "Qwen3VLMoe")},
    ),
    Wrapper(
        model_type="qwen3_5",
        texts=("qwen3_5_text",),
        class_prefix="Qwen3_5",
        natives={"qwen3_5_moe_text": ("qwen3_5_moe", "Qwen3_5Moe")},
    ),
    Wrapper(
        model_type="gemma4",
        texts=("gemma4_text",),
        class_prefix="Gemma4",
        natives={"gemma4_text": ("gemma4", "Gemma4")},
        tied=True,
    ),
)
WRAPPERS: Mapping[str, Wrapper] = {row.model_type: row for row in _ROWS}
_BY_TYPE = {
    name: row
    for row in _ROWS
    for name in (row.model_type, row.upcycled, *(native for native, _ in row.natives.values()))
}
"""By the model type of a config, before and after upcycling."""


def wrapper_of(config: Mapping[str, Any]) -> Wrapper | None:
    """Return the row of a wrapper's config, dense or MoE; None for a plain text model."""
    model_type = config.get("model_type")
    return _BY_TYPE.get(model_type) if isinstance(model_type, str) else None


def text_config_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of a wrapper's text model, or any other config unchanged.

    `tie_word_embeddings` of the result is that of the whole model. Raises UpcycleError if
    text_config is not an object.
    """
    wrapper = wrapper_of(config)
    if wrapper is None:
        return config
    text = config.get("text_config")
    if text is None and wrapper.is_flat:
        text = {key: value for key, value in config.items() if key in _flat_keys(wrapper)}
    if not isinstance(text, Mapping):
        raise UpcycleError(f"config.json: text_config must be an object, not {shown(text)}.")
    tied = config.get("tie_word_embeddings", wrapper.tied)
    if wrapper.ties_by_text:
        tied = tied or text.get("tie_word_embeddings", False)
    return {"model_type": wrapper.texts[0], **text, "tie_word_embeddings": tied}


def with_text_config(
    config: Mapping[str, Any], text: dict[str, Any], native: str | None, *, tied: bool
) -> dict[str, Any]:
    """Return a wrapper's config with `text` for the text model, and copies of nested configs.

    `native` is the wrapper's new model type, if transformers has one; `tied` is whether the head is
    tied to the embedding.
    """
    wrapper = _BY_TYPE[config["model_type"]]
    result = dict(config) | {part: dict(config[part]) for part in nested_configs(config)}
    if "text_config" not in config:
        result = {key: result[key] for key in result if key not in _flat_keys(wrapper)}
    text.pop("architectures", None)  # nothing loads the text model by itself
    # The text model keeps its own statement about tying, unless the head was untied.
    stated = config.get("text_config", {}).get("tie_word_embeddings")
    text["tie_word_embeddings"] = tied if wrapper.ties_by_text or not tied else stated
    if text["tie_word_embeddings"] is None:
        del text["tie_word_embeddings"]
    vision = result.get("vision_config")
    if native is not None and vision and "model_type" in vision:
        # Wrappers of different types have vision towers of different types.
        vision["model_type"] = vision["model_type"].replace(config["model_type"], native)
    return result | {"text_config": text}


def _flat_keys(wrapper: Wrapper) -> set[str]:
    known = defaults_of(wrapper.texts[0]).keys()
    return {*known, "rope_theta", "rope_scaling", "rope_parameters"} - {"tie_word_embeddings"}


def nested_configs(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys under which a config holds the configs of wrapped models."""
    if wrapper_of(config) is not None:
        parts = ("text_config", "vision_config", "audio_config")
        yield from (key for key in parts if isinstance(config.get(key), Mapping))
