"""A picture and text: do both models predict the same where a text model is inside of another?

The picture is drawn at random, as a processor would hand it over, and as small as the vision tower
takes it; the model itself says how many tokens it makes of it. What comes before and after is
random tokens.

Legend: K positions that are compared, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch

from upcycle_cli.checkpoint.checkpoint import Reader
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.old_verification.facts import Facts
from upcycle_cli.old_verification.running import dense_model, moe_model, rounds
from upcycle_cli.run.models import Model, TransformersError, transformers_says

_BEFORE, _AFTER = 4, 12
"""Tokens of text; those after the picture are compared, and the last of the picture."""
_SIDE = 2
"""Of a picture of any size, how many of its merged patches make up a side."""
_CHANNELS = 3
"""Of pictures where no config says it."""


def picture_metrics(facts: Facts, dense: Reader, moe: Reader) -> dict[str, Any]:
    """Return how far the predictions for a picture and text are apart: KL(dense ‖ MoE) in nats.

    The dense model's weights are rounded as the MoE's are. Nothing for a model that takes text
    alone. Raises UpcycleError when the dense model cannot be run, TransformersError for the MoE.
    """
    if facts.family.inside is None:
        return {}
    published = dense_model(facts, dense, rounded=rounds(facts))
    if published.config.vision_config is None:
        return {}
    try:
        with transformers_says(), torch.no_grad():
            inputs = _inputs(published)
            wanted_KV = _logits(published, inputs)
    except TransformersError as error:
        raise UpcycleError(f"transformers cannot run {facts.dense.path}: {error}") from error
    upcycled = moe_model(facts, moe)
    with transformers_says(), torch.no_grad():
        found_KV = _logits(upcycled, inputs)
    p_KV, q_KV = (logits.log_softmax(-1) for logits in (wanted_KV, found_KV))
    return {
        # Rounding can make a sum of nothing negative.
        "kl_mean_picture": max(0.0, float((p_KV.exp() * (p_KV - q_KV)).sum(-1).mean())),
        "max_abs_logit_diff_picture": float((wanted_KV - found_KV).abs().max()),
        "picture_tokens": int((inputs["input_ids"] == published.config.image_token_id).sum()),
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
    """Draw a picture in the form in which the model takes it: patches, or pixels of one size."""
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
    found = {"pixel_values": pixels}
    if "image_sizes" in signature(type(base.vision_tower).forward).parameters:
        # Of a size that the picture may have, and not has to have.
        size = _SIDE * vision.patch_size * getattr(model.config, "spatial_merge_size", 1)
        found["pixel_values"] = pixels[..., :size, :size]
        found["image_sizes"] = torch.tensor([[size, size]])
    return found
