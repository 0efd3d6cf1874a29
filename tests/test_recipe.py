"""The recipe: what is valid, and the factors and promises that follow from it."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import make_recipe

from upcycle_cli import Recipe, UpcycleError
from upcycle_cli.recipe.recipe import (
    DEFAULT_LOGIT_STD,
    Promise,
    Routing,
    ScaleSplit,
    Scaling,
    parse_recipe_name,
)
from upcycle_cli.recipe.scaling import Factors, MlpKind

SOFTMAX_TOPK, TOPK_SOFTMAX, SIGMOID_TOPK = Routing
RELU2 = MlpKind(gated=False, degree=2)

# The notation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("E8G1T2", (8, 1, 2)),
        ("E8G8T8", (8, 8, 8)),
        ("e16g4t32", (16, 4, 32)),
        (" E2G1T1\n", (2, 1, 1)),
        ("E0G0T0", (0, 0, 0)),  # well-formed; it is the recipe that refuses it
    ],
)
def test_the_papers_notation(text: str, sizes: tuple[int, int, int]) -> None:
    assert parse_recipe_name(text) == sizes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8",
        "E8",
        "E8G1",
        "8x2",
        "G1E8T2",
        "E8G1T2T2",
        "xE8G1T2",
        "E-8G1T2",
        "E8.5G1T2",
        "E8 G1T2",
    ],
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UpcycleError, match="is not a recipe") as caught:
        parse_recipe_name(text)
    assert text in caught.value.message
    assert caught.value.hint is not None
    assert "E8G1T2" in caught.value.hint


@given(expansion=st.integers(1, 64), granularity=st.integers(1, 64), groups=st.integers(1, 64))
def test_the_name_says_it_all(expansion: int, granularity: int, groups: int) -> None:
    top_k = granularity * min(groups, expansion)
    recipe = Recipe(expansion=expansion, granularity=granularity, top_k=top_k)
    assert parse_recipe_name(recipe.name) == (expansion, granularity, top_k)
    assert recipe.num_experts == expansion * granularity
    assert recipe.picks_whole_groups


# Validity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((0, 1, 1), "expansion (E) must be at least 1, not 0"),
        ((8, 0, 1), "granularity (G) must be at least 1, not 0"),
        ((8, 1, 0), "top-k (T) must be at least 1, not 0"),
        ((-1, 1, 1), "expansion (E) must be at least 1, not -1"),
    ],
)
def test_sizes_are_positive(sizes: tuple[int, int, int], words: str) -> None:
    expansion, granularity, top_k = sizes
    with pytest.raises(UpcycleError) as caught:
        Recipe(expansion=expansion, granularity=granularity, top_k=top_k)
    assert words in str(caught.value)


def test_no_more_than_all_experts_can_be_chosen() -> None:
    assert make_recipe("E2G4T8").top_k == 8
    with pytest.raises(UpcycleError, match="top-k 9 is more than the 8 experts") as caught:
        make_recipe("E2G4T9", allow_inexact=True)
    assert caught.value.hint == "Use a top-k of at most 8."


@pytest.mark.parametrize(
    ("name", "advice"),
    [("E8G8T2", "8"), ("E8G8T12", "8 or 16"), ("E2G3T5", "3 or 6"), ("E1G8T7", "8")],
)
def test_a_top_k_that_splits_groups_needs_permission(name: str, advice: str) -> None:
    with pytest.raises(UpcycleError, match="not a multiple of granularity") as caught:
        make_recipe(name)
    assert caught.value.hint is not None
    assert f"Use a top-k of {advice}, or pass --allow-inexact" in caught.value.hint
    allowed = make_recipe(name, allow_inexact=True)
    assert not allowed.picks_whole_groups


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_is_a_positive_number(scale: float) -> None:
    with pytest.raises(UpcycleError, match="the scale must be a positive number"):
        make_recipe("E2G1T1", scaling=scale)


@pytest.mark.parametrize("std", [0.0, -1e-3, math.inf, math.nan])
def test_router_logits_have_a_positive_deviation(std: float) -> None:
    with pytest.raises(UpcycleError, match="router logit standard deviation"):
        make_recipe("E2G1T1", router_logit_std=std)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_fits_63_bits(seed: int) -> None:
    assert make_recipe("E2G1T1", seed=2**63 - 1).seed == 2**63 - 1
    with pytest.raises(UpcycleError, match="the seed must be between"):
        make_recipe("E2G1T1", seed=seed)


def test_python_callers_may_write_what_the_command_line_takes() -> None:
    """A plain string is equal to a StrEnum member without being one, and 4 is a scale as 4.0 is."""
    written = make_recipe("E8G1T2", "topk-softmax", scaling="none", scale_split="down")  # type: ignore[arg-type]
    meant = make_recipe("E8G1T2", TOPK_SOFTMAX, scaling=Scaling.NONE, scale_split=ScaleSplit.DOWN)
    assert written == meant
    assert (written.factors(), written.promise()) == (meant.factors(), meant.promise())
    assert make_recipe("E8G1T2", TOPK_SOFTMAX, scaling=4).factors().c == 4.0


@pytest.mark.parametrize("setting", ["routing", "scaling", "scale_split"])
def test_python_callers_hear_of_a_word_that_does_not_exist(setting: str) -> None:
    settings: dict[str, Any] = {setting: "sideways"}
    with pytest.raises(UpcycleError, match="sideways"):
        Recipe(expansion=2, granularity=1, top_k=1, **settings)


# Defaults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("default", list(Routing))
def test_resolving_fills_in_what_is_absent(default: Routing) -> None:
    recipe = make_recipe("E8G1T2", seed=3)
    assert (recipe.routing, recipe.router_logit_std) == (None, None)
    resolved = recipe.resolve(default)
    assert resolved.routing is default
    assert resolved.router_logit_std == DEFAULT_LOGIT_STD[default]
    assert resolved.seed == 3
    assert resolved.resolve(TOPK_SOFTMAX) == resolved


def test_resolving_keeps_what_is_given() -> None:
    recipe = make_recipe("E8G1T2", SOFTMAX_TOPK, router_logit_std=0.5)
    resolved = recipe.resolve(TOPK_SOFTMAX)
    assert resolved == replace(recipe, scale_split=ScaleSplit.BALANCED)


def test_the_factor_goes_where_the_target_has_a_place_for_it() -> None:
    recipe = make_recipe("E8G8T8", SIGMOID_TOPK)
    assert recipe.resolve(SIGMOID_TOPK).scale_split is ScaleSplit.BALANCED
    in_config = recipe.resolve(SIGMOID_TOPK, scales_in_config=True)
    assert in_config.scale_split is ScaleSplit.CONFIG
    assert in_config.factors() == Factors(
        c=8.0, gate=1.0, up=1.0, down=1.0, down_bias=0.125, config=8.0
    )
    down = replace(recipe, scale_split=ScaleSplit.DOWN)
    assert down.resolve(SIGMOID_TOPK, scales_in_config=True).scale_split is ScaleSplit.DOWN


def test_the_default_deviations() -> None:
    # Any router is exact for gates that sum to 1; the others must be nearly equal.
    assert DEFAULT_LOGIT_STD == {SOFTMAX_TOPK: 0.001, TOPK_SOFTMAX: 1.0, SIGMOID_TOPK: 1.0}


def test_factors_need_a_routing() -> None:
    with pytest.raises(ValueError, match="resolve the recipe first"):
        make_recipe("E8G1T2").factors()


# Factors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "routing", "c", "paper"),
    [
        ("E8G8T8", SOFTMAX_TOPK, 64.0, 4.0),
        ("E8G1T2", SOFTMAX_TOPK, 4.0, 1.5874),
        ("E8G8T8", TOPK_SOFTMAX, 8.0, 2.0),
        ("E8G1T2", TOPK_SOFTMAX, 1.0, 1.0),
    ],
)
def test_golden_values_of_the_paper(name: str, routing: Routing, c: float, paper: float) -> None:
    factors = make_recipe(name, routing, scaling=Scaling.PAPER).factors()
    assert factors.c == c
    assert factors.gate == factors.up == factors.down == pytest.approx(paper, abs=5e-5)
    if paper == round(paper):
        assert factors.gate == paper  # a cube root that is a whole number comes out as one


@pytest.mark.parametrize(
    ("name", "routing", "c", "up", "down"),
    [
        ("E8G8T8", SOFTMAX_TOPK, 64.0, 8.0, 8.0),
        ("E8G1T2", SOFTMAX_TOPK, 4.0, 2.0, 2.0),
        ("E8G1T2", TOPK_SOFTMAX, 1.0, 1.0, 1.0),
        ("E2G2T2", TOPK_SOFTMAX, 2.0, 2.0, 1.0),  # an odd exponent: the extra 2 goes to up
        ("E8G8T8", TOPK_SOFTMAX, 8.0, 4.0, 2.0),
        ("E16G1T1", SOFTMAX_TOPK, 16.0, 4.0, 4.0),
        ("E32G1T1", SOFTMAX_TOPK, 32.0, 8.0, 4.0),
        ("E3G1T1", SOFTMAX_TOPK, 3.0, 2.0, 1.5),  # otherwise one factor is a power of two
        ("E6G1T1", SOFTMAX_TOPK, 6.0, 2.0, 3.0),
        ("E12G1T1", SOFTMAX_TOPK, 12.0, 4.0, 3.0),
    ],
)
def test_exact_factors(name: str, routing: Routing, c: float, up: float, down: float) -> None:
    factors = make_recipe(name, routing).factors()
    assert factors == Factors(c=c, gate=1.0, up=up, down=down, down_bias=factors.down_bias)
    assert factors.preserve()
    assert lossless(factors) == (c in {1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0})
    all_down = make_recipe(name, routing, scale_split=ScaleSplit.DOWN).factors()
    assert (all_down.c, all_down.up, all_down.down) == (c, 1.0, c)


@pytest.mark.parametrize("routing", list(Routing))
def test_no_scaling(routing: Routing) -> None:
    factors = make_recipe("E8G8T8", routing, scaling=Scaling.NONE).factors()
    assert (factors.gate, factors.up, factors.down) == (1.0, 1.0, 1.0)
    assert factors.c == (64.0 if routing is SOFTMAX_TOPK else 8.0)
    assert lossless(factors)
    assert not factors.preserve()


def test_a_scale_of_ones_own_is_split_by_the_exact_rule() -> None:
    assert make_recipe("E8G1T2", TOPK_SOFTMAX, scaling=12.0).factors() == Factors(
        c=12.0, gate=1.0, up=4.0, down=3.0
    )


def lossless(factors: Factors) -> bool:
    return all(map(is_power_of_two, (factors.gate, factors.up, factors.down)))


@pytest.mark.parametrize("name", ["E2G2T4", "E4G3T12", "E1G5T5", "E8G1T8"])
def test_with_every_expert_chosen_both_routings_agree(name: str) -> None:
    # The softmax over all experts is then the softmax over the chosen ones.
    one, *others = (make_recipe(name, routing) for routing in Routing)
    for other in others:
        assert one.factors() == other.factors()
        assert one.promise() is other.promise() is Promise.EXACT


SIZES = st.integers(1, 64)


@given(expansion=SIZES, granularity=SIZES, groups=SIZES, routing=st.sampled_from(Routing))
def test_factors_multiply_to_c(
    expansion: int, granularity: int, groups: int, routing: Routing
) -> None:
    top_k = granularity * min(groups, expansion)
    recipe = Recipe(expansion=expansion, granularity=granularity, top_k=top_k, routing=routing)
    factors = recipe.factors()
    assert factors.c >= 1
    assert math.isclose(factors.up * factors.down, factors.c, rel_tol=1e-12)
    # Factors below 1 could lose subnormal values; only overflow is left to be refused.
    assert factors.gate == 1
    assert factors.up >= 1
    assert factors.down >= 1
    assert is_power_of_two(factors.up)
    assert 1 / 2 <= factors.up / factors.down <= 2
    assert lossless(factors) == is_power_of_two(factors.c)


@given(c=st.floats(1, 1e9))
def test_any_scale_of_at_least_one_has_factors_of_at_least_one(c: float) -> None:
    factors = make_recipe("E2G1T1", TOPK_SOFTMAX, scaling=c).factors()
    assert factors.up >= 1
    assert factors.down >= 1
    assert factors.preserve()


@given(exponent=st.integers(-30, 60))
def test_powers_of_two_split_into_powers_of_two(exponent: int) -> None:
    factors = make_recipe("E2G1T1", TOPK_SOFTMAX, scaling=2.0**exponent).factors()
    assert lossless(factors)
    assert factors.up * factors.down == 2.0**exponent
    assert factors.up / factors.down == (1.0 if exponent % 2 == 0 else 2.0)


@pytest.mark.parametrize("factor", [3.0, 1.5, 0.75, math.cbrt(4)])
def test_one_factor_that_rounds_is_not_lossless(factor: float) -> None:
    for matrix in ("gate", "up", "down"):
        values = {"gate": 1.0, "up": 2.0, "down": 0.5} | {matrix: factor}
        assert not lossless(Factors(c=1.0, **values))


@pytest.mark.parametrize(
    ("gate", "up", "down", "preserving"),
    [(1.0, 2.0, 2.0, True), (1.0, 1.0, 4.0, True), (2.0, 2.0, 2.0, False), (1.0, 2.0, 1.0, False)],
)
def test_a_gate_that_is_scaled_is_another_function(
    gate: float, up: float, down: float, *, preserving: bool
) -> None:
    assert Factors(c=4.0, gate=gate, up=up, down=down).preserve() == preserving


def is_power_of_two(value: float) -> bool:
    # By repeated halving, not as recipe.py does it.
    while value > 1:
        value /= 2
    return value == 1


# Other MLPs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "c", "paper", "exact"),
    [
        ("E8G8T8", 64.0, 4.0, (4.0, 4.0)),  # the paper's own case, in which both are the same
        ("E8G1T2", 4.0, 1.5874, (2.0, 1.0)),
        ("E2G1T1", 2.0, 1.2599, (1.0, 2.0)),
        ("E3G1T1", 3.0, 1.4422, (1.4422, 1.4422)),  # no powers of two make it
    ],
)
def test_golden_factors_of_a_squared_relu(
    name: str, c: float, paper: float, exact: tuple[float, float]
) -> None:
    factors = make_recipe(name, SOFTMAX_TOPK, scaling=Scaling.PAPER).factors(RELU2)
    assert (factors.c, factors.gate) == (c, 1.0)
    assert (round(factors.up, 4), round(factors.down, 4)) == (paper, paper)
    assert factors.preserve(RELU2)
    assert not factors.preserve() or c == 1  # a gated one is linear in up
    factors = make_recipe(name, SOFTMAX_TOPK).factors(RELU2)
    assert (round(factors.up, 4), round(factors.down, 4)) == exact
    assert factors.preserve(RELU2)


@given(exponent=st.integers(0, 30), degree=st.integers(0, 2))
def test_powers_of_two_are_lossless_for_every_kind(exponent: int, degree: int) -> None:
    kind = MlpKind(gated=False, degree=degree)
    factors = make_recipe("E2G1T1", TOPK_SOFTMAX, scaling=2.0**exponent).factors(kind)
    assert lossless(factors)
    assert factors.preserve(kind)
    assert min(factors.up, factors.down) >= 1
    if degree:
        assert 1 / 4 < factors.up / factors.down < 4


def test_an_activation_of_no_degree_leaves_up_alone() -> None:
    gelu = MlpKind(gated=False, degree=0)
    exact = make_recipe("E8G8T8", TOPK_SOFTMAX)
    assert exact.factors(gelu) == Factors(c=8.0, gate=1.0, up=1.0, down=8.0)
    assert exact.promise(gelu) is Promise.EXACT
    paper = replace(exact, scaling=Scaling.PAPER)
    assert paper.factors(gelu).up == paper.factors(gelu).down == math.sqrt(8)
    assert paper.promise(gelu) is Promise.NONE


@pytest.mark.parametrize("kind", [RELU2, MlpKind(gated=False, degree=1)])
def test_the_papers_scaling_is_exact_where_everything_scales(kind: MlpKind) -> None:
    recipe = make_recipe("E8G8T8", TOPK_SOFTMAX, scaling=Scaling.PAPER)
    assert recipe.promise(kind) is Promise.EXACT
    assert recipe.promise() is Promise.NONE


@pytest.mark.parametrize(
    ("routing", "settings", "factor"),
    [
        (TOPK_SOFTMAX, {}, 1.0),
        (SIGMOID_TOPK, {"scale_split": ScaleSplit.CONFIG}, 1 / 8),
        (SOFTMAX_TOPK, {}, 8.0),  # E·G/T
        (SOFTMAX_TOPK, {"scaling": Scaling.PAPER}, 8.0),
        (SOFTMAX_TOPK, {"scaling": Scaling.NONE}, 1.0),
    ],
)
def test_a_down_bias_is_added_once_a_chosen_expert(
    routing: Routing, settings: dict[str, Any], factor: float
) -> None:
    assert make_recipe("E8G8T8", routing, **settings).factors(RELU2).down_bias == factor


# Promises ----------------------------------------------------------------------------------------


def shard_weights(recipe: Recipe, logit_std: float, seed: int) -> list[float]:
    """What a token gets of each shard of the dense MLP, in units of what the dense model gives.

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


