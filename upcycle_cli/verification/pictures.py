"""Compare both models' predictions for a picture with text, if a wrapper has a vision tower.

The picture is random, in the form that a processor returns, and as small as the vision tower
allows. Random text tokens come before and after it.

Legend: K compared positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
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
_ANY_SIZE = 64
"""Pixels per side, if the vision tower takes pictures of any size."""
_Form = tuple[Sequence[int], Mapping[str, torch.Tensor]]


def picture_metrics(dense: LazyModel, moe: LazyModel) -> dict[str, Any]:
    """Return KL(dense ‖ MoE) in nats for a picture with text; empty for a text model."""
    if not hasattr(dense.net.base_model, "get_image_features") or _vision(dense.net.config) is None:
        return {}
    with source_errors(dense.checkpoint.path), torch.no_grad():
        inputs = picture_with_text(dense.net)
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


def picture_with_text(model: Model) -> dict[str, torch.Tensor]:
    """Return the inputs of a model for a random picture between random text tokens."""
    generator, base, config = torch.Generator().manual_seed(0), model.base_model, model.config
    known = {*signature(type(base).forward).parameters}
    shape, others = _picture(known, config)
    inputs = {"pixel_values": torch.randn(shape, generator=generator), **others}
    seen = base.get_image_features(**inputs, return_dict=True)
    made = seen.pooler_output
    if made is None:
        layers = getattr(seen, "deepstack_features", None)  # features to add to several layers
        made = layers[0][1] if layers else seen.last_hidden_state
    pieces = made if isinstance(made, list | tuple) else [made]
    count = sum(piece.numel() // piece.shape[-1] for piece in pieces)
    stated = [value for key, value in config.to_dict().items() if "token" in key]
    special = {t for value in stated for t in (value if isinstance(value, list) else [value])}
    usable = [i for i in range(config.get_text_config().vocab_size) if i not in special]
    drawn = torch.randint(len(usable), (_BEFORE + _AFTER,), generator=generator).tolist()
    words, picture = [usable[i] for i in drawn], [config.image_token_id] * count
    ids = torch.tensor([[*words[:_BEFORE], *picture, *words[_BEFORE:]]])
    kinds = known & {"token_type_ids", "mm_token_type_ids"}
    inputs |= dict.fromkeys(kinds, (ids == config.image_token_id).long())
    return {"input_ids": ids, **inputs}


def _vision(config: Any) -> Any:  # noqa: ANN401 - transformers is untyped
    return getattr(config, "vision_config", config)


def _picture(known: Collection[str], config: Any) -> _Form:  # noqa: ANN401
    """Return the shape of a picture and its other inputs, for a model with the inputs `known`."""
    vision = _vision(config)
    side = _SIDE * getattr(vision, "pooling_kernel_size", getattr(vision, "spatial_merge_size", 2))
    count, grid = side**2, torch.tensor([[side, side]])
    patch = _side(getattr(vision, "model_patch_size", getattr(vision, "patch_size", 0)))
    frames = getattr(vision, "temporal_patch_size", getattr(vision, "patch_temporal", 1))
    flat: tuple[int, ...] = (count, _CHANNELS * frames * patch**2)
    if vision.model_type == "paddleocr_vl_vision":
        flat = (count, _CHANNELS, patch, patch)
    grids = {"image_grid_thw": torch.tensor([[1, side, side]])}
    mask = {"pixel_attention_mask": torch.ones(1, count, dtype=torch.long)}
    places = torch.cartesian_prod(*[torch.arange(side)] * 2)[None]
    forms: Mapping[str, _Form] = {
        "image_position_ids": ((1, *flat), {"image_position_ids": places}),
        "spatial_shapes": ((1, *flat), {"spatial_shapes": grid, **mask}),
        "target_sizes": ((1, _CHANNELS, patch, count * patch), {"target_sizes": grid}),
        "image_merge_sizes": (flat, {**grids, "image_merge_sizes": torch.tensor([2])}),
        "image_grid_thw": (flat, grids),
    }
    embedded: _Form | None = ((1, *flat), {}) if vision is config else None  # without a tower
    patches = next((form for name, form in forms.items() if name in known), embedded)
    if patches is not None:
        return patches
    tokens = getattr(config, "vision_soft_tokens_per_image", 0)  # gemma3n's, from any picture
    stated = getattr(vision, "image_size", None) or getattr(vision, "resolution", None)
    stated = stated or (vision.model_args or {}).get("img_size", _ANY_SIZE)
    size = 32 * math.isqrt(tokens) or _side(stated)
    shape: tuple[int, ...] = (1, _CHANNELS, size, size)
    others: dict[str, torch.Tensor] = {}
    if tiled := getattr(config, "image_grid_pinpoints", None):
        height, width = min(tiled, key=math.prod)
        tiles = 1 + -(-height // size) * -(-width // size)  # the first shows the whole picture
        shape, others = (1, tiles, *shape[1:]), {"image_sizes": torch.tensor([[height, width]])}
    elif "tile_fine_mask" in known:
        shape, others = (1, *shape), {"pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}
    elif "pixel_attention_mask" in known or config.model_type == "perception_lm":
        shape = (1, *shape)
    elif high := getattr(config, "high_res_vision_config", None):
        larger = torch.ones(1, _CHANNELS, high.image_size, high.image_size)
        others = {"high_res_pixel_values": larger}
    elif vision.model_type == "pixtral":  # it takes several sizes: use a small one
        size = _SIDE * patch * getattr(config, "spatial_merge_size", 1)
        shape, others = (1, _CHANNELS, size, size), {"image_sizes": torch.tensor([[size, size]])}
    elif "image_sizes" in known and not hasattr(vision, "image_size"):
        others = {"image_sizes": torch.tensor([[size, size]])}
    return shape, others


def _side(value: int | Sequence[int]) -> int:
    return value if isinstance(value, int) else value[0]
