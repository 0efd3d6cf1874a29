"""The dense side of a family: what a source config means.

A `Decoder` holds the effective value of every setting that the forward pass reads, with the
source's own defaults filled in: a key that is absent from a config means the default of *its*
model type, and the target's defaults differ. Each dense model type has one file that makes its
`Decoder`; the targets read nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from upcycle_cli.errors import UpcycleError, shown

FULL = "full_attention"
SLIDING = "sliding_attention"

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A dense decoder in effect: every setting its forward pass reads, and which biases it has."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    attention_dropout: float
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    """Everything of the rope settings but theta; None for the plain kind."""
    sliding_window: int | None
    """Tokens that a sliding layer sees; None when every layer sees all."""
    layer_types: tuple[str, ...]
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None


@dataclass(frozen=True, kw_only=True)
class DenseFamily:
    """A dense model type that can be upcycled."""

    model_type: str
    decoder: Callable[[Mapping[str, Any]], Decoder]
    ignored: tuple[tuple[re.Pattern[str], str], ...] = (
        (
            re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
            "rotary frequencies are computed from the config",
        ),
    )
    """Tensors that old checkpoints carry and no model reads, with the reason to drop them."""


class Values:
    """Reads typed settings from a config, with the defaults of its model type."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._config = config
        self._defaults = defaults

    def _get(self, key: str) -> Any:  # noqa: ANN401 - a JSON value
        return self._config.get(key, self._defaults[key])

    def _refuse(self, key: str, wanted: str) -> UpcycleError:
        value = self._get(key)
        found = "null" if value is None else shown(value)
        return UpcycleError(f"config.json: {key} must be {wanted}, not {found}.")

    def count(self, key: str, *, most: int | None = None) -> int:
        """Return a positive integer."""
        value = self._get(key)
        if type(value) is not int or value < 1:
            raise self._refuse(key, "a positive integer")
        if most is not None and value > most:
            raise self._refuse(key, f"at most {most}")
        return value

    def optional_count(self, key: str) -> int | None:
        """Return a positive integer, or None when the key is null."""
        return None if self._get(key) is None else self.count(key)

    def number(self, key: str, *, least: float = 0.0, below: float = math.inf) -> float:
        """Return a finite number of at least `least`, as the config writes it."""
        value = self._get(key)
        if type(value) not in (int, float):
            raise self._refuse(key, "a number")
        if not (least <= value < below):
            wanted = "a finite number" if below == math.inf else f"less than {below:g}"
            raise self._refuse(key, f"{wanted} and at least {least:g}")
        result: float = value
        return result

    def positive(self, key: str) -> float:
        """Return a finite number larger than zero, as the config writes it."""
        value = self.number(key)
        if value == 0:
            raise self._refuse(key, "larger than 0")
        return value

    def flag(self, key: str) -> bool:
        """Return a boolean."""
        value = self._get(key)
        if type(value) is not bool:
            raise self._refuse(key, "true or false")
        return value

    def activation(self, key: str) -> str:
        """Return the name of an activation."""
        value = self._get(key)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise self._refuse(key, "an activation that transformers knows, such as silu or gelu")
        return value

    def token(self, key: str) -> int | None:
        """Return a token id, or None."""
        value = self._get(key)
        if value is not None and type(value) is not int:
            raise self._refuse(key, "a token id or null")
        return value

    def tokens(self, key: str) -> int | list[int] | None:
        """Return a token id, several, or None."""
        value = self._get(key)
        if isinstance(value, list) and all(type(item) is int for item in value):
            return value
        return self.token(key)


_MAX_LAYERS = 10_000  # a plan holds every tensor of every layer

ACTIVATIONS = (
    "silu",
    "swish",
    "gelu",
    "gelu_10",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_python_tanh",
    "gelu_pytorch_tanh",
    "hardswish",
    "laplace",
    "leaky_relu",
    "linear",
    "mish",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "sqrtsoftplus",
    "tanh",
)
"""The activations without weights of their own that transformers knows by name."""

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
"""The ways to stretch rotary embeddings that transformers knows by name."""

_NO_ROPE_NUMBERS = ("rope_type", "type", "mscale", "mscale_all_dim")  # 0 leaves the last two out

ROPE_DEFAULTS: Mapping[str, Any] = {
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
}

COMMON_DEFAULTS: Mapping[str, Any] = {
    **ROPE_DEFAULTS,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}
"""Defaults that llama, mistral, qwen2 and qwen3 share in transformers."""


