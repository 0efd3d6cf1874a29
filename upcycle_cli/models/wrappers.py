"""The rows of wrapper model types, and how a wrapper's config contains that of its text model.

Only the text model's MLPs become experts; the vision tower and the projector are copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.models.defaults import defaults_of
from upcycle_cli.models.dense import DenseFamily
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.wrapper import NamePrefixes, Wrapper

TEXTS: Mapping[str, DenseFamily] = {
    **DENSE,
    "qwen2_5_vl_text": replace(DENSE["qwen2"], model_type="qwen2_5_vl_text", targets=()),
    "qwen3_vl_text": DenseFamily("qwen3_vl_text", targets=("qwen3_vl_moe_text",)),
}
"""The text models that wrappers may hold; the last two exist only inside wrappers."""

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
        parts=("text_config", "vision_config", "audio_config"),
    ),
)
WRAPPERS: Mapping[str, Wrapper] = {row.model_type: row for row in _ROWS}
_BY_TYPE = {name: row for row in _ROWS for name in row.types}


def wrapper_of(config: Mapping[str, Any]) -> Wrapper | None:
    """Return the row of a wrapper's config, dense or MoE; None for a plain text model."""
    model_type = config.get("model_type")
    return _BY_TYPE.get(model_type) if isinstance(model_type, str) else None


def text_config_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of a wrapper's text model; any other config is returned as it is.

    `tie_word_embeddings` of the result says whether the whole model ties its head. Raises
    UpcycleError if text_config is not an object.
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
    """Return a wrapper's config with `text` as its text model's, and copies of nested configs.

    `native` is the new model type of the wrapper if transformers has one; `tied` says whether the
    head is tied to the embedding.
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
    wrapper = wrapper_of(config)
    if wrapper is not None:
        yield from (key for key in wrapper.parts if isinstance(config.get(key), Mapping))
