"""Experts that differ from the start: noise on their matrices, or neurons that are drawn anew.

Every expert draws for itself, the copies of a shard too, so that all N differ. Noise is relative to
the standard deviation of the expert's own matrix, as it would be without it; biases have none. A
neuron that is drawn anew is its row of gate and of up, its column of down, and its entries of their
biases, the same neurons in all of them; each part gets the mean and the standard deviation of what
it replaces (Drop-Upcycling, Nakamura et al., arXiv 2502.19261).
"""

from __future__ import annotations

from collections.abc import Iterable

from upcycle_cli.models.mlp import BIAS, Weight
from upcycle_cli.plan.expressions import AddNoise, Concat, Expr, Permutation, Reinit, type_of
from upcycle_cli.recipe.recipe import Recipe


def perturbed(recipe: Recipe, weight: Weight, layer: int, experts: Iterable[Expr]) -> list[Expr]:
    """Return a weight of each expert of a layer with what it draws."""
    if not recipe.perturbed:
        return [*experts]
    return [
        _perturbed(recipe, weight, f"layers.{layer}.experts.{number}", expr)
        for number, expr in enumerate(experts)
    ]


def _perturbed(recipe: Recipe, weight: Weight, stream: str, expr: Expr) -> Expr:
    parts = expr.parts if isinstance(expr, Concat) else (expr,)
    own = tuple(
        _part(recipe, part, weight.split_dim, stream, each)
        for part, each in zip(weight.parts, parts, strict=True)
    )
    return Concat(own) if len(own) > 1 else own[0]


def _part(recipe: Recipe, part: str, cut: int | None, stream: str, expr: Expr) -> Expr:
    if recipe.noise:
        if part.endswith(BIAS):
            return expr
        return AddNoise(expr, recipe.noise, recipe.seed, f"{stream}.{part}")
    if cut is None:
        return expr
    size = type_of(expr).shape[cut]
    order, count = Permutation(size, f"{stream}.neurons", recipe.seed), recipe.redrawn(size)
    return Reinit(expr, cut, order, count, recipe.seed, f"{stream}.{part}")
