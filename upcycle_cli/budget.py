"""Which recipes fit a budget: parameters, active parameters, and the memory of the GPUs.

What a recipe adds is affine in the virtual groups E and the experts N = E·G, so one plan tells the
sizes of all. Memory is that of the parameters alone: a KV cache and activations come on top.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from upcycle_cli.checkpoint import Checkpoint
from upcycle_cli.errors import UpcycleError
from upcycle_cli.plan import Plan, build_plan
from upcycle_cli.recipe import Recipe
from upcycle_cli.tensors import Role

WEIGHT_BYTES = 2
"""Of a parameter in bfloat16."""
TRAINING_BYTES = 16
"""Of a parameter in training with AdamW: weight and gradient in bfloat16, and in float32 the master
weight and both moments (2 + 2 + 4 + 4 + 4)."""
_EXPANSIONS = (2, 4, 8, 16, 32, 64)
_GRANULARITIES = (1, 2, 4, 8, 16)
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

    expansion: int
    granularity: int
    top_k: int
    total_parameters: int
    active_parameters: int
    flops_ratio: float
    """FLOPs per token as a multiple of the dense model's, attention scores left out of both."""
    trains: bool | None
    """Whether training fits the memory of the GPUs; None where that is not given."""

    @property
    def name(self) -> str:
        """The recipe, in the paper's notation."""
        return f"E{self.expansion}G{self.granularity}T{self.top_k}"

    @property
    def weight_bytes(self) -> int:
        """What its weights take in bfloat16."""
        return WEIGHT_BYTES * self.total_parameters

    @property
    def training_bytes(self) -> int:
        """What training takes with AdamW, activations aside."""
        return TRAINING_BYTES * self.total_parameters


def fitting(source: Checkpoint, budget: Budget, *, target: str = "auto") -> tuple[Fit, ...]:
    """Return the recipes within a budget, of each granularity and top-k the largest that fits.

    Raises UpcycleError when none does, and as `build_plan` does.
    """
    plan = build_plan(Recipe(expansion=2, granularity=1, top_k=2), source, target=target)
    sizes = _Sizes.of(plan)
    found: dict[tuple[int, int], Fit] = {}
    candidates = list(_candidates(sizes, budget))
    for fit in candidates:
        over = (
            budget.max_params is not None and fit.total_parameters > budget.max_params,
            budget.max_active is not None and fit.active_parameters > budget.max_active,
            budget.gpu_bytes is not None and fit.weight_bytes > budget.gpu_bytes,
        )
        if not any(over):
            found[fit.granularity, fit.top_k // fit.granularity] = fit  # E grows
    if not found:
        smallest = min(candidates, key=lambda fit: fit.total_parameters)
        raise UpcycleError(
            f"no recipe fits: the smallest, {smallest.name}, has {smallest.total_parameters:,} "
            f"parameters, {smallest.active_parameters:,} active.",
            "Allow more, or begin with a smaller model.",
        )
    return tuple(sorted(found.values(), key=lambda fit: fit.total_parameters))


@dataclass(frozen=True)
class _Sizes:
    """How many parameters there are of what, and what they grow with."""

    width: int
    fixed: int
    per_group: int
    """With E: matrices, and biases that are cut as they are."""
    per_expert: int
    """With E·G: router rows, and biases that every expert has whole."""
    whole_biases: int
    """Of these, the experts' own."""
    cut: int
    """With 1/G: a shared expert as wide as an expert."""
    dense: int
    """What a token is multiplied with of the dense model."""
    lookup: int
    """What it is not, of the MoE."""

    @classmethod
    def of(cls, plan: Plan) -> _Sizes:
        """Take them from a plan of E2G1."""
        by_role = dict.fromkeys(Role, 0)
        biases = 0
        for tensor in plan.tensors:
            by_role[tensor.role] += tensor.num_elements
            if "down_bias" in tensor.holds:
                biases += tensor.num_elements
        shared = plan.family.target.shared
        cut = by_role[Role.SHARED_EXPERT] if shared and shared.size is None else 0
        of_experts = by_role[Role.ROUTER] + by_role[Role.CORRECTION_BIAS] + biases
        each = sum(added.per_expert for added in plan.target.added)
        of_experts += each * len(plan.layers) * plan.num_experts
        per_group = by_role[Role.EXPERT] - biases
        multiplied, dense = plan.multiplied
        return cls(
            width=plan.family.dense.intermediate_size,
            fixed=plan.total_parameters - per_group - of_experts - cut,
            per_group=per_group // 2,
            per_expert=of_experts // 2,
            whole_biases=biases // 2,
            cut=cut,
            dense=dense,
            lookup=plan.active_parameters - multiplied,
        )


def _candidates(sizes: _Sizes, budget: Budget) -> Iterator[Fit]:
    for granularity in _GRANULARITIES:
        if sizes.width % granularity:
            continue
        for expansion in _EXPANSIONS:
            experts = expansion * granularity
            for top_k in (granularity, 2 * granularity):
                if top_k <= experts <= _MOST_EXPERTS:
                    yield _fit(sizes, budget, expansion, granularity, top_k)


def _fit(sizes: _Sizes, budget: Budget, expansion: int, granularity: int, top_k: int) -> Fit:
    num_experts = expansion * granularity
    total = sizes.fixed + expansion * sizes.per_group + num_experts * sizes.per_expert
    total += sizes.cut // granularity
    an_expert = sizes.per_group // granularity + sizes.whole_biases
    active = total - (num_experts - top_k) * an_expert
    return Fit(
        expansion=expansion,
        granularity=granularity,
        top_k=top_k,
        total_parameters=total,
        active_parameters=active,
        flops_ratio=(active - sizes.lookup) / sizes.dense,
        trains=None if budget.gpu_bytes is None else TRAINING_BYTES * total <= budget.gpu_bytes,
    )
