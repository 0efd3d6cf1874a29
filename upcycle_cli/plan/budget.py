"""Which recipes fit a budget: parameters, active parameters, and the memory of the GPUs.

What a recipe adds is affine in the virtual groups E, so one plan for each granularity tells the
sizes of all. Memory is that of the parameters alone: a KV cache and activations come on top.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.plan.output import Options, Role
from upcycle_cli.plan.plan import Plan
from upcycle_cli.plan.upcycle import build_plan
from upcycle_cli.recipe.recipe import Recipe

WEIGHT_BYTES = 2
"""Of a parameter in bfloat16."""
TRAINING_BYTES = 16
"""Of a parameter in training with AdamW: weight and gradient in bfloat16, and in float32 the master
weight and both moments (2 + 2 + 4 + 4 + 4)."""
_EXPANSIONS = (2, 4, 8, 16, 32, 64)
_GRANULARITIES = (1, 2, 4, 8, 16)
_GROUPS_CHOSEN = (1, 2, 4)
_MOST_EXPERTS = 256


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that a conversion may have of each; None is no limit."""

    max_params: int | None = None
    max_active: int | None = None
    gpu_bytes: int | None = None
    """The memory of all GPUs together, which bfloat16 weights must fit."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A recipe and what it costs."""

    recipe: Recipe
    target: str
    """The architecture that sizes are those of, as --target has it."""
    total_parameters: int
    active_parameters: int
    flops_per_token: int
    """As `Plan.flops_per_token` has them."""
    flops_ratio: float
    """As a multiple of the dense model's."""
    trains: bool | None
    """Whether training fits the memory of the GPUs; None where that is not given."""

    @property
    def weight_bytes(self) -> int:
        """What its weights take in bfloat16."""
        return WEIGHT_BYTES * self.total_parameters

    @property
    def training_bytes(self) -> int:
        """What training takes with AdamW, activations aside."""
        return TRAINING_BYTES * self.total_parameters

    @property
    def paper(self) -> tuple[str, ...]:
        """What the paper (He et al., arXiv 2410.07524) says of such a recipe."""
        words = tuple(words for names, words in _NAMED if names(self.recipe))
        return (*words, _HIGHER_T) if self.recipe.rows_chosen > 1 else words


_HIGHER_T = "a T above G helps, at the price of compute"
_NAMED: tuple[tuple[Callable[[Recipe], bool], str], ...] = (
    (
        lambda recipe: (recipe.granularity, recipe.num_experts) == (8, 64),
        "64 experts at G = 8 were the sweet spot",
    ),
    (
        lambda recipe: recipe.name == "E8G1T2",
        "of Nemotron-4 15B: MMLU 67.6 after 1T more tokens, the dense model 65.3 after as many",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is wanted of the models beside their size."""

    target: str = "auto"
    options: Options = field(default_factory=Options)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """What a Recipe has beside E, G and T."""


def fitting(source: Checkpoint, budget: Budget, wanted: Wanted | None = None) -> tuple[Fit, ...]:
    """Return the recipes within a budget, smaller ones first.

    They are those whose E and G are powers of two, with 1, 2 or 4 whole groups a token, and up to
    256 experts. Raises UpcycleError when none fits, and as `build_plan` does.
    """
    candidates = [
        fit for plan in _plans(source, wanted or Wanted()) for fit in _candidates(plan, budget)
    ]
    candidates.sort(key=lambda fit: (fit.total_parameters, fit.active_parameters))
    found = tuple(fit for fit in candidates if _is_within(fit, budget))
    if not found:
        smallest = candidates[0]
        raise UpcycleError(
            f"no recipe fits: the smallest, {smallest.recipe.name}, has "
            f"{smallest.total_parameters:,} parameters, {smallest.active_parameters:,} active.",
            "Allow more, or begin with a smaller model.",
        )
    return found


def notable(fits: Sequence[Fit]) -> tuple[Fit, ...]:
    """Return those of the largest E, of each G and T, and those that the paper names."""
    # Smaller ones come first.
    largest = {(fit.recipe.granularity, fit.recipe.top_k): fit for fit in fits}
    return tuple(fit for fit in fits if fit in largest.values() or {*fit.paper} - {_HIGHER_T})


def _plans(source: Checkpoint, wanted: Wanted) -> Iterator[Plan]:
    """Yield a plan of two groups for each granularity that the model can have."""
    shared, refusal, planned = wanted.recipe.get("shared_experts", 0), None, False
    for granularity in _GRANULARITIES:
        try:
            # A recipe of its own, that it is refused as convert would refuse it.
            recipe = Recipe(
                expansion=2, granularity=granularity, top_k=granularity - shared, **wanted.recipe
            )
            yield build_plan(recipe, source, target=wanted.target, options=wanted.options)
            planned = True
        except UpcycleError as error:
            refusal = error
    if refusal is not None and not planned:
        raise refusal


@dataclass(frozen=True)
class _Sizes:
    """How many parameters there are of what, for one granularity."""

    fixed: int
    per_group: int
    """With E: experts, and what routers have for each."""
    an_expert: int
    dense: int
    """What a token is multiplied with of the dense model."""
    lookup: int
    """What it is not, of the MoE."""

    @classmethod
    def of(cls, plan: Plan) -> _Sizes:
        """Take them from a plan of two groups."""
        by_role = dict.fromkeys(Role, 0)
        for tensor in plan.tensors:
            by_role[tensor.role] += tensor.num_elements
        grows = sum(by_role[role] for role in (Role.EXPERT, Role.ROUTER, Role.CORRECTION_BIAS))
        each = sum(added.per_expert for added in plan.target.extra_tensors)
        grows += each * len(plan.layers) * plan.num_experts
        multiplied, dense = plan.multiplied
        return cls(
            fixed=plan.total_parameters - grows,
            per_group=grows // plan.recipe.expansion,
            an_expert=by_role[Role.EXPERT] // plan.num_experts,
            dense=dense,
            lookup=plan.active_parameters - multiplied,
        )


def _candidates(plan: Plan, budget: Budget) -> Iterator[Fit]:
    sizes, planned = _Sizes.of(plan), plan.recipe
    for expansion in _EXPANSIONS:
        for groups in _GROUPS_CHOSEN:
            experts = expansion * planned.group_size
            if groups <= expansion and experts <= _MOST_EXPERTS:
                top_k = groups * planned.group_size
                recipe = replace(planned, expansion=expansion, top_k=top_k)
                yield _fit(sizes, recipe, plan.family.choice, budget)


def _fit(sizes: _Sizes, recipe: Recipe, target: str, budget: Budget) -> Fit:
    total = sizes.fixed + recipe.expansion * sizes.per_group
    active = total - (recipe.num_experts - recipe.top_k) * sizes.an_expert
    multiplied = active - sizes.lookup
    return Fit(
        recipe=recipe,
        target=target,
        total_parameters=total,
        active_parameters=active,
        flops_per_token=2 * multiplied,
        flops_ratio=multiplied / sizes.dense,
        trains=None if budget.gpu_bytes is None else TRAINING_BYTES * total <= budget.gpu_bytes,
    )


def _is_within(fit: Fit, budget: Budget) -> bool:
    return all(
        most is None or size <= most
        for size, most in (
            (fit.total_parameters, budget.max_params),
            (fit.active_parameters, budget.max_active),
            (fit.weight_bytes, budget.gpu_bytes),
        )
    )
