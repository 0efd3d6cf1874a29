"""Tiny models that take pictures as well: what is around their text models, and what is asked.

What prepares pictures is written by hand, as released checkpoints have it, for engines insist on
that even where they are asked about a text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIDE, PATCH = 32, 8
"""Of a picture, in pixels."""
MARKS = (
    *("<image>", "<start_of_image>", "<image_soft_token>", "<end_of_image>"),
    *("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
    *("<video>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"),
    *("<img>", "</img>", "<IMG_CONTEXT>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    *("<|image>", "<|image|>", "<image|>", "<|video|>"),
    *("<|audio>", "<|audio|>", "<audio|>"),
)
"""Tokens that stand for pictures, added to a tokenizer: each wrapper has some of them."""
_NESTED = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model")
"""Vision towers whose tensors have longer names in releases than transformers 5 gives them."""
SPARE = 32  # rows of the embedding for these
TOKENIZER, PICTURES = "tokenizer_config.json", "preprocessor_config.json"

_SEES: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_SEES_PATCHES: Mapping[str, Any] = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "out_hidden_size": 128,
    "patch_size": PATCH,
}
_NORMAL: Mapping[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_ROPE: Mapping[str, Any] = {
    "rope_type": "default",
    "mrope_section": [4, 6, 6],
    "rope_theta": 10000.0,
}
_TURNS: Mapping[str, Any] = {**_ROPE, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
_TINY: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "sliding_window": None,
}
LINEAR: Mapping[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
"""What a tiny text model of Qwen3.5 needs said."""
GEMMA4: Mapping[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 32,
    "global_head_dim": 64,
    "hidden_size_per_layer_input": 0,  # as all of its own mixtures
}
"""What a tiny text model of Gemma 4 needs said."""
_SOFT: Mapping[str, Any] = {
    "patch_size": PATCH,
    "pooling_kernel_size": 2,
    "max_soft_tokens": 70,  # the fewest that there can be
}


@dataclass(frozen=True, kw_only=True)
class Wrapped:
    """A wrapper around a tiny text model."""

    text: Mapping[str, Any]
    sees: Mapping[str, Any]
    """Of its vision tower."""
    tokens: Mapping[str, str]
    """Which token a key of its config says the number of."""
    asked: str
    """What stands for a picture in a text that it is given with one."""
    files: Mapping[str, Mapping[str, Any]]
    """What prepares pictures and text, by the name of its file."""
    around: Mapping[str, Any] = field(default_factory=dict)
    """Other keys of its config."""
    repeats: tuple[str, ...] = ()
    """Keys of its text model that its config has as well."""


_QWEN: Mapping[str, Any] = {
    "tokens": {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
    "asked": "<|vision_start|><|image_pad|><|vision_end|>",
}


def _qwen_files(processor: str, video: str) -> dict[str, dict[str, Any]]:
    sizes = {
        **_NORMAL,
        "processor_class": processor,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": SIDE**2, "longest_edge": SIDE**2 * 4},
    }
    return {
        PICTURES: {**sizes, "image_processor_type": "Qwen2VLImageProcessor"},
        "video_preprocessor_config.json": {**sizes, "video_processor_type": video},
    }


def _files(
    processor: str,
    pictures: str,
    size: Mapping[str, Any],
    **others: Any,  # noqa: ANN401
) -> dict[str, dict[str, Any]]:
    """Return the files of a processor: how it scales pictures, and its other settings."""
    of = {"processor_class": processor}
    return {
        PICTURES: {**_NORMAL, **of, "image_processor_type": pictures, **size},
        "processor_config.json": {**of, **others},
    }


_SQUARE: Mapping[str, Any] = {"size": {"height": SIDE, "width": SIDE}}
_CROP: Mapping[str, Any] = {"size": {"shortest_edge": SIDE}, "crop_size": _SQUARE["size"]}
_TILES: Mapping[str, Any] = {"image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]}
_SIGLIP: Mapping[str, Any] = {
    **_SEES,
    "model_type": "siglip_vision_model",
    "vision_use_head": False,
}
_PIXTRAL: Mapping[str, Any] = {**_SEES, "model_type": "pixtral", "head_dim": 32}


def _pixtral_files(
    spatial_merge_size: int, processor: str = "PixtralProcessor"
) -> dict[str, dict[str, Any]]:
    return _files(
        processor,
        "PixtralImageProcessor",
        {"patch_size": PATCH, "size": {"longest_edge": SIDE}},
        patch_size=PATCH,
        spatial_merge_size=spatial_merge_size,
        image_token="[IMG]",
        image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
    )


def _llava(text: str) -> Wrapped:
    return Wrapped(
        text={**_TINY, "model_type": text},
        sees={**_SEES, "model_type": "clip_vision_model"},
        tokens={"image_token_index": "<image>"},
        asked="<image>",
        files=_files(
            "LlavaProcessor",
            "CLIPImageProcessor",
            _CROP,
            image_token="<image>",
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        ),
    )


def _mistral3(text: str) -> Wrapped:
    return Wrapped(
        text={**_TINY, "model_type": text},
        sees=_PIXTRAL,
        tokens={"image_token_index": "[IMG]"},
        asked="[IMG]",
        files=_pixtral_files(2),
        around={"tie_word_embeddings": False, "spatial_merge_size": 2},
    )


WRAPPED: Mapping[str, Wrapped] = {
    "gemma3": Wrapped(
        text={
            **_TINY,
            "model_type": "gemma3_text",
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 32,
            "query_pre_attn_scalar": 32,
        },
        sees=_SIGLIP,
        tokens={
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        asked="<start_of_image>",
        files={
            **_files(
                "Gemma3Processor",
                "Gemma3ImageProcessor",
                {**_SQUARE, "do_pan_and_scan": False},
                image_seq_length=4,
            ),
            TOKENIZER: {
                "extra_special_tokens": {
                    "image_token": "<image_soft_token>",
                    "boi_token": "<start_of_image>",
                    "eoi_token": "<end_of_image>",
                },
            },
        },
        around={"mm_tokens_per_image": 4},
    ),
    "internvl (qwen2)": Wrapped(
        text={**_TINY, "model_type": "qwen2"},
        sees={
            **_SEES,
            "model_type": "internvl_vision",
            "image_size": [SIDE, SIDE],
            "patch_size": [PATCH, PATCH],
        },
        tokens={"image_token_id": "<IMG_CONTEXT>"},
        asked="<IMG_CONTEXT>",
        files={
            **_files(
                "InternVLProcessor",
                "GotOcr2ImageProcessor",
                {**_SQUARE, "crop_to_patches": False},
                image_seq_length=4,
            ),
            "video_preprocessor_config.json": {
                **_NORMAL,
                **_SQUARE,
                "processor_class": "InternVLProcessor",
                "video_processor_type": "InternVLVideoProcessor",
            },
            TOKENIZER: {
                "extra_special_tokens": {
                    "start_image_token": "<img>",
                    "end_image_token": "</img>",
                    "context_image_token": "<IMG_CONTEXT>",
                    "video_token": "<video>",
                },
            },
        },
        around={"image_seq_length": 4, "tie_word_embeddings": False},
    ),
    "lfm2_vl": Wrapped(
        text={
            **_TINY,
            "model_type": "lfm2",
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
        },
        sees={
            **{key: value for key, value in _SEES.items() if key != "image_size"},
            "model_type": "siglip2_vision_model",
            "num_patches": 16,
            "vision_use_head": False,
        },
        tokens={"image_token_id": "<image>"},
        asked="<image>",
        files=_files(
            "Lfm2VlProcessor",
            "Lfm2VlImageProcessor",
            {
                "do_image_splitting": False,
                "encoder_patch_size": PATCH,
                "tile_size": SIDE,
                "min_image_tokens": 4,
                "max_image_tokens": 4,
            },
        ),
        around={"projector_hidden_size": 64},
    ),
    "lighton_ocr": Wrapped(
        text={**_TINY, "model_type": "qwen3"},
        sees=_PIXTRAL,
        tokens={"image_token_id": "[IMG]"},
        asked="[IMG]",
        files={
            **_pixtral_files(2, "LightOnOcrProcessor"),
            TOKENIZER: {
                "extra_special_tokens": {
                    "image_token": "[IMG]",
                    "image_break_token": "[IMG_BREAK]",
                    "image_end_token": "[IMG_END]",
                },
            },
        },
        around={"spatial_merge_size": 2},
    ),
    "llava (mistral)": _llava("mistral"),
    "llava (qwen2)": _llava("qwen2"),
    "llava (qwen3)": _llava("qwen3"),
    "llava (pixtral)": Wrapped(
        text={**_TINY, "model_type": "mistral"},
        sees=_PIXTRAL,
        tokens={"image_token_index": "[IMG]"},
        asked="[IMG]",
        files=_pixtral_files(1),
        around={"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    ),
    "llava_next (mistral)": Wrapped(
        text={**_TINY, "model_type": "mistral"},
        sees={**_SEES, "model_type": "clip_vision_model"},
        tokens={"image_token_index": "<image>"},
        asked="<image>",
        files=_files(
            "LlavaNextProcessor",
            "LlavaNextImageProcessor",
            {**_CROP, **_TILES},
            image_token="<image>",
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        ),
        around=_TILES,
    ),
    "llava_onevision": Wrapped(
        text={**_TINY, "model_type": "qwen2"},
        sees=_SIGLIP,
        tokens={"image_token_index": "<image>", "video_token_index": "<video>"},
        asked="<image>",
        files={
            **_files(
                "LlavaOnevisionProcessor",
                "LlavaOnevisionImageProcessor",
                {**_SQUARE, **_TILES},
                image_token="<image>",
                video_token="<video>",
                num_image_tokens=(SIDE // PATCH) ** 2,
                vision_feature_select_strategy="full",
            ),
            "video_preprocessor_config.json": {
                **_NORMAL,
                **_SQUARE,
                "processor_class": "LlavaOnevisionProcessor",
                "video_processor_type": "LlavaOnevisionVideoProcessor",
            },
        },
        around=_TILES,
    ),
    "mistral3 (mistral)": _mistral3("mistral"),
    "paligemma": Wrapped(
        text={**_TINY, "model_type": "gemma"},
        sees={**_SIGLIP, "projection_dim": _TINY["hidden_size"]},
        tokens={"image_token_index": "<image>"},
        asked="<image>",
        files=_files(
            "PaliGemmaProcessor",
            "SiglipImageProcessor",
            {**_SQUARE, "image_seq_length": (SIDE // PATCH) ** 2},
        ),
        around={"hidden_size": _TINY["hidden_size"], "projection_dim": _TINY["hidden_size"]},
    ),
    "qwen2_vl": Wrapped(
        text={**_TINY, "model_type": "qwen2_vl_text", "rope_parameters": _ROPE},
        sees={
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": _TINY["hidden_size"],
            "num_heads": 2,
            "patch_size": PATCH,
        },
        files=_qwen_files("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
        **_QWEN,
    ),
    "qwen2_5_vl": Wrapped(
        text={**_TINY, "model_type": "qwen2_5_vl_text", "rope_parameters": _ROPE},
        sees={**_SEES_PATCHES, "window_size": 32, "fullatt_block_indexes": [0]},
        files=_qwen_files("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
        **_QWEN,
    ),
    "qwen3_vl": Wrapped(
        text={**_TINY, "model_type": "qwen3_vl_text", "rope_parameters": _TURNS},
        sees={**_SEES_PATCHES, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        files=_qwen_files("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
        around={"tie_word_embeddings": False},
        **_QWEN,
    ),
    "qwen3_5": Wrapped(
        text={
            **_TINY,
            **LINEAR,
            "model_type": "qwen3_5_text",
            "rope_parameters": {**_TURNS, "partial_rotary_factor": 1.0},
        },
        sees={**_SEES_PATCHES, "num_position_embeddings": 16},
        files=_qwen_files("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
        around={"tie_word_embeddings": False},
        **_QWEN,
    ),
    "gemma4": Wrapped(
        text={**_TINY, **GEMMA4, "model_type": "gemma4_text", "pad_token_id": 0},
        sees={
            **_SEES,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
            "default_output_length": _SOFT["max_soft_tokens"],
        },
        tokens={
            "image_token_id": "<|image|>",
            "boi_token_id": "<|image>",
            "eoi_token_id": "<image|>",
            "video_token_id": "<|video|>",
        },
        asked="<|image|>",
        files={
            "processor_config.json": {
                "processor_class": "Gemma4Processor",
                "image_processor": {
                    "image_processor_type": "Gemma4ImageProcessor",
                    **_SOFT,
                },
                "video_processor": {"video_processor_type": "Gemma4VideoProcessor", **_SOFT},
                "feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"},
            },
            TOKENIZER: {
                "extra_special_tokens": {
                    "image_token": "<|image|>",
                    "boi_token": "<|image>",
                    "eoi_token": "<image|>",
                    "audio_token": "<|audio|>",
                    "boa_token": "<|audio>",
                    "eoa_token": "<audio|>",
                },
            },
        },
        around={"audio_config": None},
        repeats=("vocab_size",),  # MLX looks for it there
    ),
}
"""By name, which begins with the type."""


def make_wrapped(name: str, tokens: Mapping[str, Any]) -> PreTrainedModel:
    """Return a dense model with random weights; `tokens` are settings that go with a tokenizer."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    row, marks = WRAPPED[name], _marks(tokens)
    text = {**tokens, **row.text, "vocab_size": tokens["vocab_size"] + SPARE}
    config = CONFIG_MAPPING[name.split(maxsplit=1)[0]](
        text_config=text,
        vision_config=dict(row.sees),
        **{key: marks[mark] for key, mark in row.tokens.items()},
        **{key: text[key] for key in row.repeats},
        **row.around,
    )
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    # A large embedding would let a tied head repeat the last token, whatever the layers do.
    draw_weights(model, embedding=0.02)
    return model


