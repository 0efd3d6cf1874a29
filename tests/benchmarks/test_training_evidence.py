"""The experiment on training: its arms can be made, it measures what it says, its tables follow."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense  # noqa: TC002 - pytest reads it
from shapes import tiny_config, write_hollow
from smollm2 import load

DOCS = Path(__file__).resolve().parents[2] / "docs" / "evidence"
sys.path.insert(0, str(Path(__file__).resolve().parent))

from training import claims  # noqa: E402
from training.arms import ARMS, DENSE_AS_LONG  # noqa: E402
from training.claims import Spread  # noqa: E402
from training.figures import draw  # noqa: E402
from training.measure import Distances, Load, Routers, watch_routers  # noqa: E402
from training.page import with_tables  # noqa: E402

from upcycle_cli import build_plan, convert, open_checkpoint  # noqa: E402

WIDTH: Mapping[str, Any] = {"intermediate_size": 64}
RESULTS = json.loads((DOCS / "training" / "results.json").read_text(encoding="utf-8"))


def test_every_arm_can_be_converted_and_what_is_compared_is_run(tmp_path: Path) -> None:
    source = open_checkpoint(write_hollow(tmp_path / "dense", tiny_config("qwen3", **WIDTH)))
    for arm in (arm for arm in ARMS.values() if arm.recipe):
        plan = build_plan(arm.to_recipe(seed=1), source, target=arm.target)
        assert plan.recipe.name == arm.recipe
        assert (plan.inputs.text is not None) == arm.calibrated
    of_the_paper = [each for comparisons in claims.PAPER.values() for each in comparisons]
    for each in (*of_the_paper, *claims.CHOICES, *claims.OVER_TIME):
        assert {each.first, each.second} - {DENSE_AS_LONG} <= ARMS.keys()


def test_an_interval_that_holds_zero_decides_nothing() -> None:
    verdicts = [claims.verdict(Spread(values)) for values in ((0.1, 0.2, 0.3), (0.19, 0.2, 0.21))]
    assert verdicts == ["not decided", "yes"]


def test_the_page_and_its_figures_say_what_the_results_say(tmp_path: Path) -> None:
    page = (DOCS / "training.md").read_text(encoding="utf-8")
    assert page == with_tables(page, RESULTS), "run `python tests/benchmarks/training --report`"
    for folder in ("a", "b"):
        draw(claims.runs_of(RESULTS), tmp_path / folder)
    drawn = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    assert drawn == {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()}
    assert drawn.keys() == {file.name for file in (DOCS / "training").glob("*.svg")}


@pytest.mark.parametrize("is_sigmoid", [False, True])
def test_balancing_loss_is_top_k_when_balanced_and_more_when_not(*, is_sigmoid: bool) -> None:
    chosen_TK = torch.tensor([[0, 1], [2, 3]])
    even = Routers(is_sigmoid, [(torch.zeros(2, 4), chosen_TK)] * 2)
    assert float(even.balancing_loss()) == pytest.approx(2.0)
    likes_the_first = (torch.tensor([[5.0, 4.0, 0.0, 0.0]] * 2), torch.tensor([[0, 1]] * 2))
    likes_the_last = (likes_the_first[0].flip(1), torch.tensor([[3, 2]] * 2))
    uneven = Routers(is_sigmoid, [likes_the_first, likes_the_last])
    assert float(uneven.balancing_loss()) > 2.2
    assert float(uneven.balancing_loss(pooled=True)) == pytest.approx(2.0)  # opposites cancel


def test_load_counts_choices_and_groups_that_are_split() -> None:
    load_of_experts, routers = Load(granularity=2), Routers(is_sigmoid=False)
    for chosen in ([[0, 1], [0, 1]], [[0, 1], [1, 2]]):
        routers.records.append((torch.zeros(2, 4), torch.tensor(chosen)))
        load_of_experts.add(routers)
    facts = load_of_experts.facts()
    assert facts["split_share"] == 0.25
    assert facts["idle_experts"] == 1
    assert facts["load_cv"] == pytest.approx(torch.tensor([3.0, 4, 1, 0]).std(correction=0) / 2)


@pytest.mark.parametrize("name", ["E4G4T8, shuffled", "E4G4T8, sigmoid-topk"])
def test_groups_are_copies_at_first_in_whatever_order(
    make_dense: MakeDense, tmp_path: Path, name: str
) -> None:
    arm = ARMS[name]
    moe = tmp_path / "moe"
    convert(make_dense("qwen3", **WIDTH), moe, arm.to_recipe(seed=1), target=arm.target)
    model = load(moe)
    ordered = arm.convert.get("neuron_order") != "shuffled"
    distances = Distances(model, arm.granularity, ordered=ordered)
    assert len(distances.layers) == model.config.num_hidden_layers
    assert distances.facts() == pytest.approx({"apart": 0.0, "moved": 0.0}, abs=1e-9)
    with torch.no_grad():
        distances.layers[0].down_proj[0].mul_(2.0)
    assert distances.facts()["apart"] > 1e-4
    with watch_routers(model, is_sigmoid=False) as routers:
        model(input_ids=torch.zeros(1, 5, dtype=torch.long))
    assert [chosen_TK.shape for _, chosen_TK in routers.records] == [(5, 8)] * 2
