"""Recipes as verification reckons with them: what routing needs, and what a record claims.

The formulas repeat the method's few lines of arithmetic instead of importing the converter's, so
that an error there is seen here.

Legend: N experts, E expansion (groups), G granularity (shards), K of them shared, T top-k,
N = E·(G − K).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeGuard

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.storage import RECORD_NAME, read_json
from upcycle_cli.core.errors import UpcycleError, shown

SOFTMAX_TOPK = "softmax-topk"
ROUTINGS = (SOFTMAX_TOPK, "topk-softmax", "sigmoid-topk")
"""All but the first have gates that sum to 1."""
SLICED, SHUFFLED, CLUSTERED = "sliced", "shuffled", "clustered"
"""Whether groups have the dense MLP's neurons as they come, all but the first in an order of their
own, or all in one that a calibration found; a fourth is "file"."""
APPROXIMATE_LOGIT_STD = 0.05
"""Above this standard deviation of the router's logits, gates that are nearly equal are not."""

FITTED_LOGIT_STD = 0.01
"""The same where rows were fitted to their input: the recorded deviation is a measured one."""
NORMAL, FILE = "normal", "file"
PROMPTS = "prompts"
FITTED = ("balanced", "centroids", PROMPTS)
"""Where router rows come from: drawn, given by the user, or fitted to a calibration."""
DRAWN = (NORMAL, "balanced")
"""Those that are random rows, or what is left of them without a few directions."""
_OFF_BY_STD = 4.0
"""Gates that are nearly equal are off by so many deviations of their logits at most."""

_SAME = 1e-6  # relative; factors are stated in double precision


class Promise(StrEnum):
    """What the MoE owes the dense model."""

    EXACT = "exact"
    APPROXIMATE = "approximate"
    NONE = "none"


@dataclass(frozen=True)
class MlpKind:
    """How an MLP's output answers to scaled matrices, by verification's own reckoning."""

    matrices: tuple[str, ...]
    degree: int
    """d, where up × a makes the output × a**d; 0 where nothing can be said."""


def mlp_kind(parts: Collection[str], activation: object) -> MlpKind:
    """Return the kind of an MLP of these parts.

    down · (act(gate·x) ⊙ up·x) is linear in up; without a gate it depends on the activation.
    """
    if "gate" in parts:
        return MlpKind(("gate", "up", "down"), 1)
    return MlpKind(("up", "down"), {"relu2": 2, "relu": 1, "linear": 1}.get(str(activation), 0))


