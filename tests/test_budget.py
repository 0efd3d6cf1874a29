"""Budgets: the sizes that are said of a recipe are those of its plan, and none is over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import SIZES, MakeDense, RunCli

from upcycle_cli import Options, Recipe, UpcycleError, build_plan, open_checkpoint
from upcycle_cli.budget import Budget, Fit, fitting
from upcycle_cli.commands.budget_options import to_budget
from upcycle_cli.families import targets_of
from upcycle_cli.families.dense_rows import DENSE
from upcycle_cli.recipe import SHIPPED, parse_recipe_name

ROWS: list[tuple[str, str, dict[str, Any]]] = [
    *((name, target, {}) for name in SIZES for target in targets_of(DENSE[name])),
    ("llama", "mixtral", {"tie_word_embeddings": True}),
    ("llama", SHIPPED, {"mlp_bias": True}),
]


@pytest.mark.parametrize(("name", "target", "config"), ROWS, ids=str)
def test_sizes_are_those_of_the_plan(
    make_dense: MakeDense, name: str, target: str, config: dict[str, Any]
) -> None:
    source = open_checkpoint(make_dense(name, **config))
    fits = fitting(source, Budget(max_params=10**6), target=target)
    assert len(fits) > 6
    for fit in fits:
        expansion, granularity, top_k = parse_recipe_name(fit.name)
        recipe = Recipe(expansion=expansion, granularity=granularity, top_k=top_k)
        plan = build_plan(recipe, source, target=target, options=Options())
        found = (plan.total_parameters, plan.active_parameters)
        assert (fit.total_parameters, fit.active_parameters) == found, fit.name
        assert fit.flops_ratio == pytest.approx(plan.flops_ratio, rel=1e-12)


def test_the_largest_that_fits(llama: Path) -> None:
    source = open_checkpoint(llama)

    def fits(**budget: int) -> dict[str, Fit]:
        return {fit.name: fit for fit in fitting(source, Budget(**budget))}

    everything = fits()
    assert {"E64G1T1", "E64G1T2", "E32G8T8"} <= everything.keys()
    limit = everything["E64G1T1"].total_parameters
    assert "E64G1T1" in fits(max_params=limit)
    assert "E32G1T1" in fits(max_params=limit - 1)
    assert "E64G1T1" not in fits(max_params=limit - 1)
    active = everything["E64G1T1"].active_parameters
    assert all(fit.active_parameters <= active for fit in fits(max_active=active).values())
    assert "E64G1T2" not in fits(max_active=active)
    memory = fits(gpu_bytes=2 * limit)
    assert "E64G1T1" in memory
    assert memory["E64G1T1"].trains is False
    assert fits(gpu_bytes=16 * limit)["E64G1T1"].trains is True
    assert everything["E64G1T1"].trains is None
    with pytest.raises(UpcycleError, match="no recipe fits: the smallest, E2G1T1, has"):
        fits(max_params=1000)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (("50B", None, None), Budget(max_params=50 * 10**9)),
        (("1.5b", "700M", None), Budget(max_params=1_500_000_000, max_active=700_000_000)),
        ((None, None, "80GB×8"), Budget(gpu_bytes=640 * 10**9)),
        ((None, None, "80 GiB x 2"), Budget(gpu_bytes=160 * 2**30)),
        ((None, None, "24GB"), Budget(gpu_bytes=24 * 10**9)),
        ((None, None, None), None),
    ],
)
def test_how_budgets_are_written(
    given: tuple[str | None, str | None, str | None], wanted: Budget | None
) -> None:
    assert to_budget(*given) == wanted


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-params", "many"), "--max-params 'many' is not a number of parameters"),
        (("--max-active", "0"), "--max-active '0' is not a number of parameters"),
        (("--gpu-memory", "80"), "no recipe fits"),
        (("--gpu-memory", "80GBx0"), "--gpu-memory '80GBx0' is none at all"),
        (("--gpu-memory", "a lot"), "--gpu-memory 'a lot' is not a size"),
        (("--max-params", "1M", "--recipe", "E2G2T2"), "--recipe asks for one recipe"),
    ],
)
def test_what_is_no_budget(
    run_cli: RunCli, llama: Path, options: tuple[str, ...], words: str
) -> None:
    done = run_cli("inspect", llama, *options)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_an_moe_has_no_budget(run_cli: RunCli, llama: Path, tmp_path: Path) -> None:
    assert run_cli("convert", llama, tmp_path / "moe", "--recipe", "E2G2T2").returncode == 0
    done = run_cli("inspect", tmp_path / "moe", "--max-params", "1M")
    assert done.returncode == 2
    assert "mixture of experts already" in done.stderr
