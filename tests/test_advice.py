"""Each warning where it is due, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import LAYOUTS, MakeDense
from shapes import make_recipe, tiny_config, write_hollow

from upcycle_cli import Options, build_plan, open_checkpoint
from upcycle_cli.plan.facts import why_no_promise
from upcycle_cli.plan.plan import Plan
from upcycle_cli.plan.warnings import warnings
from upcycle_cli.recipe.recipe import ExpertLayout, Routing, ScaleSplit, Scaling

TOPK_SOFTMAX, SOFTMAX_TOPK = Routing.TOPK_SOFTMAX, Routing.SOFTMAX_TOPK
Advise = Callable[..., list[str]]

NO_PROMISE = "promises no equality with the dense model"
NO_GRADIENT = "gives the router no gradient"
NOTHING_TO_ROUTE = "there is nothing to route between"
APPROXIMATE = "equals the dense model only up to the router's logits"
SPLITS = "training split virtual groups"
TIES = "the softmax rounds different groups to the same value"
FLOAT16 = "lose precision in float16"
ENGINE = "but computes something else"
OVERFLOW = "can exceed 65504"
NARROW_ROWS = "needs multiples of 16"
ROUNDED_C = "is no power of two"
ALL = (
    ROUNDED_C,
    OVERFLOW,
    NARROW_ROWS,
    NO_PROMISE,
    NO_GRADIENT,
    NOTHING_TO_ROUTE,
    APPROXIMATE,
    SPLITS,
    TIES,
    FLOAT16,
    ENGINE,
)


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., Plan]:
    def make(
        recipe: str,
        routing: Routing | None = None,
        *,
        model_type: str = "llama",
        target: str = "auto",
        options: Options | None = None,
        config: dict[str, Any] | None = None,
        **settings: Any,  # noqa: ANN401
    ) -> Plan:
        sizes = tiny_config(model_type, **({"intermediate_size": 96} | (config or {})))
        source = open_checkpoint(write_hollow(tmp_path / "dense", sizes))
        wanted = make_recipe(recipe, routing, **settings)
        return build_plan(wanted, source, target=target, options=options)

    return make


@pytest.fixture
def advise(plan: Callable[..., Plan]) -> Advise:
    """Return which of the warnings a plan gets, in order; each must be one that is known."""

    def kinds(*arguments: Any, **settings: Any) -> list[str]:  # noqa: ANN401
        found = []
        for text in warnings(plan(*arguments, **settings)):
            (kind,) = [known for known in ALL if known in text]
            found.append(kind)
        return found

    return kinds


def test_nothing_to_say(advise: Advise) -> None:
    for recipe in ("E8G1T2", "E4G2T4", "E4G4T16"):
        assert advise(recipe) == []
        assert advise(recipe, model_type="qwen3") == []
    assert advise("E4G2T4", scale_split=ScaleSplit.DOWN, seed=3, router_logit_std=1e-6) == []


@pytest.mark.parametrize(
    ("recipe", "settings", "why"),
    [
        ("E4G4T6", {"allow_inexact": True}, "top-k 6 is not a multiple of G = 4"),
        (
            "E4G2T4",
            {"virtual_groups": False},
            "without virtual groups a token does not get every shard of the dense MLP",
        ),
        ("E4G4T8", {"scaling": Scaling.PAPER}, "scaling paper does not preserve"),
        ("E4G2T4", {"scaling": Scaling.NONE}, "scaling none does not preserve"),
        ("E4G2T4", {"scaling": 3.0}, "the experts are scaled by 3 in all"),
    ],
)
def test_no_promise(
    advise: Advise, plan: Callable[..., Plan], recipe: str, settings: dict[str, Any], why: str
) -> None:
    assert advise(recipe, **settings) == [NO_PROMISE]
    made = plan(recipe, **settings)
    assert why in why_no_promise(made)
    assert next(warnings(made)).startswith(f"{made.recipe.name} promises")
    assert why in next(warnings(made))


def test_scaling_that_the_routing_does_not_need_is_kept_promise(advise: Advise) -> None:
    assert advise("E4G1T2", scaling=Scaling.PAPER) == []  # c = 1, so every factor is 1
    assert advise("E4G1T2", scaling=Scaling.NONE) == []
    assert advise("E4G2T4", scaling=2.0) == []  # what the exact rule would give


@pytest.mark.parametrize("recipe", ["E8G1T1", "E4G4T4"])
def test_one_group_gives_the_router_no_gradient(advise: Advise, recipe: str) -> None:
    assert advise(recipe) == [NO_GRADIENT]


@pytest.mark.parametrize(
    ("recipe", "target", "tied"),
    [
        ("E8G1T1", "auto", False),
        ("E4G4T4", "auto", True),
        ("E4G4T8", "auto", False),
        ("E4G4T4", "upcycled", False),
    ],
)
def test_tying_is_advised_where_it_was_measured_to_help(
    plan: Callable[..., Plan], recipe: str, target: str, *, tied: bool
) -> None:
    text = " ".join(warnings(plan(recipe, target=target)))
    assert ("Tie virtual groups" in text) is tied


def test_the_remedy_for_no_gradient_is_twice_the_granularity(plan: Callable[..., Plan]) -> None:
    (text,) = warnings(plan("E8G4T4"))
    assert "With a top-k of 8 or more" in text


@pytest.mark.parametrize(("target", "able"), [("qwen2_moe", True), ("mixtral", False)])
def test_a_routing_that_the_target_lacks_is_no_remedy(
    plan: Callable[..., Plan], target: str, *, able: bool
) -> None:
    text = " ".join(warnings(plan("E4G4T4", Routing.TOPK_SOFTMAX, target=target)))
    assert ("softmax-topk from the start" in text) is able


def test_one_group_in_all(advise: Advise) -> None:
    assert advise("E1G4T4") == [NOTHING_TO_ROUTE]
    assert advise("E1G1T1") == [NOTHING_TO_ROUTE]


def test_without_groups_the_router_has_its_gradient(advise: Advise) -> None:
    """The gates of the chosen experts differ then, unless one alone is chosen."""
    assert advise("E4G4T4", virtual_groups=False) == [NO_PROMISE]
    assert advise("E1G4T4", virtual_groups=False) == [NO_PROMISE]
    assert advise("E4G1T1", virtual_groups=False) == [NO_GRADIENT]


def test_softmax_topk_is_approximate(advise: Advise) -> None:
    assert advise("E8G1T2", SOFTMAX_TOPK) == [APPROXIMATE]
    assert advise("E4G4T4", SOFTMAX_TOPK) == [SPLITS, APPROXIMATE]
    # The code that is shipped keeps groups whole by itself.
    assert advise("E4G4T4", SOFTMAX_TOPK, target="upcycled") == [APPROXIMATE]
    assert advise("E4G2T8", SOFTMAX_TOPK) == []  # every expert is chosen: exact
    assert advise("E8G1T2", SOFTMAX_TOPK, scaling=Scaling.NONE) == [NO_PROMISE]


def test_the_deviation_is_in_the_words(plan: Callable[..., Plan]) -> None:
    (text,) = warnings(plan("E8G1T2", SOFTMAX_TOPK, router_logit_std=0.03))
    assert "(std 0.03)" in text


def test_large_logits_promise_nothing(advise: Advise, plan: Callable[..., Plan]) -> None:
    assert advise("E8G1T2", SOFTMAX_TOPK, router_logit_std=0.05) == [APPROXIMATE]
    assert advise("E8G1T2", SOFTMAX_TOPK, router_logit_std=0.06) == [NO_PROMISE]
    (text,) = warnings(plan("E8G1T2", SOFTMAX_TOPK, router_logit_std=1.0))
    assert "standard deviation 1 the gates are far from equal" in text


def test_a_wrong_scale_is_the_reason_when_the_logits_are_small(plan: Callable[..., Plan]) -> None:
    made = plan("E8G1T2", SOFTMAX_TOPK, scaling=3.0)
    assert why_no_promise(made).startswith("the experts are scaled by 3 in all")


def test_scaled_experts_in_float16_can_overflow(advise: Advise) -> None:
    half = Options(dtype="float16")
    assert advise("E8G2T4", options=half) == [OVERFLOW]
    assert advise("E8G1T2", options=half) == []  # c = 1
    assert advise("E8G2T4", options=Options(dtype="float32")) == []


@pytest.mark.parametrize(
    ("how", "remedy"),
    [
        ({}, "and the config of glm4_moe, solar_open or upcycled holds c itself"),
        ({"target": "qwen2_moe", "shared_experts": 3, "recipe": "E2G6T6"}, "of glm4_moe or solar"),
        ({"target": "glm4_moe", "scale_split": ScaleSplit.BALANCED}, "--scale-split config"),
        ({"target": "glm4_moe"}, None),
        ({"options": Options(dtype="float32")}, None),
        ({"target": "qwen2_moe", "shared_experts": 1, "recipe": "E2G3T4"}, None),
    ],
    ids=str,
)
def test_a_factor_that_rounds_the_experts(
    plan: Callable[..., Plan], how: dict[str, Any], remedy: str | None
) -> None:
    settings = {"recipe": "E2G3T6"} | how
    routing = None if settings.get("target") == "glm4_moe" else TOPK_SOFTMAX
    found = [text for text in warnings(plan(routing=routing, **settings)) if ROUNDED_C in text]
    assert len(found) == (remedy is not None)
    assert all("c = 3 " in text and "--dtype float32" in text for text in found)
    assert all(str(remedy) in text for text in found)


def test_rows_that_the_grouped_product_refuses(advise: Advise) -> None:
    assert advise("E2G16T32") == [NARROW_ROWS]
    assert advise("E2G4T8") == []  # 24 wide: 48 bytes in bfloat16
    assert advise("E2G16T32", options=Options(dtype="float32")) == []


@pytest.mark.parametrize(
    ("recipe", "std", "ties"),
    [
        ("E4G4T4", 1e-3, False),  # the default
        ("E4G4T4", 9.9e-4, True),
        ("E4G4T4", 1e-6, True),
        ("E8G1T2", 1e-6, False),  # a tie of whole experts does no harm
    ],
)
def test_ties(advise: Advise, recipe: str, std: float, *, ties: bool) -> None:
    found = advise(recipe, SOFTMAX_TOPK, router_logit_std=std)
    assert (TIES in found) == ties
    assert {*found} <= {SPLITS, APPROXIMATE, TIES}


def test_gates_that_sum_to_one_do_not_tie(advise: Advise) -> None:
    assert advise("E4G4T8", TOPK_SOFTMAX, router_logit_std=1e-6) == []


# Rows have a deviation of about std / √H; below 2⁻¹⁴ float16 is subnormal. H = 16: std 2⁻¹².
@pytest.mark.parametrize(
    ("std", "dtype", "due"),
    [
        (2.0**-12, "float16", False),
        (2.0**-12 * 0.99, "float16", True),
        (1e-5, "float16", True),
        (1e-5, "bfloat16", False),
        (1e-5, "float32", False),
        (1e-5, None, False),
    ],
)
def test_float16(advise: Advise, std: float, dtype: str | None, *, due: bool) -> None:
    found = advise(
        "E8G1T2",
        router_logit_std=std,
        options=Options(dtype=dtype),
        config={"hidden_size": 16},
    )
    assert found == ([FLOAT16] if due else [])


@pytest.mark.parametrize(
    ("model_type", "target", "routing", "engines"),
    [
        ("llama", "mixtral", TOPK_SOFTMAX, []),
        ("llama", "qwen2_moe", SOFTMAX_TOPK, []),
        ("llama", "qwen2_moe", TOPK_SOFTMAX, ["llama.cpp", "MLX"]),
        ("qwen2", "qwen2_moe", TOPK_SOFTMAX, ["llama.cpp", "MLX"]),
        ("qwen3", "qwen3_moe", TOPK_SOFTMAX, []),
        ("qwen3", "qwen3_moe", SOFTMAX_TOPK, ["llama.cpp"]),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_engines_that_compute_something_else(
    plan: Callable[..., Plan],
    model_type: str,
    target: str,
    routing: Routing,
    engines: list[str],
    layout: ExpertLayout,
) -> None:
    made = plan(
        "E4G2T4",
        routing,
        model_type=model_type,
        target=target,
        options=Options(expert_layout=layout),
    )
    assert [text for text in warnings(made) if ENGINE in text] == [
        f"{name} loads {target} with {routing} but computes something else." for name in engines
    ]


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("youtu", "vLLM loads deepseek_v3 with sigmoid-topk but computes something else on a CPU"),
        ("nemotron_h", "mergekit saves nemotron_h with other tensors"),
    ],
)
def test_what_goes_wrong_of_whoever_made_the_model_is_said(
    make_dense: MakeDense, model_type: str, words: str
) -> None:
    made = build_plan(make_recipe("E4G2T4"), open_checkpoint(make_dense(model_type)))
    (found,) = (text for text in warnings(made) if words in text)
    assert found.endswith(".")


def test_the_most_important_comes_first(advise: Advise) -> None:
    found = advise(
        "E4G4T4",
        SOFTMAX_TOPK,
        model_type="qwen3",
        router_logit_std=1e-5,
        options=Options(dtype="float16"),
    )
    assert found == [SPLITS, APPROXIMATE, TIES, OVERFLOW, FLOAT16, ENGINE]