def read_common(values: Values, config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the settings that every family here has, under the names of `Decoder`'s fields."""
    hidden_size = values.count("hidden_size")
    num_heads = values.count("num_attention_heads")
    head_dim = values.optional_count("head_dim")
    if head_dim is None:
        if hidden_size % num_heads:
            raise UpcycleError(
                f"config.json: hidden_size {hidden_size} is not a multiple of "
                f"num_attention_heads {num_heads}, and head_dim is not given."
            )
        head_dim = hidden_size // num_heads
    num_kv_heads = values.optional_count("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise UpcycleError(
            f"config.json: num_attention_heads {num_heads} is not a multiple of "
            f"num_key_value_heads {num_kv_heads}."
        )
    rope_theta, rope_scaling = _read_rope(values, config)
    return {
        "vocab_size": values.count("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": values.count("intermediate_size"),
        "num_layers": values.count("num_hidden_layers", most=_MAX_LAYERS),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_act": values.activation("hidden_act"),
        "rms_norm_eps": values.number("rms_norm_eps"),
        "attention_dropout": values.number("attention_dropout", below=1.0),
        "max_position_embeddings": values.count("max_position_embeddings"),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "tie_word_embeddings": values.flag("tie_word_embeddings"),
        "bos_token_id": values.token("bos_token_id"),
        "eos_token_id": values.tokens("eos_token_id"),
        "pad_token_id": values.token("pad_token_id"),
    }


def _read_rope(values: Values, config: Mapping[str, Any]) -> tuple[float, Mapping[str, Any] | None]:
    # transformers lets a non-empty rope_scaling win over rope_parameters, and a theta inside
    # either over the one at the top level.
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    parameters = config.get(key) or {}
    if not isinstance(parameters, dict):
        raise UpcycleError(
            f"config.json: {key} must be an object or null, not {shown(parameters)}."
        )
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UpcycleError(
            f"config.json: {key} differs from layer to layer, which no target can express yet."
        )
    theta = parameters.get("rope_theta")
    if theta is None:
        theta = values.positive("rope_theta")
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise UpcycleError(
            f"config.json: {key} must name its rope_type, one of {', '.join(ROPE_KINDS)}, "
            f"not {shown(kind)}."
        )
    for name, value in {**scaling, "rope_theta": theta}.items():
        numbers = value if isinstance(value, list) else [value]
        if name not in _NO_ROPE_NUMBERS and not all(map(_is_usable, numbers)):
            raise UpcycleError(
                f"config.json: {key} has {name} {shown(value)}, and no rotary embedding has."
            )
    if kind == "default":
        return theta, None
    return theta, scaling | {"rope_type": kind}


def _is_usable(value: object) -> bool:
    """Whether this can be a setting of rotary embeddings: a flag, or a positive number."""
    if value is None or isinstance(value, bool):
        return True
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def qwen_layer_types(
    values: Values, config: Mapping[str, Any], num_layers: int
) -> tuple[int | None, tuple[str, ...]]:
    """Return the window and each layer's kind by the rule that qwen2 and qwen3 share.

    A layer slides when `use_sliding_window` is true and its index is at least
    `max_window_layers`, unless `layer_types` says otherwise.
    """
    window = values.optional_count("sliding_window") if values.flag("use_sliding_window") else None
    layer_types = config.get("layer_types")
    if layer_types is None:
        first_sliding = num_layers if window is None else values.number("max_window_layers")
        layer_types = [SLIDING if i >= first_sliding else FULL for i in range(num_layers)]
    if not isinstance(layer_types, list) or any(
        kind not in (FULL, SLIDING) for kind in layer_types
    ):
        raise UpcycleError(
            f"config.json: layer_types may hold {FULL} and {SLIDING}, not {shown(layer_types)}."
        )
    if len(layer_types) != num_layers:
        raise UpcycleError(
            f"config.json: layer_types has {len(layer_types)} entries for {num_layers} layers."
        )
    if SLIDING in layer_types and window is None:
        raise UpcycleError(
            "config.json: layer_types has sliding layers, but use_sliding_window is false "
            "or sliding_window is null."
        )
    if SLIDING not in layer_types:
        window = None
    return window, tuple(layer_types)


def dense_shapes(decoder: Decoder) -> Shapes:
    """Return every tensor that the dense checkpoint must have, with its shape.

    The head of a tied model may be there as well; it is not listed.
    """
    H, I = decoder.hidden_size, decoder.intermediate_size  # noqa: E741 - the field's letters
    shapes = shared_shapes(decoder)
    for layer in range(decoder.num_layers):
        mlp = f"model.layers.{layer}.mlp"
        shapes |= {
            f"{mlp}.gate_proj.weight": (I, H),
            f"{mlp}.up_proj.weight": (I, H),
            f"{mlp}.down_proj.weight": (H, I),
        }
    return shapes


def shared_shapes(decoder: Decoder) -> Shapes:
    """Return the tensors that the dense model and its MoE have in common: all but the MLPs."""
    H = decoder.hidden_size
    q_rows = decoder.num_heads * decoder.head_dim
    kv_rows = decoder.num_kv_heads * decoder.head_dim
    shapes: Shapes = {"model.embed_tokens.weight": (decoder.vocab_size, H)}
    for layer in range(decoder.num_layers):
        prefix = f"model.layers.{layer}"
        attn = f"{prefix}.self_attn"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (H,),
            f"{prefix}.post_attention_layernorm.weight": (H,),
            f"{attn}.q_proj.weight": (q_rows, H),
            f"{attn}.k_proj.weight": (kv_rows, H),
            f"{attn}.v_proj.weight": (kv_rows, H),
            f"{attn}.o_proj.weight": (H, q_rows),
        }
        if decoder.qkv_bias:
            shapes |= {
                f"{attn}.q_proj.bias": (q_rows,),
                f"{attn}.k_proj.bias": (kv_rows,),
                f"{attn}.v_proj.bias": (kv_rows,),
            }
        if decoder.o_bias:
            shapes[f"{attn}.o_proj.bias"] = (H,)
        if decoder.qk_norm:
            shapes |= {
                f"{attn}.q_norm.weight": (decoder.head_dim,),
                f"{attn}.k_norm.weight": (decoder.head_dim,),
            }
    shapes["model.norm.weight"] = (H,)
    if not decoder.tie_word_embeddings:
        shapes["lm_head.weight"] = (decoder.vocab_size, H)
    return shapes
