"""Mean and standard deviation of values, also pooled over several sets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Moments:
    """The number of values, their sum, and the sum of their squares."""

    count: int
    total: float
    squares: float

    @classmethod
    def pooled(cls, several: Iterable[Moments]) -> Moments:
        """Pool several sets; their order does not matter."""
        every = [(each.count, each.total, each.squares) for each in several]
        counts, totals, squares = zip(*every, strict=True)
        return cls(sum(counts), math.fsum(totals), math.fsum(squares))

    @property
    def mean(self) -> float:
        """The mean."""
        return self.total / self.count

    @property
    def std(self) -> float:
        """The standard deviation."""
        return math.sqrt(max(0.0, self.squares / self.count - self.mean**2))


def noted_moments(noted: object, names: Sequence[str]) -> dict[str, Moments] | None:
    """Read back the moments in a note, by name; None where one of `names` is missing."""
    held = noted if isinstance(noted, dict) else {}
    try:
        found = {name: Moments(*held[name]) for name in names}
    except (KeyError, TypeError):
        return None
    return found if all(each.count > 0 for each in found.values()) else None