def draw_weights(model: PreTrainedModel, embedding: float = 0.15) -> None:
    """Draw weights that are large enough for every part of a model to matter to its text."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale, mean = (0.2, 1.0) if "norm" in name else (0.15, 0.0)
        parameter.data = mean + (embedding if "embed_tokens" in name else scale) * noise


def _marks(tokens: Mapping[str, Any]) -> dict[str, int]:
    return {mark: tokens["vocab_size"] + index for index, mark in enumerate(MARKS)}


def save_wrapped(path: Path, name: str, tokens: Mapping[str, Any]) -> None:
    """Write a dense model with random weights, and what prepares pictures for it.

    The files of the tokenizer have to be there.
    """
    from safetensors.torch import load_file, save_file

    row, marks = WRAPPED[name], _marks(tokens)
    make_wrapped(name, tokens).save_pretrained(path)
    if row.sees.get("model_type") in _NESTED:
        weights = path / "model.safetensors"
        tensors = {
            key.replace("vision_tower.", "vision_tower.vision_model."): tensor.clone()
            for key, tensor in load_file(weights).items()
        }
        weights.unlink()
        save_file(tensors, weights, metadata={"format": "pt"})
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"] += [
        {"id": number, "content": mark, **plain, "special": True} for mark, number in marks.items()
    ]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    for file, content in row.files.items():
        before = json.loads((path / file).read_text()) if (path / file).exists() else {}
        (path / file).write_text(json.dumps({**before, **content}, indent=2))


def draw_picture(path: Path) -> Path:
    """Write a picture of nothing in particular, made when it is not there yet."""
    if not path.exists():
        import numpy as np
        from PIL import Image

        pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return path
