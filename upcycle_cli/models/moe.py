"""The MoE side: what a row of an architecture says that dense models can become.

A row says how its tensors are named, which config keys say what, what it can express, and, in a
small function each, what its config needs said and why it cannot take a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from upcycle_cli.checkpoint.header import Tensor
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.models.defaults import defaults_of
from upcycle_cli.models.dense import DenseModel
from upcycle_cli.models.layers import LayerChoice
from upcycle_cli.models.mlp import Weight
from upcycle_cli.models.shipped import UPCYCLED_PREFIX
from upcycle_cli.recipe.recipe import ExpertLayout, Routing

if TYPE_CHECKING:
    from upcycle_cli.models.wrappers import Inside

IN_MEMORY = "model.layers.{layer}."
"""How transformers 5 has a layer's names begin in memory, and saves them when told to."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The tensors of a layer's experts and router, by their names within the layer."""

    experts: tuple[Weight, ...]
    router: str

    @property
    def block(self) -> str:
        """The module that has both, as it is in memory; empty where that is the layer."""
        return self.module.rpartition(".")[0]

    @property
    def module(self) -> str:
        """The module that has the experts of a layer."""
        return self.experts[0].name.rpartition(".")[0]

    @property
    def gate(self) -> str:
        """The module that routes, whose own or whose part's the router is."""
        block = f"{self.block}." if self.block else ""
        return block + self.router.removeprefix(block).partition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Which config keys say what."""

    num_experts: str
    usual: Mapping[str, str] = field(default_factory=dict)
    """Names of its own for what most configs call num_hidden_layers and so on."""
    aliases: tuple[str, ...] = ()
    """Other names of the same, which some version of transformers writes."""
    top_k: str = "num_experts_per_tok"
    expert_size: str = "moe_intermediate_size"
    expert_size_too: str | None = None
    """Another name of the same, which some engine reads."""
    dense_size: str = "intermediate_size"
    """Of layers that stay dense, where that is not the same key."""
    routing: tuple[str, Mapping[Any, Routing]] | None = None
    """A key and what its values stand for; None where the routing is fixed."""
    scale: str | None = None
    """A factor that the model multiplies its gates by."""


@dataclass(frozen=True, kw_only=True)
class SharedExpert:
    """An expert for every token; where the architecture insists on one, its output is made zero."""

    weights: tuple[Weight, ...]
    fused: tuple[Weight, ...] = ()
    """The same in the fused layout, where their names are others."""
    router: str | None = None
    """A gate of its own, the sigmoid of one row: 1/2 where that is zero."""
    size_key: str | None = None
    """The key of its intermediate size; None where it follows from that of an expert."""
    size: int | None = None
    """What that key is to say where it does nothing."""
    count_key: str | None = None
    """The key of how many experts wide it is; with neither key it is as wide as one."""
    insisted_on: bool = True
    norm: str | None = None
    """The weight of a norm of its own, which is zero where it does nothing; None without one."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The config keys that it needs where it does something."""

    @property
    def down_factor(self) -> float:
        """What its down matrix is multiplied by to make up for its gate."""
        return 1.0 if self.router is None else 2.0

    def choices(self, count: int, expert_size: int) -> dict[str, Any]:
        """Return the config keys of one that is `count` experts wide."""
        found = {self.size_key: count * expert_size, self.count_key: count}
        return {key: value for key, value in found.items() if key} | dict(self.settings)

    @property
    def words(self) -> str:
        """How many experts wide it can be: "any", "1", or "none"."""
        if self.objection(1):
            return "none"
        return "1" if self.objection(2) else "any"

    def objection(self, count: int) -> str | None:
        """Say why it cannot be `count` experts wide, or None when it can."""
        if self.norm is not None:
            return "its shared expert and the others go through norms of their own"
        if count == 1 or self.size_key or self.count_key:
            return None
        return f"its shared expert is as wide as one expert, not {count}"


@dataclass(frozen=True, kw_only=True)
class CorrectionBias:
    """A bias on the choice of experts, which weighs none of them: zero at first, moved in training.

    It is in float32 whatever the rest is in, since it moves by steps that bfloat16 loses.
    """

    name: str
    fused: str | None = None
    """Its name in the fused layout, where that is another."""
    routing: Routing = Routing.SIGMOID_TOPK
    """The routing that it belongs to."""
    rows: int | None = None
    """Where it is (rows, N); None where it is (N,)."""

    def shape(self, num_experts: int) -> tuple[int, ...]:
        """Return its shape."""
        return (num_experts,) if self.rows is None else (self.rows, num_experts)


