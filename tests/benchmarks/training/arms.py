"""The arms of the experiment, a row each: how a model is converted, and how it is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from upcycle_cli import Recipe

DENSE, DENSE_LONGER = "dense", "dense, as many FLOPs as E8G1T2"
DENSE_AS_LONG = "dense, as many FLOPs"
"""Not an arm: the dense model at equal FLOPs, between those two runs."""


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
    balancing: float = 0.01
    """The weight of the balancing loss."""
    pooled: bool = False
    """Whether that loss takes all layers as one, as transformers does."""
    tied: bool = False
    """Whether the router rows of a group are trained as one."""
    flops_of: str | None = None
    """Train for the FLOPs of this arm; if None, for the tokens of the scale."""

    @property
    def granularity(self) -> int:
        """The experts of a virtual group: G minus the shared ones."""
        if self.recipe is None:
            return 1
        recipe = self.to_recipe(seed=0)
        return recipe.granularity - recipe.shared_experts

    def to_recipe(self, seed: int) -> Recipe:
        """Return the whole recipe."""
        assert self.recipe is not None
        return Recipe(self.recipe, seed=seed, **self.convert)


SIZES = ("E8G1T2", "E4G4T8", "E8G8T8", "E8G8T16")
GROUPED = SIZES[1:]
SHARED = {"E4G4T8": "E4G4T6", "E8G8T8": "E8G8T7", "E8G8T16": "E8G8T14"}
"""The recipe with one shared shard that chooses as many groups, by size."""
_UNIFORM = {"routing": "softmax-topk"}
_SOFTMAX = {**_UNIFORM, "router_logit_std": 1.0}
_SIGMOID = {"routing": "sigmoid-topk"}
_FIT = {"calibrated": True}
Way = tuple[str, Mapping[str, Any], Mapping[str, Any]]
"""A name, fields of the Recipe, and other fields of the Arm."""
_AT_EVERY_SIZE: tuple[Way, ...] = (
    ("softmax-topk τ=0.001", _UNIFORM, {}),
    ("softmax-topk τ=1", _SOFTMAX, {}),
    ("softmax-topk τ=1 paper", {**_SOFTMAX, "scaling": "paper"}, {}),
    ("softmax-topk τ=1 none", {**_SOFTMAX, "scaling": "none"}, {}),
    ("softmax-topk τ=1 measured", {**_SOFTMAX, "scaling": "measured"}, _FIT),
    # qwen3 has no sibling with a sigmoid and no shared expert, so this ships its code.
    ("sigmoid-topk", _SIGMOID, {"target": "upcycled"}),
    ("τ=0.1", {"router_logit_std": 0.1}, {}),
    ("balanced", {"router_init": "balanced"}, _FIT),
    ("centroids", {"router_init": "centroids"}, _FIT),
    ("no aux loss", {}, {"balancing": 0.0}),
    ("aux loss pooled", {}, {"pooled": True}),
    ("learning rate not reset", {}, {"reset": False}),
    ("noise 0.01", {"noise": 0.01}, {}),
    ("noise 0.1", {"noise": 0.1}, {}),
    ("reinit 0.25", {"reinit": 0.25}, {}),
    ("reinit 0.5", {"reinit": 0.5}, {}),
)
_GROUPED: tuple[Way, ...] = (
    ("tied", {}, {"tied": True}),
    ("softmax-topk τ=0.001 tied", _UNIFORM, {"tied": True}),
    ("paper", {"scaling": "paper"}, {}),
    ("none", {"scaling": "none"}, {}),
    ("no virtual groups", {"virtual_groups": False}, {}),
    ("shuffled", {"neuron_order": "shuffled"}, {}),
    ("clustered", {"neuron_order": "clustered"}, _FIT),
)
_ROWS = (
    Arm(name=DENSE),
    Arm(name="dense, learning rate not reset", reset=False),
    Arm(name=DENSE_LONGER, flops_of="E8G1T2"),
    *(Arm(name=size, recipe=size) for size in SIZES),
    *(
        Arm(name=f"{size}, {name}", recipe=size, convert=convert, **others)
        for ways, sizes in ((_AT_EVERY_SIZE, SIZES), (_GROUPED, GROUPED))
        for name, convert, others in ways
        for size in sizes
    ),
    *(
        Arm(
            name=f"{size}, sigmoid-topk 1 shared",
            recipe=size,
            convert={**_SIGMOID, "shared_experts": 1},
            target="glm4_moe",
        )
        for size in SHARED.values()
    ),
)
ARMS: Mapping[str, Arm] = {arm.name: arm for arm in _ROWS}
