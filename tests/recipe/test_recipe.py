"""Recipes: which are valid, what they leave to the target, and what they promise."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import pytest

from upcycle_cli import Growth, Recipe, UpcycleError
from upcycle_cli.recipe.recipe import (
    DEFAULT_LOGIT_STD,
    Promise,
    Routing,
    ScaleSplit,
    Scaling,
    parse_recipe_name,
)

SOFTMAX_TOPK, TOPK_SOFTMAX, SIGMOID_TOPK = Routing


def test_parse_the_papers_notation() -> None:
    assert parse_recipe_name("E8G1T2") == (8, 1, 2)
    assert parse_recipe_name(" e16g4t32\n") == (16, 4, 32)
    for text in ("", "8", "E8G1", "8x2", "G1E8T2", "E8G1T2T2", "E-8G1T2", "E8.5G1T2", "E8 G1T2"):
        with pytest.raises(UpcycleError, match=f"'{text}' is not a recipe") as caught:
            parse_recipe_name(text)
        assert "E8G1T2" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"expansion": 0}, "expansion (E) must be at least 1, not 0"),
        ({"granularity": 0}, "granularity (G) must be at least 1, not 0"),
        ({"top_k": 0}, "top-k (T) must be at least 1, not 0"),
        ({"top_k": 9, "allow_inexact": True}, "Use a top-k of at most 4"),
        ({"top_k": 3}, "Use a top-k of 2 or 4, or pass `allow_inexact=True`"),
        ({"top_k": 1}, "Use a top-k of 2, or pass `allow_inexact=True`"),
        ({"expansion": 4097}, "At most 4096"),
        ({"shared_experts": 2}, "less than G = 2"),
        ({"scaling": 0.0}, "`scaling` must be a positive number"),
        ({"scaling": math.nan}, "`scaling` must be a positive number"),
        ({"scaling": "double"}, "double"),
        ({"routing": "random"}, "random"),
        ({"scale_split": "up"}, "up"),
        ({"router_logit_std": 0.0}, "`router_logit_std` must be"),
        ({"router_logit_std": math.inf}, "`router_logit_std` must be"),
        ({"router_logit_std": 1.0, "router_init": "file"}, "`router_logit_std`"),
        ({"seed": -1}, "`seed` must be between"),
        ({"seed": 2**63}, "`seed` must be between"),
        ({"noise": 1e-7}, "`noise` must be"),
        ({"noise": math.nan}, "`noise` must be"),
        ({"reinit": 1.5}, "must be between 0 and 1"),
        ({"noise": 0.1, "reinit": 0.1}, "`noise` and `reinit`"),
        ({"noise": 0.1, "shared_experts": 1, "top_k": 1}, "`shared_experts`"),
    ],
    ids=str,
)
def test_a_recipe_is_valid_or_is_not_made(changes: dict[str, Any], words: str) -> None:
    valid: dict[str, Any] = {"expansion": 2, "granularity": 2, "top_k": 2}
    with pytest.raises(UpcycleError) as caught:
        Recipe(**valid | changes)
    assert words in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize("values", [{"expand": 1}, {"expand": 2, "top_k": 0}])
def test_a_growth_is_valid_or_is_not_made(values: dict[str, Any]) -> None:
    with pytest.raises(UpcycleError, match="must be at least"):
        Growth(**values)


def test_python_callers_may_write_what_the_command_line_takes() -> None:
    """A plain string equals a StrEnum member without being one, and 4 is as good as 4.0."""
    written = Recipe("E8G1T2", routing="topk-softmax", scale_split="down")
    assert written == Recipe("E8G1T2", routing=TOPK_SOFTMAX, scale_split=ScaleSplit.DOWN)
    assert written.routing is TOPK_SOFTMAX
    assert Recipe("E8G1T2", routing=TOPK_SOFTMAX, scaling=4).factors().c == 4.0


@pytest.mark.parametrize("default", list(Routing))
def test_resolving_fills_in_only_what_is_absent(default: Routing) -> None:
    # Any router is exact for gates that sum to 1; the others must be nearly equal.
    assert DEFAULT_LOGIT_STD == {SOFTMAX_TOPK: 0.001, TOPK_SOFTMAX: 1.0, SIGMOID_TOPK: 1.0}
    resolved = Recipe("E8G1T2", seed=3).resolve(default)
    assert (resolved.routing, resolved.seed) == (default, 3)
    assert resolved.router_logit_std == DEFAULT_LOGIT_STD[default]
    assert resolved.resolve(TOPK_SOFTMAX) == resolved
    stated = Recipe("E8G1T2", routing=SOFTMAX_TOPK, router_logit_std=0.5)
    assert stated.resolve(default) == replace(stated, scale_split=ScaleSplit.BALANCED)


def test_a_granularity_must_divide_the_intermediate_size() -> None:
    for granularity, near in ((5, "4 or 6"), (7, "6 or 12"), (8, "6 or 12"), (24, "12")):
        with pytest.raises(UpcycleError, match="12 is not divisible by granularity") as caught:
            Recipe(f"E2G{granularity}T{granularity}").check_width(12)
        assert caught.value.hint == f"Try {near}."
    with pytest.raises(UpcycleError, match="rounds to 0 neurons") as caught:
        Recipe("E2G2T2", reinit=0.01).check_width(12)
    assert caught.value.hint == "Use a `reinit` of at least 0.0833."


# Promises ----------------------------------------------------------------------------------------


def shard_weights(recipe: Recipe, logit_std: float, seed: int) -> list[float]:
    """Return a token's weight of each shard of the dense MLP, where the dense model has 1.

    Routes one token by the definition of the routing, top-k breaking ties by lowest index.
    """
    draw = random.Random(seed)  # noqa: S311 - nothing secret here
    groups, size = recipe.expansion, recipe.granularity
    rows = groups if recipe.virtual_groups else recipe.num_experts
    logits = [draw.gauss(0, logit_std) for _ in range(rows)]
    if recipe.virtual_groups:
        logits = [logit for logit in logits for _ in range(size)]
    chosen = sorted(range(recipe.num_experts), key=lambda e: -logits[e])[: recipe.top_k]
    pool = range(recipe.num_experts) if recipe.routing is SOFTMAX_TOPK else chosen
    sigmoid = recipe.routing is SIGMOID_TOPK
    scores = [1 / (1 + math.exp(-logit)) if sigmoid else math.exp(logit) for logit in logits]
    total = sum(scores[e] for e in pool)
    factors = recipe.factors()
    weights = [0.0] * size
    for expert in chosen:
        gate = factors.config * scores[expert] / total
        weights[expert % size] += gate * factors.up * factors.down
    return weights


def deviation(recipe: Recipe, logit_std: float) -> float:
    return max(
        abs(weight - 1) for seed in range(3) for weight in shard_weights(recipe, logit_std, seed)
    )


@pytest.mark.parametrize("routing", list(Routing))
def test_a_simulated_token_keeps_every_promise(routing: Routing) -> None:
    seen = set()
    for expansion, granularity in itertools.product((1, 2, 3, 4), (1, 2, 3)):
        for top_k, scaling, split, grouped in itertools.product(
            range(1, expansion * granularity + 1),
            (*Scaling, 1.0, 2.0, 4.5),
            ScaleSplit,
            (True, False),
        ):
            recipe = Recipe(
                expansion=expansion,
                granularity=granularity,
                top_k=top_k,
                routing=routing,
                scaling=scaling,
                scale_split=split,
                virtual_groups=grouped,
                allow_inexact=True,
            )
            linear = recipe.factors().gate == 1  # a gated MLP is not linear in its gate
            exact = linear and deviation(recipe, 1.0) < 1e-9
            approximate = linear and deviation(recipe, 1e-7) < 1e-6
            seen.add(recipe.promise(recipe.factors())[0])
            match recipe.promise(recipe.factors())[0]:
                case Promise.EXACT:
                    assert exact, recipe
                case Promise.APPROXIMATE:
                    assert approximate and not exact, recipe  # noqa: PT018
                case Promise.NONE if grouped or granularity == 1:
                    assert not approximate, recipe
                case Promise.NONE:
                    # Without groups a token gets whole MLPs only by choosing all experts.
                    assert not exact, recipe
    assert seen == set(Promise) - ({Promise.APPROXIMATE} if routing is not SOFTMAX_TOPK else set())


@pytest.mark.parametrize(
    ("settings", "promise"),
    [
        ({}, Promise.EXACT),
        ({"routing": SOFTMAX_TOPK}, Promise.APPROXIMATE),
        ({"router_init": "file"}, Promise.EXACT),
        # A string says why nothing is promised.
        ({"routing": SOFTMAX_TOPK, "router_logit_std": 0.06}, "standard deviation 0.06 the gates"),
        ({"routing": SOFTMAX_TOPK, "router_init": "file"}, "rows from a file can be anything"),
        ({"scaling": 8.1}, "the experts are scaled by 8.1, and the routing needs 8"),
        ({"scaling": Scaling.PAPER}, "scaling paper does not preserve"),
        ({"virtual_groups": False}, "without virtual groups a token does not get"),
        ({"noise": 0.01}, "noise of 0.01"),
        ({"reinit": 0.5}, "50 % of each expert's neurons reinitialized"),
        ({"top_k": 4, "allow_inexact": True}, "top-k 4 is not a multiple of G = 8"),
    ],
    ids=str,
)
def test_promises_of_e8g8t8(settings: dict[str, Any], promise: Promise | str) -> None:
    sizes = {"expansion": 8, "granularity": 8, "top_k": 8, "routing": TOPK_SOFTMAX}
    recipe = Recipe(**{**sizes, **settings})
    found, why = recipe.promise(recipe.factors())
    assert found is (promise if isinstance(promise, Promise) else Promise.NONE)
    assert (promise in why) if found is Promise.NONE else not why
