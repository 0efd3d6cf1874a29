"""What an MLP's matrices are multiplied by, and what that does to its output."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MlpKind:
    """What an MLP's output does when its matrices are multiplied.

    Multiplying up by a and down by b multiplies it by a**degree · b; a gate is not to be touched.
    """

    gated: bool
    degree: int

    @property
    def matrices(self) -> tuple[str, ...]:
        """The matrices it has."""
        return ("gate", "up", "down") if self.gated else ("up", "down")


GATED = MlpKind(gated=True, degree=1)


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What each expert matrix is multiplied by, and the factor c that this is meant to make.

    `config` is the part of c by which the model itself multiplies its gates.
    """

    c: float
    gate: float
    up: float
    down: float
    config: float = 1.0

    @property
    def lossless(self) -> bool:
        """Whether every factor is a power of two: the dense weights can be recovered exactly."""
        return all(map(is_power_of_two, (self.gate, self.up, self.down)))

    def output(self, kind: MlpKind) -> float:
        """Return by how much an expert's output, before its gate, is more than its dense part's."""
        return self.up**kind.degree * self.down

    def preserve(self, kind: MlpKind = GATED) -> bool:
        """Whether the factors scale an MLP's output by exactly c and change nothing else."""
        if self.gate != 1.0 or (kind.degree == 0 and self.up != 1.0):
            return False
        return math.isclose(self.output(kind) * self.config, self.c, rel_tol=1e-12)


def is_power_of_two(factor: float) -> bool:
    """Whether multiplying by this loses nothing, barring overflow."""
    return math.frexp(factor)[0] == 0.5


def balanced_factors(c: float, degree: int) -> tuple[float, float]:
    """Return a and b of a**degree · b = c, as equal as they can be without loss."""
    if degree == 0:
        return 1.0, c
    if not is_power_of_two(c) and degree == 2:
        root = cube_root(c)
        return root, root
    # A power of two keeps this factor lossless whatever c is; the other one is too when c itself
    # is a power of two. An odd exponent gives its extra 2 to up where it is counted once.
    exponent = math.log2(c) / (degree + 1)
    odd = degree == 1 and is_power_of_two(c)
    a = 2.0 ** (math.ceil(exponent) if odd else round(exponent))
    return a, c / a**degree


def cube_root(c: float) -> float:
    """Return the cube root, a whole number where there is one."""
    # c ** (1/3) of a perfect cube is one ulp off (64 ** (1/3) = 3.9999999999999996).
    nearest = round(math.cbrt(c))
    return float(nearest) if nearest**3 == c else math.cbrt(c)
