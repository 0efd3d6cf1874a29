"""Weights: is every tensor of the MoE what the method makes of the dense model, bit for bit?

Each expert must equal round(cast(shard) × factor), which is exact even when the factor is not
lossless; the factors themselves are recovered from the tensors, whatever `upcycle.json` says, and
must multiply to what config.json implies. `scan.py` finds what differs as bytes; only that is
compared as numbers here, and put in words.

Legend: N experts, E groups, G shards, H hidden size, I dense intermediate size; expert e = g·G + s
holds shard s of group g.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from upcycle_cli.checkpoint.checkpoint import Reader
from upcycle_cli.checkpoint.header import TORCH_DTYPES
from upcycle_cli.checkpoint.storage import CONFIG_NAME
from upcycle_cli.core.callbacks import Watch
from upcycle_cli.models.mlp import Location
from upcycle_cli.old_verification.bits import bits, difference, one_thread, same
from upcycle_cli.old_verification.disorder import order_failures
from upcycle_cli.old_verification.dtypes import dtype_failures
from upcycle_cli.old_verification.factors import factor_of, is_power_of_two, ratio, recover_factors
from upcycle_cli.old_verification.facts import Facts
from upcycle_cli.old_verification.merged import MeanReader, by_model, rest_reader
from upcycle_cli.old_verification.neurons import Neurons
from upcycle_cli.old_verification.perturbed import Perturbed
from upcycle_cli.old_verification.places import Experts
from upcycle_cli.old_verification.recipes import DRAWN
from upcycle_cli.old_verification.rounding import Rounding
from upcycle_cli.old_verification.rows import (
    given_failures,
    other_rows,
    row_failures,
    size_failures,
)
from upcycle_cli.old_verification.scan import Key, Scan
from upcycle_cli.old_verification.shared import shared_failures
from upcycle_cli.old_verification.wanted import Wanted, wanted_tensors
from upcycle_cli.verification.result import CheckResult, Findings

NAME = "weights"
_MOST_TIMES = 4.0


def check_weights(facts: Facts, watch: Watch) -> tuple[CheckResult, frozenset[int]]:
    """Check every tensor of the MoE against the dense model, or each group against its own.

    Returns the layers, too, whose experts are bit for bit what they should be: there the copies of
    a shard are the same bytes.
    """
    findings, rounding = Findings(), Rounding()
    wanted = wanted_tensors(facts, Experts.of(facts))
    sound = {name: wanted[name] for name in _sound(facts, wanted, findings)}
    reordered = 0
    with facts.moe.reader() as moe:
        for one in by_model(facts):
            with one.dense.reader() as dense:
                factors, rest = recover_factors(one), None if facts.merged else sound
                comparison = _Comparison(one, dense, moe, findings, rounding, factors)
                copied = comparison.run(sound, watch, rest=rest)
                perturbed = comparison.perturbed
            reordered += sum(comparison.neurons.reordered.values())
        if facts.merged is not None:
            copied = set()  # no expert is another one's copy
            with rest_reader(facts) as dense:
                no_groups = replace(facts, only=())
                comparison = _Comparison(no_groups, dense, moe, findings, rounding, factors)
                comparison.run(sound, watch, rest=sound)
    findings.add(*dtype_failures(facts), *rounding.failures())
    matrices = facts.kind.matrices
    exact = rounding.lossless and all(is_power_of_two(factors[matrix]) for matrix in matrices)
    lossless = exact and not facts.recipe.perturbed
    metrics = {
        "expansion": facts.expansion,
        "granularity": facts.granularity,
        **({"shared_experts": facts.shared_experts} if facts.shared_experts else {}),
        **{f"{matrix}_factor": factors[matrix] for matrix in matrices},
        "gates_factor": factors["config"],
        "c": facts.implied.needed_c,
        "groups_checked": facts.expansion * len(facts.layers),
        "reordered_groups": reordered,
        "tensors_compared": len(sound),
        "lossless": lossless,
        "rounding_error": rounding.error,
        "zeroed_share": rounding.zeroed,
    }
    metrics |= perturbed.metrics()
    drawn = perturbed.in_words() if perturbed.samples else None
    detail = _passed_detail(facts, factors, drawn, lossless=lossless, reordered=bool(reordered))
    return findings.result(NAME, detail, metrics), frozenset(copied)


def _passed_detail(
    facts: Facts,
    factors: Mapping[str, float],
    drawn: str | None,
    *,
    lossless: bool,
    reordered: bool,
) -> str:
    shown = ", ".join(f"{matrix} × {factors[matrix]:.6g}" for matrix in facts.kind.matrices)
    if factors["config"] != 1.0:
        shown += f", gates × {factors['config']:.6g} by {CONFIG_NAME}"
    end = "rounded to the output dtype, so the dense weights cannot be recovered exactly"
    if lossless:
        end = "the dense weights can be recovered bit for bit"
    elif facts.recipe.perturbed:
        end = "the dense weights cannot be recovered"
    routers = (
        "Router rows are equal inside each virtual group and differ between groups"
        if facts.recipe.virtual_groups
        else "All router rows differ"
    )
    of = "the dense MLP" if facts.merged is None else "its own model's MLP"
    experts = f"Every expert is its shard of {of}, bit for bit"
    if reordered:
        experts = f"The experts of each virtual group have every neuron of {of} once, bit for bit"
    if facts.shared_experts:
        experts += f", {facts.shared_width:,} of them in the shared expert"
    mean = facts.merged is not None and facts.merged.mean
    rest = "are the mean of all models'" if mean else "equal the dense model's"
    if facts.target.extra_tensors:
        rest += ", or are what its architecture adds"
    return f"{drawn or experts} ({shown}; {end}). {routers}. All other tensors {rest}."


def _sound(facts: Facts, wanted: Mapping[str, Wanted], findings: Findings) -> Iterator[str]:
    """Yield the names that can be compared; note the missing, the misshapen and the surplus."""
    for name, item in wanted.items():
        entry = facts.moe.tensors.get(name)
        if entry is None:
            findings.add(f"{name} is missing")
        elif entry.shape != item.shape:
            findings.add(f"{name} has shape {list(entry.shape)} instead of {list(item.shape)}")
        elif entry.dtype not in TORCH_DTYPES:
            findings.add(f"{name} is {entry.dtype}, which no weight is")
        else:
            yield name
    for name in facts.moe.tensors:
        if name not in wanted:
            findings.add(f"{name} comes from no tensor of the dense model")


@dataclass
class _Comparison:
    """Compares tensors and notes what it finds."""

    facts: Facts
    dense: Reader | MeanReader
    moe: Reader
    findings: Findings
    rounding: Rounding
    factors: Mapping[str, float]
    neurons: Neurons = field(init=False)
    perturbed: Perturbed = field(init=False)
    differing: set[Key] = field(default_factory=set)
    """What holds other bytes than the dense model, and is to be put in words."""

    def __post_init__(self) -> None:
        by_part = {part: factor_of(self.facts, self.factors, part) for part in self.facts.parts}
        self.neurons = Neurons(self.facts, self.dense, self.moe, by_part)
        self.perturbed = Perturbed(self.facts, self.neurons, self.rounding)

    def run(
        self, sound: Collection[str], watch: Watch, *, rest: Mapping[str, Wanted] | None
    ) -> set[int]:
        """Compare the experts of the groups in view, and `rest`, which experts are no part of.

        Returns the layers whose experts are what they should be, and alike.
        """
        facts, neurons, copied = self.facts, self.neurons, set[int]()
        if facts.groups:
            self.check_factors()
        items = {} if rest is None else rest
        copies = {name: item.copy for name, item in items.items() if item.copy is not None}
        placed = Experts.of(facts)
        scan = Scan(facts, placed, self.dense, self.moe, self.rounding, watch, neurons)
        self.differing |= scan.run({*sound}, copies, self.factors)
        if facts.recipe.perturbed:
            whole = [layer for layer in facts.layers if placed.names(layer).keys() <= {*sound}]
            self.findings.add(*self.perturbed.failures(whole, watch))
        for layer in facts.layers:
            before = len(self.findings)
            for part in facts.parts:
                if (part, layer) in self.differing:
                    self.experts(part, layer, neurons.factors[part], sound)
            alike = layer not in neurons.uneven and not facts.recipe.perturbed
            alike = alike and placed.names(layer).keys() <= {*sound}
            if len(self.findings) == before and alike:
                copied.add(layer)
            if items:
                self.findings.add(*shared_failures(neurons, layer))
            if facts.router_name(layer) in items:
                with one_thread():
                    self.router(layer)
        for name, item in items.items():
            self.other(name, item)
        return copied

    def check_factors(self) -> None:
        """Hold the recovered factors against config.json and the rule of the scaling."""
        factors = self.factors
        unknown = [matrix for matrix, factor in factors.items() if math.isnan(factor)]
        if unknown:
            self.findings.add(f"the factor of {' and '.join(unknown)} cannot be recovered")
            return
        if self.facts.lenient:
            return  # whatever they are, they were to be expected
        needed_c, recipe = self.facts.implied.needed_c, self.facts.recipe
        failure = recipe.scaling_failure(factors, needed_c, self.facts.origin)
        if failure is not None:
            self.findings.add(failure)

    def experts(self, part: str, layer: int, factor: float, sound: Collection[str]) -> None:
        """Compare a part of a layer's experts with the dense shards, or in a group's own order."""
        facts = self.facts
        spot = facts.dense_place(part, layer)
        source = self.dense.tensor(spot.tensor)
        # By dtype, since a damaged expert may have one of its own. Each shard is made contiguous
        # once, which makes comparing its E copies several times faster for the columns of down.
        scaled: dict[torch.dtype, list[torch.Tensor]] = {}
        reordered: dict[int, list[str] | None] = {}
        origin = "" if facts.only is None else f", of {facts.dense.name}"
        for expert in facts.experts:
            place = facts.locate(part, layer, expert)
            if place.tensor not in sound:
                continue
            held = self.moe.tensor(place.tensor)[place.index]
            if held.dtype not in scaled:
                whole = self.rounding.cast(spot.tensor, source, held.dtype) * factor
                spots = (facts.dense_place(part, layer, s) for s in range(facts.granularity))
                scaled[held.dtype] = [s.select(whole, place.split_dim).contiguous() for s in spots]
            shards, own = scaled[held.dtype], facts.shard_of(expert)
            if same(held, shards[own]):
                continue
            group = expert // facts.group_size
            if group not in reordered:
                reordered[group] = order_failures(self.neurons, part, layer, group)
                self.findings.add(*(reordered[group] or ()))
            if reordered[group] is None:
                self.findings.add(
                    lambda: _expert_failure(place, held, shards, own) + origin  # noqa: B023
                )

    def router(self, layer: int) -> None:
        """Check that rows are finite, equal inside a group and different between groups."""
        facts, name = self.facts, self.facts.router_name(layer)
        router_NH = self.moe.tensor(name)
        finite_N = torch.isfinite(router_NH).all(dim=-1)
        if not bool(finite_N.all()):
            row = int((~finite_N).nonzero()[0])
            self.findings.add(f"{name}: row {row} holds values that are not finite")
        # One integer per row says which rows are equal.
        _, identity = torch.unique(bits(router_NH), dim=0, return_inverse=True)
        size = facts.group_size if facts.recipe.virtual_groups else 1
        groups = identity.reshape(-1, size)
        odd = (groups != groups[:, :1]).nonzero()
        if len(odd) and not facts.lenient:
            group, place = odd[0].tolist()
            self.findings.add(
                f"{name}: row {group * size + place} differs from the other rows of "
                f"its virtual group {group}"
            )
        if facts.rows is not None:
            found = other_rows(router_NH, facts.rows, layer)
            self.findings.add(*(f"{name}: {failure}" for failure in found))
        if bool(finite_N.all()):
            dtype = facts.moe.tensors[name].dtype
            drawn = facts.recipe.router_init in DRAWN
            check = row_failures if drawn else given_failures
            found = check(router_NH[::size], self._gamma(layer), dtype)
            self.findings.add(*(f"{name}: {failure}" for failure in found))

    def _gamma(self, layer: int) -> torch.Tensor:
        """Return the effective weight of the norm that feeds a layer's MLP, ones without one."""
        name = self.facts.gamma_name(layer)
        if name is None:
            return torch.ones(self.facts.hidden_size)
        return self.dense.tensor(name).float() + self.facts.family.norm_offset

    def _shared(self, name: str, item: Wanted, held: torch.Tensor) -> None:
        """Check that what works on the input is of the dense model's size, or all zero."""
        if not bool(torch.isfinite(held).all()):
            self.findings.add(f"{name} holds values that are not finite")
            return
        size = float(held.double().square().mean().sqrt())
        usual = float(self.dense.tensor(item.source).double().square().mean().sqrt())
        if size and not usual / _MOST_TIMES <= size <= usual * _MOST_TIMES:
            self.findings.add(
                f"{name} has values of {size:.3g} on average, and the dense model's MLP of "
                f"{usual:.3g}: what it computes can overflow, or be lost"
            )

    def other(self, name: str, item: Wanted) -> None:
        """Compare a tensor that is neither an expert nor a router."""
        if item.role in ("expert", "router", "made"):
            return
        copy = item.copy
        if copy is not None and name not in self.differing:
            return
        held = self.moe.tensor(name)
        wanted = self._wanted(item, held.dtype)
        if wanted is not None:
            if not same(held, wanted):
                self.findings.add(lambda: f"{name} {difference(held, wanted)}")
        elif item.role == "zero":
            if bool((held != 0).any()):
                self.findings.add(lambda: f"{name} {difference(held, torch.zeros_like(held))}")
        elif item.role == "shared":
            self._shared(name, item, held)
        elif not bool(torch.isfinite(held).all()) or not bool((held != 0).any()):
            self.findings.add(f"{name} must be finite and not all zero")
        else:
            dtype = self.facts.moe.tensors[name].dtype
            found = size_failures(held, self._gamma(item.layer), dtype)
            self.findings.add(*(f"{name}: {failure}" for failure in found))

    def _wanted(self, item: Wanted, dtype: torch.dtype) -> torch.Tensor | None:
        """Return what a tensor must hold that is copied or added; None for what is drawn."""
        if item.copy is not None:
            source = item.copy.of(self.dense.tensor(item.copy.source))
            return self.rounding.cast(item.copy.source, source, dtype)
        if item.role != "added":
            return None
        if not item.source:
            return torch.full(item.shape, item.value, dtype=dtype)
        source = self.dense.tensor(item.source)
        return self.rounding.cast(item.source, source, dtype) * item.value


def _expert_failure(
    place: Location, held: torch.Tensor, shards: list[torch.Tensor], own: int
) -> str:
    """Say what an expert's matrix holds instead of its own shard."""
    for shard, other in enumerate(shards):
        if shard != own and same(held, other):
            return f"{place.label} holds shard {shard} where shard {own} belongs"
    wanted = shards[own]
    further = ratio(held, wanted)
    if not math.isclose(further, 1.0, rel_tol=1e-3) and same(wanted * further, held):
        return f"{place.label} is its shard multiplied by a further {further:g}"
    return f"{place.label} {difference(held, wanted)}"
