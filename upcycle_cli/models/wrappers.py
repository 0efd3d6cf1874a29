"""Wrappers: vision models whose text model is one of the families.

A wrapper is a row of data that is combined with the rows of its text model and of the target.
Tensor names get another prefix, and the text model's settings move to `text_config`. Only the text
model's MLPs become experts; the vision tower and the projector are copied.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeAlias

from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.models.defaults import defaults_of
from upcycle_cli.models.shipped import UPCYCLED_PREFIX

MODEL_PREFIX = "model."
"""The prefix of all tensors but the head, in memory of transformers 5."""
LAYER_PREFIX = MODEL_PREFIX + "layers.{layer}."
HEAD = "lm_head.weight"


def replace_parts(name: str, renamed: Iterable[tuple[str, str]]) -> str:
    """Return a tensor name with parts replaced, in order; each pair is (old, new)."""
    for old, new in renamed:
        name = name.replace(old, new)
    return name


Names: TypeAlias = tuple[tuple[str, str], ...]
"""How names in files begin, and how they begin in memory of transformers 5; the first pair counts.

A name that begins in no such way is the same in both.
"""


@dataclass(frozen=True)
class Wrapper:
    """A model type around a text model: a row of `WRAPPERS`."""

    model_type: str
    texts: tuple[str, ...]
    """The model types it may hold; the first is the default of a config without a type."""
    _: KW_ONLY
    names: tuple[Names, ...] = ((),)
    """How files may name its tensors; transformers writes the first."""
    old_texts: tuple[str, ...] = ()
    """Model types that early releases state for the first one."""
    text: str = "language_model"
    """The name of the text model within the base model."""
    natives: tuple[str, ...] = ()
    """The targets that a wrapper of transformers can hold."""
    native_type: str | None = None
    """The model type of that wrapper, if it is another one, which adds the balancing loss."""
    ties_by_text: bool = False
    """Whether the text model's config can tie the head, too."""
    is_flat: bool = False
    """Whether its config may hold the text model's settings at the top level."""
    unread: str = ""
    """A regular expression for tensors that transformers ignores: parts that generate pictures."""
    renamed: Names = ()
    """Parts of names in files with their in-memory replacement, outside of the text model."""
    text_renamed: Names = ()
    """The same of the text model."""
    kept: Names = ()
    """More of them, which shipped code keeps: transformers renames these for it, too."""

    @property
    def native(self) -> str:
        """The model type of the wrapper around a native target."""
        return self.native_type or self.model_type

    @property
    def upcycled(self) -> str:
        """Its model type once it has shipped code."""
        return f"{UPCYCLED_PREFIX}{self.model_type}"

    def inside(self, names: Collection[str] = ()) -> Inside:
        """Return the position of its text model in a checkpoint that has the tensors `names`."""
        found = (Inside(self, option) for option in (*self.names, ()))
        starts = ((inside, inside.wrapped(MODEL_PREFIX + "layers.")) for inside in found)
        fits = (inside for inside, start in starts if any(n.startswith(start) for n in names))
        return next(fits, Inside(self, self.names[0]))


@dataclass(frozen=True)
class Inside:
    """The position of a text model: its wrapper, and how names in its checkpoint begin."""

    wrapper: Wrapper
    names: Names = ()

    def wrapped(self, name: str) -> str:
        """Return the name here of a tensor that a standalone text model calls `name`."""
        if name == HEAD:
            return self._in_file(HEAD)
        return self._in_file(f"{MODEL_PREFIX}{self.wrapper.text}.{name.removeprefix(MODEL_PREFIX)}")

    def is_text(self, name: str) -> bool:
        """Whether a tensor belongs to the text model."""
        loaded = self._loaded(name)
        return loaded.startswith(f"{MODEL_PREFIX}{self.wrapper.text}.") or loaded == HEAD

    def in_memory(self, name: str) -> str:
        """Map a checkpoint name to its in-memory name."""
        return replace_parts(self.moved(name, Inside(self.wrapper)), self.wrapper.kept)

    def moved(self, name: str, other: Inside) -> str:
        """Map a name of this checkpoint to its name in another one."""
        moved = other._in_file(self._loaded(name))
        row = self.wrapper
        renamed = row.text_renamed if self.is_text(name) else row.renamed
        return moved if other.names else replace_parts(moved, renamed)

    def _loaded(self, name: str) -> str:
        for file, memory in self.names:
            if name.startswith(file):
                return memory + name.removeprefix(file)
        return name

    def _in_file(self, name: str) -> str:
        for file, memory in self.names:
            if name.startswith(memory):
                return file + name.removeprefix(memory)
        return name