@dataclass(frozen=True, kw_only=True)
class RecipeClaim:
    """A recipe as `upcycle.json` records it, or as it is assumed to have been."""

    expansion: int
    granularity: int
    top_k: int
    shared_experts: int = 0
    routing: str
    kind: MlpKind
    scaling: str | float = "exact"
    scale_split: str = "balanced"
    virtual_groups: bool = True
    neuron_order: str = SLICED
    router_init: str = NORMAL
    router_logit_std: float | None = None
    """None when nothing says it: then it is measured."""
    noise: float = 0.0
    """On each expert's matrices, relative to their standard deviation."""
    reinit: float = 0.0
    """The share of each expert's neurons that were drawn anew."""

    @property
    def perturbed(self) -> bool:
        """Whether no expert is made of the dense model's weights alone."""
        return self.noise > 0 or self.reinit > 0

    def redrawn(self, expert_size: int) -> int:
        """Return how many neurons of an expert were drawn anew: the nearest number to the share."""
        return math.floor(self.reinit * expert_size + 0.5)

    @property
    def num_experts(self) -> int:
        """N = E·(G − K), the routed ones."""
        return self.expansion * self.group_size

    @property
    def group_size(self) -> int:
        """G − K, the routed experts of a virtual group."""
        return self.granularity - self.shared_experts

    @property
    def needed_c(self) -> float:
        """The factor that the gates take away, and the experts must give back."""
        if self.routing == SOFTMAX_TOPK:
            return self.expansion * self.group_size**2 / self.top_k
        return float(self.group_size)

    @property
    def claimed_c(self) -> float:
        """The factor that the scaling sets out to make."""
        return float(self.scaling) if isinstance(self.scaling, float) else self.needed_c

    def objection(self) -> str | None:  # noqa: C901, PLR0911 - a table of reasons
        """Say why this recipe promises no equality, or None when it promises some."""
        c = self.needed_c
        if self.noise:
            return f"noise of {self.noise:g} × their standard deviation is on the experts' matrices"
        if self.reinit:
            return f"{self.reinit:.4g} of each expert's neurons were drawn anew"
        if self.top_k % self.group_size:
            of = "the routed shards," if self.shared_experts else "granularity"
            return (
                f"top-k {self.top_k} is not a multiple of {of} {self.group_size}, "
                "so every token misses some shards of the dense MLP"
            )
        if not self.virtual_groups and self.group_size > 1:
            return (
                "without virtual groups the chosen experts need not hold every shard of the "
                "dense MLP"
            )
        if self.scaling == "paper" and not math.isclose(c, 1.0):
            if "gate" in self.kind.matrices:
                return "scaling paper also scales the gate of SwiGLU, which is not linear in it"
            if self.kind.degree == 0:
                return "scaling paper also scales up, and the activation is not linear"
        if self.scaling == "none" and not math.isclose(c, 1.0):
            return f"scaling none leaves the MLP's output too small by a factor of {c:g}"
        if not self.uniform and self.router_init == FILE:
            return (
                "softmax-topk weighs by the router's logits, and those of given rows can be any, "
                "so the difference is only measured"
            )
        std, most = self.router_logit_std, self.largest_std
        # Where gates are equal up to their logits anyway, c may be off by as much.
        near = 0.0 if self.uniform or std is None else min(std, most) * _OFF_BY_STD
        if not math.isclose(self.claimed_c, c, rel_tol=max(_SAME, near)):
            return f"the scale was set to {self.claimed_c:g}, and the routing needs {c:g}"
        if not self.uniform and std is not None and std > most:
            return (
                f"the router's logits are too large (standard deviation {std:.3g}, more than "
                f"{most:g}) for the recipe to promise anything, so the "
                "difference is only measured"
            )
        return None

    @property
    def largest_std(self) -> float:
        """Up to which standard deviation of the router's logits gates are nearly equal."""
        return FITTED_LOGIT_STD if self.router_init in FITTED else APPROXIMATE_LOGIT_STD

    @property
    def uniform(self) -> bool:
        """Whether the gates of any whole groups sum to what the scale makes up for, exactly."""
        # With every expert chosen, the softmax over all is the softmax over the chosen.
        return self.routing != SOFTMAX_TOPK or self.top_k == self.num_experts

    @property
    def promise(self) -> Promise:
        """What a model made by this recipe owes the dense one."""
        if self.objection() is not None:
            return Promise.NONE
        return Promise.EXACT if self.uniform else Promise.APPROXIMATE

    def scaling_failure(self, factors: Mapping[str, float], c: float, origin: str) -> str | None:
        """Say what is wrong with factors of which `origin` needs `c`, or None."""
        wanted, need = c, f"{origin} needs c ="
        if isinstance(self.scaling, float):
            wanted, need = self.scaling, "the recorded scale is"
        matrices, config = self.kind.matrices, factors["config"]
        if self.scaling in ("paper", "none"):
            # What the paper and Megatron-LM multiply every matrix by.
            root = math.cbrt if "gate" in matrices or self.kind.degree == 2 else math.sqrt
            each = root(wanted) if self.scaling == "paper" else 1.0
            for matrix in (*matrices, "config"):
                meant = 1.0 if matrix == "config" else each
                if not math.isclose(factors[matrix], meant, rel_tol=_SAME):
                    return (
                        f"the factor of {matrix} is {factors[matrix]:.7g}, but scaling "
                        f"{self.scaling} with c = {wanted:g} ({origin}) makes it {meant:.7g}"
                    )
            return None
        fixed = {"gate", "up"} if self.kind.degree == 0 else {"gate"}
        for matrix in matrices:
            if matrix in fixed and not math.isclose(factors[matrix], 1.0, rel_tol=_SAME):
                return (
                    f"the factor of {matrix} is {factors[matrix]:.7g}: the MLP is not linear in "
                    f"its {matrix}, which must keep its scale"
                )
        product = factors["up"] ** self.kind.degree * factors["down"] * config
        if not math.isclose(product, wanted, rel_tol=_SAME):
            formula = {0: "down", 1: "up × down", 2: "up² × down"}[self.kind.degree]
            return f"{formula} = {product:.7g}, but {need} {wanted:g}"
        return None

    @property
    def down_bias_factor(self) -> float:
        """What a down bias is multiplied by, before the gates' own factor is taken off."""
        return 1.0 if self.scaling == "none" else self.needed_c / self.group_size


