"""Convert a dense model, and train the MoE with the Trainer of transformers.

    python docs/examples/train.py DENSE TEXT OUT [--recipe E4G2T4] [--steps 20] [--lr 2e-5]

TEXT is a file to train on. The converted model goes to OUT/moe, the trained one to OUT/trained.
Each step logs the language-model loss and, for each layer, the coefficient of variation of its
experts' load. At the end the script prints what `upcycle inspect OUT/trained --weights --dense
DENSE` prints: how far the experts have moved, and whether the virtual groups are whole.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from upcycle_cli import convert, inspect, tie_virtual_groups

LENGTH = 128


def main() -> None:
    """Convert, train, save, and inspect the result."""
    arguments = _arguments()
    moe = arguments.out / "moe"
    convert(arguments.dense, moe, arguments.recipe)

    tokenizer = AutoTokenizer.from_pretrained(moe)
    rows = _rows(tokenizer, arguments.text.read_text(encoding="utf-8"))
    # In float32: with weights in bfloat16 alone, small updates are rounded away.
    model = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32, trust_remote_code=True)
    # Otherwise transformers applies no load-balancing loss. config.router_aux_loss_coef weighs it.
    model.config.output_router_logits = True
    tie_virtual_groups(model)  # so that each group keeps computing one whole MLP
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
    print(f"first loss {trainer.first_loss:.5f}, dense model {wanted:.5f}")
    print(inspect(trained, weights=True, dense=arguments.dense).summary())


class LoggedTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that logs the loss without the balancing loss, and the load of the experts."""

    first_loss = float("nan")
    first_batch: dict[str, torch.Tensor]

    def compute_loss(
        self,
        model: Any,  # noqa: ANN401 - transformers has no types
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 - as transformers calls it
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Compute the loss as usual, and log its parts."""
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
    """Return the coefficient of variation of the number of tokens per expert."""
    load_N = logits_TN.topk(top_k, dim=-1).indices.flatten().bincount(minlength=logits_TN.shape[-1])
    return float(load_N.double().std(correction=0) / load_N.double().mean())


def _rows(tokenizer: Any, text: str) -> list[dict[str, torch.Tensor]]:  # noqa: ANN401
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    whole = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    if not len(whole):
        raise SystemExit(f"the text has {len(ids)} tokens; a training row needs {LENGTH}")
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
        help="peak learning rate of the cosine schedule. The paper uses the peak of the dense "
        "model's pretraining, with batches of millions of tokens. %(default)s is smaller because a "
        "batch here has 256 tokens",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
