"""The factors on an MLP's matrices and biases, for every routing and kind of MLP."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upcycle_cli import Recipe
from upcycle_cli.recipe.recipe import Promise, Routing, ScaleSplit, Scaling
from upcycle_cli.recipe.scaling import Factors, MlpKind

SOFTMAX_TOPK, TOPK_SOFTMAX, SIGMOID_TOPK = Routing
RELU2, GELU = MlpKind(gated=False, degree=2), MlpKind(gated=False, degree=0)
SIZES = st.integers(1, 64)


def is_power_of_two(value: float) -> bool:
    return value.hex().startswith("0x1.0000000000000p")


def lossless(factors: Factors) -> bool:
    return all(map(is_power_of_two, (factors.gate, factors.up, factors.down)))


@pytest.mark.parametrize(
    ("name", "routing", "c", "up", "down"),
    [
        ("E8G8T8", SOFTMAX_TOPK, 64.0, 8.0, 8.0),
        ("E8G1T2", SOFTMAX_TOPK, 4.0, 2.0, 2.0),
        ("E8G1T2", TOPK_SOFTMAX, 1.0, 1.0, 1.0),
        ("E2G2T2", TOPK_SOFTMAX, 2.0, 2.0, 1.0),  # an odd exponent: up gets the extra 2
        ("E8G8T8", TOPK_SOFTMAX, 8.0, 4.0, 2.0),
        ("E32G1T1", SOFTMAX_TOPK, 32.0, 8.0, 4.0),
        ("E3G1T1", SOFTMAX_TOPK, 3.0, 2.0, 1.5),  # else one factor is a power of two
        ("E6G1T1", SOFTMAX_TOPK, 6.0, 2.0, 3.0),
        ("E12G1T1", SOFTMAX_TOPK, 12.0, 4.0, 3.0),
    ],
)
def test_exact_factors(name: str, routing: Routing, c: float, up: float, down: float) -> None:
    factors = Recipe(name, routing=routing).factors()
    assert (factors.c, factors.gate, factors.up, factors.down) == (c, 1.0, up, down)
    assert factors.preserve()
    all_down = Recipe(name, routing=routing, scale_split=ScaleSplit.DOWN).factors()
    assert (all_down.c, all_down.up, all_down.down) == (c, 1.0, c)


@pytest.mark.parametrize("name", ["E2G2T4", "E4G3T12", "E1G5T5", "E8G1T8"])
def test_all_routings_agree_when_every_expert_is_chosen(name: str) -> None:
    one, *others = (Recipe(name, routing=routing) for routing in Routing)
    for other in others:
        assert one.factors() == other.factors()
        assert one.promise(one.factors()) == other.promise(other.factors()) == (Promise.EXACT, "")


@given(expansion=SIZES, granularity=SIZES, groups=SIZES, routing=st.sampled_from(Routing))
def test_factors_multiply_to_c(
    expansion: int, granularity: int, groups: int, routing: Routing
) -> None:
    top_k = granularity * min(groups, expansion)
    recipe = Recipe(expansion=expansion, granularity=granularity, top_k=top_k, routing=routing)
    factors = recipe.factors()
    assert math.isclose(factors.up * factors.down, factors.c, rel_tol=1e-12)
    # Factors below 1 could lose subnormal values; overflow is refused.
    assert factors.gate == 1
    assert min(factors.up, factors.down) >= 1
    assert is_power_of_two(factors.up)
    assert 1 / 2 <= factors.up / factors.down <= 2
    assert lossless(factors) == is_power_of_two(factors.c)


@given(exponent=st.integers(0, 30), degree=st.integers(0, 2))
def test_powers_of_two_are_lossless_for_every_kind(exponent: int, degree: int) -> None:
    kind = MlpKind(gated=False, degree=degree)
    factors = Recipe("E2G1T1", routing=TOPK_SOFTMAX, scaling=2.0**exponent).factors(kind)
    assert lossless(factors)
    assert factors.preserve(kind)
    assert min(factors.up, factors.down) >= 1
    if degree:
        assert 1 / 4 < factors.up / factors.down < 4


@pytest.mark.parametrize(
    ("name", "c", "paper", "exact"),
    [
        ("E8G8T8", 64.0, 4.0, (4.0, 4.0)),  # the paper's case, where both are the same
        ("E8G1T2", 4.0, 1.5874, (2.0, 1.0)),
        ("E2G1T1", 2.0, 1.2599, (1.0, 2.0)),
        ("E3G1T1", 3.0, 1.4422, (1.4422, 1.4422)),  # no powers of two make it
    ],
)
def test_factors_of_a_squared_relu(
    name: str, c: float, paper: float, exact: tuple[float, float]
) -> None:
    factors = Recipe(name, routing=SOFTMAX_TOPK, scaling=Scaling.PAPER).factors(RELU2)
    assert (factors.c, factors.gate) == (c, 1.0)
    assert (round(factors.up, 4), round(factors.down, 4)) == (paper, paper)
    assert factors.preserve(RELU2)
    assert not factors.preserve()  # a gated MLP is linear in up
    factors = Recipe(name, routing=SOFTMAX_TOPK).factors(RELU2)
    assert (round(factors.up, 4), round(factors.down, 4)) == exact
    assert factors.preserve(RELU2)


def test_an_activation_that_is_not_homogeneous_leaves_up_alone() -> None:
    exact = Recipe("E8G8T8", routing=TOPK_SOFTMAX)
    assert exact.factors(GELU) == Factors(c=8.0, gate=1.0, up=1.0, down=8.0)
    assert exact.promise(exact.factors(GELU), GELU)[0] is Promise.EXACT
    paper = replace(exact, scaling=Scaling.PAPER)
    assert paper.factors(GELU).up == paper.factors(GELU).down == math.sqrt(8)
    assert paper.promise(paper.factors(GELU), GELU)[0] is Promise.NONE
    assert paper.promise(paper.factors(RELU2), RELU2)[0] is Promise.EXACT
    assert paper.promise(paper.factors())[0] is Promise.NONE
