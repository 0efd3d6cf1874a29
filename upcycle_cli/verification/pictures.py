"""Compare both models' predictions for a picture with text, if a wrapper has a vision tower.

The picture is random, in the form that a processor returns, and as small as the vision tower
allows. Random text tokens come before and after it.

Legend: K compared positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch

from upcycle_cli.run.lazy_models import LazyModel
from upcycle_cli.run.models import Model, source_errors, transformers_errors

_BEFORE, _AFTER = 4, 12
"""Tokens of text; the last position of the picture and all after it are compared."""
_SIDE = 2
"""Merged patches per side, if a picture may have any size."""
_CHANNELS = 3
"""Channels of a picture, if no config has the number."""


def picture_metrics(dense: LazyModel, moe: LazyModel) -> dict[str, Any]:
    """Return KL(dense ‖ MoE) in nats for a picture with text; empty for a text model."""
    if getattr(dense.net.config, "vision_config", None) is None:
        return {}
    with source_errors(dense.checkpoint.path), torch.no_grad():
        inputs = _inputs(dense.net)
        wanted_KV = _logits(dense.net, inputs)
    with transformers_errors(), torch.no_grad():
        found_KV = _logits(moe.net, inputs)
    p_KV, q_KV = (logits.log_softmax(-1) for logits in (wanted_KV, found_KV))
    return {
        # Rounding can make a sum of zeros negative. Not max(): it would turn nan into 0.
        "kl_mean_picture": float((p_KV.exp() * (p_KV - q_KV)).sum(-1).mean().clamp(min=0)),
        "picture_tokens": int((inputs["input_ids"] == dense.net.config.image_token_id).sum()),
    }


def _logits(model: Model, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    logits: torch.Tensor = model(**inputs, use_cache=False, logits_to_keep=_AFTER + 1).logits
    return logits[0].double()


def _inputs(model: Model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = _picture(model, generator)
    made = model.get_image_features(**inputs, return_dict=True).pooler_output
    pieces = made if isinstance(made, list | tuple) else [made]
    count = sum(piece.numel() // piece.shape[-1] for piece in pieces)
    config = model.config
    special = {value for key, value in config.to_dict().items() if "token" in key}
    usable = [i for i in range(config.get_text_config().vocab_size) if i not in special]
    drawn = torch.randint(len(usable), (_BEFORE + _AFTER,), generator=generator).tolist()
    words, picture = [usable[i] for i in drawn], [config.image_token_id] * count
    ids = torch.tensor([[*words[:_BEFORE], *picture, *words[_BEFORE:]]])
    known = signature(type(model.base_model).forward).parameters
    kinds = {key for key in ("token_type_ids", "mm_token_type_ids") if key in known}
    return {
        "input_ids": ids,
        **inputs,
        **dict.fromkeys(kinds, (ids == config.image_token_id).long()),
    }


def _picture(model: Model, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return a random picture in the form that the model takes: patches or pixels."""
    base, vision = model.base_model, model.config.vision_config
    known = signature(type(base).forward).parameters
    if "image_position_ids" in known:
        side = _SIDE * vision.pooling_kernel_size
        patches = torch.rand(1, side**2, _CHANNELS * vision.patch_size**2, generator=generator)
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side))[None]
        return {"pixel_values": patches, "image_position_ids": places}
    if "image_grid_thw" in known:
        side = _SIDE * vision.spatial_merge_size
        size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        patches = torch.randn(side**2, size, generator=generator)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, side, side]])}
    size = vision.image_size
    pixels = torch.randn(1, vision.num_channels, size, size, generator=generator)
    if "image_sizes" not in signature(type(base.vision_tower).forward).parameters:
        return {"pixel_values": pixels}
    # This model takes pictures of several sizes: use a small one.
    size = _SIDE * vision.patch_size * getattr(model.config, "spatial_merge_size", 1)
    return {"pixel_values": pixels[..., :size, :size], "image_sizes": torch.tensor([[size, size]])}
