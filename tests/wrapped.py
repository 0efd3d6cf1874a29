"""Tiny models with a vision tower, one for each row of wrappers, and pictures for them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import (
    SPECIAL,
    TINY,
    VOCAB_SIZE,
    random_weight,
    read_json,
    save_companions,
    write_json,
)

sys.path.insert(0, str(Path(__file__).parent / "interoperability"))

from interop.wrapped import WRAPPED

from upcycle_cli import Recipe, verify
from upcycle_cli.models.lookup import native_target, targets_of, wrapped_families
from upcycle_cli.models.wrappers import WRAPPERS
from upcycle_cli.recipe.recipe import SHIPPED, Routing
from upcycle_cli.verification.pictures import picture_with_text
from upcycle_cli.verification.prompts import TextOptions
from upcycle_cli.verification.result import CHECK_NAMES

IMAGE, SOUND = 250, 254
_TEXT: Mapping[str, Any] = {
    **TINY,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "head_dim": 8,
}
ROPE: Mapping[str, Any] = {
    "rope_type": "default",
    "mrope_section": [1, 1, 2],
    "rope_theta": 10000.0,
}
_SMALL: Mapping[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "image_size": 16,
    "patch_size": 4,
    "out_hidden_size": 32,
    "head_dim": 8,
    "window_size": 8,
    "position_embedding_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "depth": 1,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
    "num_position_embeddings": 16,
}
"""Sizes of any model that sees."""
_HEARS: Mapping[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [8, 4],
    "output_proj_dims": 24,
}


_SAM: Mapping[str, Any] = {
    "image_size": 64,
    "output_channels": 8,
    "global_attn_indexes": [0],
    "window_size": 4,
    "mlp_dim": 24,
}
_SEEN: Mapping[str, int] = {"vocab_offset": 244, "vocab_size": 8}
_HEARD: Mapping[str, int] = {"vocab_offset": 252, "vocab_size": 8}
_TILED: Mapping[str, Any] = {"image_grid_pinpoints": [[16, 32]]}
_MINICPM: Mapping[str, Any] = {
    "image_token_id": IMAGE,
    "insert_layer_id": 0,
    "vision_config": {"num_hidden_layers": 2},
}
OTHERWISE: Mapping[str, Mapping[str, Any]] = {
    "apertus1p5": {
        "image_token_offset": 190,
        "audio_token_offset": 250,
        "vision_config": {
            "codebook_size": 60,
            "embed_dim": 8,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "resolution": 16,
            "patch_size": 2,
        },
        "audio_config": {"hidden_size": 512, "codebook_size": 10},
    },
    "deepseek_vl_hybrid": {
        "high_res_vision_config": {**_SAM, "image_size": 64, "output_channels": 8, "scale": 0.5}
    },
    "gemma3n": {
        "vision_config": {"architecture": "test_convnext", "hidden_size": 64, **_SEEN},
        "audio_config": {"conf_num_hidden_layers": 1, "conf_num_attention_heads": 2, **_HEARD},
        "vision_soft_tokens_per_image": 4,
    },
    "gemma4_unified": {
        "vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32}
    },
    "got_ocr2": {"vision_config": _SAM},
    "granite4_vision": {
        "vision_config": {"hidden_size": 64},
        "qformer_config": {"vocab_size": 8},
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 1]],
        "image_grid_pinpoints": [[16, 16]],
        "spatial_target_layers": [0, 1],
    },
    "granite_docling": {"vision_config": {"scale_factor": 2}},
    "hunyuan_vl": {"vision_config": {"text_hidden_size": 32, "max_image_size": 16}},
    "fast_vlm": {
        "vision_config": {
            "architecture": "fastvit_mci3",
            "model_args": {
                "inference_mode": True,
                "layers": [1] * 5,
                "embed_dims": [32] * 5,
                "mlp_ratios": [2] * 5,
            },
            "hidden_size": 64,
        },
    },
    "fuyu": {"image_size": 16, "patch_size": 4},
    "muse_glimmer": {
        "out_hidden_size": 64,
        "projector_hidden_size": 24,
        "vision_config": {"pos_emb_height": 8, "pos_emb_width": 8},
    },
    "qwen2_vl": {"vision_config": {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}},
    "idefics2": {
        "perceiver_config": {
            "hidden_size": 32,
            "resampler_n_latents": 3,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
        },
    },
    "janus": {
        "vision_config": {"projection_dim": 32},
        "vq_config": {
            "embed_dim": 4,
            "num_embeddings": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "latent_channels": 32,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
        },
    },
    "lfm2_vl": {"vision_config": {"num_patches": 16}},
    "lfm3_vl": {"vision_config": {"layer_types": ["full_attention"]}},
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), _TILED),
    **dict.fromkeys(("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), _MINICPM),
    "ovis2": {
        "hidden_size": 32,
        "vision_config": {"vocab_size": 24},
        "visual_indicator_token_ids": [2, 3, 4, 5, 6],
        "vocab_size": VOCAB_SIZE,
    },
    "paligemma": {
        "hidden_size": 32,
        "projection_dim": 32,
        "vision_config": {"projection_dim": 32},
    },
    "perception_lm": {
        "vision_config": {
            "architecture": "vit_pe_core_tiny_patch16_384",
            "do_pooling": False,
            "num_classes": 0,
            "model_args": {
                "depth": 1,
                "embed_dim": 16,
                "global_pool": "",
                "img_size": [16, 16],
                "num_heads": 2,
                "patch_size": 4,
                "ref_feat_shape": [1, 1],
            },
        },
    },
    "pp_chart2table": {"vision_config": _SAM},
    "vipllava": {"vision_feature_layers": [-1, 0]},
}
"""What a tiny model needs besides `_SMALL`: keys of its config, and of the parts of that."""


def _around(wrapper: str) -> dict[str, Any]:
    """The config outside of the text model: transformers' own, or that of other tests, smaller."""
    from transformers import CONFIG_MAPPING

    other = OTHERWISE.get(wrapper, {})
    row = next((row for name, row in WRAPPED.items() if name.split()[0] == wrapper), None)
    if row is not None:
        tokens = {key: IMAGE + number for number, key in enumerate(row.tokens)}
        small = {key: value for key, value in _SMALL.items() if key in row.sees}
        vision = {**row.sees, **small, **other.get("vision_config", {})}
        return {**row.around, **tokens, **other, "vision_config": vision}
    usual = CONFIG_MAPPING[wrapper]()
    keys = (key for key, value in vars(usual).items() if isinstance(value, int))
    marks = sorted(key for key in keys if key.endswith(("_token_id", "_token_index")))
    result: dict[str, Any] = {key: IMAGE + number for number, key in enumerate(marks)}
    for part in {*usual.sub_configs} - {"text_config"}:
        sub = getattr(usual, part, None)
        if sub is not None:
            small = {key: value for key, value in _SMALL.items() if hasattr(sub, key)}
            result[part] = {"model_type": sub.model_type, **small, **other.get(part, {})}
    return result | {key: value for key, value in other.items() if key not in result}


