"""Each warning where it is due, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from shapes import hollow_plan

from upcycle_cli import Options, Recipe, build_plan, open_checkpoint
from upcycle_cli.checkpoint.made import Dequantize, Source
from upcycle_cli.plan.expressions import Scale
from upcycle_cli.plan.facts import vanished_weights, warnings
from upcycle_cli.plan.plan import Plan
from upcycle_cli.recipe.recipe import Routing, ScaleSplit, Scaling

if TYPE_CHECKING:
    from conftest import MakeDense

SOFTMAX_TOPK, TOPK_SOFTMAX, SIGMOID_TOPK = Routing
HALF, FULL = Options(dtype="float16"), Options(dtype="float32")
MakePlan = Callable[..., Plan]

NO_PROMISE = "promises no equality with the dense model"
NO_GRADIENT = "gives the router no gradient"
UNBALANCED = "no loss that balances the experts"
NOTHING_TO_ROUTE = "there is nothing to route between"
APPROXIMATE = "equals the dense model only up to the router's logits"
SPLITS = "training split virtual groups"
TIES = "the softmax rounds different groups to the same value"
ENGINE = "computes something else"
WRONG = "loads, computes something else"
OTHER = f"{WRONG} with topk-softmax routing. With `--target mixtral` it computes the same"
OVERFLOW = "overflows above 65504"
NARROW_ROWS = "needs multiples of 16"
ROUNDED_C = "is not a power of two"
NOISE = "rounds most of a noise"
ALL = (
    *(ROUNDED_C, OVERFLOW, NARROW_ROWS, NO_PROMISE, NO_GRADIENT, NOTHING_TO_ROUTE, APPROXIMATE),
    *(SPLITS, TIES, ENGINE, NOISE, UNBALANCED),
)


@pytest.fixture
def plan(tmp_path: Path) -> MakePlan:
    def make(*recipe: Any, config: Mapping[str, Any] | None = None, **settings: Any) -> Plan:  # noqa: ANN401
        sizes = {"intermediate_size": 96, **(config or {})}
        return hollow_plan(tmp_path, *recipe, config=sizes, **settings)

    return make


def kinds(plan: Plan) -> list[str]:
    """Return which warnings a plan gets, in order; each must be a known one."""
    found = []
    for text in warnings(plan):
        (kind,) = [known for known in ALL if known in text]
        found.append(kind)
    return found


DUE: list[tuple[str, dict[str, Any], list[str]]] = [
    ("E8G1T2", {}, []),
    ("E4G4T16", {"model_type": "qwen3"}, []),
    ("E4G2T4", {"scale_split": ScaleSplit.DOWN, "router_logit_std": 1e-6}, []),
    # Scaling that the routing does not need keeps the promise.
    ("E4G1T2", {"scaling": Scaling.PAPER}, []),
    ("E4G2T4", {"scaling": 2.0}, []),
    ("E8G1T1", {}, [NO_GRADIENT]),
    ("E4G4T4", {}, [NO_GRADIENT]),
    ("E1G4T4", {}, [NOTHING_TO_ROUTE]),
    # Without groups the gates of the chosen experts differ, unless one alone is chosen.
    ("E4G4T4", {"virtual_groups": False}, [NO_PROMISE]),
    ("E4G1T1", {"virtual_groups": False}, [NO_GRADIENT]),
    ("E8G1T2", {"routing": SOFTMAX_TOPK}, [APPROXIMATE]),
    ("E4G4T4", {"routing": SOFTMAX_TOPK}, [SPLITS, APPROXIMATE]),
    ("E4G2T8", {"routing": SOFTMAX_TOPK}, []),  # every expert is chosen: exact
    ("E8G1T2", {"routing": SOFTMAX_TOPK, "router_logit_std": 0.05}, [APPROXIMATE]),
    ("E8G1T2", {"routing": SOFTMAX_TOPK, "router_logit_std": 0.06}, [NO_PROMISE]),
    # Ties of whole experts do no harm, nor do ties of gates that sum to one.
    ("E4G4T4", {"routing": SOFTMAX_TOPK, "router_logit_std": 9e-4}, [SPLITS, APPROXIMATE, TIES]),
    ("E8G1T2", {"routing": SOFTMAX_TOPK, "router_logit_std": 1e-6}, [APPROXIMATE]),
    ("E8G2T4", {"options": HALF}, [OVERFLOW]),
    ("E8G1T2", {"options": HALF}, []),  # c = 1
    ("E2G16T32", {}, [NARROW_ROWS]),
    ("E2G4T8", {}, []),  # 24 wide: 48 bytes in bfloat16
    # A factor that is no power of two rounds the experts.
    ("E2G3T6", {}, [ROUNDED_C]),
    ("E2G3T6", {"target": "glm4_moe", "scale_split": ScaleSplit.BALANCED}, [UNBALANCED, ROUNDED_C]),
    ("E2G3T6", {"target": "glm4_moe"}, [UNBALANCED]),
    ("E2G3T6", {"options": FULL}, []),
    ("E2G3T4", {"target": "qwen2_moe", "shared_experts": 1}, []),
    ("E8G1T2", {"noise": 1e-4}, [NO_PROMISE, NOISE]),
    ("E8G1T2", {"noise": 1e-2}, [NO_PROMISE]),
    (
        "E4G4T4",
        {"routing": SOFTMAX_TOPK, "model_type": "qwen3", "router_logit_std": 1e-5, "options": HALF},
        [SPLITS, APPROXIMATE, TIES, OVERFLOW, ENGINE],  # the most important first
    ),
]


@pytest.mark.parametrize(("recipe", "settings", "due"), DUE, ids=str)
def test_warn_where_it_is_due(
    plan: MakePlan, recipe: str, settings: dict[str, Any], due: list[str]
) -> None:
    made = plan(recipe, **settings)
    assert kinds(made) == due
    if NO_PROMISE in due:
        assert next(warnings(made)).endswith(f"{made.why_no_promise}.")


@pytest.mark.parametrize(
    ("recipe", "settings", "words", "said"),
    [
        ("E8G4T4", {}, "Use a top-k of 8 or more", True),
        # Tying is advised where it was measured to help.
        ("E4G4T4", {}, "tie virtual groups", True),
        ("E4G4T8", {}, "tie virtual groups", False),
        ("E4G4T4", {"target": "upcycled"}, "tie virtual groups", False),
        # A routing that the target lacks is no remedy.
        ("E4G4T4", {"target": "qwen2_moe", "routing": TOPK_SOFTMAX}, "or softmax-topk", True),
        ("E4G4T4", {"target": "mixtral"}, "or softmax-topk", False),
    ],
)
def test_remedies(
    plan: MakePlan, recipe: str, settings: dict[str, Any], words: str, *, said: bool
) -> None:
    assert (words in " ".join(warnings(plan(recipe, **settings)))) is said


@pytest.mark.parametrize(
    ("model_type", "target", "routing", "found"),
    [
        ("llama", "mixtral", TOPK_SOFTMAX, {}),
        ("llama", "qwen2_moe", TOPK_SOFTMAX, dict.fromkeys(("llama.cpp", "MLX"), OTHER)),
        ("qwen3", "qwen3_moe", SOFTMAX_TOPK, {"llama.cpp": f"{WRONG} with softmax-topk routing"}),
        ("youtu", "deepseek_v3", SIGMOID_TOPK, {"vLLM": f"{WRONG} on a CPU with plain attention"}),
        ("nemotron_h", "nemotron_h", SIGMOID_TOPK, {"mergekit": "gives back other tensors"}),
    ],
)
def test_name_the_engines_that_go_wrong(
    make_dense: MakeDense, model_type: str, target: str, routing: Routing, found: dict[str, str]
) -> None:
    recipe = Recipe("E4G2T4", routing=routing)
    made = [*warnings(build_plan(recipe, open_checkpoint(make_dense(model_type)), target=target))]
    starts = tuple(f" with {target}{words}: " for words in ("", f" and {routing}"))
    said = [text for text in made if any(start in text for start in starts)]
    for text, (name, words) in zip(said, found.items(), strict=True):
        where = target if " with " in words else f"{target} and {routing}"
        assert text.startswith(f"{name} with {where}: {words}.")


@pytest.mark.parametrize(("count", "warns"), [(1, False), (400, True)])
def test_vanished_weights_that_are_computed(count: int, *, warns: bool) -> None:
    """Scales, which are few, do not count."""
    weight, scale = Source("up", "F8_E4M3", (100, 100)), Source("up_scale", "F32", (1, 1))
    expr = Scale(Dequantize(weight, scale, (100, 100), "F16"), 0.5)
    found = vanished_weights({expr: count})
    assert (found is not None) == warns
    assert not warns or str(found).startswith("4 % of up is too small for float16")
