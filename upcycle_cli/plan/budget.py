"""Which recipes fit a budget of parameters, active parameters and GPU memory.

Sizes are affine in E, so two plans for each granularity give the sizes of all recipes. Memory
counts the parameters alone: a KV cache and activations need more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.plan.output import Options
from upcycle_cli.plan.plan import Plan
from upcycle_cli.plan.upcycle import build_plan
from upcycle_cli.recipe.recipe import Recipe, Routing

TRAINING_BYTES_PER_PARAMETER = 16
"""A parameter in training with AdamW: weight and gradient in bfloat16, and the master weight and
both moments in float32 (2 + 2 + 4 + 4 + 4)."""
_EXPANSIONS = (2, 4, 8, 16, 32, 64)
_GRANULARITIES = (1, 2, 4, 8, 16)
_GROUPS_CHOSEN = (1, 2, 4)
_MOST_EXPERTS = 256
_MOST_EXPERTS_THAT_HELPED = 64
_LARGEST_EXPANSION_MEASURED = 8
_BEST_GROUPS_CHOSEN = 2


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The limits of a model; None for a size without one."""

    max_params: int | None = None
    max_active: int | None = None
    gpu_bytes: int | None = None
    """The memory of all GPUs together, which bfloat16 weights must fit."""

    def allows(self, fit: SizedRecipe) -> bool:
        """Whether a recipe's sizes are within every limit."""
        sizes = (fit.total_parameters, fit.active_parameters, fit.weight_bytes)
        limits = (self.max_params, self.max_active, self.gpu_bytes)
        return all(most is None or size <= most for size, most in zip(sizes, limits, strict=True))


@dataclass(frozen=True, kw_only=True)
class SizedRecipe:
    """A recipe and its costs."""

    recipe: Recipe
    target: str
    """The target that the sizes are for."""
    total_parameters: int
    active_parameters: int
    flops_per_token: int
    """As `Plan.flops_per_token`."""
    flops_ratio: float
    """FLOPs per token as a multiple of the dense model's."""
    trains: bool | None
    """Whether training fits the GPUs' memory; None without a limit."""

    @property
    def weight_bytes(self) -> int:
        """The size of its weights in bfloat16."""
        return 2 * self.total_parameters

    @property
    def training_bytes(self) -> int:
        """The memory of training with AdamW, without activations."""
        return TRAINING_BYTES_PER_PARAMETER * self.total_parameters

    @property
    def warnings(self) -> dict[str, str]:
        """Why it may train badly: a short name for each reason, and a sentence; mildest first."""
        recipe = self.recipe
        size = "G - K" if recipe.shared_experts else "G"
        blind = (
            ""
            if recipe.routing is Routing.SOFTMAX_TOPK
            else "The language-model loss gives the router no gradient between groups, so only "
            "load balancing trains it. "
        )
        found = {
            "N > 64": (
                recipe.num_experts > _MOST_EXPERTS_THAT_HELPED,
                "The paper found no gain above 64 experts, and 256 were worse.",
            ),
            f"T = {size}": (
                recipe.rows_chosen == 1,
                f"{blind}Recipe E8G8T8 ended worse than continued dense training in our study of "
                "a tiny model, and better in the paper (15B parameters, 1T tokens).",
            ),
            "T = N": (
                recipe.top_k == recipe.num_experts,
                "Every token uses every expert, so there is nothing to route.",
            ),
        }
        return {name: text for name, (applies, text) in found.items() if applies}

    @property
    def rank(self) -> tuple[object, ...]:
        """The place among other recipes: the best has the lowest rank.

        What can be trained comes first, then what was measured. The recipes that beat continued
        dense training in our study (E8G8T16, E8G1T2, E4G4T8) and in the paper (E8G1T2) have T = 2G
        and at most E = 8. T = 4G costs twice as much; T = G ended worse than dense in our study.
        Finer experts gained 0.006 there, and nothing after 1T tokens in the paper, so a small G
        comes first.
        """
        recipe, groups = self.recipe, self.recipe.rows_chosen
        return (
            self.trains is False,
            recipe.top_k == recipe.num_experts,
            groups == 1,
            recipe.num_experts > _MOST_EXPERTS_THAT_HELPED,
            groups != _BEST_GROUPS_CHOSEN,
            recipe.expansion > _LARGEST_EXPANSION_MEASURED,
            abs(recipe.expansion - _LARGEST_EXPANSION_MEASURED),
            recipe.granularity,
        )


