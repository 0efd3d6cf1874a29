"""Models around a text model: what is known of those that take pictures as well.

A wrapper's text model is one of the families, and only its MLPs become experts; the vision tower
and what lies between the two are copied. So a wrapper is a row, which is composed with the rows of
the text model and of its target: names begin otherwise, and the text model's settings lie deeper.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.models.defaults import defaults_of
from upcycle_cli.models.dense import DenseFamily
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.layers import MLP_ONLY_LAYERS
from upcycle_cli.models.mlp import stacked
from upcycle_cli.models.moe import IN_MEMORY, Keys, Layout, Target, in_memory
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.models.shipped import UPCYCLED_PREFIX
from upcycle_cli.recipe.recipe import ExpertLayout, Routing

_ROOT = IN_MEMORY.partition("layers.")[0]


@dataclass(frozen=True)
class Form:
    """How the names of a wrapper's tensors begin in one kind of checkpoint."""

    text: str
    """Those of the text model but for its head."""
    head: str
    """The whole name of the head."""
    rest: str
    """All others."""


LOADED = Form("model.language_model.", "lm_head.weight", "model.")
"""As transformers 5 has them in memory, whatever the wrapper, and reads them too."""


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """A model type around a text model: a row of `WRAPPERS`."""

    model_type: str
    texts: Mapping[str, DenseFamily]
    """The text models that it may hold, by their types; that without a type is the first."""
    classes: tuple[str, str, str]
    """Its config, its base model and the whole model, as transformers calls them."""
    released: Form
    natives: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """The targets that a wrapper of transformers can hold, with its model type and class."""
    balances: bool = True
    """Whether its native classes add the text model's auxiliary loss in training."""
    tied: bool = False
    """Whether the head is the embedding where its config does not say."""
    ties_by_text: bool = False
    """Whether it is as well where the text model's config says so."""
    is_flat: bool = False
    """Whether its config may have the text model's settings among its own."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Parts of released names with what they are in memory."""
    parts: tuple[str, ...] = ("text_config", "vision_config")
    """The keys under which its config has the configs of its models."""

    @property
    def forms(self) -> tuple[Form, ...]:
        """What is read; that of released checkpoints comes first."""
        return self.released, LOADED

    @property
    def types(self) -> tuple[str, ...]:
        """The model types that its config can have, before it is upcycled and after."""
        others = (native for native, _ in self.natives.values())
        return tuple(dict.fromkeys((self.model_type, *others, self.upcycled)))

    @property
    def upcycled(self) -> str:
        """The model type with which the code of an MoE is shipped."""
        return f"{UPCYCLED_PREFIX}{self.model_type}"

    def form(self, names: Collection[str]) -> Form:
        """Return how the names of a checkpoint's tensors begin."""
        for form in self.forms[::-1]:  # what others begin with, too, is the released one
            if any(name.startswith(form.text) for name in names):
                return form
        return self.released


@dataclass(frozen=True)
class Inside:
    """Where a text model is: in which wrapper, and how the names in its checkpoint begin."""

    wrapper: Wrapper
    form: Form

    def place(self, name: str) -> str:
        """Return the name that a text model's tensor has here, from that which it has alone."""
        if name == LOADED.head:
            return self.form.head
        return self.form.text + name.removeprefix(_ROOT)

    def is_text(self, name: str) -> bool:
        """Whether a tensor of the checkpoint is the text model's."""
        return name.startswith(self.form.text) or name == self.form.head

    def loaded(self, name: str, form: Form | None = None) -> str:
        """Return what a tensor is called in memory that is called so here, or in another form."""
        name = _moved(name, form or self.form, LOADED)
        return in_memory(name, self.wrapper.renamed)

    def unloaded(self, name: str) -> str:
        """Return what a tensor that is called so in memory is called here."""
        return _moved(name, LOADED, self.form)

    def moved(self, name: str, other: Inside) -> str:
        """Return the name that a tensor of this checkpoint has in another one.

        The parts that are `renamed` stay: transformers 4 reads no others, and 5 reads both.
        """
        return _moved(name, self.form, other.form)


def _moved(name: str, before: Form, after: Form) -> str:
    if name == before.head:
        return after.head
    for here, there in ((before.text, after.text), (before.rest, after.rest)):
        if name.startswith(here):
            return there + name.removeprefix(here)
    return name


