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
from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle_cli.checkpoint import TORCH_DTYPES, Reader
from upcycle_cli.verification.facts import (
    EMBEDDING,
    MATRICES,
    Facts,
    Place,
    dense_mlp_name,
    dtype_failures,
    is_dense_mlp,
    read_tensors,
)
from upcycle_cli.verification.report import CheckResult, Findings

if TYPE_CHECKING:
    import torch

NAME = "weights"
_HEAD = "lm_head.weight"
_SNAP = 0.01  # relative; a measured factor is this close to the one that was meant
_PROBE_ELEMENTS = 1 << 20  # enough for a median, and a bound on its memory


@dataclass(frozen=True)
class _Wanted:
    """A tensor that the MoE must have: its shape, and how its values are judged.

    `role` is copied (from the dense tensor `source`), expert, router, zero or shared_router.
    """

    shape: tuple[int, ...]
    role: str
    source: str = ""


def check_weights(facts: Facts) -> CheckResult:
    """Check every tensor of the MoE against the dense model."""
    findings = Findings()
    wanted = _wanted(facts)
    sound = set(_sound(facts, wanted, findings))
    with facts.dense.reader() as dense, facts.moe.reader() as moe:
        comparison = _Comparison(facts, dense, moe, findings)
        factors = _recover(facts, dense, moe, sound)
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
    lossless = comparison.cast_lossless and all(map(is_power_of_two, factors.values()))
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
    }
    return findings.result(NAME, _passed_detail(facts, factors, lossless=lossless), metrics)


def recover_factors(facts: Facts) -> dict[str, float]:
    """Return what gate, up and down were multiplied by, measured on the tensors themselves.

    nan where nothing can be measured, because the tensors are missing or zero.
    """
    sound = set(_sound(facts, _wanted(facts), Findings()))
    with facts.dense.reader() as dense, facts.moe.reader() as moe:
        return _recover(facts, dense, moe, sound)


def is_power_of_two(factor: float) -> bool:
    """Whether multiplying by the factor loses nothing."""
    return math.frexp(factor)[0] == 0.5


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
        wanted[names.shared_router.format(layer=layer)] = _Wanted((1, H), "shared_router")
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


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    # Equal as numbers is not enough: -0 equals 0, and nan does not equal itself.
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    import torch

    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    if torch.equal(_bits(left), _bits(right)):
        return True
    return bool(left.isnan().any()) and not bool(_unequal(left, right).any())