def fitting(
    source: Checkpoint,
    budget: Budget,
    *,
    target: str = "auto",
    options: Options | None = None,
    **common: Any,  # noqa: ANN401 - the fields of a Recipe except E, G and T
) -> tuple[SizedRecipe, ...]:
    """Return the recipes within a budget, the best first (see `SizedRecipe.rank`).

    E and G are powers of two, a token chooses 1, 2 or 4 whole groups, and a layer has at most 256
    experts. Raises UpcycleError when none fits, and as `build_plan` does.
    """
    plans = _plans(source, common, target=target, options=options)
    candidates = [fit for two, four in plans for fit in _fits(two, four, budget)]
    found = sorted(filter(budget.allows, candidates), key=lambda fit: fit.rank)
    if not found:
        smallest = min(candidates, key=lambda fit: (fit.total_parameters, fit.active_parameters))
        raise UpcycleError(
            f"no recipe fits: the smallest, {smallest.recipe.name}, has "
            f"{smallest.total_parameters:,} parameters, {smallest.active_parameters:,} active.",
            "Allow more, or begin with a smaller model.",
        )
    return tuple(found)


def suggestion(fits: Sequence[SizedRecipe]) -> tuple[SizedRecipe, str] | None:
    """Return the best recipe that can be trained, and the reason; None if none can."""
    best = fits[0]
    reason = (
        "With T = 2G a token gets two copies of the MLP, and the router learns. Such recipes beat "
        "continued dense training on the same tokens in the paper (E8G1T2, 15B parameters)"
    )
    if best.warnings:
        reason = "Every recipe that fits has a warning, and this is the best of them."
    elif best.recipe.routing is Routing.SOFTMAX_TOPK:
        reason += (
            ". In our study of a tiny model they did so with topk-softmax, but not with "
            "softmax-topk and its default router logits (std 0.001)."
        )
    else:
        reason += " and in our study of a tiny model, but not in that study at equal FLOPs."
    return None if best.trains is False else (best, reason)


def _plans(
    source: Checkpoint, common: Mapping[str, Any], *, target: str, options: Options | None
) -> Iterator[tuple[Plan, Plan]]:
    """Yield plans of two and of four groups for each granularity that the model can have."""
    shared, refusals = common.get("shared_experts", 0), list[UpcycleError]()
    if shared >= (largest := _GRANULARITIES[-1]):
        words = f"`shared_experts` must be less than G, and the largest G listed is {largest}."
        raise UpcycleError(words)
    for granularity in _GRANULARITIES:
        sizes = {"granularity": granularity, "top_k": granularity - shared}
        try:
            recipes = (Recipe(expansion=groups, **sizes, **common) for groups in (2, 4))
            two, four = (
                build_plan(recipe, source, target=target, options=options) for recipe in recipes
            )
            yield two, four
        except UpcycleError as error:
            refusals.append(error)
    if len(refusals) == len(_GRANULARITIES):
        raise refusals[-1]


def _fits(two: Plan, four: Plan, budget: Budget) -> Iterator[SizedRecipe]:
    """Yield every recipe of a granularity, with sizes derived from two and four groups'."""
    per_group = (four.total_parameters - two.total_parameters) // 2
    idle = two.total_parameters - two.active_parameters  # the experts of one group
    multiplied, dense = two.multiplied
    lookup = two.active_parameters - multiplied
    size, memory = two.recipe.group_size, budget.gpu_bytes
    for expansion, groups in product(_EXPANSIONS, _GROUPS_CHOSEN):
        if groups > expansion or expansion * size > _MOST_EXPERTS:
            continue
        total = two.total_parameters + (expansion - 2) * per_group
        active = total - (expansion - groups) * idle
        yield SizedRecipe(
            recipe=replace(two.recipe, expansion=expansion, top_k=groups * size),
            target=two.family.choice,
            total_parameters=total,
            active_parameters=active,
            flops_per_token=2 * (active - lookup),
            flops_ratio=(active - lookup) / dense,
            trains=None if memory is None else TRAINING_BYTES_PER_PARAMETER * total <= memory,
        )
