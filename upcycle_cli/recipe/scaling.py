"""The factors on an MLP's matrices and biases, and their effect on its output."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MlpKind:
    """How an MLP's output scales with its matrices.

    Multiplying up by a and down by b multiplies the output by a**degree · b. A gate is not linear.
    """

    gated: bool
    degree: int

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names of its matrices."""
        return ("gate", "up", "down") if self.gated else ("up", "down")


GATED = MlpKind(gated=True, degree=1)


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The factors on an expert's parts, and the c that their product should be.

    `config` is the part of c that the model's config applies to the gates.
    """

    c: float
    gate: float
    up: float
    down: float
    down_bias: float = 1.0
    config: float = 1.0

    def of(self, part: str) -> float:
        """Return the factor on a matrix or a bias: gate, up, down, gate_bias, up_bias, down_bias.

        The gate and up biases are added before the activation, so they scale as their matrices do.
        """
        factors = {"gate": self.gate, "up": self.up, "down": self.down}
        return self.down_bias if part == "down_bias" else factors[part.removesuffix("_bias")]

    def output(self, kind: MlpKind) -> float:
        """Return the factor on an expert's output before its gate."""
        return self.up**kind.degree * self.down

    def preserve(self, kind: MlpKind = GATED) -> bool:
        """Whether the factors scale an MLP's output by exactly c and change nothing else."""
        if self.gate != 1.0 or (kind.degree == 0 and self.up != 1.0):
            return False
        return math.isclose(self.output(kind) * self.config, self.c, rel_tol=1e-12)


def is_power_of_two(factor: float) -> bool:
    """Whether multiplying by a factor is lossless, barring overflow."""
    return math.frexp(factor)[0] == 0.5


def balanced_factors(c: float, degree: int) -> tuple[float, float]:
    """Return a and b with a**degree · b = c, as equal as lossless factors can be."""
    if degree == 0:
        return 1.0, c
    if not is_power_of_two(c) and degree == 2:
        root = cube_root(c)
        return root, root
    # a is a power of two, so lossless for every c; b is lossless when c is a power of two. With an
    # odd exponent up gets the extra 2 where it counts once.
    exponent = math.log2(c) / (degree + 1)
    odd = degree == 1 and is_power_of_two(c)
    a = 2.0 ** (math.ceil(exponent) if odd else round(exponent))
    return a, c / a**degree


def cube_root(c: float) -> float:
    """Return the cube root, a whole number where there is one."""
    # c ** (1/3) of a perfect cube is one ulp off (64 ** (1/3) = 3.9999999999999996).
    nearest = round(math.cbrt(c))
    return float(nearest) if nearest**3 == c else math.cbrt(c)