AROUND = {name: _around(name) for name in WRAPPERS}
AROUND["gemma4"] |= {"audio_config": _HEARS, "audio_token_id": SOUND}
AROUND["gemma4"]["vision_config"] |= {"use_clipped_linears": True, "standardize": True}
_MULTIDIMENSIONAL = ["glm4v", "hunyuan_vl", "paddleocr_vl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
TEXTS: Mapping[str, dict[str, Any]] = {
    "cohere_compass_text": {**SPECIAL["cohere_compass_text"], "sliding_window": 8},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "gemma4_text": {**SPECIAL["gemma4_text"], "sliding_window": 8, "pad_token_id": 0},
    "gemma4_unified_text": {
        **SPECIAL["gemma4_unified_text"],
        "sliding_window": 8,
        "pad_token_id": 0,
    },
    "gemma3n_text": {
        **SPECIAL["gemma3n_text"],
        "sliding_window": 8,
        "pad_token_id": 0,
        "vocab_size_per_layer_input": 244,  # the rest stands for pictures and sounds
    },
    "glm_ocr_text": {"rope_parameters": ROPE, "num_nextn_predict_layers": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm3": {**SPECIAL["lfm3"]},
    "mistral": {"sliding_window": 8},
    "ministral3": {"max_position_embeddings": 1 << 18},
    "muse_glimmer_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
    },
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0, "mrope_interleaved": True},
    },
    **{f"{name}_text": {"rope_parameters": ROPE} for name in _MULTIDIMENSIONAL},
}
SAME = 1e-5

Row = tuple[str, str, str]


FAMILIES = wrapped_families()
ROWS: list[Row] = [
    (wrapper, text, target)
    for wrapper in WRAPPERS
    for text, family in FAMILIES[wrapper].items()
    for target in targets_of(family)
]
"""Every wrapper, text model and target."""


def save_wrapper(path: Path, wrapper: str, text: str, around: Mapping[str, Any]) -> Path:
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, AutoTokenizer

    inner = {**_TEXT, **TEXTS.get(text, {}), "model_type": text}
    config = CONFIG_MAPPING[wrapper](**{**AROUND[wrapper], **around, "text_config": inner})
    model = AutoModelForImageTextToText.from_config(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data = random_weight(name, parameter.shape, generator)
        if "timm_model" in name and parameter.dim() == 4:  # few weights see each channel
            parameter.data *= 10 / parameter[0].numel() ** 0.5
    model.config.dtype = torch.float32
    model.save_pretrained(path)
    save_companions(path)
    if wrapper == "qwen3_5":
        # transformers loads any tokenizer of this type as its own class.
        AutoTokenizer.from_pretrained(path).save_pretrained(path)
    write_json(path / "preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]})
    return path


def failures(dense: Path, moe: Path, checks: Sequence[str] = CHECK_NAMES) -> list[str]:
    """All that verify finds wrong."""
    report = verify(dense, moe, checks=checks, texts=TextOptions(tokens=64))
    return [failure for check in report.checks for failure in check.failures]


def recipe(row: Row) -> Recipe:
    """A recipe that is exact for any router, since its gates sum to 1."""
    wrapper, text, target = row
    routing = Routing.TOPK_SOFTMAX
    if target != SHIPPED:
        routings = native_target(target, FAMILIES[wrapper][text].inside).routings
        routing = next(r for r in routings if r is not Routing.SOFTMAX_TOPK)
    return Recipe("E2G2T2", routing=routing)


def load(path: Path) -> Any:  # noqa: ANN401 - transformers is untyped
    from transformers import AutoModelForImageTextToText

    code = read_json(path / "config.json")["model_type"].startswith("upcycled_")
    model, info = AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, trust_remote_code=code
    )
    assert not {kind: found for kind, found in info.items() if found}
    return model.eval()


@torch.no_grad()
def picture_and_text(model: Any) -> dict[str, torch.Tensor]:  # noqa: ANN401
    """Inputs as a processor of any of these models would make them."""
    return picture_with_text(model)


@torch.no_grad()
def logits(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:  # noqa: ANN401
    found: torch.Tensor = model(**inputs).logits
    return found
