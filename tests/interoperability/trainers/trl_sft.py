"""A step of TRL's SFTTrainer, and what it saves."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from answer import Rows, first_loss, load, no_picture, one_step, saved_otherwise, serve
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer


def measure(folder: Path, rows: Rows) -> tuple[float, list[str], dict[str, Any]]:
    """Return the first loss, what is saved after a step of no size, and what balancing adds."""
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="upcycle-trainer-") as name:
        scratch = Path(name)
        model, loss = step(folder, rows, scratch, router_aux_loss_coef=0.0)
        wrong = saved_otherwise(folder, model)
        keys: dict[str, int] | None = {}
        try:
            step(folder, rows, scratch)
        except (AttributeError, TypeError) as error:
            measured["stops with"] = str(error)
            # Around a text model there may be no place for what its routers say.
            known = isinstance(error, AttributeError)
            keys = {"num_experts": model.config.num_local_experts} if known else None
        ways = {} if keys is None else {"as written": 1, "as written, in 4 parts": 4}
        measured["added"] = {
            way: step(folder, rows, scratch, parts=parts, keys=keys)[1] - loss
            for way, parts in ways.items()
        }
    return loss, wrong, measured


def step(
    folder: Path,
    rows: Rows,
    scratch: Path,
    *,
    parts: int = 1,
    keys: Mapping[str, int] | None = None,
    **settings: float,
) -> tuple[Any, float]:
    """Return a model after a step of no size on a batch in so many parts, and the loss it had."""
    arguments = {**one_step(scratch, rows, parts), "bf16": False, "gradient_checkpointing": False}
    model = load(folder)
    for key, value in (keys or {}).items():
        setattr(model.config, key, value)
    kinds = {key: [row] * len(rows) for key, row in no_picture(model, len(rows[0])).items()}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**arguments, **settings),
        train_dataset=Dataset.from_dict({"input_ids": rows, **kinds}),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>")),
            pad_token="<pad>",
            eos_token="<pad>",
        ),
    )
    return model, first_loss(trainer)


if __name__ == "__main__":
    serve(measure)
