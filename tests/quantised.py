"""FP8 copies of a checkpoint, as several programs write them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import clone, read_json, read_tensors, write_json
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
FP8 = torch.float8_e4m3fn
_LINEAR = re.compile(r"(?!.*vision).*layers\.\d+\.(?!.*norm)(?!.*gate\.weight).*\.weight")
ACTIVATIONS = {"transformers": "activation_scale", "vllm": "input_scale"}


def save_fp8(
    source: Path,
    target: Path,
    scheme: tuple[int, int] | str = (16, 16),
    writer: str = "transformers",
    edit: Callable[[Tensors, dict[str, Any]], object] = lambda *_: None,
) -> Path:
    """Write a checkpoint with its linear layers in FP8, and return `target`.

    A scheme is a block, "tensor" or "channel"; `edit` changes the tensors and the config.
    """
    clone(source, target)
    tensors = read_tensors(source)
    for name in filter(_LINEAR.fullmatch, [*tensors]):
        height, width = tensors[name].shape
        whole = {"tensor": (height, width), "channel": (1, width)}
        rows, columns = whole[scheme] if isinstance(scheme, str) else scheme
        grid = -(-height // rows), -(-width // columns)
        padded = torch.zeros(grid[0] * rows, grid[1] * columns)
        padded[:height, :width] = tensors[name]
        blocks = padded.reshape(grid[0], rows, grid[1], columns)
        scale = blocks.abs().amax((1, 3)) / 448
        values = (blocks / scale[:, None, :, None]).reshape(padded.shape)[:height, :width]
        tensors[name] = values.to(FP8).contiguous()
        ending = "_scale_inv" if writer == "transformers" else "_scale"
        tensors[name + ending] = scale.reshape(()) if scheme == "tensor" else scale
        if writer in ACTIVATIONS and scheme == "tensor":
            tensors[name.removesuffix("weight") + ACTIVATIONS[writer]] = torch.ones(())
    config = read_json(target / "config.json")
    config["quantization_config"] = _settings(scheme, writer)
    edit(tensors, config)
    for path in target.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    write_json(target / "config.json", config)
    return target


def _settings(scheme: tuple[int, int] | str, writer: str) -> dict[str, Any]:
    block = None if isinstance(scheme, str) else [*scheme]
    if writer != "compressed-tensors":
        activations = "static" if scheme == "tensor" else "dynamic"
        held = {"quant_method": "fp8", "activation_scheme": activations}
        return {**held, "weight_block_size": block}
    weights = {"num_bits": 8, "type": "float", "strategy": "block" if block else scheme}
    weights |= {"symmetric": True, "dynamic": False, "block_structure": block}
    return {
        "quant_method": writer,
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
