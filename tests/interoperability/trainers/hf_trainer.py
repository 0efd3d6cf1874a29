"""A step of transformers' own Trainer, and what it saves."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from answer import Rows, load, no_picture, saved_otherwise, serve
from transformers import Trainer, TrainingArguments


def measure(folder: Path, rows: Rows) -> tuple[float, list[str], dict[str, Any]]:
    """Say the first loss, what is saved after a step of no size, and what balancing adds."""
    model = load(folder)
    with tempfile.TemporaryDirectory(prefix="upcycle-trainer-") as name:
        scratch = Path(name)
        losses = {"as written": first_loss(model, rows, scratch)}
        wrong = saved_otherwise(folder, model)
        text = model.config.get_text_config()
        text.output_router_logits, stops = True, {}
        try:
            losses["output_router_logits"] = first_loss(model, rows, scratch)
            losses["output_router_logits, in 4 parts"] = first_loss(model, rows, scratch, parts=4)
        except TypeError as error:  # the model around it has no place for them
            text.output_router_logits, stops = False, {"stops with": str(error)}
        text.router_aux_loss_coef = 0.0  # which most models have read by now
        losses["router_aux_loss_coef = 0 after loading"] = first_loss(model, rows, scratch)
        model.router_aux_loss_coef = 0.0
        loss = first_loss(model, rows, scratch)
        moved = moved_biases(model, rows, scratch)
    added = {key: value - loss for key, value in losses.items()}
    return loss, wrong, {"added": added, "bias moved by": moved, **stops}


def first_loss(
    model: Any, rows: Rows, scratch: Path, *, parts: int = 1, rate: float = 0.0
) -> float:
    """Return the loss that the Trainer says of one step, of a batch in so many parts."""
    arguments = TrainingArguments(
        output_dir=str(scratch / "output"),
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=len(rows) // parts,
        gradient_accumulation_steps=parts,
        learning_rate=rate,
        optim="sgd",
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data: Any = [
        {
            "input_ids": row,
            "labels": row,
            "attention_mask": [1] * len(row),
            **no_picture(model, len(row)),
        }
        for row in rows
    ]
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return float(trainer.state.log_history[0]["loss"])


def moved_biases(model: Any, rows: Rows, scratch: Path) -> float | None:
    """Return the largest change of a correction bias by a step; None where there is none."""
    biases = {k: v for k, v in model.state_dict().items() if k.endswith("e_score_correction_bias")}
    before = {name: bias.clone() for name, bias in biases.items()}
    if not before:
        return None
    first_loss(model, rows, scratch, rate=1e-3)
    return max(float((biases[name] - before[name]).abs().max()) for name in before)


if __name__ == "__main__":
    serve(measure)
