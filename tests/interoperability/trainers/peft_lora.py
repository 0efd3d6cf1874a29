"""LoRA by peft on MODEL.

Says which parts of the model each way to choose them reaches, and whether those learn.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from answer import Rows, load, no_picture, saved_otherwise, serve
from peft import LoraConfig, get_peft_model

RANK = 4
MLP = ["gate_proj", "up_proj", "down_proj"]


def measure(folder: Path, rows: Rows) -> tuple[float, list[str], dict[str, Any]]:
    """Say the loss with adapters on the experts, and what is left when they are taken off."""
    names = [name for name, parameter in load(folder).named_parameters() if parameter.ndim == 3]
    stacked = sorted({inner_name(name) for name in names if "expert" in name})
    ways: dict[str, dict[str, Any]] = {
        "all-linear": {"target_modules": "all-linear"},
        "gate_proj, up_proj, down_proj": {"target_modules": MLP},
        "target_parameters": {"target_modules": [], "target_parameters": stacked},
    }
    reached: dict[str, dict[str, list[int]]] = {}
    for name, way in ways.items():
        base = load(folder)
        # Shipped code applies its balancing loss in training.
        base.config.get_text_config().router_aux_loss_coef = 0.0
        try:
            model = get_peft_model(base, LoraConfig(r=RANK, **way))
        except ValueError as error:  # no such module, or one that it cannot adapt
            print(f"{name}: {error}", file=sys.stderr)
            reached[name] = {}
            continue
        loss, reached[name] = learns(model, rows)
    state = model.unload()
    return loss, saved_otherwise(folder, state), {"reached": reached}


def inner_name(name: str) -> str:
    """Return a parameter's name within its layer."""
    return re.sub(r".*\.layers\.\d+\.", "", name)


def learns(model: Any, rows: Rows) -> tuple[float, dict[str, list[int]]]:
    """Return the loss, and by parts of the model how many adapters it has and how many learn."""
    ids_BT = torch.tensor(rows)
    kinds = no_picture(model.get_base_model(), ids_BT.shape[1])
    known = {key: torch.tensor([zeros] * len(rows)) for key, zeros in kinds.items()}
    loss = model.train()(input_ids=ids_BT, labels=ids_BT, output_router_logits=False, **known).loss
    if loss.requires_grad:  # or all adapters are on what sees pictures
        loss.backward()
    all_of, moved = Counter[str](), Counter[str]()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            part = part_of(name)
            all_of[part] += 1
            moved[part] += bool(parameter.grad is not None and parameter.grad.abs().max() > 0)
    return float(loss), {part: [all_of[part], moved[part]] for part in sorted(all_of)}


def part_of(name: str) -> str:
    """Return which part of a layer an adapter is on."""
    for word, part in (("shared", "shared expert"), ("expert", "experts"), ("attn", "attention")):
        if word in name:
            return part
    return "router" if re.search(r"\.(gate|router)\b", name) else "others"


if __name__ == "__main__":
    serve(measure)
