"""What an MoE is held to: the factors on its experts, measured, and whether it promises equality.

What config.json says of the routing implies a recipe, and the tensors show what was done. What
`upcycle.json` says can only take a promise back: then nothing passes, it is measured.

Legend: N experts, H hidden size, I dense intermediate size, G shards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from upcycle_cli.checkpoint.checkpoint import Reader
from upcycle_cli.checkpoint.header import TORCH_DTYPES
from upcycle_cli.old_verification.bits import bits, one_thread, same
from upcycle_cli.old_verification.facts import Facts
from upcycle_cli.old_verification.merged import by_model
from upcycle_cli.old_verification.neurons import (
    cut_of,
    dense_part,
    first_entries,
    group_part,
    hashes_of,
    routed_neurons,
)

_SNAP = 0.01  # relative; a measured factor is this close to the one that was meant
_MOST_DEVIATIONS = 6.0
_PROBE_ELEMENTS = 1 << 20  # enough for a median, and a bound on its memory


def find_objection(facts: Facts) -> str | None:
    """Say why the MoE owes the dense model nothing, or None when it owes it the function."""
    if facts.merged is not None:
        return "its experts are those of several models"
    objection = facts.standard.objection() or facts.recipe.objection()
    if objection is None and facts.lenient:
        objection = facts.implied.scaling_failure(
            recover_factors(facts), facts.implied.needed_c, facts.origin
        ) or _ungrouped(facts)
    return objection


def _ungrouped(facts: Facts) -> str | None:
    with facts.moe.reader() as moe:
        for layer in facts.layers:
            name = facts.router_name(layer)
            if facts.group_size > 1 and name in facts.moe.tensors:
                _, rows = torch.unique(bits(moe.tensor(name)), dim=0, return_inverse=True)
                groups = rows.reshape(-1, facts.group_size)
                if bool((groups != groups[:, :1]).any()):
                    return f"the router rows of {name} differ inside virtual groups"
    return None


def recover_factors(facts: Facts) -> dict[str, float]:
    """Return what each matrix was multiplied by, measured on the tensors themselves.

    nan where nothing can be measured, because the tensors are missing or zero. "config" is what
    config.json has the gates multiplied by. Of several models the first that gave experts is asked.
    """
    facts = next(by_model(facts))
    with one_thread(), facts.dense.reader() as dense, facts.moe.reader() as moe:
        found = {matrix: _recover(facts, dense, moe, matrix) for matrix in facts.kind.matrices}
    return {**found, "config": facts.gate_scale}


def factor_of(facts: Facts, factors: Mapping[str, float], part: str) -> float:
    """Return what a part is multiplied by: a bias as its matrix is, but for that of down."""
    if part == "down_bias":
        return facts.recipe.down_bias_factor / factors["config"]
    return factors[part.removesuffix("_bias")]


def is_power_of_two(factor: float) -> bool:
    """Whether multiplying by the factor loses nothing."""
    return math.frexp(factor)[0] == 0.5


def ratio(held: torch.Tensor, base: torch.Tensor) -> float:
    """Return the median of held / base, nan when there is nothing to measure.

    A median, since one damaged element would carry a least-squares fit away.
    """
    rows = max(1, _PROBE_ELEMENTS // base.shape[-1])
    held64, base64 = held[:rows].double(), base[:rows].double()
    usable = (base64 != 0) & torch.isfinite(held64) & torch.isfinite(base64)
    if not bool(usable.any()):
        return math.nan
    return float((held64[usable] / base64[usable]).median())


def _recover(facts: Facts, dense: Reader, moe: Reader, matrix: str) -> float:
    """Return the candidate that explains some expert bit for bit, else the first measurement.

    Several experts are asked, so that one damaged expert does not change what is expected of all.
    """
    if facts.recipe.perturbed:
        return _recover_perturbed(facts, dense, moe, matrix)
    layers, experts = facts.layers, facts.experts
    middle = layers[(len(layers) - 1) // 2], experts[len(experts) // 2]
    probes = (layers[0], experts[0]), (layers[-1], experts[-1]), middle
    fallback, shape = math.nan, facts.expert_shape(matrix)
    for layer, expert in probes:
        place = facts.locate(matrix, layer, expert)
        entry = facts.moe.tensors.get(place.tensor)
        if entry is None or entry.dtype not in TORCH_DTYPES or entry.shape != shape:
            continue
        source = facts.dense_place(matrix, layer, facts.shard_of(expert))
        held = place.select(moe.tensor(place.tensor), source.split_dim)
        base = dense.tensor(source.tensor)[source.index].to(held.dtype)
        measured = ratio(held, base)
        near = _near_candidates(facts, matrix, measured)
        for candidate in near:
            if same(base * candidate, held):
                return candidate
        if math.isnan(fallback):
            fallback = near[0] if near else measured
    for layer, expert in probes:
        found = _recover_reordered(facts, dense, moe, matrix, layer, expert // facts.group_size)
        if found is not None:
            return found
    return fallback


def _recover_perturbed(facts: Facts, dense: Reader, moe: Reader, matrix: str) -> float:
    """Return the recorded factor if it explains how large a group's matrices are, else what does.

    Draws of the mean and standard deviation of what they replace leave the norm what it was, and
    noise adds its own; both but for what chance makes of so many values.
    """
    layer, claimed = facts.layers[0], facts.record.factor(matrix)
    held = group_part(facts, moe, matrix, layer, 0)
    if held is None:
        return math.nan
    base = dense_part(facts, dense, matrix, layer).to(held[0].dtype)
    length = float(base.double().norm())
    if not length:
        return math.nan
    norms = (float(each.double().norm()) for each in held)
    measured = math.hypot(*norms) / length / math.hypot(1.0, facts.recipe.noise)
    slack = _SNAP + _MOST_DEVIATIONS / math.sqrt(2 * base.numel())
    fits = claimed is not None and math.isclose(measured, claimed, rel_tol=slack)
    return claimed if claimed is not None and fits else measured


def _recover_reordered(
    facts: Facts, dense: Reader, moe: Reader, matrix: str, layer: int, group: int
) -> float | None:
    """Return the candidate that explains the first entries of a group in another order, if any."""
    held, cut = group_part(facts, moe, matrix, layer, group), cut_of(facts, matrix)
    if held is None or cut is None:
        return None
    ours = torch.cat([first_entries(each, cut) for each in held], cut)
    base = first_entries(dense_part(facts, dense, matrix, layer), cut).to(ours.dtype)
    base = base.index_select(cut, torch.from_numpy(routed_neurons(facts, dense, moe, layer)))
    length = float(base.double().norm())
    measured = float(ours.double().norm()) / length if length else math.nan
    wanted = np.sort(hashes_of(ours, cut, matrix))
    for candidate in _near_candidates(facts, matrix, measured):
        if np.array_equal(np.sort(hashes_of(base * candidate, cut, matrix)), wanted):
            return candidate
    return None


def _near_candidates(facts: Facts, matrix: str, measured: float) -> list[float]:
    """Return the factors that a rule could have meant by a measurement, nearest first."""
    totals = {facts.implied.needed_c, facts.recipe.needed_c, facts.recipe.claimed_c}
    totals |= {c / facts.gate_scale for c in totals}
    powers = [2.0**exponent for exponent in range(-12, 25)]
    candidates = set(powers)
    for c in totals:
        candidates |= {c / power for power in powers} | {math.cbrt(c), math.sqrt(c)}
        candidates.add(float(round(math.cbrt(c))))  # where math.cbrt misses a whole one
    recorded = facts.record.factor(matrix)
    if recorded is not None:
        candidates.add(recorded)
    near = (value for value in candidates if math.isclose(value, measured, rel_tol=_SNAP))
    return sorted(near, key=lambda value: abs(value - measured))
