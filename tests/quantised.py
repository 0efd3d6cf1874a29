"""FP8 copies of a checkpoint, as they are released."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from conftest import clone, read_json, read_tensors, write_json
from safetensors.torch import save_file

FP8 = torch.float8_e4m3fn
_LINEAR = re.compile(r"model\.layers\.\d+\.(?!.*norm)(?!.*gate\.weight).*\.weight")


def save_fp8(source: Path, target: Path, scheme: Any, **settings: Any) -> Path:  # noqa: ANN401
    """Write a checkpoint with its linear layers in FP8; a scheme is a block, "tensor" or "channel".

    A block of 128 x 128 and its like is what transformers writes, the others what vLLM's are.
    """
    clone(source, target)
    tensors = read_tensors(source)
    for name in [name for name in tensors if _LINEAR.fullmatch(name)]:
        weight = tensors[name].float()
        height, width = weight.shape
        rows, columns = (
            {"tensor": (height, width), "channel": (1, width)}[scheme]
            if isinstance(scheme, str)
            else scheme
        )
        grid = -(-height // rows), -(-width // columns)
        padded = torch.zeros(grid[0] * rows, grid[1] * columns)
        padded[:height, :width] = weight
        blocks = padded.reshape(grid[0], rows, grid[1], columns)
        scale = blocks.abs().amax((1, 3)) / 448
        values = (blocks / scale[:, None, :, None]).reshape(padded.shape)[:height, :width]
        tensors[name] = values.to(FP8).contiguous()
        by_block = not isinstance(scheme, str)
        ending = "_scale_inv" if by_block else "_scale"
        tensors[name + ending] = scale if scheme != "tensor" else scale.reshape(())
        if not by_block:
            tensors[name.removesuffix("weight") + "input_scale"] = torch.ones(())
    for path in target.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    block = None if isinstance(scheme, str) else [*scheme]
    quantization: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    quantization |= {"weight_block_size": block, **settings}
    config = read_json(target / "config.json")
    write_json(target / "config.json", {**config, "quantization_config": quantization})
    return target
