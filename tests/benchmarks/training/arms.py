"""The arms of the experiment, a row each: how a model is converted, and how it is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from upcycle_cli import Recipe
from upcycle_cli.recipe.recipe import parse_recipe_name

BALANCING = 0.01
DENSE, DENSE_LONGER = "dense", "dense, as many FLOPs as E8G1T2"
DENSE_AS_LONG = "dense, as many FLOPs"
"""No arm: the dense model with the FLOPs of what it is compared with, between those two."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to go on from the dense model."""

    name: str
    recipe: str | None = None
    """EnGnTn, or None for the dense model itself."""
    convert: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the Recipe, beside its sizes and the seed."""
    target: str = "auto"
    calibrated: bool = False
    """Whether routers or factors are fitted to some of the text that is trained on."""
    reset: bool = True
    """Whether the learning rate goes up to its peak again, or stays where pretraining ended."""
    balancing: float = BALANCING
    """The weight of the balancing loss."""
    pooled: bool = False
    """Whether that loss takes all layers as one, as transformers does."""
    tied: bool = False
    """Whether the router rows of a group are trained as one."""
    flops_of: str | None = None
    """The arm whose FLOPs it is trained for; for the tokens of the scale otherwise."""

    @property
    def granularity(self) -> int:
        """The experts of a virtual group: G, less those that are shared."""
        if self.recipe is None:
            return 1
        return parse_recipe_name(self.recipe)[1] - int(self.convert.get("shared_experts", 0))

    def to_recipe(self, seed: int) -> Recipe:
        """Return the whole recipe."""
        assert self.recipe is not None
        expansion, granularity, top_k = parse_recipe_name(self.recipe)
        return Recipe(
            expansion=expansion, granularity=granularity, top_k=top_k, seed=seed, **self.convert
        )

    def settings(self) -> dict[str, Any]:
        """Return the row as JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Way:
    """What is changed of an arm, at each size or at some."""

    name: str
    at: tuple[str, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the Arm."""


SIZES = ("E8G1T2", "E4G4T8", "E8G8T8", "E8G8T16")
GROUPED = SIZES[1:]

_NEARLY_UNIFORM = {"routing": "softmax-topk"}
_SOFTMAX = {**_NEARLY_UNIFORM, "router_logit_std": 1.0}
# Without a sibling of qwen3 that has a sigmoid and no shared expert: the code that is shipped.
_SIGMOID = {"convert": {"routing": "sigmoid-topk"}, "target": "upcycled"}


def _way(name: str, at: tuple[str, ...] = SIZES, /, **convert: Any) -> Way:  # noqa: ANN401
    return Way(name=name, at=at, changes={"convert": convert})


def _fitted(name: str, at: tuple[str, ...] = SIZES, /, **convert: Any) -> Way:  # noqa: ANN401
    return Way(name=name, at=at, changes={"convert": convert, "calibrated": True})


_WAYS = (
    _way("softmax-topk τ=0.001", **_NEARLY_UNIFORM),
    _way("softmax-topk τ=1", **_SOFTMAX),
    _way("softmax-topk τ=1 paper", **_SOFTMAX, scaling="paper"),
    _way("softmax-topk τ=1 none", **_SOFTMAX, scaling="none"),
    _fitted("softmax-topk τ=1 measured", **_SOFTMAX, scaling="measured"),
    Way(name="sigmoid-topk", at=SIZES, changes=_SIGMOID),
    _way("τ=0.1", router_logit_std=0.1),
    _fitted("balanced", router_init="balanced"),
    _fitted("centroids", router_init="centroids"),
    Way(name="no aux loss", at=SIZES, changes={"balancing": 0.0}),
    Way(name="aux loss pooled", at=SIZES, changes={"pooled": True}),
    Way(name="learning rate not reset", at=SIZES, changes={"reset": False}),
    *(
        _way(f"{way} {size:g}", **{way: size})
        for way, sizes in {"noise": (0.01, 0.1), "reinit": (0.25, 0.5)}.items()
        for size in sizes
    ),
    Way(name="tied", at=GROUPED, changes={"tied": True}),
    Way(
        name="softmax-topk τ=0.001 tied",
        at=GROUPED,
        changes={"convert": _NEARLY_UNIFORM, "tied": True},
    ),
    _way("paper", GROUPED, scaling="paper"),
    _way("none", GROUPED, scaling="none"),
    _way("no virtual groups", GROUPED, virtual_groups=False),
    _way("shuffled", GROUPED, neuron_order="shuffled"),
    _fitted("clustered", GROUPED, neuron_order="clustered"),
)
SHARED = {"E4G4T8": "E4G4T6", "E8G8T8": "E8G8T7", "E8G8T16": "E8G8T14"}
"""The size at which one shard of each group is shared, and as many groups are chosen."""

_ROWS = (
    Arm(name=DENSE),
    Arm(name="dense, learning rate not reset", reset=False),
    Arm(name=DENSE_LONGER, flops_of="E8G1T2"),
    *(Arm(name=size, recipe=size) for size in SIZES),
    *(
        Arm(name=f"{size}, {way.name}", recipe=size, **way.changes)
        for way in _WAYS
        for size in way.at
    ),
    *(
        Arm(
            name=f"{size}, sigmoid-topk 1 shared",
            recipe=size,
            convert={"routing": "sigmoid-topk", "shared_experts": 1},
            target="glm4_moe",
        )
        for size in SHARED.values()
    ),
)
ARMS: Mapping[str, Arm] = {arm.name: arm for arm in _ROWS}
