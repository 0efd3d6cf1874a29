"""The dense side: a row for each model type that can be upcycled, and what its config means.

`DenseModel` holds the effective value of every setting, with the model type's own defaults filled
in: a key that is absent from a config means the default of *its* type, and the target's differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from upcycle_cli.errors import UpcycleError, shown
from upcycle_cli.families.layers import block_types
from upcycle_cli.families.mlp import Weight, degree, parts_of, present, separate
from upcycle_cli.families.settings import Values
from upcycle_cli.families.values import tensor_shapes
from upcycle_cli.recipe import MlpKind

HEAD = "lm_head.weight"
FULL = "full_attention"
SLIDING = "sliding_attention"

COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Tensors that old checkpoints carry and no model reads."""

Windows = tuple[int | None, ...]
"""By layer, the tokens that it sees; None where it sees all."""


@dataclass(frozen=True, kw_only=True)
class DenseFamily:
    """A dense model type that can be upcycled: a row of `DENSE`."""

    model_type: str
    mlp: tuple[Weight, ...]
    """The tensors of a layer's MLP."""
    norm: str | None = "post_attention_layernorm.weight"
    """The weight of the norm before the MLP; None where it reads the residual stream itself, or
    where that norm has no weight."""
    norm_offset: float = 0.0
    """What the norm adds to its weight: 1 for LayerNorm1P and Gemma."""
    layer: str = "model.layers.{layer}."
    """How the names of a layer's tensors begin."""
    embedding: str = "model.embed_tokens.weight"
    activation: str = "hidden_act"
    """The config's key for the MLP's activation."""
    blocks: str | None = None
    """Where layers differ, the kind (layers_block_type) of those that are MLPs."""
    windows: Callable[[Values, int], Windows] = lambda _, count: (None,) * count
    targets: tuple[str, ...] = ()
    """What it can become, beside the shipped code; that which most software can load first."""
    classes: str | tuple[str, str, str] | None = None
    """How the names of its classes in transformers begin, or the names of its config, its model and
    its causal LM there, for the shipped code; None without."""
    outgrown_code: bool = False
    """Whether released models carry code that transformers has had itself since."""

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
        return int(self.values["intermediate_size"])

    @property
    def mlp_kind(self) -> MlpKind:
        """How the MLP answers to scaled matrices."""
        parts = parts_of(self.family.mlp)
        return MlpKind("gate" in parts, degree(parts, self.values[self.family.activation]))

    def prefix(self, layer: int) -> str:
        """Return how the names of a layer's tensors begin."""
        return self.family.layer.format(layer=layer)

    def mlp(self, names: Collection[str], layer: int) -> tuple[Weight, ...]:
        """Return the weights of a layer's MLP; `names` are those of all tensors there are."""
        return present(self.family.mlp, names, self.prefix(layer))

    def has(self, name: str) -> bool:
        """Whether its layers have a tensor, as far as that is known."""
        return self.prefix(0) + name in self.shapes

    def norm(self, layer: int) -> str | None:
        """Return the name of the weight of the norm before a layer's MLP."""
        norm = self.family.norm
        return None if norm is None else self.prefix(layer) + norm

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor that the checkpoint must have; none where they are not known."""
        return tensor_shapes(self.family.model_type, self.values, self.kinds)


def read_dense(family: DenseFamily, config: Mapping[str, Any]) -> DenseModel:
    """Return what a config means; raises UpcycleError where it makes no sense."""
    values = Values(config, family.model_type)
    if family.blocks is None:
        kinds = ("layer",) * values["num_hidden_layers"]
    else:
        try:
            kinds = block_types(config)
        except ValueError as error:
            raise UpcycleError(f"config.json: {error}.") from error
    windows = family.windows(values, len(kinds))
    return DenseModel(family, values.effective(), kinds, windows)


def _some_slide(values: Values, count: int) -> Windows:
    """Read the windows by the rule of qwen2 and qwen3.

    A layer slides when `use_sliding_window` is true and its index is at least
    `max_window_layers`, unless `layer_types` says otherwise.
    """
    window = values["sliding_window"] if values["use_sliding_window"] else None
    kinds = values.config.get("layer_types")
    if kinds is None:
        first_sliding = count if window is None else values["max_window_layers"]
        kinds = [SLIDING if i >= first_sliding else FULL for i in range(count)]
    if not isinstance(kinds, list) or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise UpcycleError(
            f"config.json: layer_types may hold {FULL} and {SLIDING}, not {shown(kinds)}."
        )
    if len(kinds) != count:
        raise UpcycleError(f"config.json: layer_types has {len(kinds)} entries for {count} layers.")
    if SLIDING in kinds and window is None:
        raise UpcycleError(
            "config.json: layer_types has sliding layers, but use_sliding_window is false "
            "or sliding_window is null."
        )
    return tuple(window if kind == SLIDING else None for kind in kinds)


_SWIGLU = separate("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_UP_DOWN = separate("", "mlp.up_proj", "mlp.down_proj")
_GATE_UP = (
    Weight("mlp.gate_up_proj.weight", ("gate", "up"), 0),
    Weight("mlp.down_proj.weight", ("down",), 1),
)
_SHARED = "input_layernorm.weight"  # attention and MLP run side by side
_GEMMA: Any = {
    "mlp": _SWIGLU,
    "norm": "pre_feedforward_layernorm.weight",
    "norm_offset": 1.0,
    "activation": "hidden_activation",
}
_LLAMA = ("LlamaModel", "LlamaForCausalLM")  # as the last two classes

_ROWS: Sequence[DenseFamily] = (
    DenseFamily(
        model_type="llama",
        mlp=_SWIGLU,
        targets=("mixtral", "qwen2_moe", "glm4_moe"),
        classes="Llama",
    ),
    DenseFamily(
        model_type="mistral",
        mlp=_SWIGLU,
        windows=lambda values, count: (values["sliding_window"],) * count,
        targets=("mixtral", "qwen2_moe"),
        classes="Mistral",
    ),
    DenseFamily(
        model_type="qwen2",
        mlp=_SWIGLU,
        windows=_some_slide,
        targets=("qwen2_moe", "glm4_moe"),
        classes="Qwen2",
    ),
    DenseFamily(
        model_type="qwen3",
        mlp=_SWIGLU,
        windows=_some_slide,
        targets=("qwen3_moe", "glm4_moe"),
        classes="Qwen3",
    ),
    DenseFamily(model_type="arcee", mlp=_UP_DOWN, classes="Arcee"),
    DenseFamily(model_type="cohere", mlp=_SWIGLU, norm=_SHARED, classes="Cohere"),
    DenseFamily(model_type="cohere2", mlp=_SWIGLU, norm=_SHARED, classes="Cohere2"),
    DenseFamily(model_type="cwm", mlp=_SWIGLU, classes="Cwm"),
    DenseFamily(model_type="diffllama", mlp=_SWIGLU, classes="DiffLlama"),
    DenseFamily(model_type="ernie4_5", mlp=_SWIGLU, classes="Ernie4_5"),
    DenseFamily(model_type="exaone4", mlp=_SWIGLU, norm=None, classes="Exaone4"),
    DenseFamily(model_type="gemma", mlp=_SWIGLU, norm_offset=1.0, classes="Gemma"),
    DenseFamily(model_type="gemma2", **_GEMMA, classes="Gemma2"),
    DenseFamily(
        model_type="gemma3_text",
        **_GEMMA,
        classes=("Gemma3TextConfig", "Gemma3TextModel", "Gemma3ForCausalLM"),
    ),
    DenseFamily(model_type="glm", mlp=_GATE_UP, classes="Glm"),
    DenseFamily(model_type="glm4", mlp=_GATE_UP, classes="Glm4"),
    DenseFamily(model_type="granite", mlp=_SWIGLU, classes="Granite"),
    DenseFamily(model_type="granite_swa", mlp=_SWIGLU, classes="GraniteSWA"),
    DenseFamily(model_type="helium", mlp=_SWIGLU, classes="Helium"),
    DenseFamily(model_type="hunyuan_v1_dense", mlp=_SWIGLU, classes="HunYuanDenseV1"),
    DenseFamily(model_type="hyperclovax", mlp=_SWIGLU, classes="HyperCLOVAX"),
    DenseFamily(model_type="internlm3", mlp=_SWIGLU, classes=("InternLM3Config", *_LLAMA)),
    DenseFamily(model_type="iquestcoder", mlp=_SWIGLU, classes=("IQuestCoderConfig", *_LLAMA)),
    DenseFamily(model_type="jais2", mlp=_UP_DOWN, classes="Jais2"),
    DenseFamily(model_type="minicpm3", mlp=_SWIGLU, classes="MiniCPM3"),
    DenseFamily(model_type="ministral", mlp=_SWIGLU, classes="Ministral"),
    DenseFamily(model_type="ministral3", mlp=_SWIGLU, classes="Ministral3"),
    DenseFamily(
        model_type="nanochat", mlp=separate("", "mlp.fc1", "mlp.fc2"), norm=None, classes="NanoChat"
    ),
    DenseFamily(model_type="olmo", mlp=_SWIGLU, norm=None, classes="Olmo"),
    DenseFamily(model_type="olmo2", mlp=_SWIGLU, norm=None, classes="Olmo2"),
    DenseFamily(model_type="olmo3", mlp=_SWIGLU, norm=None, classes="Olmo3"),
    DenseFamily(
        model_type="persimmon",
        mlp=separate("", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        classes="Persimmon",
    ),
    DenseFamily(
        model_type="phi", mlp=separate("", "mlp.fc1", "mlp.fc2"), norm=_SHARED, classes="Phi"
    ),
    DenseFamily(model_type="phi3", mlp=_GATE_UP, classes="Phi3"),
    DenseFamily(model_type="seed_oss", mlp=_SWIGLU, classes="SeedOss"),
    DenseFamily(model_type="smollm3", mlp=_SWIGLU, classes="SmolLM3"),
    DenseFamily(model_type="stablelm", mlp=_SWIGLU, classes="StableLm"),
    DenseFamily(
        model_type="starcoder2", mlp=separate("", "mlp.c_fc", "mlp.c_proj"), classes="Starcoder2"
    ),
    DenseFamily(model_type="vaultgemma", **_GEMMA, classes="VaultGemma"),
    DenseFamily(model_type="youtu", mlp=_SWIGLU, classes="Youtu"),
    DenseFamily(model_type="nemotron", mlp=_UP_DOWN, norm_offset=1.0, classes="Nemotron"),
    DenseFamily(
        model_type="nemotron_h",
        mlp=separate("", "mixer.up_proj", "mixer.down_proj"),
        norm="norm.weight",
        layer="backbone.layers.{layer}.",
        embedding="backbone.embeddings.weight",
        activation="mlp_hidden_act",
        blocks="mlp",
        targets=("nemotron_h",),
        outgrown_code=True,
    ),
)
DENSE: Mapping[str, DenseFamily] = {row.model_type: row for row in _ROWS}
