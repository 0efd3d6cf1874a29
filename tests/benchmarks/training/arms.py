"""The arms of the experiment, a row each: how a model is converted, and how it is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from upcycle_cli import Recipe
from upcycle_cli.recipe import parse_recipe_name

BALANCING = 0.01
DENSE, DENSE_LONGER = "dense", "dense, as many FLOPs as E8G1T2"


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


def _of(recipe: str, more: str, **row: Any) -> Arm:  # noqa: ANN401 - an Arm's fields
    return Arm(name=f"{recipe}, {more}", recipe=recipe, **row)


_NEARLY_UNIFORM = {"routing": "softmax-topk"}
_SOFTMAX = {**_NEARLY_UNIFORM, "router_logit_std": 1.0}
_PAPER = {**_SOFTMAX, "scaling": "paper"}
# Without a sibling of qwen3 that has a sigmoid and no shared expert: the code that is shipped.
_SIGMOID: Mapping[str, Any] = {"convert": {"routing": "sigmoid-topk"}, "target": "upcycled"}

_ROWS = (
    Arm(name=DENSE),
    Arm(name="dense, learning rate not reset", reset=False),
    Arm(name=DENSE_LONGER, flops_of="E8G1T2"),
    Arm(name="E8G1T2", recipe="E8G1T2"),
    _of("E8G1T2", "softmax-topk τ=0.001", convert=_NEARLY_UNIFORM),
    _of("E8G1T2", "softmax-topk τ=1", convert=_SOFTMAX),
    _of("E8G1T2", "softmax-topk τ=1 paper", convert=_PAPER),
    _of(
        "E8G1T2",
        "softmax-topk τ=1 measured",
        convert={**_SOFTMAX, "scaling": "measured"},
        calibrated=True,
    ),
    _of("E8G1T2", "sigmoid-topk", **_SIGMOID),
    _of("E8G1T2", "τ=0.1", convert={"router_logit_std": 0.1}),
    _of("E8G1T2", "balanced", convert={"router_init": "balanced"}, calibrated=True),
    _of("E8G1T2", "centroids", convert={"router_init": "centroids"}, calibrated=True),
    _of("E8G1T2", "no aux loss", balancing=0.0),
    _of("E8G1T2", "aux loss pooled", pooled=True),
    _of("E8G1T2", "learning rate not reset", reset=False),
    *(
        _of("E8G1T2", f"{way} {size:g}", convert={way: size})
        for way, sizes in {"noise": (0.01, 0.1), "reinit": (0.25, 0.5)}.items()
        for size in sizes
    ),
    Arm(name="E4G4T8", recipe="E4G4T8"),
    _of("E4G4T8", "tied", tied=True),
    _of("E4G4T8", "softmax-topk τ=0.001", convert=_NEARLY_UNIFORM),
    _of("E4G4T8", "softmax-topk τ=0.001 tied", convert=_NEARLY_UNIFORM, tied=True),
    _of("E4G4T8", "softmax-topk τ=1", convert=_SOFTMAX),
    _of("E4G4T8", "softmax-topk τ=1 paper", convert=_PAPER),
    _of("E4G4T8", "softmax-topk τ=1 none", convert={**_SOFTMAX, "scaling": "none"}),
    _of("E4G4T8", "sigmoid-topk", **_SIGMOID),
    _of(
        "E4G4T6",
        "sigmoid-topk 1 shared",
        convert={"routing": "sigmoid-topk", "shared_experts": 1},
        target="glm4_moe",
    ),
    _of("E4G4T8", "paper", convert={"scaling": "paper"}),
    _of("E4G4T8", "none", convert={"scaling": "none"}),
    _of("E4G4T8", "no virtual groups", convert={"virtual_groups": False}),
    _of("E4G4T8", "shuffled", convert={"neuron_order": "shuffled"}),
    _of("E4G4T8", "clustered", convert={"neuron_order": "clustered"}, calibrated=True),
    Arm(name="E8G8T8", recipe="E8G8T8"),
    _of("E8G8T8", "softmax-topk τ=1 paper", convert=_PAPER),
    Arm(name="E8G8T16", recipe="E8G8T16"),
    _of("E8G8T16", "softmax-topk τ=1 paper", convert=_PAPER),
)
ARMS: Mapping[str, Arm] = {arm.name: arm for arm in _ROWS}
