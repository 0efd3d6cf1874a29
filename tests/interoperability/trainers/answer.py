"""What the scripts of trainers have in common; runs in the environment of each.

A job has a model and a batch: rows of token ids of one length. The answer has the loss of the
trainer's first step, the names of the tensors that did not come back as they went in, and whatever
else was measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parents[1]))

from worker import answer_all

SAVED = "saved"
"""The directory beside a model, of what a trainer made of it by a step of no size."""
Rows = list[list[int]]
Measure = Callable[[Path, Rows], tuple[float, list[str], dict[str, Any]]]
"""From a model and a batch to the first loss, the tensors that changed, and other measurements."""


def serve(measure: Measure) -> None:
    """Answer the jobs on stdin."""

    def run(job: dict[str, Any]) -> Any:
        loss, wrong, measured = measure(Path(job["model"]), job["rows"])
        return {"loss": loss, "wrong": wrong, "measured": measured}

    answer_all(run)


def load(folder: Path) -> Any:
    """Return the model in float32, with its vision tower where it has one."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    wraps = "text_config" in config(folder)
    auto = AutoModelForImageTextToText if wraps else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)


def no_picture(model: Any, length: int) -> dict[str, list[int]]:
    """Return what a model wants to know of which tokens are pictures: none is."""
    wanted = signature(model.forward).parameters
    return {key: [0] * length for key in ("token_type_ids", "mm_token_type_ids") if key in wanted}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint by its name."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def config(folder: Path) -> dict[str, Any]:
    """Return what config.json says."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def rope_of(folder: Path, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Return how rotary embeddings are scaled, with "rope_type"; SystemExit for another kind."""
    settings = config(folder)
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    found = {"rope_type": "default", "rope_theta": settings.get("rope_theta"), **rope}
    if found["rope_type"] not in ("default", *kinds):
        raise SystemExit(f"Error: it has no {found['rope_type']} rope scaling")
    return found


def changed(folder: Path, found: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors of a checkpoint that are missing, surplus or another tensor."""
    held = tensors(folder)
    both = held.keys() & found.keys()
    wrong = {name for name in both if not is_same(found[name], held[name])}
    return sorted(wrong | (held.keys() ^ found.keys()))


def is_same(mine: torch.Tensor, its: torch.Tensor) -> bool:
    """Whether a tensor came back; stacks of matrices may be turned, as they are in memory."""
    # What was read into float32 gives back every narrower number.
    ways = [mine] if mine.ndim < 3 else [mine, mine.mT]
    return any(torch.equal(each.to(its.dtype), its) for each in ways)


def saved_otherwise(folder: Path, model: Any) -> list[str]:
    """Return the tensors of a checkpoint that `model` does not save again, beside it."""
    saved = folder.with_name(SAVED)
    model.save_pretrained(saved)
    return changed(folder, tensors(saved))


def one_step(scratch: Path, rows: Rows, parts: int = 1) -> dict[str, Any]:
    """Return the arguments of transformers' Trainer for a step of no size, in so many parts."""
    return {
        "output_dir": str(scratch / "output"),
        "max_steps": 1,
        "logging_steps": 1,
        "per_device_train_batch_size": len(rows) // parts,
        "gradient_accumulation_steps": parts,
        "learning_rate": 0.0,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }


def first_loss(trainer: Any) -> float:
    """Train, and return the loss that the Trainer says of its first step."""
    trainer.train()
    return float(trainer.state.log_history[0]["loss"])


def next_token_loss(logits_BTV: torch.Tensor, rows: list[list[int]]) -> float:
    """Return the mean cross entropy of each row's tokens but the first."""
    ids_BT = torch.tensor(rows)
    flat = logits_BTV[:, :-1].float().reshape(-1, logits_BTV.shape[-1])
    return float(torch.nn.functional.cross_entropy(flat, ids_BT[:, 1:].reshape(-1)))
