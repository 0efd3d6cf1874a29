"""What the user wants: the recipe, and the arithmetic that follows from it alone.

Notation is the paper's (He et al., arXiv 2410.07524): E expansion, G granularity, T top-k; a layer
gets N = E·G experts. Nothing here reads a file or imports torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

from upcycle_cli.errors import UpcycleError


class Routing(StrEnum):
    """How a token's gates come from its router logits."""

    SOFTMAX_TOPK = "softmax-topk"
    """Softmax over all experts, then top-k; the gates are used as they are."""
    TOPK_SOFTMAX = "topk-softmax"
    """Top-k, then gates that sum to 1 (softmax over the chosen, or renormalised)."""


class Scaling(StrEnum):
    """A named rule for the factors on the expert matrices; a number sets c itself."""

    EXACT = "exact"
    PAPER = "paper"
    NONE = "none"


class ScaleSplit(StrEnum):
    """Where the factor c goes."""

    BALANCED = "balanced"
    DOWN = "down"


class Promise(StrEnum):
    """What the converted model owes the dense one."""

    EXACT = "exact"
    """The same function, up to the rounding of the arithmetic."""
    APPROXIMATE = "approximate"
    """The same function in the limit of a uniform router: an error of order `router_logit_std`."""
    NONE = "none"
    """A starting point for training only."""


DEFAULT_LOGIT_STD = {Routing.SOFTMAX_TOPK: 0.001, Routing.TOPK_SOFTMAX: 1.0}
TIE_LOGIT_STD = 0.001
"""Below this nominal logit standard deviation float32 softmax itself ties groups."""

_Choice = TypeVar("_Choice", bound=StrEnum)

_MAX_EXPERTS = 4096  # several times what anybody has trained; a plan holds every tensor of them

APPROXIMATE_LOGIT_STD = 0.05
"""Above this nominal logit standard deviation softmax-topk is too far from the dense model to
promise anything: on SmolLM2-135M the mean KL is 4e-4 at 0.01 and 3 at 1."""

