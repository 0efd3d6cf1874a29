"""NVIDIA's Nemotron models at full size, without weights: parameters counted by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from configs import dense_model
from shapes import FIXTURES, write_hollow

from upcycle_cli import Recipe, build_plan, open_checkpoint
from upcycle_cli.plan.output import Role
from upcycle_cli.recipe.recipe import Promise, Routing, Scaling
from upcycle_cli.recipe.scaling import MlpKind

NAMES = (
    *("nemotron-4-15b", "nemotron-4-340b", "minitron-4b-base"),
    *("nemotron-h-8b-base-8k", "nemotron-h-47b-base-8k", "nvidia-nemotron-nano-9b-v2"),
)
SOFTMAX, RENORMALISED = Routing.SOFTMAX_TOPK, Routing.TOPK_SOFTMAX
COARSE = Recipe(expansion=8, granularity=1, top_k=2)
FINE = Recipe(expansion=8, granularity=8, top_k=8)


def released(name: str) -> Mapping[str, Any]:
    content: Mapping[str, Any] = json.loads((FIXTURES / "shapes" / f"{name}.json").read_text())
    return content


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All models, as headers without data."""
    folder = tmp_path_factory.mktemp("nemotron")
    for name in NAMES:
        config = released(name)["config"]
        write_hollow(folder / name, config, shapes=dict(dense_model(config).shapes))
    return folder


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("recipe", "experts", "more_mlps"), [(COARSE, 8, 1), (FINE, 64, 0)])
def test_a_plan_has_the_parameters_of_the_formula(
    name: str, recipe: Recipe, experts: int, more_mlps: int, sources: Path
) -> None:
    """Eight MLPs instead of one, of which a token uses one or two, and the routers.

    nemotron_h also gets a correction bias, and a shared expert that is 64 wide.
    """
    plan, model = build_plan(recipe, open_checkpoint(sources / name)), released(name)
    H, I = model["config"]["hidden_size"], model["config"]["intermediate_size"]  # noqa: E741
    dense, layers = model["dense_parameters"], model["mlp_layers"]
    rest = experts * H + (
        experts + 2 * 64 * H if model["config"]["model_type"] == "nemotron_h" else 0
    )
    assert plan.total_parameters == dense + layers * (7 * 2 * I * H + rest)
    assert plan.active_parameters == dense + layers * (more_mlps * 2 * I * H + rest)
    assert plan.dense_parameters == dense
    assert plan.lossless
    assert plan.promise is Promise.EXACT
    assert len({t.layer for t in plan.tensors if t.role is Role.ROUTER}) == layers
    copied = {tensor.name for tensor in plan.tensors if tensor.role is Role.COPIED}
    mlps = {name for name in plan.source.tensors if "up_proj" in name or "down_proj" in name}
    assert copied == plan.source.tensors.keys() - mlps


@pytest.mark.parametrize(
    ("recipe", "c", "factor"),
    [
        # The paper's c = E·G²/T, and its cube root on up and on down.
        (replace(FINE, routing=SOFTMAX), 64.0, 4.0),
        (replace(COARSE, routing=SOFTMAX), 4.0, 1.587401),
        (replace(FINE, routing=RENORMALISED), 8.0, 2.0),
    ],
)
def test_the_papers_factors(recipe: Recipe, c: float, factor: float, sources: Path) -> None:
    source = open_checkpoint(sources / "nemotron-4-15b")
    plan = build_plan(replace(recipe, scaling=Scaling.PAPER), source)
    factors = plan.factors
    assert (factors.c, factors.gate, factors.config) == (c, 1.0, 1.0)
    assert factors.up == factors.down == pytest.approx(factor, rel=1e-6)
    # up² · down = c: the paper's scaling is exact for a squared ReLU.
    assert factors.up**2 * factors.down == pytest.approx(c, rel=1e-12)
    assert plan.family.dense.mlp_kind == MlpKind(gated=False, degree=2)
    assert plan.promise is (Promise.APPROXIMATE if recipe.routing is SOFTMAX else Promise.EXACT)