def _unequal(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return where two tensors differ in their bits, if one of them is a number there."""
    # Which nan comes out of a cast or a product differs between libraries and processors.
    return (_bits(left) != _bits(right)) & ~(left.isnan() & right.isnan())


def _shard(facts: Facts, matrix: str, dense_IH: torch.Tensor, shard: int) -> torch.Tensor:
    """Return a shard's rows of gate or up (I, H), or its columns of down (H, I)."""
    part = slice(shard * facts.expert_size, (shard + 1) * facts.expert_size)
    return dense_IH[:, part] if matrix == "down" else dense_IH[part]


def _recover(facts: Facts, dense: Reader, moe: Reader, sound: set[str]) -> dict[str, float]:
    return {matrix: _recover_one(facts, dense, moe, sound, matrix) for matrix in MATRICES}


def _recover_one(facts: Facts, dense: Reader, moe: Reader, sound: set[str], matrix: str) -> float:
    """Return the candidate that explains some expert bit for bit, else the first measurement.

    Several experts are asked, so that one damaged expert does not change what is expected of all.
    """
    last = facts.num_layers - 1
    probes = ((0, 0), (last, facts.num_experts - 1), (last // 2, facts.num_experts // 2))
    fallback = math.nan
    for layer, expert in probes:
        place = facts.place(matrix, layer, expert)
        if place.tensor not in sound:
            continue
        held = moe.tensor(place.tensor)[place.index]
        whole = dense.tensor(dense_mlp_name(matrix, layer))
        base = _shard(facts, matrix, whole, expert % facts.granularity).to(held.dtype)
        measured = _ratio(held, base)
        near = _near_candidates(facts, matrix, measured)
        for candidate in near:
            if _same(base * candidate, held):
                return candidate
        if math.isnan(fallback):
            fallback = near[0] if near else measured
    return fallback


def _ratio(held: torch.Tensor, base: torch.Tensor) -> float:
    """Return the median of held / base, nan when there is nothing to measure.

    A median, since one damaged element would carry a least-squares fit away.
    """
    import torch

    rows = max(1, _PROBE_ELEMENTS // base.shape[-1])
    held64, base64 = held[:rows].double(), base[:rows].double()
    usable = (base64 != 0) & torch.isfinite(held64) & torch.isfinite(base64)
    if not bool(usable.any()):
        return math.nan
    return float((held64[usable] / base64[usable]).median())


def _near_candidates(facts: Facts, matrix: str, measured: float) -> list[float]:
    """Return the factors that a rule could have meant by a measurement, nearest first."""
    totals = {facts.implied.needed_c, facts.recipe.needed_c, facts.recipe.claimed_c}
    powers = [2.0**exponent for exponent in range(-12, 25)]
    candidates = set(powers)
    for c in totals:
        candidates |= {c / power for power in powers} | {c, math.cbrt(c), math.sqrt(c)}
        nearest_root = round(math.cbrt(c))
        if nearest_root**3 == c:
            candidates = candidates - {math.cbrt(c)} | {float(nearest_root)}
    recorded = None if facts.record is None else facts.record.factor(matrix)
    if recorded is not None:
        candidates.add(recorded)
    near = (value for value in candidates if math.isclose(value, measured, rel_tol=_SNAP))
    return sorted(near, key=lambda value: abs(value - measured))


@dataclass
class _Comparison:
    """Compares tensors and notes what it finds; `cast_lossless` turns false by a lossy cast."""

    facts: Facts
    dense: Reader
    moe: Reader
    findings: Findings
    cast_lossless: bool = True

    def factors(self, factors: Mapping[str, float]) -> None:
        """Hold the recovered factors against config.json and the rule of the scaling."""
        unknown = [matrix for matrix in MATRICES if math.isnan(factors[matrix])]
        if unknown:
            self.findings.add(f"the factor of {' and '.join(unknown)} cannot be recovered")
            return
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
                whole = self._cast(source, held.dtype) * factor
                scaled[held.dtype] = [
                    _shard(facts, matrix, whole, shard).contiguous()
                    for shard in range(facts.granularity)
                ]
            shards, own = scaled[held.dtype], expert % facts.granularity
            if not _same(held, shards[own]):
                self.findings.add(lambda: _expert_failure(place, held, shards, own))  # noqa: B023

    def _cast(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        cast = tensor.to(dtype)
        if self.cast_lossless and cast.dtype != tensor.dtype:
            self.cast_lossless = _same(cast.to(tensor.dtype), tensor)
        return cast

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
        _, identity = torch.unique(_bits(router_NH), dim=0, return_inverse=True)
        size = facts.granularity if facts.recipe.virtual_groups else 1
        groups = identity.reshape(-1, size)
        if bool((groups != groups[:, :1]).any()):
            group, place = (groups != groups[:, :1]).nonzero()[0].tolist()
            self.findings.add(
                f"{name}: row {group * size + place} differs from the other rows of "
                f"its virtual group {group}"
            )
        first: dict[int, int] = {}
        unit = "the rows of groups" if size > 1 else "rows"
        for group, key in enumerate(groups[:, 0].tolist()):
            if key in first:
                self.findings.add(
                    f"{name}: {unit} {first[key]} and {group} are the same, "
                    "so nothing tells them apart"
                )
            first.setdefault(key, group)

    def other(self, name: str, item: _Wanted) -> None:
        """Compare a tensor that is neither an expert nor a router."""
        import torch

        if item.role in ("expert", "router"):
            return
        held = self.moe.tensor(name)
        if item.role == "copied":
            wanted = self._cast(self.dense.tensor(item.source), held.dtype)
            if not _same(held, wanted):
                self.findings.add(lambda: f"{name} {_difference(held, wanted)}")
        elif item.role == "zero":
            if bool((held != 0).any()):
                self.findings.add(lambda: f"{name} {_difference(held, torch.zeros_like(held))}")
        elif not bool(torch.isfinite(held).all()) or not bool((held != 0).any()):
            self.findings.add(f"{name} must be finite and not all zero")


def _expert_failure(place: Place, held: torch.Tensor, shards: list[torch.Tensor], own: int) -> str:
    """Say what an expert's matrix holds instead of its own shard."""
    for shard, other in enumerate(shards):
        if shard != own and _same(held, other):
            return f"{place.label} holds shard {shard} where shard {own} belongs"
    wanted = shards[own]
    ratio = _ratio(held, wanted)
    if not math.isclose(ratio, 1.0, rel_tol=1e-3) and _same(wanted * ratio, held):
        return f"{place.label} is its shard multiplied by a further {ratio:g}"
    return f"{place.label} {_difference(held, wanted)}"


def _difference(held: torch.Tensor, wanted: torch.Tensor) -> str:
    """Say where two tensors of one shape differ first, and in how many elements."""
    different = _unequal(held, wanted)
    rows = different.flatten(1).any(dim=1) if different.dim() > 1 else different
    row = int(rows.nonzero()[0])
    index = [row]
    if different.dim() > 1:
        index.append(int(different[row].nonzero()[0]))
    where = tuple(index)
    return (
        f"differs in {int(different.sum())} of {different.numel()} elements, first at {index}: "
        f"{float(held[where]):.8g} instead of {float(wanted[where]):.8g}"
    )
