"""Dense models: the row of a family, and a model of the family with all settings.

`DenseModel.values` has the defaults of *its* model type filled in. A target's may differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any

from upcycle_cli.core.display import Compact
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.models import defaults
from upcycle_cli.models.mlp import Weight, degree, parts_of, present_weights, swiglu
from upcycle_cli.models.wrappers import HEAD, LAYER_PREFIX, Inside, replace_parts
from upcycle_cli.recipe.scaling import MlpKind

FULL = "full_attention"
SLIDING = "sliding_attention"
Windows = tuple[int | None, ...]
"""The sliding window of each layer, in tokens; None for full attention."""

Pieces = Mapping[str, Mapping[str, str]]
"""Fused tensors that native targets store separately, by their names within the layer.

For each, the target's tensors from the first row on, with their numbers of rows as products of
config keys: "num_attention_heads*head_dim".
"""

_PREDICTS = "transformers has no layers for multi-token prediction"
_UNREAD: Sequence[tuple[re.Pattern[str], str]] = (
    (
        re.compile(r"(\w+\.)*layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
        "rotary frequencies are computed from the config",
    ),
    (re.compile(r"mtp\..+"), _PREDICTS),
)
_LAYER = re.compile(r"(\d+)\.(self_attn\.[kv]_(?:proj|norm)\.weight$)?")
"""A layer's number, and the name of its keys or values."""


