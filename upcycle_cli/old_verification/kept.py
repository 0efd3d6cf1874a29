"""In which order a group has the dense MLP's neurons, where experts were perturbed.

Under noise each is the nearest in direction; of those that are left when others were drawn anew,
each is the same bit for bit, and the others may stand for any that are nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from upcycle_cli.inspection.neuron_matching import nearest
from upcycle_cli.old_verification.neurons import hashes_of
from upcycle_cli.old_verification.recipes import SLICED, RecipeClaim

if TYPE_CHECKING:
    from upcycle_cli.inspection.neuron_matching import Indices

_SKETCHED = 32
"""Entries of a neuron's part by which it is known again under noise."""
_MOST = 0.5
"""The share of neurons that says what a group was meant to be."""


def order_of(
    recipe: RecipeClaim,
    cuts: Mapping[str, int],
    held: Mapping[str, Sequence[torch.Tensor]],
    base: Mapping[str, torch.Tensor],
) -> Indices | None:
    """Return by place of a group the dense neuron that it had, each once; None for their own order.

    By part, `cuts` is the dimension that counts neurons, `held` what each expert has and `base` the
    dense MLP's as a conversion writes it.
    """
    if recipe.neuron_order == SLICED or recipe.reinit == 1:
        return None
    return (_by_bits if recipe.reinit else _by_direction)(cuts, held, base)


def _by_direction(
    cuts: Mapping[str, int],
    held: Mapping[str, Sequence[torch.Tensor]],
    base: Mapping[str, torch.Tensor],
) -> Indices | None:
    parts = [part for part in cuts if base[part].dim() == 2]
    ours = [torch.cat([_sketch(each, cuts[part]) for each in held[part]]) for part in parts]
    wanted = [_sketch(base[part], cuts[part]) for part in parts]
    return nearest(torch.cat(ours, 1).numpy(), torch.cat(wanted, 1).numpy())


def _sketch(matrix: torch.Tensor, cut: int) -> torch.Tensor:
    return matrix.movedim(cut, 0)[:, :_SKETCHED].float()


def _by_bits(
    cuts: Mapping[str, int],
    held: Mapping[str, Sequence[torch.Tensor]],
    base: Mapping[str, torch.Tensor],
) -> Indices | None:
    ours = np.sum(
        [
            np.concatenate([hashes_of(each, cut, part) for each in held[part]])
            for part, cut in cuts.items()
        ],
        axis=0,
    )
    wanted = np.sum([hashes_of(base[part], cut, part) for part, cut in cuts.items()], axis=0)
    places: dict[int, list[int]] = {}
    for neuron, hashed in enumerate(wanted.tolist()):
        places.setdefault(hashed, []).append(neuron)
    order = np.full(len(ours), -1)
    for place, hashed in enumerate(ours.tolist()):
        if places.get(hashed):
            order[place] = places[hashed].pop()
    found = order >= 0
    if not found.any() or np.mean((ours == wanted)[found]) > _MOST:
        return None
    order[~found] = np.setdiff1d(np.arange(len(order)), order)
    return order