def all_recipes() -> list[Recipe]:
    recipes = []
    for expansion, granularity in itertools.product((1, 2, 3, 4), (1, 2, 3)):
        for top_k, routing, scaling, split, grouped in itertools.product(
            range(1, expansion * granularity + 1),
            Routing,
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
            recipes.append(recipe)
    return recipes


def test_every_promise_is_kept_and_none_is_withheld() -> None:
    """For every combination, against a simulation of what a token gets."""
    seen = set()
    for recipe in all_recipes():
        preserved = recipe.factors().gate == 1  # a gated MLP is not linear in its gate
        exact = preserved and deviation(recipe, 1.0) < 1e-9
        approximate = preserved and deviation(recipe, 1e-7) < 1e-6
        promise = recipe.promise()
        seen.add(promise)
        match promise:
            case Promise.EXACT:
                assert exact, recipe
            case Promise.APPROXIMATE:
                assert approximate, recipe
                assert not exact, recipe
            case Promise.NONE if recipe.virtual_groups or recipe.granularity == 1:
                assert not approximate, recipe
            case Promise.NONE:
                # Without groups a token gets whole MLPs only by choosing all experts, and then
                # not exactly; nothing is promised there.
                assert not exact, recipe
    assert seen == set(Promise)


@pytest.mark.parametrize(
    ("settings", "promise"),
    [
        ({"routing": TOPK_SOFTMAX}, Promise.EXACT),
        ({"routing": SOFTMAX_TOPK}, Promise.APPROXIMATE),
        ({"routing": TOPK_SOFTMAX, "scale_split": ScaleSplit.DOWN}, Promise.EXACT),
        ({"routing": TOPK_SOFTMAX, "scaling": 8.0}, Promise.EXACT),
        ({"routing": SOFTMAX_TOPK, "scaling": 64.0}, Promise.APPROXIMATE),
        ({"routing": TOPK_SOFTMAX, "scaling": 8.1}, Promise.NONE),
        ({"routing": TOPK_SOFTMAX, "scaling": Scaling.PAPER}, Promise.NONE),
        ({"routing": TOPK_SOFTMAX, "scaling": Scaling.NONE}, Promise.NONE),
        ({"routing": TOPK_SOFTMAX, "virtual_groups": False}, Promise.NONE),
        ({"routing": TOPK_SOFTMAX, "top_k": 4, "allow_inexact": True}, Promise.NONE),
    ],
)
def test_promises_of_e8g8t8(settings: dict[str, Any], promise: Promise) -> None:
    recipe = Recipe(**{"expansion": 8, "granularity": 8, "top_k": 8} | settings)
    assert recipe.promise() is promise