@dataclass(frozen=True)
class DenseFamily:
    """A dense model type: a row of `DENSE` with what differs from llama."""

    model_type: str
    _: KW_ONLY
    can_ship_code: bool = True
    """Whether shipped code supports it."""
    mlp: tuple[Weight, ...] = swiglu("mlp")
    norm: str | tuple[str, ...] | None = "post_attention_layernorm.weight"
    """The weight of the norm before the MLP, or several possible names; None without a norm or
    without a weight."""
    norm_offset: float = 0.0
    """What the norm adds to its weight: 1 for LayerNorm1P and Gemma."""
    layer: str = LAYER_PREFIX
    root: str = ""
    """The first part, missing in the names of a saved base model, as gpt2's and bloom's are."""
    embedding: str = "model.embed_tokens.weight"
    head: str = HEAD
    activation: str | None = "hidden_act"
    """The config key of the MLP's activation; None if it is fixed (SiLU, if there is a gate)."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Common config keys (hidden_size, …) with the names that this type uses instead."""
    old_keys: Mapping[str, str] = field(default_factory=dict)
    """Old config keys with their present names; if a config has both, the old key counts."""
    width: Callable[[Mapping[str, Any]], int] = lambda values: int(values["intermediate_size"])
    """Computes I from the effective values."""
    layers_differ: bool = False
    """Whether layers have different tensors before their MLPs."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Parts of tensor names on disk with their in-memory replacement, which shipped code uses."""
    pieces: Pieces = field(default_factory=dict)
    """Non-expert tensors that native targets store as several."""
    interleaved_rope: bool = False
    """Whether rope rotates rows 2i and 2i + 1 of a head, and not rows i and i + half."""
    kinds: Callable[[defaults.ConfigValues], Sequence[str]] = lambda values: (
        ("layer",) * values["num_hidden_layers"]
    )
    """Returns the kind of each layer."""
    mlp_layer: str = "layer"
    """The kind of layers whose MLPs can become experts."""
    windows: Callable[[defaults.ConfigValues, int], Windows] = lambda _, count: (None,) * count
    targets: tuple[str, ...] = ()
    """The targets, the default first. Shipped code is the last one unless it is listed: native
    targets that are newer come after it, so that the default stays what it was."""
    has_obsolete_code: bool = False
    """Whether released models ship code that is now part of transformers."""
    inside: Inside | None = None
    """The wrapper around it, if any; tensor names are then the wrapper's."""

    def with_current_keys(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config with old keys renamed."""
        stated = {new: config[old] for old, new in self.old_keys.items() if old in config}
        return {key: value for key, value in config.items() if key not in self.old_keys} | stated

    @property
    def title(self) -> str:
        """The model type, preceded by the wrapper's: "llava around llama"."""
        outer = "" if self.inside is None else f"{self.inside.wrapper.model_type} around "
        return outer + self.model_type

    def has(self, name: str) -> bool:
        """Whether a tensor is the text model's and not a wrapper's."""
        return self.inside is None or self.inside.is_text(name)

    @property
    def classes(self) -> tuple[str, str, str]:
        """The names of transformers' config, base model and full model, or of the wrapper's."""
        outer = self if self.inside is None else self.inside.wrapper
        return defaults.class_names(outer.model_type)

    @property
    def text_model(self) -> str | None:
        """What its wrapper calls it; None without a wrapper."""
        return None if self.inside is None else self.inside.wrapper.text


def rope_layers(values: Mapping[str, Any], count: int) -> Sequence[bool]:
    """Return which layers have rotary embeddings; UpcycleError for invalid values."""
    listed, interval = map(values.get, ("no_rope_layers", "no_rope_layer_interval"))
    if listed is None and (interval is None or (type(interval) is int and interval > 0)):
        return [interval is None or (layer + 1) % interval != 0 for layer in range(count)]
    if not isinstance(listed, list) or len(listed) != count:
        raise UpcycleError(
            f"config.json: no_rope_layers must hold 0 or 1 for each of {count} layers, not "
            f"{shown(listed)}."
        )
    return [bool(rotates) for rotates in listed]


def why_unread(name: str, family: DenseFamily, values: Mapping[str, Any]) -> str | None:
    """Return why transformers ignores a tensor, or None if it reads it; `values` are effective."""
    found = next((why for pattern, why in _UNREAD if pattern.fullmatch(name)), None)
    if family.inside and re.fullmatch(family.inside.wrapper.unread, name):
        return f"transformers does not run this part of a {family.inside.wrapper.model_type}"
    before, _ = family.layer.split("{layer}")
    layer = _LAYER.match(name.removeprefix(before)) if name.startswith(before) else None
    keys = ("num_hidden_layers", "num_kv_shared_layers", "num_nextn_predict_layers")
    counts = [values.get(key) or 0 for key in keys]
    if layer is None or any(type(count) is not int for count in counts):
        return found
    (layers, sharing, predicting), index = counts, int(layer[1])
    if layer[2] and layers - sharing <= index < layers:
        return "its layer reuses the keys and values of an earlier one (num_kv_shared_layers)"
    return _PREDICTS if layers <= index < layers + predicting else found


@dataclass(frozen=True, repr=False)
class DenseModel(Compact):
    """A dense model: its family and the effective value of every setting."""

    family: DenseFamily
    values: Mapping[str, Any]
    kinds: tuple[str, ...]
    """The kind of each layer."""
    windows: Windows

    @property
    def model_type(self) -> str:
        """The family's model type."""
        return self.family.model_type

    @property
    def num_layers(self) -> int:
        """The number of layers of any kind."""
        return len(self.kinds)

    @property
    def mlp_layers(self) -> tuple[int, ...]:
        """The layers whose MLP can become experts."""
        return tuple(i for i, kind in enumerate(self.kinds) if kind == self.family.mlp_layer)

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
        """How the MLP's output responds to scaled matrices."""
        parts = parts_of(self.family.mlp)
        return MlpKind("gate" in parts, degree(parts, self.activation))

    @property
    def rotary_share(self) -> float:
        """The share of each head that the rotary embedding rotates."""
        key = "partial_rotary_factor"
        return float(self.values[key]) if key in defaults.defaults_of(self.model_type) else 1.0

    @property
    def activation(self) -> str:
        """The activation of the MLP."""
        key = self.family.activation
        return "silu" if key is None else str(self.values[key])

    def prefix(self, layer: int) -> str:
        """Return the prefix of a layer's tensor names."""
        return self.family.layer.format(layer=layer)

    def mlp(self, names: Collection[str], layer: int) -> tuple[Weight, ...]:
        """Return the weights of a layer's MLP; `names` are the names of all tensors."""
        return present_weights(self.family.mlp, names, self.prefix(layer))

    def has(self, name: str) -> bool:
        """Whether layers have a tensor, by its name in memory; false if shapes are unknown."""
        return self._on_disk(self.prefix(0) + name) in self.shapes

    def _on_disk(self, name: str) -> str:
        return replace_parts(name, ((new, old) for old, new in reversed(self.family.renamed)))

    def norm(self, names: Collection[str], layer: int) -> str | None:
        """Return the weight of the norm before a layer's MLP; `names` lists all tensors."""
        norm = self.family.norm
        norms = [self.prefix(layer) + n for n in ((norm,) if isinstance(norm, str) else norm or ())]
        return next((name for name in norms if name in names), norms[0] if norms else None)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The tensors that the checkpoint must have; empty if they are unknown."""
        found = defaults.tensor_shapes(self.family.model_type, self.values)
        inside = self.family.inside
        place = self._on_disk if inside is None else inside.wrapped
        return {place(name): shape for name, shape in found.items()}


def read_dense(family: DenseFamily, config: Mapping[str, Any]) -> DenseModel:
    """Return the model that a text config describes; raises UpcycleError for invalid values."""
    config = family.with_current_keys(config)
    values = defaults.ConfigValues(config, family.model_type, family.keys)
    kinds = tuple(family.kinds(values))
    model = DenseModel(family, values.effective(), kinds, family.windows(values, len(kinds)))
    family.width(model.values)  # raises if MLPs have several sizes
    return model
