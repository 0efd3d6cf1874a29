"""A step of transformers' own Trainer, and what it saves."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from answer import Rows, first_loss, load, no_picture, one_step, saved_otherwise, serve
from transformers import Trainer, TrainingArguments


def measure(folder: Path, rows: Rows) -> tuple[float, list[str], dict[str, Any]]:
    """Say the first loss, what is saved after a step of no size, and what balancing adds."""
    model = load(folder)
    with tempfile.TemporaryDirectory(prefix="upcycle-trainer-") as name:
        scratch = Path(name)
        losses = {"as written": step(model, rows, scratch)}
        wrong = saved_otherwise(folder, model)
        text = model.config.get_text_config()
        text.output_router_logits, stops = True, {}
        try:
            losses["output_router_logits"] = step(model, rows, scratch)
            losses["output_router_logits, in 4 parts"] = step(model, rows, scratch, parts=4)
        except TypeError as error:  # the model around it has no place for them
            text.output_router_logits, stops = False, {"stops with": str(error)}
        text.router_aux_loss_coef = 0.0  # which most models have read by now
        losses["router_aux_loss_coef = 0 after loading"] = step(model, rows, scratch)
        model.router_aux_loss_coef = 0.0
        loss = step(model, rows, scratch)
        moved = moved_biases(model, rows, scratch)
    added = {key: value - loss for key, value in losses.items()}
    return loss, wrong, {"added": added, "bias moved by": moved, **stops}


def step(model: Any, rows: Rows, scratch: Path, *, parts: int = 1, rate: float = 0.0) -> float:
    """Return the loss of one step, of a batch in so many parts."""
    arguments = TrainingArguments(**{**one_step(scratch, rows, parts), "learning_rate": rate})
    length = len(rows[0])
    rest = {"attention_mask": [1] * length, **no_picture(model, length)}
    data: Any = [{"input_ids": row, "labels": row, **rest} for row in rows]
    return first_loss(Trainer(model=model, args=arguments, train_dataset=data))


def moved_biases(model: Any, rows: Rows, scratch: Path) -> float | None:
    """Return the largest change of a correction bias by a step; None where there is none."""
    biases = {k: v for k, v in model.state_dict().items() if k.endswith("e_score_correction_bias")}
    before = {name: bias.clone() for name, bias in biases.items()}
    if not before:
        return None
    step(model, rows, scratch, rate=1e-3)
    return max(float((biases[name] - before[name]).abs().max()) for name in before)


if __name__ == "__main__":
    serve(measure)
