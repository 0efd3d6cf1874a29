"""Recipe: how a dense model becomes a mixture of experts. Growth: how an MoE gets more experts.

Notation is the paper's (He et al., arXiv 2410.07524): E expansion, G granularity, T top-k; a layer
gets N = E·G experts. Nothing here reads a file or imports torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import KW_ONLY, InitVar, dataclass, replace

from upcycle_cli.core.display import Compact
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.text import any_of
from upcycle_cli.recipe.options import (
    SHIPPED,
    ExpertLayout,
    NeuronOrder,
    Promise,
    RouterInit,
    Routing,
    ScaleSplit,
    Scaling,
    check_types,
)
from upcycle_cli.recipe.scaling import GATED, Factors, MlpKind, balanced_factors, cube_root

__all__ = [
    "APPROXIMATE_LOGIT_STD", "DEFAULT_LOGIT_STD", "SHIPPED", "TIE_LOGIT_STD", "ExpertLayout",
    "Growth", "NeuronOrder", "Promise", "Recipe", "RouterInit", "Routing", "ScaleSplit", "Scaling",
    "parse_recipe_name",
]  # fmt: skip

DEFAULT_LOGIT_STD = {
    Routing.SOFTMAX_TOPK: 0.001,
    Routing.TOPK_SOFTMAX: 1.0,
    Routing.SIGMOID_TOPK: 1.0,
}
TIE_LOGIT_STD = 0.001
"""Below this nominal logit standard deviation the float32 softmax itself ties groups."""

_SIZES = ("expansion", "granularity", "top_k")

MAX_EXPERTS = 4096  # several times the largest trained model; a plan lists every tensor

APPROXIMATE_LOGIT_STD = 0.05
"""Above this nominal logit standard deviation softmax-topk is too far from the dense model to
promise anything: on SmolLM2-135M the mean KL is 4e-4 at 0.01 and 3 at 1."""

_FITTED_STD = 0.01
"""The limit for rows fitted to a calibration text. It is for the measured standard deviation; the
nominal one is larger, up to 2.3 times on SmolLM2-135M."""

_OFF_BY_STD = 4.0
"""The largest of a thousand normal logits lie this many standard deviations above their mean."""

_LEAST_NOISE = 1e-6
"""Smaller noise is lost to rounding in every dtype."""

_RECIPE = re.compile(r"E(\d{1,9})G(\d{1,9})T(\d{1,9})", re.IGNORECASE)


@dataclass(frozen=True, repr=False)
class Recipe(Compact):
    """How a dense model becomes a mixture of experts: `Recipe("E8G1T2", routing="softmax-topk")`.

    The notation E8G1T2 stands for `expansion=8, granularity=1, top_k=2`. `shared_experts` of the G
    shards form an expert that every token uses. `layers`, such as "4-31" or "every:2", become
    mixtures of experts; None means all. `virtual_groups=False` gives each expert a router row of
    its own. `router_logit_std` is the standard deviation of the router's logits. `noise` is added
    to each expert matrix, relative to its standard deviation; `reinit` is the share of each
    expert's neurons to reinitialize. None means the target's default. A string such as
    "softmax-topk" stands for a member of an enum.

    Raises UpcycleError if no mixture of experts has these values.
    """

    notation: InitVar[str | None] = None
    _: KW_ONLY
    expansion: int = 0
    granularity: int = 0
    top_k: int = 0
    shared_experts: int = 0
    routing: Routing | str | None = None
    scaling: Scaling | str | float = Scaling.EXACT
    scale_split: ScaleSplit | str | None = None
    layers: str | None = None
    virtual_groups: bool = True
    neuron_order: NeuronOrder | str = NeuronOrder.SLICED
    router_init: RouterInit | str = RouterInit.NORMAL
    router_logit_std: float | None = None
    """Nominal for normal rows, measured for fitted rows, and None for rows of a file."""
    seed: int = 0
    allow_inexact: bool = False
    noise: float = 0.0
    reinit: float = 0.0

    def __post_init__(self, notation: str | None) -> None:
        if notation is not None:
            if self.expansion or self.granularity or self.top_k:
                words = f"{notation} already sets `expansion`, `granularity` and `top_k`."
                raise UpcycleError(words, "Use one or the other.")
            for name, size in zip(_SIZES, parse_recipe_name(notation), strict=True):
                object.__setattr__(self, name, size)
        if isinstance(self.scaling, int):
            object.__setattr__(self, "scaling", float(self.scaling))
        check_types(self)
        self._check_values()
        self._check_sizes()

    def _check_sizes(self) -> None:
        if not 0 <= self.shared_experts < self.granularity:
            raise UpcycleError(
                f"`shared_experts` must be at least 0 and less than G = {self.granularity}, not "
                f"{self.shared_experts}."
            )
        product = "E·(G − K)" if self.shared_experts else "E·G"
        made = f"{self.num_experts} experts per layer ({product})"
        if self.num_experts > MAX_EXPERTS:
            raise UpcycleError(f"{self.name} makes {made}.", f"At most {MAX_EXPERTS} can be made.")
        if self.top_k > self.num_experts:
            words = f"top-k {self.top_k} is too large: {self.name} makes {made}."
            raise UpcycleError(words, f"Use a top-k of at most {self.num_experts}.")
        if not self.picks_whole_groups and not self.allow_inexact:
            size = self.group_size
            below = self.top_k // size * size
            near = [k for k in (below, below + size) if 0 < k <= self.num_experts]
            words = f"granularity {self.granularity}"
            if self.shared_experts:
                words = f"{size}, the routed shards of {words}"
            raise UpcycleError(
                f"top-k {self.top_k} is not a multiple of {words}: a token would miss "
                "some shards of the dense MLP, so the outputs would differ.",
                f"Use a top-k of {any_of(near)}, or pass `allow_inexact=True` to convert anyway.",
            )

    def _check_values(self) -> None:
        scale, std = self.scaling, self.router_logit_std
        wrong = {
            f"expansion (E) must be at least 1, not {self.expansion}.": self.expansion < 1,
            f"granularity (G) must be at least 1, not {self.granularity}.": self.granularity < 1,
            f"top-k (T) must be at least 1, not {self.top_k}.": self.top_k < 1,
            f"`scaling` must be a positive number, not {scale}.": (
                isinstance(scale, float) and not 0 < scale < math.inf
            ),
            f"`router_logit_std` must be a positive number, not {std}.": (
                std is not None and not 0 < std < math.inf
            ),
            "`router_logit_std` does not apply to router rows from a file.": (
                std is not None and self.router_init is RouterInit.FILE
            ),
            f"`seed` must be between 0 and 2^63 - 1, not {self.seed}.": (
                not 0 <= self.seed < 2**63
            ),
            f"`noise` must be 0 or between {_LEAST_NOISE:g} and 1, not {self.noise}.": self.noise
            and not _LEAST_NOISE <= self.noise <= 1,
            f"`reinit` must be between 0 and 1, not {self.reinit}.": (not 0 <= self.reinit <= 1),
            "`noise` and `reinit` exclude each other.": self.noise and self.reinit,
            "`shared_experts` excludes `noise` and `reinit`.": self.perturbed
            and self.shared_experts,
        }
        for message, applies in wrong.items():
            if applies:
                raise UpcycleError(message)

    @property
    def perturbed(self) -> bool:
        """Whether experts differ from their shards by noise or new neurons."""
        return bool(self.noise or self.reinit)

    @property
    def perturbation(self) -> str:
        """How each expert differs from its shard of the dense MLP, in words."""
        if self.noise:
            return f"noise of {self.noise:g} × the standard deviation of each matrix"
        return f"{100 * self.reinit:g} % of each expert's neurons reinitialized"

    def reinit_count(self, expert_size: int) -> int:
        """Return how many of an expert's neurons are reinitialized."""
        return math.floor(self.reinit * expert_size + 0.5)

    @property
    def group_size(self) -> int:
        """G − K, the routed experts of a virtual group."""
        return self.granularity - self.shared_experts

    @property
    def num_experts(self) -> int:
        """N = E·(G − K), the routed experts of one layer."""
        return self.expansion * self.group_size

    @property
    def router_rows(self) -> int:
        """The distinct router rows: one per virtual group, or one per expert without groups."""
        return self.expansion if self.virtual_groups else self.num_experts

    @property
    def rows_chosen(self) -> int:
        """How many distinct router rows a token chooses."""
        return -(-self.top_k // self.group_size) if self.virtual_groups else self.top_k

    @property
    def name(self) -> str:
        """The recipe in the paper's notation, such as E8G1T2."""
        return f"E{self.expansion}G{self.granularity}T{self.top_k}"

    @property
    def picks_whole_groups(self) -> bool:
        """Whether top-k can hold whole virtual groups only."""
        return self.top_k % self.group_size == 0

    def check_width(self, intermediate_size: int) -> None:
        """Raise UpcycleError for an intermediate size that G does not divide."""
        size, rest = divmod(intermediate_size, self.granularity)
        if rest:
            divisors = [d for d in range(1, intermediate_size + 1) if intermediate_size % d == 0]
            near = [d for d in divisors if d < self.granularity][-1:]
            near += [d for d in divisors if d > self.granularity][:1]
            words = f"intermediate size {intermediate_size} is not divisible by granularity"
            raise UpcycleError(f"{words} {self.granularity}.", f"Try {any_of(near)}.")
        if self.reinit and not self.reinit_count(size):
            raise UpcycleError(
                f"`reinit` {self.reinit:g} of the {size} neurons of an expert rounds to 0 neurons.",
                f"Use a `reinit` of at least {0.5 / size:.3g}.",
            )

    @property
    def trains_tied(self) -> bool:
        """Whether models were measured to train better with the rows of a group tied.

        With softmax-topk, untied groups split from the first step on: gates that do not sum to 1
        scale a whole layer, so each row gets its own gradient, large compared with its values.
        """
        has_groups = self.top_k < self.num_experts and self.virtual_groups and self.group_size > 1
        one_group = self.routing is Routing.TOPK_SOFTMAX and self.top_k == self.group_size
        return has_groups and (one_group or self.routing is Routing.SOFTMAX_TOPK)

    def resolve(self, default_routing: Routing, *, scales_in_config: bool = False) -> Recipe:
        """Return the recipe with the target's defaults filled in.

        `scales_in_config` says whether the target's config has a factor on the gates.
        """
        routing = Routing(self.routing or default_routing)
        std = self.router_logit_std or DEFAULT_LOGIT_STD[routing]
        given = self.router_init is RouterInit.FILE
        scaling, uniform = self.scaling, routing is not Routing.SOFTMAX_TOPK
        if scaling is Scaling.MEASURED and (uniform or self.top_k == self.num_experts):
            scaling = Scaling.EXACT  # the gates sum to 1, so the gain needs no measurement
        if scaling is Scaling.MEASURED and self.scale_split is ScaleSplit.CONFIG:
            words = "`scaling` measured excludes `scale_split` config."
            raise UpcycleError(words, "Use `scale_split` balanced or down.")
        scales_in_config = scales_in_config and scaling is not Scaling.MEASURED
        # With c in the config, experts stay slices of the dense MLP, and nothing can overflow.
        split = self.scale_split or (ScaleSplit.CONFIG if scales_in_config else ScaleSplit.BALANCED)
        return replace(
            self,
            routing=routing,
            scaling=scaling,
            router_logit_std=None if given else std,
            scale_split=split,
        )

    def factors(self, kind: MlpKind = GATED) -> Factors:
        """Return the factors for an MLP of a kind; the recipe must be resolved.

        c is G for gates that sum to 1, and E·G²/T for softmax-topk (paper, eq. 2), with G − K for
        G where experts are shared. The paper and Megatron-LM multiply every matrix by ∛c, or by √c
        where the activation is neither gated nor a squared ReLU.
        """
        c = float(self.scaling) if isinstance(self.scaling, float) else self._compensation()
        gate = up = down = config = 1.0
        match self.scaling:
            case Scaling.NONE:
                pass
            case Scaling.PAPER:
                up = down = cube_root(c) if kind.gated or kind.degree == 2 else math.sqrt(c)
                gate = up if kind.gated else 1.0
            case _ if self.scale_split is ScaleSplit.CONFIG:
                config = c
            case _ if self.scale_split is ScaleSplit.DOWN:
                down = c
            case _:
                up, down = balanced_factors(c, kind.degree)
        # A down bias is added once per chosen expert. Megatron-LM leaves it unscaled for every
        # routing, which is wrong for softmax-topk.
        bias = self._compensation() / self.group_size / config
        bias = 1.0 if self.scaling is Scaling.NONE else bias
        return Factors(c=c, gate=gate, up=up, down=down, down_bias=bias, config=config)

    def promise(self, factors: Factors, kind: MlpKind = GATED) -> tuple[Promise, str]:
        """Return what this (resolved) recipe promises with these factors, and why if it is none."""
        needed, given = self._compensation(), self.router_init is RouterInit.FILE
        std = self.router_logit_std or DEFAULT_LOGIT_STD[Routing.SOFTMAX_TOPK]
        uniform = self.routing is not Routing.SOFTMAX_TOPK or self.top_k == self.num_experts
        largest = APPROXIMATE_LOGIT_STD if self.router_init is RouterInit.NORMAL else _FITTED_STD
        # An approximate recipe stays approximate with a c that is off by as much as its gates.
        slack = 1e-12 if uniform else min(std, largest) * _OFF_BY_STD
        scaled_right = factors.preserve(kind) and math.isclose(factors.c, needed, rel_tol=slack)
        scale = factors.output(kind) * factors.config
        size = "G - K" if self.shared_experts else "G"
        reasons = {
            f"the experts differ from the dense MLP: {self.perturbation}": self.perturbed,
            f"top-k {self.top_k} is not a multiple of {size} = {self.group_size}": (
                not self.picks_whole_groups
            ),
            "without virtual groups a token does not get every shard of the dense MLP": (
                not self.virtual_groups and self.group_size > 1
            ),
            f"scaling {self.scaling} does not preserve the MLP's output": (
                not scaled_right and self.scaling in (Scaling.PAPER, Scaling.NONE)
            ),
            "softmax-topk weighs experts by router logits, and rows from a file can be anything": (
                not uniform and given
            ),
            f"with router logits of standard deviation {std:g} the gates are far from equal": (
                not uniform and std > largest
            ),
            f"the experts are scaled by {scale:.4g}, and the routing needs {needed:.4g}": (
                not scaled_right
            ),
        }
        for reason, applies in reasons.items():
            if applies:
                return Promise.NONE, reason
        return (Promise.EXACT if uniform else Promise.APPROXIMATE), ""

    @property
    def calibrates(self) -> bool:
        """Whether this (resolved) recipe needs a calibration."""
        fitted = self.router_init not in (RouterInit.NORMAL, RouterInit.FILE)
        clustered = self.neuron_order is NeuronOrder.CLUSTERED
        return fitted or clustered or self.scaling is Scaling.MEASURED

    def _compensation(self) -> float:
        if self.routing is None:
            raise ValueError("resolve the recipe first")
        if self.routing is Routing.SOFTMAX_TOPK:
            return self.expansion * self.group_size**2 / self.top_k
        return float(self.group_size)


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How an MoE gets more experts: each is duplicated `expand` times, a token uses `top_k`.

    A `top_k` of None means `expand` times the source's, which is exact. Another one needs
    `allow_inexact=True`. Raises UpcycleError if no MoE has these values.
    """

    expand: int
    top_k: int | None = None
    allow_inexact: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if self.expand < 2:
            words = f"`expand` must be at least 2, not {self.expand}."
            raise UpcycleError(words, "2 doubles the experts.")
        if self.top_k is not None and self.top_k < 1:
            raise UpcycleError(f"top-k (T) must be at least 1, not {self.top_k}.")


def to_recipe(value: Recipe | Growth | str) -> Recipe | Growth:
    """Return a recipe, read from the paper's notation if it is text; raises UpcycleError."""
    return value if isinstance(value, Recipe | Growth) else Recipe(str(value))


def parse_recipe_name(text: str) -> tuple[int, ...]:
    """Parse the paper's notation: "E8G8T8" gives (8, 8, 8); UpcycleError for another form."""
    match = _RECIPE.fullmatch(str(text).strip())
    if match is None:
        raise UpcycleError(
            f"'{text}' is not a recipe.",
            "Write E (expansion), G (granularity) and T (top-k) with a number each, "
            "such as E8G1T2 or E8G8T8.",
        )
    return tuple(map(int, match.groups()))
