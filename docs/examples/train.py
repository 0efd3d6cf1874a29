"""Convert a dense model, and go on training it with the Trainer of transformers.

    python docs/examples/train.py DENSE TEXT OUT [--recipe E4G2T4] [--steps 20] [--lr 2e-5]

OUT/moe is what upcycle converts, OUT/trained what the steps on TEXT (a file) make of it. Every step
logs the language-model loss and, for each layer that has a router, the coefficient of variation of
its experts' load. At the end comes what `upcycle inspect OUT/trained --weights --dense DENSE` says:
how far experts have moved, and whether virtual groups are whole.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import rich
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from upcycle_cli import Recipe, convert, inspect
from upcycle_cli.cli.terminal import rows_table
from upcycle_cli.inspection.describe import inspection_rows
from upcycle_cli.recipe.recipe import parse_recipe_name
from upcycle_cli.training import tie_virtual_groups

LENGTH = 128


def main() -> None:
    """Convert, train, save, look at what came of it."""
    arguments = _arguments()
    moe = arguments.out / "moe"
    expansion, granularity, top_k = parse_recipe_name(arguments.recipe)
    convert(arguments.dense, moe, Recipe(expansion=expansion, granularity=granularity, top_k=top_k))

    tokenizer = AutoTokenizer.from_pretrained(moe)
    rows = _rows(tokenizer, arguments.text.read_text(encoding="utf-8"))
    # In float32: with weights in bfloat16 alone, small updates are rounded away.
    model = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32, trust_remote_code=True)
    # Or transformers applies no load-balancing loss; its weight is config.router_aux_loss_coef.
    model.config.output_router_logits = True
    tie_virtual_groups(model)  # a group's experts hold one MLP between them
    trainer = LoggedTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.out / "checkpoints"),
            max_steps=arguments.steps,
            per_device_train_batch_size=2,
            learning_rate=arguments.lr,
            lr_scheduler_type="cosine",
            optim="adamw_torch",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    trained = arguments.out / "trained"
    trainer.save_model(str(trained))
    dense = AutoModelForCausalLM.from_pretrained(arguments.dense, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = float(dense(**trainer.first_batch).loss)
    print(f"first loss {trainer.first_loss:.5f}, of the dense model {wanted:.5f}")
    found = inspect(trained, weights=True, dense=arguments.dense)
    rich.print(rows_table(inspection_rows(found)))


class LoggedTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that logs the language-model loss by itself, and the load of experts."""

    first_loss = float("nan")
    first_batch: dict[str, torch.Tensor]

    def compute_loss(
        self,
        model: Any,  # noqa: ANN401 - transformers has no types
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 - as transformers calls it
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Return the loss as it is, after a look at what it is made of."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        config = self.model.config
        coefficient = getattr(config, "router_aux_loss_coef", 0.0)
        balancing = getattr(outputs, "aux_loss", None)
        language = float(loss.detach()) - coefficient * (
            0.0 if balancing is None else float(balancing.detach())
        )
        if self.state.global_step == 0:
            self.first_loss = language
            self.first_batch = {key: inputs[key].cpu() for key in ("input_ids", "labels")}
        logged = {"language_model_loss": round(language, 5)}
        for layer, logits_TN in enumerate(getattr(outputs, "router_logits", None) or ()):
            spread = _spread(logits_TN, config.num_experts_per_tok)
            logged[f"load_cv/{layer}"] = round(spread, 3)
        self.log(logged)
        return (loss, outputs) if return_outputs else loss


def _spread(logits_TN: torch.Tensor, top_k: int) -> float:
    """Return the standard deviation over the mean of how many tokens experts get."""
    load_N = logits_TN.topk(top_k, dim=-1).indices.flatten().bincount(minlength=logits_TN.shape[-1])
    return float(load_N.double().std(correction=0) / load_N.double().mean())


def _rows(tokenizer: Any, text: str) -> list[dict[str, torch.Tensor]]:  # noqa: ANN401
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    whole = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    if not len(whole):
        raise SystemExit(f"the text has {len(ids)} tokens, and a row of it {LENGTH}")
    return [{"input_ids": row, "labels": row} for row in whole]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", default="E4G2T4")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--lr",
        type=float,
        default=2e-5,
        help="peak of the cosine. The paper resets it to the peak of DENSE's pretraining, which no "
        "checkpoint says and which is meant for batches of millions of tokens; give it for such a "
        "run. %(default)s is small since a batch here has 256 tokens",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
