"""What is compared: the paper's claims, and upcycle's choices; and whether it is decided.

Arms of one seed see the same tokens in the same order, so that differences are taken seed by seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.arms import DENSE, DENSE_AS_LONG, DENSE_LONGER, GROUPED, SHARED, SIZES

ENOUGH = 3
"""With fewer seeds whatever is found is a hint."""
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t at 97.5 %, by degrees of freedom."""

Runs = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""What was measured of each arm, by seed."""


@dataclass(frozen=True)
class Comparison:
    """Whether the first arm ends lower than the second."""

    first: str
    second: str
    measure: str = "loss"


def _each(
    first: str, second: str, sizes: Sequence[str] = SIZES, measure: str = "loss"
) -> tuple[Comparison, ...]:
    """Return a comparison at each size; the names are what follows the size in the arms' names."""
    pairs = [[f"{size}, {way}" if way else size for way in (first, second)] for size in sizes]
    return tuple(Comparison(one, other, measure) for one, other in pairs)


PAPER: Mapping[str, Sequence[Comparison]] = {
    "upcycled beats continued dense, at equal tokens": [Comparison(s, DENSE) for s in SIZES],
    "upcycled beats continued dense, at equal FLOPs": [
        Comparison(size, DENSE_AS_LONG) for size in SIZES
    ],
    "weight scaling helps": (
        *_each("softmax-topk τ=1 paper", "softmax-topk τ=1 none"),
        *_each("paper", "none", GROUPED),
    ),
    "softmax-then-topk beats topk-then-softmax": _each("softmax-topk τ=1 paper", ""),
    "finer experts are better, with equal active parameters": [Comparison("E8G8T16", "E8G1T2")],
    "a higher T is better": [Comparison("E8G8T16", "E8G8T8")],
    "virtual groups help": _each("", "no virtual groups", GROUPED),
    "an aux loss helps": _each("", "no aux loss"),
    "without an aux loss the load is uneven, and experts die": (
        *_each("", "no aux loss", measure="idle_experts"),
        *_each("", "no aux loss", measure="load_cv"),
    ),
    "resetting the learning rate to its peak helps": (
        *_each("", "learning rate not reset"),
        Comparison(DENSE, "dense, learning rate not reset"),
    ),
}
"""The paper's claims, and the comparisons that bear on each."""
OVER_TIME = (
    *_each("tied", "", GROUPED),
    *_each("softmax-topk τ=0.001 tied", "softmax-topk τ=0.001", GROUPED),
    *_each("", "learning rate not reset"),
)
"""What may help for some of the time."""
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
    *(
        Comparison(f"{shared}, sigmoid-topk 1 shared", f"{size}, sigmoid-topk")
        for size, shared in SHARED.items()
    ),
)


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
        return statistics.stdev(self.values) / math.sqrt(count) if count > 1 else math.nan

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


def spread_of(runs: Runs, arm: str, measure: str = "loss", when: int = -1) -> Spread:
    """Return an arm's measurements at a place on its curve, the end by default."""
    return Spread(tuple(run["curve"][when][measure] for run in runs[arm].values()))


def difference(runs: Runs, comparison: Comparison, when: int = -1) -> Spread | None:
    """Return the second arm's measure minus the first's, by seed; None where no seed has both."""
    longer = comparison.second == DENSE_AS_LONG
    names = (comparison.first, *((DENSE, DENSE_LONGER) if longer else (comparison.second,)))
    arms = [runs.get(name, {}) for name in names]
    values = []
    for seed in sorted(set.intersection(*({*arm} for arm in arms))):
        points = [arm[seed]["curve"][when] for arm in arms]
        second = _at_equal_flops(*points) if longer else points[1][comparison.measure]
        values.append(float(second - points[0][comparison.measure]))
    return Spread(tuple(values)) if values else None


def _at_equal_flops(
    own: Mapping[str, float], short: Mapping[str, float], long: Mapping[str, float]
) -> float:
    """Return the loss of the dense model after as many FLOPs as `own`.

    Between the ends of two dense runs, each with its own schedule, and a little beyond the longer
    one, the loss is taken to be linear in the logarithm of the FLOPs.
    """
    share = math.log(own["flops"] / short["flops"]) / math.log(long["flops"] / short["flops"])
    return short["loss"] + share * (long["loss"] - short["loss"])


def verdict(spread: Spread | None) -> str:
    """Say whether the second arm's end is higher: 95 %, without a correction for many questions."""
    if spread is None:
        return "not run"
    if len(spread.values) < ENOUGH:
        return "a hint"
    if abs(spread.mean) <= spread.margin:
        return "not decided"
    return "yes" if spread.mean > 0 else "no"


def verdict_of_all(verdicts: Sequence[str]) -> str:
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
