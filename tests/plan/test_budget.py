"""Budgets: the sizes of each recipe equal its plan's, and no recipe is over the budget."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from refusals import invoke

from upcycle_cli import Options, Recipe, UpcycleError, build_plan, open_checkpoint
from upcycle_cli.cli.parse_options import to_budget
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.lookup import targets_of
from upcycle_cli.plan.budget import Budget, SizedRecipe, fitting, suggestion
from upcycle_cli.recipe.recipe import SHIPPED

if TYPE_CHECKING:
    from conftest import MakeDense

UNTIED = Options(untie_embeddings=True)
ROWS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    *(("llama", target, {}, {}) for target in targets_of(DENSE["llama"])),
    *((name, SHIPPED, {}, {}) for name in ("phi", "gpt2")),
    ("llama", "mixtral", {"options": UNTIED}, {"tie_word_embeddings": True}),
    ("llama", SHIPPED, {"layers": "1"}, {"mlp_bias": True}),
    ("llama", "qwen2_moe", {"shared_experts": 2}, {}),
]


@pytest.mark.parametrize(("name", "target", "choices", "config"), ROWS)
def test_sizes_equal_those_of_the_plan(
    make_dense: MakeDense,
    name: str,
    target: str,
    choices: dict[str, Any],
    config: dict[str, Any],
) -> None:
    source = open_checkpoint(make_dense(name, **config))
    fits = fitting(source, Budget(max_params=300_000), target=target, **choices)
    common = {key: value for key, value in choices.items() if key != "options"}
    assert {fit.recipe.granularity for fit in fits[::7]} > {4, 8}
    for fit in fits[::7]:
        sizes = {name: getattr(fit.recipe, name) for name in ("expansion", "granularity", "top_k")}
        recipe = Recipe(**sizes, **common)
        plan = build_plan(recipe, source, target=target, options=choices.get("options"))
        found = (plan.total_parameters, plan.active_parameters)
        assert (fit.total_parameters, fit.active_parameters) == found, recipe.name
        assert fit.flops_per_token == plan.flops_per_token
        assert fit.flops_ratio == pytest.approx(plan.flops_ratio, rel=1e-12)
        assert fit.target == target


def test_list_the_recipes_that_fit(llama: Path) -> None:
    source = open_checkpoint(llama)

    def fits(**budget: int) -> dict[str, SizedRecipe]:
        return {fit.recipe.name: fit for fit in fitting(source, Budget(**budget))}

    everything = fits()
    assert {fit.recipe.expansion for fit in everything.values()} == {2, 4, 8, 16, 32, 64}
    assert {"E64G1T1", "E64G1T2", "E32G8T8"} <= everything.keys()
    large = everything["E64G1T1"]
    limit, active = large.total_parameters, large.active_parameters
    assert large.trains is None
    assert {"E64G1T1", "E32G1T1"} <= fits(max_params=limit).keys()
    assert "E64G1T1" not in fits(max_params=limit - 1)
    assert all(fit.active_parameters <= active for fit in fits(max_active=active).values())
    with pytest.raises(UpcycleError, match="no recipe fits: the smallest, E2G1T1, has"):
        fits(max_params=1000)


RANKED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("E8G1T2", "E8G8T16", "E4G1T2", "E16G1T2", "E8G1T4"), ()),
    "E16G8T16": ("N > 64",),
    **dict.fromkeys(("E8G1T1", "E8G8T8"), ("T = G",)),
    "E16G8T8": ("N > 64", "T = G"),
    "E2G1T2": ("T = N",),
}
"""Recipes from the best to the worst, with their warnings."""


def test_rank_by_what_was_measured(llama: Path) -> None:
    source = open_checkpoint(llama)
    fits = {fit.recipe.name: fit for fit in fitting(source, Budget())}
    assert {name: (*fits[name].warnings,) for name in fits if name in RANKED} == RANKED
    assert [name for name in fits if name in RANKED] == [*RANKED]
    assert "no gradient" in fits["E8G8T8"].warnings["T = G"]
    for name, fit in fits.items():
        assert (fit.recipe.top_k == fit.recipe.granularity) == ("T = G" in fit.warnings), name
    for fit in fitting(source, Budget(), target="qwen2_moe", shared_experts=2):
        assert (fit.recipe.rows_chosen == 1) == ("T = G - K" in fit.warnings)
        assert "no gradient" not in "".join(fit.warnings.values())  # softmax-topk has one
    for name, wanted in ("E64G1T1", "E8G1T2"), ("E4G1T2", "E4G1T2"), ("E2G1T1", "E2G1T1"):
        memory = fits[name].training_bytes
        found = fitting(source, Budget(gpu_bytes=memory))
        assert sorted(found, key=lambda fit: not fit.trains) == [*found]
        best, _ = suggestion(found) or (None, "")
        assert best is found[0]
        assert (best.recipe.name, best.training_bytes <= memory) == (wanted, True)
    assert suggestion(fitting(source, Budget(gpu_bytes=memory - 1))) is None


def test_parse_budgets() -> None:
    assert to_budget("50B", None, None) == Budget(max_params=50 * 10**9)
    wanted = Budget(max_params=1_500_000_000, max_active=700_000_000)
    assert to_budget("1.5b", "700M", None) == wanted
    memory = {
        "80GB×8": 640 * 10**9,
        "8x80GB": 640 * 10**9,
        "80 GiB x 2": 160 * 2**30,
        "24GB": 24 * 10**9,
    }
    for text, size in memory.items():
        assert to_budget(None, None, text) == Budget(gpu_bytes=size)
    assert to_budget(None, None, None) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-params", "many"), "--max-params 'many' is not a number of parameters"),
        (("--max-active", "0"), "no recipe fits"),
        (("--gpu-memory", "80"), "80 means 80 bytes; write 80GB"),
        (("--gpu-memory", "80GBx0"), "80GBx0' is not a size"),
        (("--gpu-memory", "a lot"), "--gpu-memory 'a lot' is not a size"),
        (("--max-params", "1M", "--recipe", "E2G2T2"), "--recipe"),
        (("--max-active", "1M", "--noise", "0.1", "-T", "2"), "--top-k, --noise"),
        (("--max-params", "1M", "--target", "dots1"), "llama cannot become 'dots1'"),
    ],
    ids=str,
)
def test_refuse_what_is_no_budget(llama: Path, options: tuple[str, ...], words: str) -> None:
    done = invoke("inspect", llama, *options)
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.split())


def test_suggest_an_output_outside_the_source(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama)
    done = invoke("inspect", ".", "--max-params", "1M")
    assert f"upcycle convert . ../{llama.name}-E" in done.stdout


def test_show_the_best_recipes_first(llama: Path) -> None:
    budget = ("inspect", llama, "--max-params", "1M", "--target", "qwen2_moe", "--layers", "1")
    found = json.loads(invoke(*budget, "--json").stdout)
    names = [fit["recipe"] for fit in found["fits"]]
    for options, count in (((), 20), (("--all",), len(names))):
        done = invoke(*budget, *options)
        lines = done.stdout.splitlines()
        assert [line.split()[0] for line in lines if line.startswith("E")] == names[:count]
        assert f"Next: {found['suggestion']['command']}" in lines
        assert (f"{len(names) - count} more recipes fit" in done.stderr) == (not options)
    command = f"--recipe {names[0]} --verify --target qwen2_moe --layers 1"
    assert found["suggestion"]["command"].endswith(command)
    assert {fit["target"] for fit in found["fits"]} == {"qwen2_moe"}
    too_small = invoke("inspect", llama, "--gpu-memory", "600KB").stdout
    assert "nothing can be trained" in too_small
    assert "upcycle convert" not in too_small
