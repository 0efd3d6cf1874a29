"""Convert a dense model, and train the MoE with the Trainer of transformers.

    python docs/examples/train.py DENSE TEXT OUT [--recipe E4G2T4] [--steps 20] [--lr 2e-5]

Before training, the script compares the first loss with the dense model's, and stops if they
differ. While training it prints the language-model loss, the weighted balancing loss, and how much
the experts' load varies: the coefficient of variation, on average and in the worst layer. At the
end it prints what `upcycle inspect OUT/trained --weights --dense DENSE` prints: how far the experts
have moved, and whether the virtual groups are whole.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM as AutoModel
from transformers import AutoTokenizer, PrinterCallback, Trainer, TrainingArguments

from upcycle_cli import UpcycleError, convert, inspect, tie_virtual_groups

LENGTH = 128


def main() -> None:
    """Convert, compare the first loss, train, save, and inspect the result."""
    arguments = _arguments()
    moe, trained = arguments.out / "moe", arguments.out / "trained"
    if find_spec("accelerate") is None:
        raise SystemExit("The Trainer of transformers needs accelerate: pip install accelerate")
    if not arguments.text.is_file():
        raise SystemExit(f"{arguments.text} is not a file. TEXT is the text to train on.")
    try:
        inspect(arguments.dense, arguments.recipe)  # finds errors without writing anything
        tokenizer = AutoTokenizer.from_pretrained(arguments.dense)
        rows = _rows(tokenizer, arguments.text.read_text(encoding="utf-8"))
        convert(arguments.dense, moe, arguments.recipe)
    except UpcycleError as error:
        other = f"{moe.name} exists" in error.message  # converted by another recipe
        hint = f"Remove {moe}, or choose another OUT." if other else error.hint
        raise SystemExit(f"{error.message} {hint or ''}") from None

    wanted = _loss(AutoModel.from_pretrained(arguments.dense, dtype=torch.float32), rows)
    # In float32: with weights in bfloat16 alone, small updates are rounded away.
    model = AutoModel.from_pretrained(moe, dtype=torch.float32, trust_remote_code=True)
    first = _loss(model, rows)
    print(f"first loss {first:.5f}, dense model {wanted:.5f}", flush=True)
    # Rounding in float32 makes less than 0.0001.
    if not abs(first - wanted) < 0.001:
        raise SystemExit(f"The MoE computes something else. Try `upcycle verify DENSE {moe}`.")

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
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=rows,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.save_pretrained(trained)  # trainer.save_model would add training_args.bin, a pickle
    tokenizer.save_pretrained(trained)
    print(inspect(trained, weights=True, dense=arguments.dense).summary())


class LoggedTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that prints the two parts of the loss, and the load of the experts."""

    def compute_loss(
        self,
        model: Any,  # noqa: ANN401 - transformers has no types
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 - as transformers calls it
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Compute the loss as usual, and print its parts every few steps."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        step, steps = self.state.global_step + 1, self.state.max_steps
        if step == 1 or step % max(1, steps // 10) == 0:
            config = self.model.config
            auxiliary = getattr(outputs, "aux_loss", None)
            coefficient = getattr(config, "router_aux_loss_coef", 0.0)
            balancing = 0.0 if auxiliary is None else coefficient * float(auxiliary.detach())
            language = float(loss.detach()) - balancing
            line = f"step {step}/{steps}  loss {language:.2f}  balancing {balancing:.2f}"
            logits = getattr(outputs, "router_logits", None) or ()
            if loads := [_variation(each, config.num_experts_per_tok) for each in logits]:
                line += f"  load varies by {sum(loads) / len(loads):.2f}"
                line += f", at most {max(loads):.2f} (layer {loads.index(max(loads))})"
            print(line, flush=True)
        return (loss, outputs) if return_outputs else loss


def _loss(model: Any, rows: list[dict[str, torch.Tensor]]) -> float:  # noqa: ANN401
    """Return the language-model loss of the first rows, without a balancing loss."""
    ids = torch.stack([row["input_ids"] for row in rows[:2]])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def _variation(logits_TN: torch.Tensor, top_k: int) -> float:
    """Return the coefficient of variation of the number of tokens per expert."""
    load_N = logits_TN.topk(top_k, dim=-1).indices.flatten().bincount(minlength=logits_TN.shape[-1])
    return float(load_N.double().std(correction=0) / load_N.double().mean())


def _rows(tokenizer: Any, text: str) -> list[dict[str, torch.Tensor]]:  # noqa: ANN401
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    whole = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    if not len(whole):
        raise SystemExit(f"TEXT has {len(ids)} tokens. Take a text of {LENGTH} or more.")
    return [{"input_ids": row, "labels": row} for row in whole]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("dense", help="dense model: a directory, or ORG/NAME on the Hub")
    parser.add_argument("text", type=Path, help="text file to train on")
    parser.add_argument("out", type=Path, help="writes OUT/moe (converted) and OUT/trained")
    parser.add_argument("--recipe", default="E4G2T4", help="experts to make")
    parser.add_argument("--steps", type=int, default=20, help="steps of 2 rows of 128 tokens")
    # The paper uses the peak of the dense model's pretraining, with millions of tokens per batch.
    parser.add_argument("--lr", type=float, default=2e-5, help="peak rate of the cosine schedule")
    return parser.parse_args()


if __name__ == "__main__":
    main()
