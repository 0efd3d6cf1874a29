"""The mean and the standard deviation of values, of some or of several lots together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Moments:
    """How many values there are, their sum, and that of their squares."""

    count: int
    total: float
    squares: float

    @classmethod
    def pooled(cls, several: Iterable[Moments]) -> Moments:
        """Return those of all values together, whatever the order they come in."""
        every = [(each.count, each.total, each.squares) for each in several]
        counts, totals, squares = zip(*every, strict=True)
        return cls(sum(counts), math.fsum(totals), math.fsum(squares))

    @property
    def mean(self) -> float:
        """Their mean."""
        return self.total / self.count

    @property
    def std(self) -> float:
        """Their standard deviation."""
        return math.sqrt(max(0.0, self.squares / self.count - self.mean**2))


def noted_moments(noted: object, names: Sequence[str]) -> dict[str, Moments] | None:
    """Read back what `astuple` made of several, by name; None where one of `names` is missing."""
    held = noted if isinstance(noted, dict) else {}
    try:
        found = {name: Moments(*held[name]) for name in names}
    except (KeyError, TypeError):
        return None
    numbers = (number for each in found.values() for number in (each.total, each.squares))
    sound = all(type(each.count) is int and each.count > 0 for each in found.values())
    return found if sound and all(type(number) is float for number in numbers) else None
