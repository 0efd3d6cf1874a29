"""What is compared: the paper's claims, and upcycle's choices; and whether it is decided.

Arms of one seed see the same tokens in the same order, so that differences are taken seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from training.arms import DENSE, DENSE_AS_LONG, DENSE_LONGER, GROUPED, SHARED, SIZES

ENOUGH = 3
"""The seeds below which whatever is found is a hint."""
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t at 97.5 %, by degrees of freedom."""

Runs = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""What was measured of each arm, by seed."""
Verdict = Literal["yes", "no", "not decided", "a hint", "not run"]


@dataclass(frozen=True)
class Comparison:
    """Whether the first arm ends lower than the second."""

    first: str
    second: str
    measure: str = "loss"


@dataclass(frozen=True)
class Claim:
    """A sentence, and the comparisons that bear on it."""

    text: str
    comparisons: tuple[Comparison, ...]


def _all(*pairs: tuple[str, str], measure: str = "loss") -> tuple[Comparison, ...]:
    return tuple(Comparison(first, second, measure) for first, second in pairs)


def _each(first: str, second: str, sizes: Sequence[str] = SIZES) -> tuple[Comparison, ...]:
    """Return a comparison at each size; the names of the arms are what is said after that of it."""
    return _all(*((_arm(size, first), _arm(size, second)) for size in sizes))


def _arm(size: str, way: str) -> str:
    return f"{size}, {way}" if way else size


PAPER = (
    Claim(
        "upcycled beats continued dense, at equal tokens", _all(*((size, DENSE) for size in SIZES))
    ),
    Claim(
        "upcycled beats continued dense, at equal FLOPs",
        _all(*((size, DENSE_AS_LONG) for size in SIZES)),
    ),
    Claim(
        "weight scaling helps",
        (
            *_each("softmax-topk τ=1 paper", "softmax-topk τ=1 none"),
            *_each("paper", "none", GROUPED),
        ),
    ),
    Claim("softmax-then-topk beats topk-then-softmax", _each("softmax-topk τ=1 paper", "")),
    Claim("finer experts are better, as many parameters being active", _all(("E8G8T16", "E8G1T2"))),
    Claim("a higher T is better, and costs more", _all(("E8G8T16", "E8G8T8"))),
    Claim("virtual groups help", _each("", "no virtual groups", GROUPED)),
    Claim("an aux loss helps", _each("", "no aux loss")),
    Claim(
        "without an aux loss the load is uneven, and experts die",
        tuple(
            Comparison(each.first, each.second, measure)
            for measure in ("idle_experts", "load_cv")
            for each in _each("", "no aux loss")
        ),
    ),
    Claim(
        "the learning rate is to be reset to its peak",
        (*_each("", "learning rate not reset"), *_all((DENSE, "dense, learning rate not reset"))),
    ),
)
CHOICES = (
    *_each("softmax-topk τ=1", "softmax-topk τ=0.001"),
    *_each("", "softmax-topk τ=1"),
    *_each("", "softmax-topk τ=0.001"),
    *_each("softmax-topk τ=1 measured", "softmax-topk τ=1"),
    *_each("softmax-topk τ=1", "softmax-topk τ=1 paper"),
    *_each("", "sigmoid-topk"),
    *_each("", "τ=0.1"),
    *_each("balanced", ""),
    *_each("centroids", ""),
    *_each("centroids", "balanced"),
    *_each("", "aux loss pooled"),
    *_each("noise 0.01", ""),
    *_each("noise 0.1", ""),
    *_each("reinit 0.25", ""),
    *_each("reinit 0.5", ""),
    *_each("", "paper", GROUPED),
    *_each("tied", "", GROUPED),
    *_each("softmax-topk τ=0.001 tied", "softmax-topk τ=0.001", GROUPED),
    *_each("shuffled", "", GROUPED),
    *_each("clustered", "", GROUPED),
    *_all(
        *(
            (f"{shared}, sigmoid-topk 1 shared", f"{size}, sigmoid-topk")
            for size, shared in SHARED.items()
        )
    ),
)

OVER_TIME = (
    *_each("tied", "", GROUPED),
    *_each("softmax-topk τ=0.001 tied", "softmax-topk τ=0.001", GROUPED),
    *_each("", "learning rate not reset"),
)
"""What may help for some of the time."""


@dataclass(frozen=True)
class Spread:
    """Values of several seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return sum(self.values) / len(self.values)

    @property
    def standard_error(self) -> float:
        """Of the mean; nan for one value."""
        count = len(self.values)
        if count < 2:
            return math.nan
        squares = sum((value - self.mean) ** 2 for value in self.values)
        return math.sqrt(squares / (count - 1) / count)

    @property
    def margin(self) -> float:
        """Half the 95 % interval of the mean, by Student's t."""
        return _T.get(len(self.values) - 1, 1.96) * self.standard_error


def runs_of(results: Mapping[str, Any]) -> Runs:
    """Return the runs by arm and seed."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for run in results["runs"]:
        found.setdefault(run["arm"], {})[run["seed"]] = run
    return found


def ends(runs: Runs, arm: str, measure: str = "loss") -> Spread:
    """Return what an arm ends with."""
    return Spread(tuple(run["curve"][-1][measure] for run in runs[arm].values()))


def difference(runs: Runs, comparison: Comparison, when: int = -1) -> Spread | None:
    """Return the second arm's measure minus the first's, by seed; None where a seed has not both.

    `when` is the place on the curve: the end, if it is not given.
    """
    if comparison.second == DENSE_AS_LONG:
        return _at_equal_flops(runs, comparison.first)
    first, second = (runs.get(arm, {}) for arm in (comparison.first, comparison.second))
    seeds = sorted(first.keys() & second.keys())

    def end(arm: Mapping[int, Mapping[str, Any]], seed: int) -> float:
        return float(arm[seed]["curve"][when][comparison.measure])

    return Spread(tuple(end(second, s) - end(first, s) for s in seeds)) if seeds else None


def _at_equal_flops(runs: Runs, arm: str) -> Spread | None:
    """Return by how much an arm ends lower than the dense model would with as many FLOPs.

    That is taken from the ends of two dense runs, each with a schedule of its own: between them the
    loss is taken for linear in the logarithm of the FLOPs, and a little beyond the longer one.
    """
    of = [runs.get(name, {}) for name in (arm, DENSE, DENSE_LONGER)]
    values = []
    for seed in sorted(of[0].keys() & of[1].keys() & of[2].keys()):
        own, short, long = (each[seed]["curve"][-1] for each in of)
        share = math.log(own["flops"] / short["flops"]) / math.log(long["flops"] / short["flops"])
        values.append(short["loss"] + share * (long["loss"] - short["loss"]) - own["loss"])
    return Spread(tuple(values)) if values else None


def verdict(spread: Spread | None) -> Verdict:
    """Say whether the second arm's end is higher: 95 %, without a correction for many questions."""
    if spread is None:
        return "not run"
    if len(spread.values) < ENOUGH:
        return "a hint"
    if abs(spread.mean) <= spread.margin:
        return "not decided"
    return "yes" if spread.mean > 0 else "no"


def verdict_of_all(verdicts: Sequence[Verdict]) -> str:
    """Say what several comparisons say of a claim."""
    kinds = {*verdicts}
    if len(kinds) == 1:
        return {"yes": "agrees", "no": "disagrees"}.get(verdicts[0], verdicts[0])
    for short in ("not run", "a hint"):
        if short in kinds:
            return short
    if kinds <= {"yes", "not decided"}:
        return "agrees in part"
    if kinds <= {"no", "not decided"}:
        return "disagrees in part"
    return "mixed"
