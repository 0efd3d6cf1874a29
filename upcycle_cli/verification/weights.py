"""Weights: is every tensor of the MoE what the method makes of the dense model, bit for bit?

Each expert must equal round(cast(shard) × factor), which is exact even when the factor is not
lossless; the factors themselves are recovered from the tensors, whatever `upcycle.json` says, and
must multiply to what config.json implies. One matrix of the dense model is in memory at a time.

Legend: N experts, E groups, G shards, H hidden size, I dense intermediate size; expert e = g·G + s
holds shard s of group g.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from upcycle_cli.checkpoint import TORCH_DTYPES, Reader
from upcycle_cli.verification.bits import bits, difference, same
from upcycle_cli.verification.factors import is_power_of_two, ratio, recover_factors, shard_of
from upcycle_cli.verification.facts import (
    EMBEDDING,
    MATRICES,
    Facts,
    Place,
    dense_mlp_name,
    dtype_failures,
    gamma_name,
    is_dense_mlp,
    read_tensors,
)
from upcycle_cli.verification.report import CheckResult, Findings
from upcycle_cli.verification.rounding import Rounding
from upcycle_cli.verification.rows import row_failures, size_failures

if TYPE_CHECKING:
    import torch

NAME = "weights"
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class _Wanted:
    """A tensor that the MoE must have: its shape, and how its values are judged.

    `role` is copied (from the dense tensor `source`), expert, router, zero or shared_router.
    """

    shape: tuple[int, ...]
    role: str
    source: str = ""
    layer: int = 0


def check_weights(facts: Facts) -> CheckResult:
    """Check every tensor of the MoE against the dense model."""
    findings = Findings()
    wanted = _wanted(facts)
    sound = set(_sound(facts, wanted, findings))
    with facts.dense.reader() as dense, facts.moe.reader() as moe:
        comparison = _Comparison(facts, dense, moe, findings)
        factors = recover_factors(facts)
        comparison.factors(factors)
        for layer in range(facts.num_layers):
            for matrix in MATRICES:
                comparison.experts(matrix, layer, factors[matrix], sound)
            if facts.router_name(layer) in sound:
                comparison.router(layer)
        for name, item in wanted.items():
            if name in sound:
                comparison.other(name, item)
    for failure in dtype_failures(facts):
        findings.add(failure)
    rounding = comparison.rounding
    for failure in rounding.failures():
        findings.add(failure)
    lossless = rounding.lossless and all(map(is_power_of_two, factors.values()))
    metrics = {
        "expansion": facts.expansion,
        "granularity": facts.granularity,
        "gate_factor": factors["gate"],
        "up_factor": factors["up"],
        "down_factor": factors["down"],
        "c": facts.implied.needed_c,
        "groups_checked": facts.expansion * facts.num_layers,
        "tensors_compared": len(sound),
        "lossless": lossless,
        "rounding_error": rounding.error,
        "zeroed_share": rounding.zeroed,
    }
    return findings.result(NAME, _passed_detail(facts, factors, lossless=lossless), metrics)


def _passed_detail(facts: Facts, factors: Mapping[str, float], *, lossless: bool) -> str:
    shown = ", ".join(f"{matrix} × {factors[matrix]:.6g}" for matrix in MATRICES)
    end = (
        "the dense weights can be recovered bit for bit"
        if lossless
        else "rounded to the output dtype, so the dense weights cannot be recovered exactly"
    )
    routers = (
        "Router rows are equal inside each virtual group and differ between groups"
        if facts.recipe.virtual_groups
        else "All router rows differ"
    )
    return (
        f"Every expert is its shard of the dense MLP, bit for bit ({shown}; {end}). {routers}. "
        "All other tensors equal the dense model's."
    )


def _wanted(facts: Facts) -> dict[str, _Wanted]:
    """Return every tensor that the MoE must have, derived from the dense model's tensors."""
    wanted: dict[str, _Wanted] = {}
    for name, entry in read_tensors(facts.dense).items():
        if not is_dense_mlp(name):
            wanted[name] = _Wanted(entry.shape, "copied", name)
    # A tied model may carry its head all the same, and an untied MoE must.
    needs_head = not facts.moe.config.get("tie_word_embeddings", False)
    if _HEAD not in wanted and (needs_head or _HEAD in facts.moe.tensors):
        wanted[_HEAD] = _Wanted(facts.dense.tensors[EMBEDDING].shape, "copied", EMBEDDING)
    for layer in range(facts.num_layers):
        wanted |= _wanted_experts(facts, layer)
        wanted |= _wanted_zeros(facts, layer, wanted)
    return wanted


def _wanted_experts(facts: Facts, layer: int) -> dict[str, _Wanted]:
    N, H, size = facts.num_experts, facts.hidden_size, facts.expert_size
    names = facts.target.names
    wanted = {facts.router_name(layer): _Wanted((N, H), "router")}
    if facts.fused:
        wanted[names.fused_gate_up.format(layer=layer)] = _Wanted((N, 2 * size, H), "expert")
        wanted[names.fused_down.format(layer=layer)] = _Wanted((N, H, size), "expert")
        return wanted
    for expert in range(N):
        for matrix in MATRICES:
            shape = (H, size) if matrix == "down" else (size, H)
            wanted[facts.place(matrix, layer, expert).tensor] = _Wanted(shape, "expert")
    return wanted