_TEXT = "model.language_model."
_ANY = ("mixtral", "qwen2_moe", "qwen3_moe")
"""Targets of what takes any text model; the rows list text models that were tested."""
_HEADED = ("language_model.lm_head.", "lm_head.")
# transformers 4 reads only the old names, and 5 reads both.
_TOWERS = (("_tower.vision_model.", "_tower."),)
_LLAVA: Any = {
    "names": ((("language_model.model.", _TEXT), _HEADED, ("", MODEL_PREFIX)),),
    "kept": _TOWERS,
}
_FLAT: Any = {"ties_by_text": True, "is_flat": True}
_QWEN: Any = {
    **_FLAT,
    "names": ((("model.", _TEXT), ("lm_head.", "lm_head."), ("", MODEL_PREFIX)),),
}
_CLOVA: Names = (
    ("model.language_model.lm_head.", "lm_head."),
    ("model.vision_projector.", "model.projector."),
)
_ANY_TIED: Any = {"natives": _ANY, "ties_by_text": True}
_ROWS: Sequence[Wrapper] = (
    Wrapper("llava", ("llama", "mistral", "qwen2", "qwen3"), **_LLAVA, **_ANY_TIED),
    Wrapper("mistral3", ("mistral", "ministral3"), **_LLAVA, natives=("mixtral", "qwen2_moe")),
    Wrapper("gemma3", ("gemma3_text",), **_LLAVA),
    Wrapper("qwen2_vl", ("qwen2_vl_text",), **_QWEN),
    Wrapper("qwen2_5_vl", ("qwen2_5_vl_text",), **_QWEN),
    Wrapper("glm4v", ("glm4v_text",), ties_by_text=True),
    Wrapper("glm46v", ("glm4v_text",)),
    Wrapper("glmga", ("glm4v_text",)),
    Wrapper("glm_ocr", ("glm_ocr_text",), ties_by_text=True),
    Wrapper("gemma3n", ("gemma3n_text",)),
    Wrapper(
        "gemma4_unified",
        ("gemma4_unified_text",),
        renamed=(
            ("vision_embedder.p", "embed_vision.p"),
            ("vision.emb", "vision.multimodal_embedder.emb"),
        ),
    ),
    Wrapper("granite4_vision", ("granite4_vision_text",), old_texts=("granite",)),
    Wrapper("granite_docling", ("granite_docling_text",), text="text_model"),
    Wrapper("muse_glimmer", ("muse_glimmer_text",)),
    Wrapper(
        "paddleocr_vl",
        ("paddleocr_vl_text",),
        **_FLAT,
        names=((("model.", _TEXT), ("mlp_AR.", "model.projector."), ("visual.", "model.visual.")),),
    ),
    Wrapper(
        "hunyuan_vl",
        ("hunyuan_vl_text",),
        **_FLAT,
        names=((("model.", _TEXT), ("vit.", "model.vision_tower.")),),
        renamed=(
            (".dense_h_to_4h.", ".fc1."),
            (".dense_4h_to_h.", ".fc2."),
            (".input_layernorm.", ".layer_norm1."),
            (".post_attention_layernorm.", ".layer_norm2."),
            (".proj.0.", ".proj_conv."),
            (".proj.2.", ".proj_out."),
            (".perceive.", ".patch_merger."),
        ),
    ),
    Wrapper(
        "qwen3_vl", ("qwen3_vl_text",), natives=("qwen3_vl_moe_text",), native_type="qwen3_vl_moe"
    ),
    Wrapper("qwen3_5", ("qwen3_5_text",), natives=("qwen3_5_moe_text",), native_type="qwen3_5_moe"),
    Wrapper("gemma4", ("gemma4_text",), natives=("gemma4_text",)),
    Wrapper("apertus1p5", ("apertus1p5_text",)),
    Wrapper("aya_vision", ("cohere2",), **_LLAVA),
    Wrapper("cohere2_vision", ("cohere2",), natives=("cohere2_moe",)),
    Wrapper("cohere_compass", ("cohere_compass_text",)),
    Wrapper(
        "cosmos3_omni",
        ("qwen3_vl_text",),
        names=(
            (
                *((name, _TEXT + name) for name in ("layers.", "embed_tokens.", "norm.")),
                *((name, name) for name in ("lm_head.", "model.")),
                ("", "model.visual."),
            ),
        ),
        text_renamed=(
            *((f".to_{part}.", f".{part}_proj.") for part in "qkv"),
            (".to_out.", ".o_proj."),
            (".norm_q.", ".q_norm."),
            (".norm_k.", ".k_norm."),
        ),
        unread=r".*\.(add_[qkv]_proj|to_add_out|norm_added_[qk])\..+|.*moe_gen.*"
        r"|((audio_|action_)?proj_(in|out)|time_embedder)\..+|(audio|action)_modality_embed",
    ),
    Wrapper("deepseek_vl", ("llama",), natives=_ANY),
    Wrapper("deepseek_vl_hybrid", ("llama",), natives=_ANY),
    Wrapper("exaone4_5", ("exaone4",), old_texts=("exaone4_5_text",)),
    Wrapper("fast_vlm", ("qwen2",), natives=_ANY, ties_by_text=True),
    Wrapper("fuyu", ("persimmon",), **_LLAVA),
    Wrapper("got_ocr2", ("qwen2",), **_LLAVA, natives=_ANY),
    Wrapper(
        "hyperclovax_vision_v2",
        ("hyperclovax",),
        names=(_CLOVA, (("model.language_model.model.", _TEXT), *_CLOVA)),
    ),
    # The connector is as wide as the text model's MLPs, which mixtral's config does not say.
    Wrapper("idefics2", ("mistral", "llama"), text="text_model", natives=("qwen2_moe",)),
    Wrapper("idefics3", ("llama",), text="text_model", natives=_ANY),
    Wrapper("internvl", ("qwen2", "qwen3", "llama"), **_LLAVA, natives=_ANY),
    Wrapper("janus", ("llama",), natives=_ANY),
    Wrapper("lfm2_vl", ("lfm2",), kept=_TOWERS, natives=("lfm2_moe",)),
    Wrapper("lfm3_vl", ("lfm3",)),
    Wrapper("lighton_ocr", ("qwen3",), natives=_ANY),
    Wrapper("llava_next", ("llama", "mistral", "qwen2"), **_LLAVA, natives=_ANY),
    Wrapper("llava_next_video", ("llama", "mistral", "qwen2"), **_LLAVA, **_ANY_TIED),
    Wrapper("llava_onevision", ("qwen2",), **_LLAVA, **_ANY_TIED),
    Wrapper("minicpm_ocr", ("qwen3_5_text",), natives=("qwen3_5_moe_text",)),
    Wrapper("minicpmv4_6", ("qwen3_5_text",), natives=("qwen3_5_moe_text",)),
    Wrapper("minicpmv4_7", ("qwen3_5_text",), natives=("qwen3_5_moe_text",)),
    Wrapper("ovis2", ("qwen2",), natives=_ANY),
    Wrapper("paligemma", ("gemma", "gemma2"), **_LLAVA),
    Wrapper("perception_lm", ("llama",), **_ANY_TIED),
    Wrapper("pp_chart2table", ("qwen2",), **_LLAVA, natives=_ANY),
    Wrapper("smolvlm", ("llama",), text="text_model", natives=_ANY),
    Wrapper("video_llama_3", ("qwen2",), **_ANY_TIED),
    Wrapper("video_llava", ("llama",), **_LLAVA, natives=_ANY),
    Wrapper("vipllava", ("llama",), **_LLAVA, natives=_ANY),
)
WRAPPERS: Mapping[str, Wrapper] = {row.model_type: row for row in _ROWS}
_BY_TYPE = {name: row for row in _ROWS for name in (row.model_type, row.upcycled, row.native)}
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
    by_default = defaults_of(wrapper.model_type)["tie_word_embeddings"]
    tied = config.get("tie_word_embeddings", by_default)
    if wrapper.ties_by_text:
        tied = tied or text.get("tie_word_embeddings", False)
    found = {"model_type": wrapper.texts[0], **text, "tie_word_embeddings": tied}
    if found["model_type"] in wrapper.old_texts:
        found["model_type"] = wrapper.texts[0]
    return found


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
    match result.get("vision_config"):
        case {"model_type": str(kind)} if native is not None:
            # Wrappers of different types have vision towers of different types.
            result["vision_config"]["model_type"] = kind.replace(config["model_type"], native)
    return result | {"text_config": text}


def _flat_keys(wrapper: Wrapper) -> set[str]:
    known = defaults_of(wrapper.texts[0]).keys()
    return {*known, "rope_theta", "rope_scaling", "rope_parameters"} - {"tie_word_embeddings"}


def nested_configs(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys under which a config holds the configs of wrapped models."""
    if wrapper_of(config) is not None:
        keys = (key for key in config if key.endswith("_config") and key != "quantization_config")
        yield from (key for key in keys if isinstance(config[key], Mapping))
