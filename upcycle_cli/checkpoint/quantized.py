"""FP8 checkpoints: which scale belongs to which weight, so that weights are computed when read.

What does not fit is an error: an FP8 weight without its scale looks like any other, and is noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from upcycle_cli.checkpoint.header import TORCH_DTYPES, TensorEntry
from upcycle_cli.checkpoint.made import FP8_DTYPES, Dequantize, Made, Source, stored_parts
from upcycle_cli.core.errors import UpcycleError, shown

_KEY = "quantization_config"
_FORMATS: Mapping[str, tuple[str, tuple[object, ...]]] = {
    "fp8": ("expert_dtype", (None, "fp8")),
    "fbgemm_fp8": ("quant_method", ("fbgemm_fp8",)),
    "compressed-tensors": ("format", ("float-quantized", "naive-quantized")),
    "modelopt": ("quant_algo", ("FP8",)),
}
"""Methods whose FP8 weights are the stored values times a scale, if a setting has such a value."""
_OTHER = "Use the bf16 or fp16 release of the model, and quantise the result."
_HINTS: Mapping[str, str] = {
    **dict.fromkeys(
        ("gptq", "awq", "compressed-tensors", "modelopt", "bitsandbytes"),
        f"{_OTHER} Or write it in bfloat16: pip install gptqmodel && python -c "
        "\"from gptqmodel.utils.model_dequant import dequantize_model as d; d('MODEL', 'NEW')\"",
    ),
    "mxfp4": "MXFP4 experts (gpt_oss) have two values in a byte, and gate and up take turns: "
    "upcycle cannot read or expand them.",
}
_SCALES = ("_scale_inv", "_scale")
"""Endings of the names of scales, after the name of the weight."""
_UNNEEDED = (
    *(f".{of}_scale" for of in ("input", "output", "activation", "q", "k", "v", "kv")),
    *(f"proj_{of}_scale" for of in ("input", "output", "activation")),
    ".input_scale_ub",
)
_WHY = "scales of activations or of a cache, which are not quantised any more"
"""Endings of the names of scales of activations and caches, and why they are left out."""


def dequantized(
    config: Mapping[str, Any], stored: Mapping[str, TensorEntry]
) -> tuple[dict[str, Any], dict[str, Made], dict[str, str]]:
    """Return the config without its quantisation, the weights to compute, and unneeded scales.

    Raises UpcycleError for other quantisations, and where scales are missing or do not fit.
    """
    settings = config.get(_KEY)
    weights = [entry for entry in stored.values() if entry.dtype in FP8_DTYPES]
    if settings is None and not weights:
        return dict(config), {}, {}
    if settings is None:
        raise _misfit(f"{weights[0].name} is stored as {weights[0].dtype}, without a {_KEY}.")
    _check_method(settings if isinstance(settings, dict) else {})
    if not weights:
        raise _misfit(f"the weights are quantised ({_KEY} in config.json), but none is FP8.")
    block = _block(settings)
    dtype = "F16" if "float16" in (config.get("dtype"), config.get("torch_dtype")) else "BF16"
    made: dict[str, Made] = {}
    for entry in weights:
        names = [entry.name + end for end in _SCALES]
        scale = next((stored[name] for name in names if name in stored), None)
        if scale is None or len(entry.shape) < 2:
            raise _misfit(f"{entry.name} is FP8, but it is no matrix or {names[0]} is missing.")
        made[entry.name] = _scaled(entry, scale, block, dtype)
    used = {part.name for each in made.values() for part in stored_parts(each)}
    left_out = dict.fromkeys((name for name in stored if name.endswith(_UNNEEDED)), _WHY)
    for name in stored.keys() - used - left_out.keys():
        owner = name.removesuffix(_SCALES[0]).removesuffix(_SCALES[1])
        if owner != name and (owner in stored or owner.endswith(".weight")):
            raise _misfit(f"{name} is the scale of no FP8 weight.")
    return {key: value for key, value in config.items() if key != _KEY}, made, left_out


def _check_method(settings: Mapping[str, Any]) -> None:
    """Raise UpcycleError unless weights are values times scales."""
    method = str(settings.get("quant_method") or _KEY)
    key, values = _FORMATS.get(method, ("", ()))
    if settings.get(key) in values and not settings.get("transform_config"):
        return
    words = f"the weights are quantised ({method} in config.json)."
    raise UpcycleError(words, _HINTS.get(method, _OTHER))


def _block(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns of a block; None for a scale per tensor or per channel."""
    sizes = set[tuple[int, int]]()
    groups = settings.get("config_groups")
    found = [settings.get("weight_block_size")]
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            size = weights.get("group_size")
            found += [weights.get("block_structure"), [1, size] if size else None]
    for block in found:
        match block:
            case None | [1, -1]:
                pass
            case [int(rows), int(columns)] if rows > 0 and columns > 0:
                sizes.add((rows, columns))
            case _:
                words = f"weight_block_size is {shown(block)}, not two sizes"
                raise UpcycleError(f"config.json: {words}.", _OTHER)
    if len(sizes) > 1:
        raise UpcycleError(f"config.json: {_KEY} has blocks of several sizes.", _OTHER)
    return next(iter(sizes), None)


def _scaled(
    weight: TensorEntry, scale: TensorEntry, block: tuple[int, int] | None, dtype: str
) -> Dequantize:
    *stack, height, width = (max(1, size) for size in weight.shape)
    for rows, columns in [block] if block else [(height, width), (1, width)]:
        grid = (*stack, -(-height // rows), -(-width // columns))
        # Ones at the end of the shape may be left out.
        if scale.shape == grid[: len(scale.shape)] and scale.num_elements == math.prod(grid):
            break
    else:
        words = f"{scale.name} has shape {[*scale.shape]}, but {weight.name} needs {[*grid]}"
        raise _misfit(f"{words}{f' in blocks of {[*block]}' if block else ' or one value'}.")
    if scale.dtype not in (*TORCH_DTYPES, "F8_E8M0", "U8"):
        raise _misfit(f"{scale.name} is stored as {scale.dtype}.")
    held = Source(weight.name, weight.dtype, weight.shape)
    return Dequantize(held, Source(scale.name, scale.dtype, grid), (rows, columns), dtype)


def _misfit(words: str) -> UpcycleError:
    return UpcycleError(words, "Download or copy the checkpoint again.")
