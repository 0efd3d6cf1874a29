"""Mean and standard deviation of values, also pooled over several sets."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple


class Moments(NamedTuple):
    """The number of values, their sum, and the sum of their squares."""

    num_values: int
    total: float
    squares: float

    @classmethod
    def pooled(cls, several: Iterable[Moments]) -> Moments:
        """Pool several sets; their order does not matter."""
        counts, totals, squares = zip(*several, strict=True)
        return cls(sum(counts), math.fsum(totals), math.fsum(squares))

    @property
    def mean(self) -> float:
        """The mean."""
        return self.total / self.num_values

    @property
    def std(self) -> float:
        """The standard deviation."""
        return math.sqrt(max(0.0, self.squares / self.num_values - self.mean**2))
