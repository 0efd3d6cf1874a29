"""Whether values were drawn as they are said to be: told from other values that were.

Nothing of what was drawn can be foretold but its statistics, and what rounding to a dtype makes of
these depends on what it was added to. So the same is drawn once more, by a generator of
verification's own, and both are compared: their mean, their size, their mean absolute value, which
tells normal values from others of that size, and how they go along with what they were added to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

_MOST_DEVIATIONS = 6.0
"""Of the difference between two honest samples; chance exceeds it once in 500 million times."""
_MOST_OFF = 9.0
"""Standard deviations that no normal value is off by."""
_LEAST = 64
"""Values of which statistics say something."""
_EPSILON = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-23}
_PIECE_ELEMENTS = 1 << 19


@dataclass
class Sums:
    """Sums of d, |d|, d² and d·p, and of the squares of these, where d is what was added to p."""

    count: int = 0
    first: torch.Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.double))
    second: torch.Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.double))

    def add(self, d: torch.Tensor, p: torch.Tensor) -> None:
        """Add the values of two vectors of float32."""
        rows = torch.stack((d, d.abs(), d * d, d * p))
        self.count += d.numel()
        self.first += rows.sum(1, dtype=torch.double)
        self.second += rows.square_().sum(1, dtype=torch.double)

    def merge(self, other: Sums) -> None:
        """Add what another has."""
        self.count += other.count
        self.first += other.first
        self.second += other.second

    @property
    def size(self) -> float:
        """The root mean square of d."""
        return math.sqrt(float(self.first[2]) / max(1, self.count))


@dataclass
class Sample:
    """What was drawn, in units of the standard deviation that it should have, and what should be.

    `held` is of the MoE, `meant` of verification's own draws.
    """

    held: Sums = field(default_factory=Sums)
    meant: Sums = field(default_factory=Sums)
    most: float = 0.0
    """By how much more than any draw and its rounding a value is off, at most."""

    def add(
        self, held: torch.Tensor, base: torch.Tensor, std: float, own: torch.Generator
    ) -> torch.Tensor:
        """Add values of the MoE that are `base` and a draw of deviation `std`; return the draws.

        Both are vectors; `base` may be one value for all. The draws are in units of `std`.
        """
        dtype, found = held.dtype, []
        for start in range(0, len(held), _PIECE_ELEMENTS):
            h = held[start : start + _PIECE_ELEMENTS].float()
            p = base[start : start + _PIECE_ELEMENTS] if len(base) > 1 else base
            p = p.float().expand(len(h))
            drawn = torch.randn(len(h), generator=own).mul_(std).add_(p)
            meant = drawn.to(dtype).float().sub_(p).div_(std)
            d = (h - p).div_(std)
            scaled = p / std
            self.held.add(d, scaled)
            self.meant.add(meant, scaled)
            allowed = _MOST_OFF + (h.abs() / std) * _EPSILON[dtype]
            self.most = max(self.most, float((d.abs() - allowed).max()))
            found.append(d)
        return torch.cat(found)

    def merge(self, other: Sample) -> None:
        """Add another's values."""
        self.held.merge(other.held)
        self.meant.merge(other.meant)
        self.most = max(self.most, other.most)

    @property
    def strength(self) -> float:
        """How large what was drawn is, relative to what it should be."""
        size = self.meant.size
        return self.held.size / size if size else math.nan

    @property
    def bound(self) -> float:
        """By how much `strength` of honest draws is off 1 at most."""
        mean = float(self.meant.first[2]) / max(1, self.meant.count)
        return _bound(self.held, self.meant, 2) / mean / 2 if mean else math.nan

    def failures(self) -> Iterator[str]:
        """Say what is not as it should be, in words that go on after a name."""
        if not math.isfinite(float(self.held.first.sum())):
            yield "holds values that are not finite"
            return
        if self.most > 0:
            yield "has values that no such draw gives"
        if self.held.count < _LEAST:
            return
        off = [_is_off(self.held, self.meant, row) for row in range(4)]
        means = (self.held.first / self.held.count).tolist()
        if off[2]:
            yield f"has draws of {self.strength:.3g} times the standard deviation they should have"
        if off[0]:
            yield f"has draws whose mean is off by {means[0]:.3g} of their standard deviation"
        if off[1] and not off[2]:
            yield "has draws that are not normal"
        if off[3] and not (off[0] or off[2]):
            yield "has draws that go along with the dense model's weights: another factor"


def _bound(held: Sums, meant: Sums, row: int) -> float:
    variance = 0.0
    for sums in (held, meant):
        mean, square = float(sums.first[row]), float(sums.second[row])
        mean, square = mean / sums.count, square / sums.count
        variance += max(0.0, square - mean * mean) / sums.count
    return _MOST_DEVIATIONS * math.sqrt(variance)


def _is_off(held: Sums, meant: Sums, row: int) -> bool:
    difference = float(held.first[row]) / held.count - float(meant.first[row]) / meant.count
    return abs(difference) > _bound(held, meant, row) + 1e-6


def sums_of(values: torch.Tensor) -> tuple[int, float, float]:
    """Return how many values a vector has, their sum, and that of their squares."""
    total = squares = 0.0
    for start in range(0, len(values), _PIECE_ELEMENTS):
        piece = values[start : start + _PIECE_ELEMENTS].double()
        total += float(piece.sum())
        squares += float(piece.square().sum())
    return len(values), total, squares


def alike(drawn_NM: torch.Tensor) -> tuple[int, int] | None:
    """Return two rows of draws that are of one draw, None where all are of their own.

    Rows in which too few values are other than 0, as rounding leaves of small draws, say nothing.
    """
    squares = drawn_NM.double().square()
    effective_N = squares.sum(1).square() / squares.square().sum(1).clamp_min(1e-300)
    usable = (effective_N >= 4 * _LEAST).nonzero().flatten()
    if len(usable) < 2:
        return None
    centred = drawn_NM[usable] - drawn_NM[usable].mean(1, keepdim=True)
    centred /= centred.norm(dim=1, keepdim=True).clamp_min(1e-30)
    correlation = (centred @ centred.T).abs_().fill_diagonal_(0.0)
    place = int(correlation.argmax())
    if float(correlation.max()) * math.sqrt(float(effective_N[usable].min())) <= 8.0:
        return None
    one, other = sorted(divmod(place, len(usable)))
    return int(usable[one]), int(usable[other])
