"""Experts that differ from the start: Gaussian noise, or some neurons initialised again.

Every expert draws for itself, so that all N differ, copies of one shard too. Noise is relative to
the standard deviation of the expert's own matrix; biases get none. A neuron that is initialised
again is its row of gate and of up, its column of down and its entries of their biases, the same
neurons in all parts; each part keeps the mean and standard deviation of the values that it replaces
(Drop-Upcycling, Nakamura et al., arXiv 2502.19261).
"""

from __future__ import annotations

from collections.abc import Iterable

from upcycle_cli.models.mlp import BIAS, Weight
from upcycle_cli.plan.expressions import AddNoise, Concat, Expr, Permutation, Reinit, type_of
from upcycle_cli.recipe.recipe import Recipe


def perturbed(recipe: Recipe, weight: Weight, layer: int, experts: Iterable[Expr]) -> list[Expr]:
    """Return a weight of each expert of a layer, perturbed as the recipe says."""
    if not recipe.perturbed:
        return [*experts]
    found: list[Expr] = []
    for number, expr in enumerate(experts):
        stream = f"layers.{layer}.experts.{number}"
        held = expr.parts if isinstance(expr, Concat) else (expr,)
        parts = tuple(
            _perturbed(recipe, part, weight.split_dim, stream, each)
            for part, each in zip(weight.parts, held, strict=True)
        )
        found.append(Concat(parts) if len(parts) > 1 else parts[0])
    return found


def _perturbed(recipe: Recipe, part: str, cut: int | None, stream: str, expr: Expr) -> Expr:
    if recipe.noise:
        if part.endswith(BIAS):
            return expr
        return AddNoise(expr, recipe.noise, recipe.seed, f"{stream}.{part}")
    if cut is None:
        return expr
    size = type_of(expr).shape[cut]
    permutation = Permutation(size, f"{stream}.neurons", recipe.seed)
    count = recipe.reinit_count(size)
    return Reinit(expr, cut, permutation, count, recipe.seed, f"{stream}.{part}")