_RECIPE = re.compile(r"E(\d{1,9})G(\d{1,9})T(\d{1,9})", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What each expert matrix is multiplied by, and the factor c that this is meant to make.

    For a gated MLP, down(act(gate·x) ⊙ up·x), the output scales with `up` · `down`.
    """

    c: float
    gate: float
    up: float
    down: float

    @property
    def lossless(self) -> bool:
        """Whether every factor is a power of two: the dense weights can be recovered exactly."""
        return all(_is_power_of_two(factor) for factor in (self.gate, self.up, self.down))

    @property
    def function_preserving(self) -> bool:
        """Whether the factors scale a gated MLP's output by exactly c and change nothing else."""
        return self.gate == 1.0 and math.isclose(self.up * self.down, self.c, rel_tol=1e-12)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a dense model becomes a mixture of experts; valid by construction.

    `routing` and `router_logit_std` may be None, meaning the target's own default; `resolve`
    fills them in.

    Raises UpcycleError when the values cannot describe any mixture of experts.
    """

    expansion: int
    granularity: int
    top_k: int
    routing: Routing | None = None
    scaling: Scaling | float = Scaling.EXACT
    scale_split: ScaleSplit = ScaleSplit.BALANCED
    virtual_groups: bool = True
    router_logit_std: float | None = None
    seed: int = 0
    allow_inexact: bool = False

    def __post_init__(self) -> None:
        self._normalise()
        self._check_sizes()
        self._check_numbers()

    def _normalise(self) -> None:
        if isinstance(self.scaling, int):
            object.__setattr__(self, "scaling", float(self.scaling))
        # Python callers may write "topk-softmax"; it must not compare unequal to the member.
        if self.routing is not None:
            object.__setattr__(self, "routing", _member(Routing, self.routing, "routing"))
        if not isinstance(self.scaling, float):
            object.__setattr__(self, "scaling", _member(Scaling, self.scaling, "scaling"))
        split = _member(ScaleSplit, self.scale_split, "scale_split")
        object.__setattr__(self, "scale_split", split)

    def _check_sizes(self) -> None:
        for label, value in (
            ("expansion (E)", self.expansion),
            ("granularity (G)", self.granularity),
            ("top-k (T)", self.top_k),
        ):
            if value < 1:
                raise UpcycleError(f"{label} must be at least 1, not {value}.")
        if self.num_experts > _MAX_EXPERTS:
            raise UpcycleError(
                f"{self.name} makes {self.num_experts} experts per layer (E·G).",
                f"At most {_MAX_EXPERTS} can be made.",
            )
        if self.top_k > self.num_experts:
            raise UpcycleError(
                f"top-k {self.top_k} is more than the {self.num_experts} experts "
                f"that {self.name} makes (E·G).",
                f"Use a top-k of at most {self.num_experts}.",
            )
        if not self.picks_whole_groups and not self.allow_inexact:
            raise UpcycleError(
                f"top-k {self.top_k} is not a multiple of granularity {self.granularity}: "
                "a token would miss some shards of the dense MLP, so the outputs would differ.",
                f"Use a top-k of {_multiples(self.granularity, self.top_k, self.num_experts)}, "
                "or pass --allow-inexact to convert all the same.",
            )

    def _check_numbers(self) -> None:
        if isinstance(self.scaling, float) and not (
            math.isfinite(self.scaling) and self.scaling > 0
        ):
            raise UpcycleError(f"the scale must be a positive number, not {self.scaling}.")
        std = self.router_logit_std
        if std is not None and not (math.isfinite(std) and std > 0):
            raise UpcycleError(
                f"the router logit standard deviation must be a positive number, not {std}.",
                "Equal logits would tie every group; 0.001 is close enough to uniform.",
            )
        if not 0 <= self.seed < 2**63:
            raise UpcycleError(f"the seed must be between 0 and 2^63 - 1, not {self.seed}.")

    @property
    def num_experts(self) -> int:
        """N = E·G, the experts of one layer."""
        return self.expansion * self.granularity

    @property
    def name(self) -> str:
        """The recipe in the paper's notation, such as E8G1T2."""
        return f"E{self.expansion}G{self.granularity}T{self.top_k}"

    @property
    def picks_whole_groups(self) -> bool:
        """Whether top-k can hold whole virtual groups only."""
        return self.top_k % self.granularity == 0

    def resolve(self, default_routing: Routing) -> Recipe:
        """Return the recipe with its routing and router_logit_std filled in."""
        routing = self.routing or default_routing
        std = self.router_logit_std or DEFAULT_LOGIT_STD[routing]
        return replace(self, routing=routing, router_logit_std=std)

    def factors(self) -> Factors:
        """Return the factors for a gated MLP; the recipe must be resolved.

        c is G for gates that sum to 1, and E·G²/T for softmax-topk (paper, eq. 2).
        """
        c = float(self.scaling) if isinstance(self.scaling, float) else self._compensation()
        match self.scaling:
            case Scaling.NONE:
                return Factors(c=c, gate=1.0, up=1.0, down=1.0)
            case Scaling.PAPER:
                root = _cube_root(c)
                return Factors(c=c, gate=root, up=root, down=root)
            case _:
                up = 1.0 if self.scale_split is ScaleSplit.DOWN else _balanced_factor(c)
                return Factors(c=c, gate=1.0, up=up, down=c / up)

    def promise(self) -> Promise:
        """Return what a model converted by this (resolved) recipe owes the dense one."""
        factors = self.factors()
        scaled_right = factors.function_preserving and math.isclose(
            factors.c, self._compensation(), rel_tol=1e-12
        )
        whole = self.picks_whole_groups and (self.virtual_groups or self.granularity == 1)
        if not (scaled_right and whole):
            return Promise.NONE
        if self.routing is Routing.TOPK_SOFTMAX or self.top_k == self.num_experts:
            return Promise.EXACT
        std = self.router_logit_std or DEFAULT_LOGIT_STD[Routing.SOFTMAX_TOPK]
        return Promise.APPROXIMATE if std <= APPROXIMATE_LOGIT_STD else Promise.NONE

    def _compensation(self) -> float:
        if self.routing is None:
            raise ValueError("resolve the recipe first")
        if self.routing is Routing.TOPK_SOFTMAX:
            return float(self.granularity)
        return self.expansion * self.granularity**2 / self.top_k


def parse_recipe_name(text: str) -> tuple[int, int, int]:
    """Parse the paper's notation: "E8G8T8" gives (8, 8, 8).

    Raises UpcycleError when the text has another form.
    """
    match = _RECIPE.fullmatch(text.strip())
    if match is None:
        raise UpcycleError(
            f"'{text}' is not a recipe.",
            "Write E (expansion), G (granularity) and T (top-k) with a number each, "
            "such as E8G1T2 or E8G8T8.",
        )
    expansion, granularity, top_k = (int(group) for group in match.groups())
    return expansion, granularity, top_k


def _member(kind: type[_Choice], value: str, label: str) -> _Choice:
    try:
        return kind(value)
    except ValueError:
        raise UpcycleError(
            f"{label} cannot be {value!r}.", f"Choose from {', '.join(kind)}."
        ) from None


def _is_power_of_two(factor: float) -> bool:
    return math.frexp(factor)[0] == 0.5


def _balanced_factor(c: float) -> float:
    # A power of two keeps this factor lossless whatever c is; the other one is too when c itself
    # is a power of two. An odd exponent gives its extra 2 to up.
    if _is_power_of_two(c):
        return 2.0 ** math.ceil(math.log2(c) / 2)
    return 2.0 ** round(math.log2(c) / 2)


def _cube_root(c: float) -> float:
    # c ** (1/3) of a perfect cube is one ulp off (64 ** (1/3) = 3.9999999999999996).
    nearest = round(math.cbrt(c))
    return float(nearest) if nearest**3 == c else math.cbrt(c)


def _multiples(step: int, near: int, most: int) -> str:
    below = near // step * step
    options = [value for value in (below, below + step) if 0 < value <= most]
    return " or ".join(str(value) for value in options)
