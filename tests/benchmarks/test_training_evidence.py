"""The experiment on training: its arms can be made, it measures what it says, its tables follow."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
from conftest import MakeDense  # noqa: TC002 - pytest reads it
from shapes import tiny_config, write_hollow
from transformers import AutoModelForCausalLM

DOCS = Path(__file__).resolve().parents[2] / "docs"
sys.path.insert(0, str(Path(__file__).resolve().parent))

from training.arms import ARMS, DENSE, DENSE_AS_LONG, DENSE_LONGER  # noqa: E402
from training.claims import (  # noqa: E402
    CHOICES,
    OVER_TIME,
    PAPER,
    Comparison,
    Spread,
    difference,
    runs_of,
    verdict,
    verdict_of_all,
)
from training.figures import draw  # noqa: E402
from training.measure import Distances, Load, Routers, watching  # noqa: E402
from training.page import with_tables  # noqa: E402

from upcycle_cli import build_plan, convert, open_checkpoint  # noqa: E402

WIDTH: Mapping[str, Any] = {"intermediate_size": 64}
COMPARED = (*(each for claim in PAPER for each in claim.comparisons), *CHOICES, *OVER_TIME)


def test_every_arm_can_be_converted_and_what_is_compared_is_run(tmp_path: Path) -> None:
    source = open_checkpoint(write_hollow(tmp_path / "dense", tiny_config("qwen3", **WIDTH)))
    for arm in (arm for arm in ARMS.values() if arm.recipe):
        plan = build_plan(arm.to_recipe(seed=1), source, target=arm.target)
        assert plan.recipe.name == arm.recipe
        assert (plan.inputs.text is not None) == arm.calibrated
    compared = {name for each in COMPARED for name in (each.first, each.second)}
    assert compared - {DENSE_AS_LONG} <= ARMS.keys()


def _results(seeds: int, gains: Mapping[str, float]) -> dict[str, Any]:
    """Return results in which an arm ends lower than the others by its gain."""
    runs: list[dict[str, Any]] = []
    times = {DENSE_LONGER: 2.0, "E8G1T2": 2**0.5, "E8G8T16": 4.0}
    for seed in range(seeds):
        for arm in ARMS.values():
            end = 3.0 + 0.01 * seed - gains.get(arm.name, 0.0) * (1 + 0.1 * seed)
            experts = {"load_cv": 0.5, "idle_experts": 0, "experts": 8}
            experts |= {"split_share": 0.0, "apart": 0.1, "moved": 0.1}
            curve = [
                {"tokens": tokens, "flops": 1e6 * tokens, "loss": loss}
                | (experts if arm.recipe else {})
                for tokens, loss in ((0, 4.0), (1000, end))
            ]
            curve[-1]["flops"] *= times.get(arm.name, 1.0)
            runs.append({"arm": arm.name, "seed": seed, "flops_per_token": 1e6, "curve": curve})
    return {"runs": runs}


def test_a_claim_is_decided_by_the_interval_of_three_seeds() -> None:
    spread = Spread((0.1, 0.2, 0.3))
    assert spread.mean == pytest.approx(0.2)
    assert spread.standard_error == pytest.approx(0.1 / 3**0.5)
    assert spread.margin == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert verdict(spread) == "not decided"
    assert verdict(Spread((0.19, 0.2, 0.21))) == "yes"
    assert verdict(Spread((-0.19, -0.2, -0.21))) == "no"
    assert verdict(Spread((0.2, 0.2))) == "a hint"
    assert verdict(None) == "not run"
    assert verdict_of_all(["yes", "yes"]) == "agrees"
    assert verdict_of_all(["no"]) == "disagrees"
    assert verdict_of_all(["yes", "not decided"]) == "agrees in part"
    assert verdict_of_all(["no", "yes"]) == "mixed"
    assert verdict_of_all(["yes", "a hint"]) == "a hint"
    assert verdict_of_all(["no", "not run", "a hint"]) == "not run"


def test_differences_are_taken_seed_by_seed() -> None:
    runs = runs_of(_results(3, {"E8G1T2": 0.1}))
    spread = difference(runs, Comparison("E8G1T2", DENSE))
    assert spread is not None
    assert spread.values == pytest.approx((0.1, 0.11, 0.12))
    one_less = {**runs, "E8G1T2": {seed: runs["E8G1T2"][seed] for seed in (0, 2)}}
    spread = difference(one_less, Comparison("E8G1T2", DENSE))
    assert spread is not None
    assert len(spread.values) == 2


def test_dense_training_of_as_many_flops_lies_between_two_runs() -> None:
    runs = runs_of(_results(3, {DENSE_LONGER: 0.2, "E8G8T16": 0.5}))
    for arm, wanted in (("E8G1T2", -0.1), (DENSE, 0.0), (DENSE_LONGER, 0.0), ("E8G8T16", 0.1)):
        spread = difference(runs, Comparison(arm, DENSE_AS_LONG))
        assert spread is not None
        assert spread.values == pytest.approx([wanted * (1 + 0.1 * seed) for seed in range(3)])
    assert difference({DENSE: runs[DENSE]}, Comparison(DENSE, DENSE_AS_LONG)) is None


def test_figures_are_svg_that_depends_on_results_alone(tmp_path: Path) -> None:
    runs = runs_of(_results(3, {"E8G1T2": 0.1}))
    for folder in ("a", "b"):
        draw(runs, tmp_path / folder)
    drawn = sorted((tmp_path / "a").iterdir())
    assert len(drawn) == 5
    for file in drawn:
        assert ET.parse(file).getroot().tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_page_says_what_the_results_say() -> None:
    results = json.loads((DOCS / "training" / "results.json").read_text(encoding="utf-8"))
    page = (DOCS / "training.md").read_text(encoding="utf-8")
    assert page == with_tables(page, results), "run `python tests/benchmarks/training --report`"


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
    load, routers = Load(granularity=2), Routers(is_sigmoid=False)
    for chosen in ([[0, 1], [0, 1]], [[0, 1], [1, 2]]):
        routers.records.append((torch.zeros(2, 4), torch.tensor(chosen)))
        load.add(routers)
    facts = load.facts()
    assert facts["split_share"] == 0.25
    assert facts["idle_experts"] == 1
    assert facts["load_cv"] == pytest.approx(torch.tensor([3.0, 4, 1, 0]).std(correction=0) / 2)


@pytest.mark.parametrize("name", ["E4G4T8, shuffled", "E4G4T8, sigmoid-topk"])
def test_groups_are_copies_at_first_in_whatever_order(
    make_dense: MakeDense, tmp_path: Path, name: str
) -> None:
    arm = ARMS[name]
    dense = make_dense("qwen3", **WIDTH)
    convert(dense, tmp_path / "moe", arm.to_recipe(seed=1), target=arm.target)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "moe", dtype=torch.float32, trust_remote_code=True
    )
    ordered = arm.convert.get("neuron_order") != "shuffled"
    distances = Distances(model, arm.granularity, ordered=ordered)
    assert len(distances.layers) == model.config.num_hidden_layers
    assert distances.facts() == pytest.approx({"apart": 0.0, "moved": 0.0}, abs=1e-9)
    with torch.no_grad():
        distances.layers[0].down_proj[0].mul_(2.0)
    assert distances.facts()["apart"] > 1e-4
    with watching(model, is_sigmoid=False) as routers:
        model(input_ids=torch.zeros(1, 5, dtype=torch.long))
    assert [chosen_TK.shape for _, chosen_TK in routers.records] == [(5, 8)] * 2