@dataclass(frozen=True, kw_only=True)
class Added:
    """A tensor of a layer with experts that a dense layer has not: one value, or a tensor times it.

    The value is `factor`, times the square root of a setting where `root` names one.
    """

    name: str
    """Within its layer."""
    factor: float = 1.0
    root: str | None = None
    of: str | None = None
    """The tensor of the dense layer; without one it is (H,), or (N,) if it is `per_expert`."""
    per_expert: bool = False
    frozen: bool = False
    """Whether training is to leave it: a usual step is much of what it is."""

    def value(self, settings: Mapping[str, Any]) -> float:
        """Return the value, from a dense model's settings."""
        return self.factor * (1.0 if self.root is None else math.sqrt(settings[self.root]))


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Where experts lie beside an MLP, and not in its place: the modules of a layer around both.

    The layer adds last(mlp_after(mlp(mlp_before(x))) + after(experts(before(x)))) to x, which the
    router reads as well; the dense layer last(mlp(mlp_before(x))).
    """

    mlp: str
    mlp_before: str
    mlp_after: str
    before: str
    after: str
    last: str


def in_memory(name: str, renamed: Sequence[tuple[str, str]]) -> str:
    """Return a name with the parts that are called otherwise in memory."""
    for before, after in renamed:
        name = name.replace(before, after)
    return name


@dataclass(frozen=True, kw_only=True)
class Target:
    """An MoE architecture that dense models can be upcycled to: a row of `NATIVE`."""

    model_type: str
    architecture: str
    routings: tuple[Routing, ...]
    """What it can express; the first is what the released models use, hence the default."""
    layouts: Mapping[ExpertLayout, Layout]
    """The first is the default."""
    keys: Keys
    layers: LayerChoice
    """How its config says which layers are mixtures of experts."""
    layer: str = IN_MEMORY
    """How the names of a layer's tensors begin, in released checkpoints."""
    head: str = "lm_head.weight"
    renamed: tuple[tuple[str, str], ...] = ()
    """Parts of the names of copied tensors, with what becomes of them."""
    correction_bias: CorrectionBias | None = None
    shared: SharedExpert | None = None
    added: tuple[Added, ...] = ()
    beside: Beside | None = None
    """None where experts are in the place of the MLP."""
    zero_biases: tuple[str, ...] = ()
    """Linear layers that must have a bias tensor even where the source has none."""
    lacks: Mapping[str, str] = field(default_factory=dict)
    """Tensors of a dense layer that it has no place for, and how that is said."""
    refusal: Callable[[DenseModel], str | None] = lambda _: None
    """Why it cannot express a model, or None when it can."""
    settings: Callable[[DenseModel], dict[str, Any]] = lambda _: {}
    """The config keys of its own that it needs beside the shared ones."""
    inside: Inside | None = None
    """The wrapper that it is the text model of; `architecture` and names are as it says."""

    @property
    def outer_type(self) -> str:
        """The model type of the whole: the wrapper's where it is inside of one."""
        if self.inside is None:
            return self.model_type
        wrapper = self.inside.wrapper
        return wrapper.upcycled if self.ships_code else wrapper.natives[self.model_type][0]

    @property
    def title(self) -> str:
        """The model type, after that of the wrapper where there is one."""
        if self.inside is None or self.ships_code:
            return self.outer_type
        return f"{self.outer_type} around {self.model_type}"

    @property
    def balances(self) -> bool:
        """Whether transformers adds an auxiliary loss in training that balances the experts."""
        if self.ships_code:
            return True
        wraps = self.inside is None or self.inside.wrapper.balances
        return wraps and "router_aux_loss_coef" in defaults_of(self.model_type)

    @property
    def ships_code(self) -> bool:
        """Whether its code comes with the model."""
        return self.model_type.startswith(UPCYCLED_PREFIX)

    @property
    def root(self) -> str:
        """How the names of all tensors begin but the head's."""
        return self.layer.partition("layers.")[0]

    def name(self, source: str) -> str:
        """Return what a dense tensor is called that is copied."""
        return in_memory(source, self.renamed)

    def prefix(self, layer: int) -> str:
        """Return how the names of a layer's tensors begin."""
        return self.layer.format(layer=layer)

    def layout(self, wanted: ExpertLayout | None) -> ExpertLayout:
        """Return a layout that it has; raises UpcycleError when it has not the one wanted."""
        if wanted is None:
            return next(iter(self.layouts))
        if wanted not in self.layouts:
            raise UpcycleError(
                f"{self.model_type} has no {wanted} layout.",
                f"Leave it out, or pass --expert-layout {next(iter(self.layouts))}.",
            )
        return wanted

    def check_layout(
        self, wanted: ExpertLayout | None, expert_size: int, hidden_size: int
    ) -> ExpertLayout:
        """Return `layout`; raises UpcycleError for one that readers would mistake, too."""
        found = self.layout(wanted)
        for weight in self.turned(self.layouts[found]):
            rows, columns = weight.shape(expert_size, hidden_size)
            if rows == columns:
                raise UpcycleError(
                    f"with experts {expert_size} wide, the matrices of {weight.name} would be "
                    f"square, {rows} by {columns}: readers tell by the shape which way they lie.",
                    "Use another --granularity, or --expert-layout fused, which transformers 5 "
                    "alone reads.",
                )
        return found

    @property
    def in_memory(self) -> Layout:
        """The layout that transformers 5 has in memory, whatever is on disk."""
        *_, found = self.layouts.values()
        return found

    def stored_layout(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> ExpertLayout:
        """Return how the experts of an MoE are stored, by its tensors' names.

        Where two layouts have the same names, the hidden size tells which way matrices lie.
        """
        hidden_size, named = self.value(config, "hidden_size"), list[ExpertLayout]()
        for layout, rows in self.layouts.items():
            fits = []
            for weight in rows.experts:
                before, after = (self.layer + weight.name).split("{layer}")
                held = (n for n in tensors if n.startswith(before) and n.endswith(after))
                name = None if "{expert}" in after else next(held, None)
                if name is not None:
                    fits.append(weight.fits(tensors[name].shape, hidden_size))
            if fits and all(fits):
                return layout
            named += [layout] if fits else []
        return named[0] if named else next(iter(self.layouts))

    def turned(self, layout: Layout) -> tuple[Weight, ...]:
        """Return the weights of a layout whose matrices lie the other way in memory.

        Readers tell that by their shapes, and take square ones as they are.
        """
        memory = {weight.name: weight.cut for weight in self.in_memory.experts}
        return tuple(w for w in layout.experts if memory.get(w.name, w.cut) != w.cut)

    def corrects(self, layout: Layout, routing: str) -> str | None:
        """Return the name of the correction bias within a layer; None where there is none."""
        bias = self.correction_bias
        if bias is None or bias.routing != routing:
            return None
        return bias.fused or bias.name if layout == self.layouts[ExpertLayout.FUSED] else bias.name

    def shared_weights(self, layout: Layout) -> tuple[Weight, ...]:
        """Return the matrices of the shared expert, none where there is none."""
        shared = self.shared
        if shared is None:
            return ()
        is_fused = layout == self.layouts.get(ExpertLayout.FUSED)
        return shared.fused or shared.weights if is_fused else shared.weights

    def value(self, config: Mapping[str, Any], key: str) -> Any:  # noqa: ANN401 - a JSON value
        """Return what an MoE's config says under a key, or means when it is absent."""
        key = self.keys.usual.get(key, key)
        names = (key, *self.keys.aliases) if key == self.keys.num_experts else (key,)
        for name in names:
            if name in config:
                return config[name]
        return defaults_of(self.model_type).get(key)

    def rotary_share(self, config: Mapping[str, Any]) -> float:
        """Return the part of each head that positions turn, 1 for shipped code."""
        key, inner = "partial_rotary_factor", config.get("rope_parameters")
        if self.ships_code or key not in defaults_of(self.model_type):
            return 1.0
        share: float = {**config, **(inner if isinstance(inner, dict) else {})}.get(
            key, self.value(config, key)
        )
        return share

    def count(self, config: Mapping[str, Any], key: str) -> int:
        """Return a positive integer of a config; raises ValueError when it is something else."""
        value = self.value(config, key)
        if type(value) is not int or value < 1:
            raise ValueError(f"{key} must be a positive integer, not {shown(value)}")
        return value

    def sizes(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """Return N, T and the intermediate size of an expert; ValueError for no such numbers."""
        keys = self.keys.num_experts, self.keys.top_k, self.keys.expert_size
        num_experts, top_k, expert_size = (self.count(config, key) for key in keys)
        return num_experts, top_k, expert_size

    def num_layers(self, config: Mapping[str, Any]) -> int:
        """Return how many layers there are, of whatever kind; ValueError for no such number."""
        return self.layers.count(config) or self.count(config, "num_hidden_layers")

    def routing(self, config: Mapping[str, Any]) -> Routing:
        """Return the routing that an MoE's config stands for; ValueError when for none."""
        if self.keys.routing is None:
            return self.routings[0]
        key, meanings = self.keys.routing
        value = self.value(config, key)
        for meant, routing in meanings.items():
            if type(value) is type(meant) and value == meant:
                return routing
        choices = " or ".join(map(shown, meanings))
        raise ValueError(f"{key} must be {choices}, not {shown(value)}")

    def moe_layers(self, config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
        """Return the layers that are mixtures of experts by a config; ValueError."""
        return self.layers.read({**defaults_of(self.model_type), **config}, num_layers)