def _wanted_zeros(facts: Facts, layer: int, copied: Mapping[str, _Wanted]) -> dict[str, _Wanted]:
    """Return the tensors that the architecture insists on and that must not do anything."""
    H, names = facts.hidden_size, facts.target.names
    wanted: dict[str, _Wanted] = {}
    if facts.target.forced_qkv_bias:
        for matrix in ("q_proj", "k_proj", "v_proj"):
            prefix = f"model.layers.{layer}.self_attn.{matrix}"
            weight = facts.dense.tensors.get(f"{prefix}.weight")
            if weight is not None and f"{prefix}.bias" not in copied:
                wanted[f"{prefix}.bias"] = _Wanted(weight.shape[:1], "zero")
    if names.shared_gate and names.shared_up and names.shared_down and names.shared_router:
        size = facts.moe.config.get("shared_expert_intermediate_size", 0)
        for template in (names.shared_gate, names.shared_up):
            wanted[template.format(layer=layer)] = _Wanted((size, H), "zero")
        wanted[names.shared_down.format(layer=layer)] = _Wanted((H, size), "zero")
        wanted[names.shared_router.format(layer=layer)] = _Wanted(
            (1, H), "shared_router", layer=layer
        )
    return wanted


def _sound(facts: Facts, wanted: Mapping[str, _Wanted], findings: Findings) -> Iterator[str]:
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
    dense: Reader
    moe: Reader
    findings: Findings
    rounding: Rounding = field(default_factory=Rounding)

    def factors(self, factors: Mapping[str, float]) -> None:
        """Hold the recovered factors against config.json and the rule of the scaling."""
        unknown = [matrix for matrix in MATRICES if math.isnan(factors[matrix])]
        if unknown:
            self.findings.add(f"the factor of {' and '.join(unknown)} cannot be recovered")
            return
        if self.facts.lenient:
            return  # whatever they are, they were to be expected
        failure = self.facts.recipe.scaling_failure(
            factors, self.facts.implied.needed_c, self.facts.origin
        )
        if failure is not None:
            self.findings.add(failure)

    def experts(self, matrix: str, layer: int, factor: float, sound: set[str]) -> None:
        """Compare one matrix of all experts of a layer with the dense model's shards."""
        facts = self.facts
        source = self.dense.tensor(dense_mlp_name(matrix, layer))
        # By dtype, since a damaged expert may have one of its own. Each shard is made contiguous
        # once, which makes comparing its E copies several times faster for the columns of down.
        scaled: dict[torch.dtype, list[torch.Tensor]] = {}
        for expert in range(facts.num_experts):
            place = facts.place(matrix, layer, expert)
            if place.tensor not in sound:
                continue
            held = self.moe.tensor(place.tensor)[place.index]
            if held.dtype not in scaled:
                whole = (
                    self.rounding.cast(dense_mlp_name(matrix, layer), source, held.dtype) * factor
                )
                scaled[held.dtype] = [
                    shard_of(facts, matrix, whole, shard).contiguous()
                    for shard in range(facts.granularity)
                ]
            shards, own = scaled[held.dtype], expert % facts.granularity
            if not same(held, shards[own]):
                self.findings.add(lambda: _expert_failure(place, held, shards, own))  # noqa: B023

    def router(self, layer: int) -> None:
        """Check that rows are finite, equal inside a group and different between groups."""
        import torch

        facts = self.facts
        name = facts.router_name(layer)
        router_NH = self.moe.tensor(name)
        finite = torch.isfinite(router_NH).all(dim=-1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            self.findings.add(f"{name}: row {row} holds values that are not finite")
        # One integer per row says which rows are equal.
        _, identity = torch.unique(bits(router_NH), dim=0, return_inverse=True)
        size = facts.granularity if facts.recipe.virtual_groups else 1
        groups = identity.reshape(-1, size)
        if bool((groups != groups[:, :1]).any()) and not facts.lenient:
            group, place = (groups != groups[:, :1]).nonzero()[0].tolist()
            self.findings.add(
                f"{name}: row {group * size + place} differs from the other rows of "
                f"its virtual group {group}"
            )
        if bool(finite.all()):
            for failure in row_failures(
                router_NH[::size], self._gamma(layer), facts.moe.tensors[name].dtype
            ):
                self.findings.add(f"{name}: {failure}")

    def _gamma(self, layer: int) -> torch.Tensor:
        """Return the weight of the norm that feeds a layer's MLP."""
        return self.dense.tensor(gamma_name(layer))

    def other(self, name: str, item: _Wanted) -> None:
        """Compare a tensor that is neither an expert nor a router."""
        import torch

        facts = self.facts

        if item.role in ("expert", "router"):
            return
        held = self.moe.tensor(name)
        if item.role == "copied":
            wanted = self.rounding.cast(item.source, self.dense.tensor(item.source), held.dtype)
            if not same(held, wanted):
                self.findings.add(lambda: f"{name} {difference(held, wanted)}")
        elif item.role == "zero":
            if bool((held != 0).any()):
                self.findings.add(lambda: f"{name} {difference(held, torch.zeros_like(held))}")
        elif not bool(torch.isfinite(held).all()) or not bool((held != 0).any()):
            self.findings.add(f"{name} must be finite and not all zero")
        else:
            gamma_H = self._gamma(item.layer)
            for failure in size_failures(held, gamma_H, facts.moe.tensors[name].dtype):
                self.findings.add(f"{name}: {failure}")


def _expert_failure(place: Place, held: torch.Tensor, shards: list[torch.Tensor], own: int) -> str:
    """Say what an expert's matrix holds instead of its own shard."""
    for shard, other in enumerate(shards):
        if shard != own and same(held, other):
            return f"{place.label} holds shard {shard} where shard {own} belongs"
    wanted = shards[own]
    further = ratio(held, wanted)
    if not math.isclose(further, 1.0, rel_tol=1e-3) and same(wanted * further, held):
        return f"{place.label} is its shard multiplied by a further {further:g}"
    return f"{place.label} {difference(held, wanted)}"
