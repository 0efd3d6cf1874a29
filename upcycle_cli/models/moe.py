"""MoE architectures: the row of a target, and how to read its configs and tensors.

A row has tensor names, config keys, and small functions for its limits and settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from upcycle_cli.checkpoint.header import Tensor
from upcycle_cli.core.display import Compact
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.models.defaults import class_names, defaults_of
from upcycle_cli.models.dense import DenseModel
from upcycle_cli.models.layers import ALL, INVALID, LayerChoice
from upcycle_cli.models.mlp import Weight
from upcycle_cli.models.shipped import ARCHITECTURE, UPCYCLED_PREFIX, WRAPPED_ARCHITECTURE
from upcycle_cli.models.wrappers import HEAD, LAYER_PREFIX, Inside, text_config_of
from upcycle_cli.recipe.recipe import ExpertLayout, Routing


@dataclass(frozen=True, kw_only=True)
class MoeBlock:
    """The tensors of a layer's experts and router, by their names within the layer."""

    experts: tuple[Weight, ...]
    router: str
    shared: tuple[Weight, ...] = ()
    """The weights of the shared expert, if the architecture has one."""
    correction_bias: str | None = None
    """A float32 bias on the selection of experts that does not affect gates: zero, then moved in
    training by updates that bfloat16 would lose."""

    @property
    def module(self) -> str:
        """The module of the experts."""
        return self.experts[0].name.rpartition(".")[0]

    @property
    def block(self) -> str:
        """The module that contains experts and router; empty if that is the layer itself."""
        return self.module.rpartition(".")[0]

    @property
    def gate(self) -> str:
        """The module of the router."""
        block = f"{self.block}." if self.block else ""
        return block + self.router.removeprefix(block).partition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The config keys of an architecture."""

    num_experts: str = "num_experts"
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Common keys (num_hidden_layers, …) with the names that this type uses instead."""
    aliases: tuple[str, ...] = ()
    """Other names of `num_experts` that some version of transformers writes."""
    top_k: str = "num_experts_per_tok"
    expert_size: str = "moe_intermediate_size"
    expert_size_copy: str | None = None
    """A second key for the same value, which some engine reads."""
    dense_size: str = "intermediate_size"
    """The intermediate size of layers that stay dense."""
    routing: tuple[str, Mapping[Any, Routing]] | None = None
    """The key of the routing with the meaning of its values; None if the routing is fixed."""
    scale: str | None = None
    """The factor by which the model multiplies its gates."""


@dataclass(frozen=True, kw_only=True)
class SharedExpert:
    """An expert for every token. If it is `required` but unused, its output is zero."""

    router: str | None = None
    """Its own gate: the sigmoid of one row, which is 1/2 for a zero row."""
    size_key: str | None = None
    """The key of its intermediate size; None if that follows from the experts' size."""
    size: int | None = None
    """The value of `size_key` when it is unused."""
    count_key: str | None = None
    """The key of its width in experts. It is one expert wide if it has neither key."""
    required: bool = True
    norm: str | None = None
    """The weight of a norm behind it, which is zero when it is unused."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Config keys that it needs when it is used."""

    @property
    def down_factor(self) -> float:
        """The factor on its down matrix that compensates its gate."""
        return 1.0 if self.router is None else 2.0

    def config_keys(self, count: int, expert_size: int) -> dict[str, Any]:
        """Return the config keys of a shared expert that is `count` experts wide, or unused."""
        if not count:
            return {self.size_key: self.size} if self.size_key and self.size else {}
        found = {self.size_key: count * expert_size, self.count_key: count}
        return {key: value for key, value in found.items() if key} | dict(self.settings)

    @property
    def possible_widths(self) -> str:
        """How many experts wide it can be: "any", "1" or "none"."""
        if self.objection(1):
            return "none"
        return "1" if self.objection(2) else "any"

    def objection(self, count: int) -> str | None:
        """Return why it cannot be `count` experts wide, or None if it can."""
        if self.norm is not None:
            return "its shared expert and the other experts pass through separate norms"
        if count == 1 or self.size_key or self.count_key:
            return None
        return f"its shared expert is as wide as one expert, not {count}"


