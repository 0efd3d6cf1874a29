"""LoRA adapters for tests: made by peft on a tiny model, and what peft merges of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from conftest import read_json, write_json
from safetensors.torch import load_file, save_file

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MLP = ["gate_proj", "up_proj", "down_proj"]


def make_adapter(
    base: Path,
    path: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    **config: Any,  # noqa: ANN401 - of LoraConfig
) -> Path:
    """Save an adapter with random weights, and what peft makes of it in float32 in PATH/merged."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    wraps = hasattr(AutoConfig.from_pretrained(base), "text_config")
    auto = AutoModelForImageTextToText if wraps else AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = {"target_modules": MLP, "r": 4, "lora_alpha": 8} | config
        model = get_peft_model(
            auto.from_pretrained(base, dtype=torch.float32),
            LoraConfig(init_lora_weights=False, **config),
        )
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data = (0.2 * noise).to(getattr(torch, dtype)).to(parameter.dtype)
        model.save_pretrained(path)
        saved = load_file(path / ADAPTER_WEIGHTS)
        narrow = {name: each.to(getattr(torch, dtype)) for name, each in saved.items()}
        save_file(narrow, path / ADAPTER_WEIGHTS)
        model.merge_and_unload().save_pretrained(path / "merged")
    edit_adapter_config(path, init_lora_weights=True, base_model_name_or_path="base")
    return path


def edit_adapter_config(path: Path, **changes: object) -> None:
    """Change keys of adapter_config.json."""
    write_json(path / ADAPTER_CONFIG, read_json(path / ADAPTER_CONFIG) | changes)
