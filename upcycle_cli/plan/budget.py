"""Which recipes fit a budget of parameters, active parameters and GPU memory.

Sizes are affine in E, so two plans for each granularity give the sizes of all recipes. Memory
counts the parameters alone: a KV cache and activations need more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.plan.output import Options
from upcycle_cli.plan.plan import Plan
from upcycle_cli.plan.upcycle import build_plan
from upcycle_cli.recipe.recipe import Recipe

WEIGHT_BYTES_PER_PARAMETER = 2
"""A parameter in bfloat16."""
TRAINING_BYTES_PER_PARAMETER = 16
"""A parameter in training with AdamW: weight and gradient in bfloat16, and the master weight and
both moments in float32 (2 + 2 + 4 + 4 + 4)."""
_EXPANSIONS = (2, 4, 8, 16, 32, 64)
_GRANULARITIES = (1, 2, 4, 8, 16)
_GROUPS_CHOSEN = (1, 2, 4)
_MOST_EXPERTS = 256


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
    """The target that the sizes are for, as --target has it."""
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
        return WEIGHT_BYTES_PER_PARAMETER * self.total_parameters

    @property
    def training_bytes(self) -> int:
        """The memory of training with AdamW, without activations."""
        return TRAINING_BYTES_PER_PARAMETER * self.total_parameters

    @property
    def paper(self) -> tuple[str, ...]:
        """What the paper (He et al., arXiv 2410.07524) found for such recipes."""
        recipe, words = self.recipe, []
        if (recipe.granularity, recipe.num_experts) == (8, 64):
            words.append("64 experts at G = 8 were the sweet spot")
        if recipe.name == "E8G1T2":
            words.append("of Nemotron-4 15B: MMLU 67.6, the dense model 65.3, both after 1T tokens")
        if recipe.rows_chosen > 1:
            words.append(_HIGHER_T)
        return (*words,)


_HIGHER_T = "a T above G helps, at the price of compute"


@dataclass(frozen=True, kw_only=True)
class SharedChoices:
    """The choices that all recipes of a budget share."""

    target: str = "auto"
    options: Options = field(default_factory=Options)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """The fields of a Recipe except E, G and T."""


def fitting(
    source: Checkpoint, budget: Budget, wanted: SharedChoices | None = None
) -> tuple[SizedRecipe, ...]:
    """Return the recipes within a budget, smallest first.

    E and G are powers of two, a token chooses 1, 2 or 4 whole groups, and a layer has at most 256
    experts. Raises UpcycleError when none fits, and as `build_plan` does.
    """
    plans = _plans(source, wanted or SharedChoices())
    candidates = [fit for two, four in plans for fit in _fits(two, four, budget)]
    candidates.sort(key=lambda fit: (fit.total_parameters, fit.active_parameters))
    found = tuple(fit for fit in candidates if budget.allows(fit))
    if not found:
        smallest = candidates[0]
        raise UpcycleError(
            f"no recipe fits: the smallest, {smallest.recipe.name}, has "
            f"{smallest.total_parameters:,} parameters, {smallest.active_parameters:,} active.",
            "Allow more, or begin with a smaller model.",
        )
    return found


def notable(fits: Sequence[SizedRecipe]) -> tuple[SizedRecipe, ...]:
    """Return the recipe with the largest E for each G and T, and what the paper names."""
    # fits are sorted, smallest first
    largest = {(fit.recipe.granularity, fit.recipe.top_k): fit for fit in fits}
    return tuple(fit for fit in fits if fit in largest.values() or {*fit.paper} - {_HIGHER_T})


def _plans(source: Checkpoint, wanted: SharedChoices) -> Iterator[tuple[Plan, Plan]]:
    """Yield plans of two and of four groups for each granularity that the model can have."""
    shared, refusals = wanted.recipe.get("shared_experts", 0), list[UpcycleError]()
    for granularity in _GRANULARITIES:
        sizes = {"granularity": granularity, "top_k": granularity - shared}
        try:
            recipes = (Recipe(expansion=groups, **sizes, **wanted.recipe) for groups in (2, 4))
            two, four = (
                build_plan(recipe, source, target=wanted.target, options=wanted.options)
                for recipe in recipes
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
