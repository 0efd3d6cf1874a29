"""Options together: routers, orders of neurons, shared experts, routings and targets.

Each drawn combination that is exact computes the dense model's function, and `verify` passes it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from conftest import logits, random_ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from upcycle_cli import Options, Recipe, convert, verify
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.recipe.options import ExpertLayout, NeuronOrder, Promise, RouterInit, Routing

TARGETS = ("mixtral", "qwen2_moe", "glm4_moe")
"""Of one dense model; together they have all routings, and two have a shared expert."""
LAYERS, WIDTH, HIDDEN = range(2), 48, 32
Case = tuple[Recipe, str, ExpertLayout]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    target = draw(st.sampled_from(TARGETS))
    routing = draw(st.sampled_from(NATIVE[target].routings))
    granularity, expansion = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(2, 3))
    count = 0 if NATIVE[target].shared is None else draw(st.integers(0, granularity - 1))
    # With softmax-topk only the choice of all experts is exact.
    chosen = expansion if routing is Routing.SOFTMAX_TOPK else draw(st.integers(1, expansion))
    recipe = Recipe(
        expansion=expansion,
        granularity=granularity,
        shared_experts=count,
        top_k=chosen * (granularity - count),
        routing=routing,
        router_init=draw(st.sampled_from(sorted({*RouterInit} - {RouterInit.PROMPTS}))),
        neuron_order=draw(st.sampled_from(NeuronOrder)),
        seed=draw(st.integers(0, 2**63 - 1)),
    )
    return recipe, target, draw(st.sampled_from(tuple(NATIVE[target].layouts)))


def router_rows(recipe: Recipe, path: Path) -> Path:
    generator = torch.Generator().manual_seed(recipe.seed % 2**32)
    shape = recipe.router_rows, HIDDEN
    rows = {f"layers.{i}.router": torch.randn(shape, generator=generator) for i in LAYERS}
    save_file(rows, path)
    return path


def orders(recipe: Recipe, path: Path) -> Path:
    """Write orders for each group that begin with the same shared neurons."""
    generator = torch.Generator().manual_seed(recipe.seed % 2**32)
    shared, found = WIDTH // recipe.granularity * recipe.shared_experts, {}
    for layer in LAYERS:
        first = torch.randperm(WIDTH, generator=generator)
        ends = (
            torch.randperm(WIDTH - shared, generator=generator) for _ in range(recipe.expansion)
        )
        groups = [torch.cat([first[:shared], first[shared:][end]]) for end in ends]
        found[f"layers.{layer}.neuron_order"] = torch.stack(groups)
    save_file(found, path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(f"{i} sheep and {i * i % 97} goats went by.\n" for i in range(200)))
    return path


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=cases())
def test_every_exact_combination_is_the_dense_function(llama: Path, text: Path, case: Case) -> None:
    (recipe, target, layout), ids = case, random_ids()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        rows = order = None
        if recipe.router_init is RouterInit.FILE:
            rows = router_rows(recipe, folder / "rows.safetensors")
        if recipe.neuron_order is NeuronOrder.FILE:
            order = orders(recipe, folder / "orders.safetensors")
        done = convert(
            llama,
            folder / "moe",
            recipe,
            target=target,
            options=Options(expert_layout=layout),
            calibration=text,
            router_rows=rows,
            neuron_orders=order,
        )
        assert done.plan.promise is Promise.EXACT
        wanted, found = (logits(path, ids, torch.float32) for path in (llama, done.output))
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5
        report = verify(llama, done.output, router_init=rows, calibration=text)
        assert report.passed, report
