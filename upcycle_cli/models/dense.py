"""The dense side: a row for each model type that can be upcycled, and what its config means.

`DenseModel` holds the effective value of every setting, with the model type's own defaults filled
in: a key that is absent from a config means the default of *its* type, and the target's differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models.defaults import defaults_of, dimension, tensor_shapes
from upcycle_cli.models.layers import block_types
from upcycle_cli.models.mlp import Weight, degree, parts_of, present, swiglu
from upcycle_cli.models.settings import Values
from upcycle_cli.models.tensor_pieces import Pieces
from upcycle_cli.recipe.scaling import MlpKind

if TYPE_CHECKING:
    from upcycle_cli.models.wrappers import Inside

FULL = "full_attention"
SLIDING = "sliding_attention"

_UNREAD: Sequence[tuple[re.Pattern[str], str]] = (
    (
        re.compile(r"(\w+\.)*layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
        "rotary frequencies are computed from the config",
    ),
    (re.compile(r"mtp\..+"), "transformers has no layers that predict further tokens"),
)


_KEYS_OR_VALUES = re.compile(r"(\d+)\.self_attn\.[kv]_(proj|norm)\.weight")


def unread(name: str, family: DenseFamily, values: Mapping[str, Any]) -> str | None:
    """Return why transformers reads no such tensor, None if it does; `values` are in effect."""
    found = next((why for pattern, why in _UNREAD if pattern.fullmatch(name)), None)
    before, _ = family.layer.split("{layer}")
    own = _KEYS_OR_VALUES.fullmatch(name.removeprefix(before)) if name.startswith(before) else None
    layers, sharing = (values.get(key) for key in ("num_hidden_layers", "num_kv_shared_layers"))
    if own and type(layers) is int and type(sharing) is int and int(own[1]) >= layers - sharing:
        return "its layer takes the keys and values of an earlier one (num_kv_shared_layers)"
    return found


Windows = tuple[int | None, ...]
"""By layer, the tokens that it sees; None where it sees all."""


@dataclass(frozen=True)
class DenseFamily:
    """A dense model type that can be upcycled: a row of `DENSE`, which says what is not usual."""

    model_type: str
    _: KW_ONLY
    mlp: tuple[Weight, ...] = swiglu("mlp")
    """The tensors of a layer's MLP."""
    norm: str | tuple[str, ...] | None = "post_attention_layernorm.weight"
    """The weight of the norm before the MLP, of several names the first that a layer has; None
    where it reads the residual stream itself, or where that norm has no weight."""
    norm_offset: float = 0.0
    """What the norm adds to its weight: 1 for LayerNorm1P and Gemma."""
    layer: str = "model.layers.{layer}."
    """How the names of a layer's tensors begin."""
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    activation: str | None = "hidden_act"
    """The config's key for the MLP's activation; None where it is SiLU whatever a config says."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """What its config calls hidden_size, num_hidden_layers and so on, where it is another name."""
    older: Mapping[str, str] = field(default_factory=dict)
    """Names that keys had once, with those they have now; of both, the old one counts."""
    width: Callable[[Mapping[str, Any]], int] = lambda values: int(values["intermediate_size"])
    """I, from the effective values."""
    mixed: bool = False
    """Whether layers differ in what is before their MLPs, so that each has tensors of its own."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Parts of names on disk with what they are in memory, where shipped code keeps the weights."""
    pieces: Pieces = field(default_factory=dict)
    """Tensors that native targets hold in another form, where they are no experts'."""
    blocks: str | None = None
    """Where layers differ, the kind (layers_block_type) of those that are MLPs."""
    windows: Callable[[Values, int], Windows] = lambda _, count: (None,) * count
    targets: tuple[str, ...] = ()
    """What it can become, beside the shipped code; that which most software can load first."""
    classes: str | tuple[str, str, str] | None = None
    """How the names of its classes in transformers begin, or the names of its config, its model and
    its causal LM there, for the shipped code; None without."""
    own_attention: bool = False
    """Whether all its models attend in one way of their own, with which engines were tried."""
    outgrown_code: bool = False
    """Whether released models carry code that transformers has had itself since."""
    inside: Inside | None = None
    """The wrapper that it is the text model of; `layer`, `embedding` and `head` are as it says."""

    def key(self, usual: str) -> str:
        """Return what its config calls a setting that most types call `usual`."""
        return self.keys.get(usual, usual)

    def current(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config whose keys have the names that they have now."""
        said = {new: config[old] for old, new in self.older.items() if old in config}
        return {key: value for key, value in config.items() if key not in self.older} | said

    @property
    def title(self) -> str:
        """The model type, after that of the wrapper where there is one."""
        outer = "" if self.inside is None else f"{self.inside.wrapper.model_type} around "
        return outer + self.model_type

    def has(self, name: str) -> bool:
        """Whether a tensor is the text model's, where there is something around it."""
        return self.inside is None or self.inside.is_text(name)

    def norm_of(self, names: Collection[str], prefix: str) -> str | None:
        """Return the weight of the norm before a layer's MLP; `prefix` is how its names begin."""
        norms = (self.norm,) if isinstance(self.norm, str) else self.norm or (None,)
        return next((norm for norm in norms if norm and prefix + norm in names), norms[0])

    @property
    def class_names(self) -> tuple[str, str, str]:
        """The config, the model and the causal LM, as transformers calls them."""
        name = self.classes
        if isinstance(name, tuple):
            return name
        return f"{name}Config", f"{name}Model", f"{name}ForCausalLM"


@dataclass(frozen=True)
class DenseModel:
    """A dense model in effect: its family, and every setting that its forward pass reads."""

    family: DenseFamily
    values: Mapping[str, Any]
    kinds: tuple[str, ...]
    """What each layer is."""
    windows: Windows

    @property
    def model_type(self) -> str:
        """The model type of the family."""
        return self.family.model_type

    @property
    def num_layers(self) -> int:
        """The number of layers, of whatever kind."""
        return len(self.kinds)

    @property
    def mlp_layers(self) -> tuple[int, ...]:
        """The layers that have an MLP."""
        wanted = self.family.blocks
        return tuple(i for i, kind in enumerate(self.kinds) if wanted in (None, kind))

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.values["hidden_size"])

    @property
    def intermediate_size(self) -> int:
        """I."""
        return self.family.width(self.values)

    @property
    def mlp_kind(self) -> MlpKind:
        """How the MLP answers to scaled matrices."""
        parts = parts_of(self.family.mlp)
        return MlpKind("gate" in parts, degree(parts, self.activation))

    @property
    def rotary_share(self) -> float:
        """The part of each head that positions turn."""
        key = "partial_rotary_factor"
        return float(self.values[key]) if key in defaults_of(self.model_type) else 1.0

    @property
    def rotary_dim(self) -> int:
        """How many rows of each head positions turn; raises UpcycleError for an odd number."""
        found = int(self.size("head_dim") * self.rotary_share)
        if found % 2 or not found:
            raise UpcycleError(
                f"config.json: partial_rotary_factor {self.rotary_share:g} of head_dim "
                f"{self.size('head_dim')} is {found}, and rows are turned in pairs."
            )
        return found

    def size(self, product: str) -> int:
        """Return a product of config keys and integers."""
        return dimension(product, self.values)

    @property
    def activation(self) -> str:
        """The activation of the MLP."""
        key = self.family.activation
        return "silu" if key is None else str(self.values[key])

    def prefix(self, layer: int) -> str:
        """Return how the names of a layer's tensors begin."""
        return self.family.layer.format(layer=layer)

    def mlp(self, names: Collection[str], layer: int) -> tuple[Weight, ...]:
        """Return the weights of a layer's MLP; `names` are those of all tensors there are."""
        return present(self.family.mlp, names, self.prefix(layer))

    def has(self, name: str) -> bool:
        """Whether its layers have a tensor, as far as that is known."""
        return self.prefix(0) + name in self.shapes

    def norm(self, names: Collection[str], layer: int) -> str | None:
        """Return the name of the weight of the norm before a layer's MLP; `names` as for `mlp`."""
        norm = self.family.norm_of(names, self.prefix(layer))
        return None if norm is None else self.prefix(layer) + norm

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor that the checkpoint must have; none where they are not known."""
        found = tensor_shapes(self.family.model_type, self.values, self.kinds)
        inside = self.family.inside
        return found if inside is None else {inside.place(name): s for name, s in found.items()}


def read_dense(family: DenseFamily, config: Mapping[str, Any]) -> DenseModel:
    """Return what a config means, of a wrapper that of its text model alone; UpcycleError."""
    config = family.current(config)
    values = Values(config, family.model_type, family.keys)
    if family.blocks is None:
        kinds = ("layer",) * values["num_hidden_layers"]
    else:
        try:
            kinds = block_types(config)
        except ValueError as error:
            raise UpcycleError(f"config.json: {error}.") from error
    windows = family.windows(values, len(kinds))
    model = DenseModel(family, values.effective(), kinds, windows)
    family.width(model.values)  # which some models have none of, or several
    return model