@dataclass(frozen=True)
class Record:
    """`upcycle.json`: its data, the recipe when it is intact, and what is wrong with the file."""

    data: Mapping[str, Any] = field(default_factory=dict)
    recipe: RecipeClaim | None = None
    problems: tuple[str, ...] = ()

    def factor(self, matrix: str) -> float | None:
        """Return the recorded factor of a matrix, or None when it is not a positive number.

        An earlier version recorded none for the gates, of which it had no factor.
        """
        factors = self.data.get("factors")
        usual = 1.0 if matrix == "config" else None
        value = factors.get(matrix, usual) if isinstance(factors, dict) else None
        return float(value) if is_positive(value) else None


def read_record(moe: Checkpoint, kind: MlpKind | None = None) -> Record:
    """Return what `upcycle.json` says, if it is there; a recipe where an MLP's `kind` is given."""
    if not moe.storage.has(RECORD_NAME):
        return Record()
    try:
        data = read_json(moe.storage.local(RECORD_NAME))
    except UpcycleError as error:
        return Record(problems=(error.message,))
    if kind is None:
        return Record(data)
    recipe, problems, found = None, [], data.get("format")
    if found != 1:
        problems.append(f"{RECORD_NAME}: format is {shown(found)}, and only 1 is known")
    try:
        recipe = _read_recipe(data.get("recipe"), kind)
    except ValueError as error:
        problems.append(f"{RECORD_NAME}: {error}")
    return Record(data, recipe, tuple(problems))


def _read_recipe(recipe: object, kind: MlpKind) -> RecipeClaim:
    if not isinstance(recipe, dict):
        raise ValueError("recipe is missing")  # noqa: TRY004 - the file's fault, not a caller's
    # An earlier version had no other order, drew all rows, and no more than rows.
    usual = dict[str, Any](neuron_order=SLICED, router_init=NORMAL, shared_experts=0)
    recipe = usual | {"noise": 0.0, "reinit": 0.0} | recipe
    wrong = [f"recipe.{key}" for key, valid in _RECIPE_FIELDS.items() if not valid(recipe.get(key))]
    if (recipe.get("router_logit_std") is None) != (recipe["router_init"] == FILE):
        wrong.append("recipe.router_logit_std")
    if not wrong and (recipe["noise"] and (recipe["reinit"] or recipe["shared_experts"])):
        wrong.append("recipe.noise")
    if not wrong and recipe["reinit"] and recipe["shared_experts"]:
        wrong.append("recipe.reinit")
    if wrong:
        raise ValueError(f"{', '.join(wrong)} missing or invalid")
    fields = {key: recipe[key] for key in _RECIPE_FIELDS}
    if not isinstance(fields["scaling"], str):
        fields["scaling"] = float(fields["scaling"])
    claim = RecipeClaim(kind=kind, **fields)
    if claim.group_size < 1:
        raise ValueError("recipe.shared_experts is not less than granularity")
    if claim.top_k > claim.num_experts:
        raise ValueError("recipe.top_k is more than the routed experts")
    return claim


def is_positive(value: object) -> TypeGuard[float]:
    """Whether this is a positive number, with which arithmetic cannot overflow; True is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-30 < value < 1e30


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


_RECIPE_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "expansion": _is_count,
    "granularity": _is_count,
    "top_k": _is_count,
    "shared_experts": lambda value: value == 0 or _is_count(value),
    "routing": lambda value: value in ROUTINGS,
    "scaling": lambda value: value in ("exact", "paper", "none") or is_positive(value),
    "scale_split": lambda value: value in ("config", "balanced", "down"),
    "virtual_groups": lambda value: type(value) is bool,
    "neuron_order": lambda value: value in (SLICED, SHUFFLED, CLUSTERED, "file"),
    "router_init": lambda value: value in (NORMAL, FILE, *FITTED),
    "router_logit_std": lambda value: value is None or is_positive(value),
    "noise": _is_share,
    "reinit": _is_share,
}
"""The fields of a recorded recipe that verification reads, and what each may hold."""