@dataclass(frozen=True, kw_only=True)
class ExtraTensor:
    """A tensor of an MoE layer that a dense layer lacks: a constant, or a multiple of a tensor.

    The constant is `factor`, times the square root of the setting `root` if it is given.
    """

    name: str
    """Within its layer."""
    factor: float = 1.0
    root: str | None = None
    of: str | None = None
    """The dense layer's tensor that is multiplied; if None the shape is (`size`,) or (N,)."""
    size: str = "hidden_size"
    per_expert: bool = False
    """Whether the shape is (N,)."""
    frozen: bool = False
    """Whether training must not change it: a typical update is large compared to its value."""

    def value(self, settings: Mapping[str, Any]) -> float:
        """Return the constant; `settings` are the dense model's values."""
        return self.factor * (1.0 if self.root is None else math.sqrt(settings[self.root]))


@dataclass(frozen=True, kw_only=True, repr=False)
class Target(Compact):
    """An MoE architecture that dense models can become: a row of `NATIVE`, or shipped code."""

    model_type: str
    routings: tuple[Routing, ...] = (Routing.TOPK_SOFTMAX,)
    """The possible routings; the first is the default, as in released models."""
    layouts: Mapping[ExpertLayout, MoeBlock]
    """The first is the default, the last is what transformers 5 has in memory."""
    keys: Keys
    layers: LayerChoice = ALL
    """How its config states which layers are mixtures of experts."""
    layer: str = LAYER_PREFIX
    """The prefix of a layer's tensors in released checkpoints."""
    head: str = HEAD
    bias_routing: Routing = Routing.SIGMOID_TOPK
    """The only routing with a correction bias."""
    bias_rows: tuple[int, ...] = ()
    """The dimensions of the correction bias before (N,)."""
    interleaved_rope: bool = False
    """Whether rope rotates rows 2i and 2i + 1 of a head, and not rows i and i + half."""
    shared: SharedExpert | None = None
    extra_tensors: tuple[ExtraTensor, ...] = ()
    keeps_mlp: bool = False
    """Whether layers have an MLP beside the experts, each between its own norms, as in gemma4.
    The router then reads the input of the norms."""
    required_biases: tuple[str, ...] = ()
    """Linear layers that need a bias tensor even if the source has none."""
    unsupported_tensors: Mapping[str, str] = field(default_factory=dict)
    """Tensors of a dense layer that it cannot hold, with the reason."""
    refusal: Callable[[DenseModel], str | None] = lambda _: None
    """Returns why it cannot express a model, or None if it can."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Config keys that have the same value for every model."""
    settings: Callable[[DenseModel], dict[str, Any]] = lambda _: {}
    """Returns the other config keys that it needs and that the dense type lacks."""
    inside: Inside | None = None
    """The wrapper around it, if any; tensor names are then the wrapper's."""

    @property
    def architecture(self) -> str:
        """The class that loads the whole model."""
        if self.ships_code:
            return ARCHITECTURE if self.inside is None else WRAPPED_ARCHITECTURE
        return class_names(self.outer_type)[-1]

    @property
    def outer_type(self) -> str:
        """The model_type of the config: the wrapper's if there is one."""
        if self.inside is None:
            return self.model_type
        wrapper = self.inside.wrapper
        return wrapper.upcycled if self.ships_code else wrapper.native

    @property
    def title(self) -> str:
        """The model type, preceded by the wrapper's: "llava around mixtral"."""
        if self.inside is None or self.ships_code:
            return self.outer_type
        return f"{self.outer_type} around {self.model_type}"

    @property
    def has_balancing_loss(self) -> bool:
        """Whether transformers adds an auxiliary loss in training that balances the experts."""
        if self.ships_code:
            return True
        wraps = self.inside is None or self.inside.wrapper.native_type is not None
        return wraps and "router_aux_loss_coef" in defaults_of(self.model_type)

    @property
    def ships_code(self) -> bool:
        """Whether the model contains its own code."""
        return self.model_type.startswith(UPCYCLED_PREFIX)

    @property
    def name_prefix(self) -> str:
        """The prefix of all tensor names except the head's."""
        return self.layer.partition("layers.")[0]

    def prefix(self, layer: int) -> str:
        """Return the prefix of a layer's tensor names."""
        return self.layer.format(layer=layer)

    def layout(self, wanted: str | None) -> ExpertLayout:
        """Return the wanted layout, or the default; raises UpcycleError if it lacks that layout."""
        if wanted is None:
            return next(iter(self.layouts))
        if wanted not in self.layouts:
            hint = f"Leave it out, or use `expert_layout` {next(iter(self.layouts))}."
            raise UpcycleError(f"{self.model_type} has no {wanted} layout.", hint)
        return ExpertLayout(wanted)

    def check_layout(self, wanted: str | None, expert_size: int, hidden_size: int) -> ExpertLayout:
        """Return `layout`; also raises UpcycleError if readers would mistake the orientation."""
        found = self.layout(wanted)
        memory = {weight.name: weight.split_dim for weight in self.in_memory.experts}
        for weight in self.layouts[found].experts:
            shape = weight.shape(expert_size, hidden_size)
            is_transposed = memory.get(weight.name, weight.split_dim) != weight.split_dim
            if is_transposed and shape == shape[::-1]:
                raise UpcycleError(
                    f"with an expert size of {expert_size}, the matrices of {weight.name} would be "
                    f"square, {shape[0]} by {shape[1]}, and readers infer the orientation from the "
                    "shape.",
                    "Use another `granularity`, or `expert_layout` fused, which only "
                    "transformers 5 reads.",
                )
        return found

    @property
    def in_memory(self) -> MoeBlock:
        """The layout in memory of transformers 5."""
        *_, found = self.layouts.values()
        return found

    def stored_layout(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> ExpertLayout:
        """Return the layout of an MoE's experts.

        If two layouts have the same names, the hidden size tells the orientation of matrices.
        """
        hidden_size = self.value(text_config_of(config), "hidden_size")
        found = next(iter(self.layouts))
        for layout, block in self.layouts.items():
            weight = block.experts[0]
            before, after = (self.layer + weight.name).split("{layer}")
            held = (n for n in tensors if n.startswith(before) and n.endswith(after))
            name = None if "{expert}" in after else next(held, None)
            if name is not None:
                found, shape = layout, tensors[name].shape
                if len(shape) == 3 and shape[1 + (weight.split_dim == 0)] == hidden_size:
                    break
        return found

    def correction_bias(self, block: MoeBlock, routing: str) -> str | None:
        """Return the correction bias within a layer; None if there is none."""
        return block.correction_bias if routing == self.bias_routing else None

    def value(self, config: Mapping[str, Any], key: str) -> Any:  # noqa: ANN401 - a JSON value
        """Return an MoE config's value of a key, or its default."""
        key = self.keys.renamed.get(key, key)
        names = (key, *self.keys.aliases) if key == self.keys.num_experts else (key,)
        for name in names:
            if name in config:
                return config[name]
        return defaults_of(self.model_type.removeprefix(UPCYCLED_PREFIX)).get(key)

    def count(self, config: Mapping[str, Any], key: str) -> int:
        """Return a positive integer of a config; UpcycleError for any other value."""
        value = self.value(config, key)
        if type(value) is not int or value < 1:
            words = f"config.json: {key} must be a positive integer, not {shown(value)}."
            raise UpcycleError(words)
        return value

    def num_layers(self, config: Mapping[str, Any]) -> int:
        """Return the number of layers of any kind; UpcycleError if it is invalid."""
        return len(self.layers.kinds(config)) or self.count(config, "num_hidden_layers")

    def routing(self, config: Mapping[str, Any]) -> Routing:
        """Return the routing that an MoE config states; UpcycleError for an unknown value."""
        if self.keys.routing is None:
            return self.routings[0]
        key, meanings = self.keys.routing
        value = self.value(config, key)
        for meant, routing in meanings.items():
            if type(value) is type(meant) and value == meant:
                return routing
        choices = " or ".join(map(shown, meanings))
        raise UpcycleError(f"config.json: {key} must be {choices}, not {shown(value)}.")

    def moe_layers(self, config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
        """Return the layers with experts; UpcycleError if the config is inconsistent."""
        config = {**defaults_of(self.model_type), **config}
        try:
            return tuple(self.layers.read(config, num_layers))
        except INVALID as error:
            keys = self.layers.write((0,), ("mlp",))
            values = ", ".join(f"{key} is {shown(config.get(key))}" for key in keys)
            words = f"config.json: which layers have experts is unclear: {values}."
            raise UpcycleError(words) from error