_QWEN2_5_VL_TEXT = replace(DENSE["qwen2"], model_type="qwen2_5_vl_text", targets=())
_QWEN3_VL_TEXT = DenseFamily("qwen3_vl_text", targets=("qwen3_vl_moe_text",))
INSIDE: Mapping[str, Target] = {
    "qwen3_vl_moe_text": Target(
        model_type="qwen3_vl_moe_text",
        architecture="Qwen3VLMoeForConditionalGeneration",
        routings=(Routing.TOPK_SOFTMAX,),
        layouts={
            ExpertLayout.STACKED: Layout(
                experts=stacked("mlp.experts", gated=True, transposed=True),
                router="mlp.gate.weight",
            ),
            ExpertLayout.FUSED: Layout(
                experts=stacked("mlp.experts", gated=True), router="mlp.gate.weight"
            ),
        },
        keys=Keys(num_experts="num_experts", aliases=("num_local_experts",)),
        layers=MLP_ONLY_LAYERS,
        settings=lambda _: {"norm_topk_prob": True},  # for vLLM
    ),
}
"""The targets that are text models inside of wrappers alone."""

# Llava's classes, and those made after it, take text models of any type; these were tried.
_LLAVA = Form("language_model.model.", "language_model.lm_head.weight", "")
_AS_LLAVA: Any = {
    "released": _LLAVA,
    "renamed": ((".vision_tower.vision_model.", ".vision_tower."),),
}
_ROWS: Sequence[Wrapper] = (
    Wrapper(
        model_type="llava",
        texts={name: DENSE[name] for name in ("llama", "mistral", "qwen2", "qwen3")},
        classes=("LlavaConfig", "LlavaModel", "LlavaForConditionalGeneration"),
        **_AS_LLAVA,
        natives=dict.fromkeys(
            ("mixtral", "qwen2_moe", "qwen3_moe"), ("llava", "LlavaForConditionalGeneration")
        ),
        balances=False,
        ties_by_text=True,
    ),
    Wrapper(
        model_type="mistral3",
        texts={name: DENSE[name] for name in ("mistral", "ministral3")},
        classes=("Mistral3Config", "Mistral3Model", "Mistral3ForConditionalGeneration"),
        **_AS_LLAVA,
        natives=dict.fromkeys(
            ("mixtral", "qwen2_moe"), ("mistral3", "Mistral3ForConditionalGeneration")
        ),
        balances=False,
        tied=True,
    ),
    Wrapper(
        model_type="gemma3",
        texts={"gemma3_text": DENSE["gemma3_text"]},
        classes=("Gemma3Config", "Gemma3Model", "Gemma3ForConditionalGeneration"),
        **_AS_LLAVA,
        tied=True,
    ),
    Wrapper(
        model_type="qwen2_5_vl",
        texts={"qwen2_5_vl_text": _QWEN2_5_VL_TEXT},
        classes=("Qwen2_5_VLConfig", "Qwen2_5_VLModel", "Qwen2_5_VLForConditionalGeneration"),
        released=Form("model.", "lm_head.weight", ""),
        ties_by_text=True,
        is_flat=True,
    ),
    Wrapper(
        model_type="qwen3_vl",
        texts={"qwen3_vl_text": _QWEN3_VL_TEXT},
        classes=("Qwen3VLConfig", "Qwen3VLModel", "Qwen3VLForConditionalGeneration"),
        released=LOADED,
        natives={"qwen3_vl_moe_text": ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration")},
    ),
    Wrapper(
        model_type="qwen3_5",
        texts={"qwen3_5_text": DENSE["qwen3_5_text"]},
        classes=("Qwen3_5Config", "Qwen3_5Model", "Qwen3_5ForConditionalGeneration"),
        released=LOADED,
        natives={"qwen3_5_moe_text": ("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration")},
    ),
    Wrapper(
        model_type="gemma4",
        texts={"gemma4_text": DENSE["gemma4_text"]},
        classes=("Gemma4Config", "Gemma4Model", "Gemma4ForConditionalGeneration"),
        released=LOADED,
        natives={"gemma4_text": ("gemma4", "Gemma4ForConditionalGeneration")},
        tied=True,
        parts=("text_config", "vision_config", "audio_config"),
    ),
)
WRAPPERS: Mapping[str, Wrapper] = {row.model_type: row for row in _ROWS}
_BY_TYPE = {name: row for row in _ROWS for name in row.types}


def wrapper_of(config: Mapping[str, Any]) -> Wrapper | None:
    """Return the row of a wrapper's config, dense or MoE; None for a text model's."""
    model_type = config.get("model_type")
    return _BY_TYPE.get(model_type) if isinstance(model_type, str) else None


def inner(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of a wrapper's text model, and any other config as it is.

    What holds for the whole, such as a head that is the embedding, is said there as well. Raises
    UpcycleError for a text model that is not known inside of this wrapper.
    """
    wrapper = wrapper_of(config)
    if wrapper is None:
        return config
    text = config.get("text_config")
    if text is None and wrapper.is_flat:
        text = {key: value for key, value in config.items() if key in _flat_keys(wrapper)}
    if not isinstance(text, Mapping):
        raise UpcycleError(f"config.json: text_config must be an object, not {shown(text)}.")
    found = {"model_type": next(iter(wrapper.texts)), **text}
    tied = config.get("tie_word_embeddings", wrapper.tied)
    if wrapper.ties_by_text:
        tied = tied or text.get("tie_word_embeddings", False)
    return found | {"tie_word_embeddings": tied}


def with_inner(
    config: Mapping[str, Any], text: dict[str, Any], native: str | None, *, tied: bool
) -> dict[str, Any]:
    """Return a wrapper's config around another text model's, `text`.

    `native` is the type of the wrapper that it becomes, if that is one of transformers; `tied` says
    whether its head is the embedding. Each model inside has a copy of its own, which may be written
    to.
    """
    wrapper = _BY_TYPE[config["model_type"]]
    result = dict(config) | {part: dict(config[part]) for part in parts(config)}
    if "text_config" not in config:
        result = {key: result[key] for key in result if key not in _flat_keys(wrapper)}
    text.pop("architectures", None)  # of the text model by itself, which nothing loads here
    # Who asks the text model has to hear what he heard, unless the head is one of its own now.
    said = config.get("text_config", {}).get("tie_word_embeddings")
    text["tie_word_embeddings"] = tied if wrapper.ties_by_text or not tied else said
    if text["tie_word_embeddings"] is None:
        del text["tie_word_embeddings"]
    vision = result.get("vision_config")
    if native is not None and vision and "model_type" in vision:
        # Where the types differ, each has a vision tower by a name of its own.
        vision["model_type"] = vision["model_type"].replace(config["model_type"], native)
    return result | {"text_config": text}


def _flat_keys(wrapper: Wrapper) -> set[str]:
    known = defaults_of(next(iter(wrapper.texts))).keys()
    return {*known, "rope_theta", "rope_scaling", "rope_parameters"} - {"tie_word_embeddings"}


def parts(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys under which a config has the configs of the models that it wraps."""
    wrapper = wrapper_of(config)
    if wrapper is not None:
        yield from (key for key in wrapper.parts if isinstance(config.get(key), Mapping))


def wrapped_family(config: Mapping[str, Any], names: Collection[str]) -> DenseFamily:
    """Return the row of a wrapper's text model, with names as they are in its checkpoint.

    Raises UpcycleError for a text model that is not known inside of this wrapper.
    """
    wrapper, text_type = _BY_TYPE[config["model_type"]], inner(config)["model_type"]
    if text_type not in wrapper.texts:
        raise UpcycleError(
            f"a {wrapper.model_type} around a text model of type {shown(text_type)} cannot be "
            "upcycled yet.",
            f"It can be around {' or '.join(wrapper.texts)}.",
        )
    return _placed(wrapper.texts[text_type], Inside(wrapper, wrapper.form(names)))


def as_loaded(family: DenseFamily) -> DenseFamily:
    """Return a family with the names that transformers has in memory where it is in a wrapper.

    Shipped code is given no others, since transformers translates none for other code than its own.
    """
    if family.inside is None:
        return family
    wrapper = family.inside.wrapper
    return _placed(wrapper.texts[family.model_type], Inside(wrapper, LOADED))


def _placed(row: DenseFamily, inside: Inside) -> DenseFamily:
    wrapper = inside.wrapper
    return replace(
        row,
        layer=inside.place(row.layer),
        embedding=inside.place(row.embedding),
        head=inside.place(row.head),
        targets=tuple(target for target in row.targets if target in wrapper.natives),
        classes=wrapper.classes,
        inside=inside,
    )


def native_target(name: str, inside: Inside | None) -> Target:
    """Return the row of a target of transformers, as it is inside of a wrapper if it is in one."""
    if inside is None:
        return NATIVE[name]
    target = INSIDE[name] if name in INSIDE else NATIVE[name]
    return replace(
        target,
        architecture=inside.wrapper.natives[target.model_type][1],
        layer=inside.place(target.layer),
        head=inside.place(target.head),
        inside=inside,
    )
