"""FP8 checkpoints: which scale belongs to which weight, so that weights are computed when read.

The config says how weights are quantised, the names and shapes of the tensors say where the scales
are. What does not fit is an error: a weight without its scale would be read as noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle_cli.checkpoint.header import TORCH_DTYPES, TensorEntry
from upcycle_cli.checkpoint.made import FP8_DTYPES, Dequantize, Made, Source
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.text import any_of

_KEY = "quantization_config"
_METHODS = ("fp8", "compressed-tensors", "fbgemm_fp8", "modelopt")
"""Methods whose FP8 weights are the stored values times a scale."""
_SCALES = ("_scale_inv", "_scale")
"""Endings of the names of scales, after the name of the weight."""
_SCALE_DTYPES = (*TORCH_DTYPES, "F8_E8M0", "U8")
_UNNEEDED = ("input_scale", "activation_scale", "k_scale", "v_scale", "q_scale", "output_scale")
"""Endings of the names of scales of what is no weight."""


def dequantized(
    config: Mapping[str, Any], stored: Mapping[str, TensorEntry]
) -> tuple[dict[str, Any], dict[str, Made], dict[str, str]]:
    """Return the config without its quantisation, the weights to compute, and unneeded scales.

    Raises UpcycleError for other quantisations, and where scales are missing or do not fit.
    """
    settings = config.get(_KEY)
    weights = [entry for entry in stored.values() if entry.dtype in FP8_DTYPES]
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method not in _METHODS or not isinstance(settings, dict):
        return dict(config), {}, {}
    if not weights:
        words = f"the weights are quantised ({method} in config.json), but no tensor is FP8."
        raise UpcycleError(words, "Download or copy the checkpoint again.")
    block, dtype = _block(settings), _dtype(config)
    made: dict[str, Made] = {}
    for entry in weights:
        scale = next((stored[entry.name + e] for e in _SCALES if entry.name + e in stored), None)
        if scale is None:
            raise UpcycleError(
                f"{entry.name} is FP8, and {entry.name}{_SCALES[0]} is missing.",
                "Download or copy the checkpoint again.",
            )
        made[entry.name] = _scaled(entry, scale, block, dtype)
    why = "scales of FP8 activations or of an FP8 cache"
    left_out = {name: why for name in stored if name.endswith(_UNNEEDED)}
    return {key: value for key, value in config.items() if key != _KEY}, made, left_out


def _block(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns of a block; None for a scale per tensor or per channel."""
    match settings.get("weight_block_size"):
        case None:
            return None
        case [int(rows), int(columns)] if min(rows, columns) > 0:
            return rows, columns
        case found:
            words = f"{_KEY} in config.json has weight_block_size {shown(found)}"
            raise UpcycleError(f"{words}, not two sizes.", "Download the config again.")


def _dtype(config: Mapping[str, Any]) -> str:
    """Return the dtype that weights are rounded to: the config's, or else bfloat16."""
    named = config.get("dtype") or config.get("torch_dtype")
    return {"float16": "F16"}.get(str(named), "BF16")


def _scaled(
    weight: TensorEntry, scale: TensorEntry, block: tuple[int, int] | None, dtype: str
) -> Dequantize:
    *stack, height, width = weight.shape if len(weight.shape) > 1 else (0, 0)
    sizes = ((height, width), (1, width)) if block is None else (block,)
    wanted = {
        (*stack, -(-height // rows), -(-width // columns)): (rows, columns)
        for rows, columns in sizes
        if height and width
    }
    # A scale per tensor or per channel may lack the dimensions of one entry at the end.
    for shape, found in wanted.items():
        if _trimmed(shape) == _trimmed(scale.shape) and scale.dtype in _SCALE_DTYPES:
            held = Source(weight.name, weight.dtype, weight.shape)
            return Dequantize(held, Source(scale.name, scale.dtype, shape), found, dtype)
    needs = any_of([[*shape] for shape in wanted]) if wanted else "a matrix"
    words = f"{scale.name} is {scale.dtype} of shape {[*scale.shape]}, but {weight.name} needs"
    raise UpcycleError(f"{words} {needs}.", "Download or copy the checkpoint again.")


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape
