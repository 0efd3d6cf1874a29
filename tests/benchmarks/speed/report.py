"""Tables and verdicts, from medians."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from speed.contestants import (
    MERGEKIT,
    PWRITE,
    TRANSFORMERS,
    UPCYCLE_FINE,
    UPCYCLE_SHUFFLED,
    UPCYCLE_SMALL,
    Contestant,
)
from speed.measure import Run

NO_LIMIT = "–"

_HEADER = (
    "| | fsync | rounds | wall (min to max), s | CPU, s | peak RssAnon, MB "
    "| beyond the interpreter, MB | on disk, GB |\n|---|---|---|---|---|---|---|---|"
)


@dataclass
class Result:
    """All runs of one contestant, or the reason why there are none."""

    contestant: Contestant
    interpreter_bytes: int
    """Anonymous memory of its interpreter once it has imported what it needs anyway."""
    runs: list[Run] = field(default_factory=list)
    failure: str = ""

    @property
    def wall(self) -> float:
        """Median seconds."""
        return statistics.median(run.wall_seconds for run in self.runs)

    @property
    def beyond_bytes(self) -> float:
        """Median peak of anonymous memory beyond the interpreter's own."""
        peak = statistics.median(run.peak_anon_bytes for run in self.runs)
        return max(0, peak - self.interpreter_bytes)

    def row(self) -> str:
        """Return its row of the table."""
        name, fsync = self.contestant.name, "yes" if self.contestant.fsync else "no"
        if not self.runs:
            return f"| {name} | {fsync} | 0 | – | – | – | – | – |"
        walls = [run.wall_seconds for run in self.runs]
        cpu = statistics.median(run.cpu_seconds for run in self.runs)
        peak = statistics.median(run.peak_anon_bytes for run in self.runs)
        disk = statistics.median(run.disk_bytes for run in self.runs)
        return (
            f"| {name} | {fsync} | {len(walls)} "
            f"| {self.wall:.2f} ({min(walls):.2f} to {max(walls):.2f}) | {cpu:.2f} "
            f"| {peak / 1e6:.0f} | {self.beyond_bytes / 1e6:.0f} | {disk / 1e9:.2f} |"
        )


@dataclass(frozen=True)
class Limit:
    """A number that must hold, and what was measured; None when it could not be."""

    what: str
    wanted: str
    measured: float | None
    held: bool | None
    """None where the limit does not apply, or could not be measured."""

    def row(self) -> str:
        """Return its row of the table."""
        number = "–" if self.measured is None else f"{self.measured:.2f}"
        if self.held is not None:
            verdict = "yes" if self.held else "**no**"
        elif self.measured is None:
            verdict = "not measured"
        else:
            verdict = "–" if self.wanted == NO_LIMIT else "does not apply to this size"
        return f"| {self.what} | {self.wanted} | {number} | {verdict} |"


def table(results: Sequence[Result]) -> str:
    """Return the table of all contestants, with the reasons for what is missing."""
    notes = [f"\n{r.contestant.key}: {r.failure}" for r in results if r.failure]
    return "\n".join([_HEADER, *(result.row() for result in results), *notes])


def limits_table(limits: Sequence[Limit]) -> str:
    """Return the table of verdicts."""
    header = "| limit | wanted | measured | held |\n|---|---|---|---|"
    return "\n".join([header, *(limit.row() for limit in limits)])


def writing_limits(results: Sequence[Result], *, start_up_counts: bool) -> list[Limit]:
    """Return the verdicts on writing; `start_up_counts` from 2.4 GB upwards."""
    found = {(result.contestant.name, result.contestant.fsync): result for result in results}
    limits = []
    for name, most in ((UPCYCLE_SMALL, 1.25), (UPCYCLE_FINE, 1.5), (UPCYCLE_SHUFFLED, 2)):
        for fsync in (True, False):
            value = _ratio(found.get((name, fsync)), found.get((PWRITE, fsync)))
            held = None if value is None or not start_up_counts else value <= most
            how = "both with fsync" if fsync else "both without fsync"
            limits.append(Limit(f"time of {name} / pwrite, {how}", f"≤ {most}", value, held))
    ours, peer = found.get((UPCYCLE_SMALL, False)), found.get((MERGEKIT, False))
    value = _ratio(peer, ours)
    held = None if value is None else value >= 4
    what = f"time of mergekit-moe / {UPCYCLE_SMALL}"
    to_limit = _ratio(peer, found.get((PWRITE, False)))
    if to_limit is not None and to_limit < 4:
        what += f" (/ pwrite, in one thread: {to_limit:.2f})"
    limits.append(Limit(what, "≥ 4", value, held))
    value = _ratio(found.get((TRANSFORMERS, False)), ours)
    limits.append(Limit(f"time of a transformers script / {UPCYCLE_SMALL}", NO_LIMIT, value, None))
    value = held = None
    if ours is not None and peer is not None and ours.runs and peer.runs:
        value = ours.beyond_bytes / peer.beyond_bytes
        held = value <= 0.1
    what = f"memory beyond the interpreter, {UPCYCLE_SMALL} / mergekit-moe"
    limits.append(Limit(what, "≤ 0.1", value, held))
    return limits


def sharing_limits(results: Sequence[Result], *, dense_bytes: int) -> list[Limit]:
    """Return the verdicts on a file system that shares extents.

    The first result is pwrite's; then those of upcycle, and last the same recipes on a model so
    small that they are all start-up.
    """
    pwrite, *ours = results
    limits = []
    for result, small in zip(ours[: len(ours) // 2], ours[len(ours) // 2 :], strict=True):
        name = result.contestant.name
        value = held = disk = None
        if result.runs and pwrite.runs and small.runs:
            value = (result.wall - small.wall) / pwrite.wall
            held = value <= 1.3
        limits.append(
            Limit(f"(time of {name} − start-up) / pwrite of the unique bytes", "≤ 1.3", value, held)
        )
        if result.runs:
            disk = statistics.median(run.disk_bytes for run in result.runs) / dense_bytes
        held = None if disk is None else disk <= 1.15
        limits.append(Limit(f"disk use of {name} / dense checkpoint", "≤ 1.15", disk, held))
    return limits


def _ratio(above: Result | None, below: Result | None) -> float | None:
    if above is None or below is None or not above.runs or not below.runs:
        return None
    return above.wall / below.wall
