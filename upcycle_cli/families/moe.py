"""The MoE side: a row for each architecture that dense models can become.

A row says how its tensors are named, which config keys say what, what it can express, and, in a
small function each, what its config needs said and why it cannot take a model. The last of all
targets is the code that is shipped with a model, which takes what has no sibling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from upcycle_cli.errors import UpcycleError, shown
from upcycle_cli.families.dense import FULL, SLIDING, DenseFamily, DenseModel
from upcycle_cli.families.layers import (
    ALL,
    BLOCK_TYPES,
    FIRST_K_DENSE,
    MLP_ONLY_LAYERS,
    MOE_LAYERS,
    LayerChoice,
)
from upcycle_cli.families.mlp import Weight, parts_of, separate, stacked, without_biases
from upcycle_cli.families.shipped import ARCHITECTURE, AUTO_MAP, UPCYCLED_PREFIX
from upcycle_cli.families.values import defaults_of
from upcycle_cli.recipe import Routing

IN_MEMORY = "model.layers.{layer}."
"""How transformers 5 has a layer's names begin in memory, and saves them when told to."""


class ExpertLayout(StrEnum):
    """How expert weights are named on disk."""

    PER_EXPERT = "per-expert"
    """A tensor per matrix and expert, as in the released checkpoints; every engine reads it."""
    STACKED = "stacked"
    """A tensor per matrix and layer for all experts, as in the released checkpoints of some."""
    FUSED = "fused"
    """A tensor per layer for gate and up, one for down, as transformers 5 holds them in memory."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The tensors of a layer's experts and router, by their names within the layer."""

    experts: tuple[Weight, ...]
    router: str


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
    routing: tuple[str, Mapping[Any, Routing]] | None = None
    """A key and what its values stand for; None where the routing is fixed."""
    scale: str | None = None
    """A factor that the model multiplies its gates by."""


@dataclass(frozen=True, kw_only=True)
class SharedExpert:
    """An expert for every token that the architecture insists on; its output is made zero."""

    weights: tuple[Weight, ...]
    router: str | None = None
    size_key: str | None = None
    """The key of its intermediate size; None where it is that of an expert."""
    size: int | None = None
    """What that key is to say."""


def _in_memory(name: str, renamed: Sequence[tuple[str, str]]) -> str:
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
    correction_bias: str | None = None
    """A bias on the choice of experts, zero at first, which trainers move."""
    shared: SharedExpert | None = None
    zero_biases: tuple[str, ...] = ()
    """Linear layers that must have a bias tensor even where the source has none."""
    lacks: Mapping[str, str] = field(default_factory=dict)
    """Tensors of a dense layer that it has no place for, and how that is said."""
    refusal: Callable[[DenseModel], str | None] = lambda _: None
    """Why it cannot express a model, or None when it can."""
    settings: Callable[[DenseModel], dict[str, Any]] = lambda _: {}
    """The config keys of its own that it needs beside the shared ones."""

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
        return _in_memory(source, self.renamed)

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

    def value(self, config: Mapping[str, Any], key: str) -> Any:  # noqa: ANN401 - a JSON value
        """Return what an MoE's config says under a key, or means when it is absent."""
        key = self.keys.usual.get(key, key)
        names = (key, *self.keys.aliases) if key == self.keys.num_experts else (key,)
        for name in names:
            if name in config:
                return config[name]
        return defaults_of(self.model_type).get(key)

    def count(self, config: Mapping[str, Any], key: str) -> int:
        """Return a positive integer of a config; raises ValueError when it is something else."""
        value = self.value(config, key)
        if type(value) is not int or value < 1:
            raise ValueError(f"{key} must be a positive integer, not {shown(value)}")
        return value

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


_BY_NORM = ("norm_topk_prob", {True: Routing.TOPK_SOFTMAX, False: Routing.SOFTMAX_TOPK})
_SIGMOID = ("norm_topk_prob", {True: Routing.SIGMOID_TOPK})


def _layouts(
    per_expert: Sequence[Weight], fused: str, *, router: str, fused_router: str | None = None
) -> Mapping[ExpertLayout, Layout]:
    gated = "gate" in {part for weight in per_expert for part in weight.holds}
    return {
        ExpertLayout.PER_EXPERT: Layout(experts=without_biases(per_expert), router=router),
        ExpertLayout.FUSED: Layout(
            experts=stacked(fused, gated=gated), router=fused_router or router
        ),
    }


def _swiglu(prefix: str) -> tuple[Weight, ...]:
    return separate(f"{prefix}.gate_proj", f"{prefix}.up_proj", f"{prefix}.down_proj")


_QWEN_LAYOUTS = _layouts(_swiglu("mlp.experts.{expert}"), "mlp.experts", router="mlp.gate.weight")
_NO_O_BIAS = "attention_bias is true, and its o_proj has no bias"
_NO_QKV_BIAS = "{model_type} has q, k and v biases, and its attention has none"
_QKV = tuple(f"self_attn.{matrix}_proj" for matrix in "qkv")


def _no_mixed_windows(dense: DenseModel) -> str | None:
    if len({*dense.windows}) == 1:
        return None
    return "only some layers slide (layer_types), and its layers all attend alike"


def _no_windows(dense: DenseModel) -> str | None:
    return "some layers have a window, and its layers see all" if any(dense.windows) else None


def window_settings(dense: DenseModel) -> dict[str, Any]:
    """State windows in the terms of the Qwen MoE configs."""
    first = next((i for i, window in enumerate(dense.windows) if window), None)
    return {
        "use_sliding_window": first is not None,
        "sliding_window": None if first is None else dense.windows[first],
        "max_window_layers": dense.num_layers if first is None else first,
        "layer_types": [SLIDING if window else FULL for window in dense.windows],
    }


def _glm4_moe_settings(dense: DenseModel) -> dict[str, Any]:
    return {
        "attention_bias": dense.has("self_attn.q_proj.bias"),
        "use_qk_norm": dense.has("self_attn.q_norm.weight"),
        "partial_rotary_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 0,
    }


_ROWS: Sequence[Target] = (
    Target(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        routings=(Routing.TOPK_SOFTMAX,),
        layouts=_layouts(
            separate(
                *(f"block_sparse_moe.experts.{{expert}}.{matrix}" for matrix in ("w1", "w3", "w2"))
            ),
            "mlp.experts",
            router="block_sparse_moe.gate.weight",
            fused_router="mlp.gate.weight",
        ),
        keys=Keys(
            num_experts="num_local_experts",
            aliases=("num_experts",),
            expert_size="intermediate_size",
        ),
        layers=ALL,
        lacks={"self_attn.o_proj.bias": _NO_O_BIAS, "self_attn.q_proj.bias": _NO_QKV_BIAS},
        refusal=_no_mixed_windows,
        settings=lambda dense: {"sliding_window": dense.windows[0], "router_jitter_noise": 0.0},
    ),
    Target(
        # It always has a shared expert and q, k and v biases. A source without biases gets zeros,
        # since vLLM reads them unasked; the shared expert is 64 wide, since vLLM refuses an empty
        # one; and its gate is drawn at random, since llama.cpp computes it as silu(x)/x, which is
        # 0/0 for a zero row.
        model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        routings=(Routing.SOFTMAX_TOPK, Routing.TOPK_SOFTMAX),
        layouts=_QWEN_LAYOUTS,
        keys=Keys(num_experts="num_experts", aliases=("num_local_experts",), routing=_BY_NORM),
        layers=MLP_ONLY_LAYERS,
        shared=SharedExpert(
            weights=without_biases(_swiglu("mlp.shared_expert")),
            router="mlp.shared_expert_gate.weight",
            size_key="shared_expert_intermediate_size",
            size=64,
        ),
        zero_biases=_QKV,
        lacks={"self_attn.o_proj.bias": _NO_O_BIAS},
        settings=lambda dense: window_settings(dense) | {"qkv_bias": True},
    ),
    Target(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        routings=(Routing.TOPK_SOFTMAX, Routing.SOFTMAX_TOPK),
        layouts=_QWEN_LAYOUTS,
        keys=Keys(num_experts="num_experts", aliases=("num_local_experts",), routing=_BY_NORM),
        layers=MLP_ONLY_LAYERS,
        refusal=_no_mixed_windows,
        settings=lambda dense: (
            window_settings(dense) | {"attention_bias": dense.values["attention_bias"]}
        ),
    ),
    Target(
        model_type="glm4_moe",
        architecture="Glm4MoeForCausalLM",
        routings=(Routing.SIGMOID_TOPK,),
        layouts=_QWEN_LAYOUTS,
        keys=Keys(
            num_experts="n_routed_experts",
            aliases=("num_local_experts", "num_experts"),
            routing=_SIGMOID,
            scale="routed_scaling_factor",
        ),
        layers=FIRST_K_DENSE,
        correction_bias="mlp.gate.e_score_correction_bias",
        shared=SharedExpert(weights=without_biases(_swiglu("mlp.shared_experts"))),
        lacks={"self_attn.o_proj.bias": _NO_O_BIAS},
        refusal=_no_windows,
        settings=_glm4_moe_settings,
    ),
    Target(
        model_type="granitemoe",
        architecture="GraniteMoeForCausalLM",
        routings=(Routing.TOPK_SOFTMAX,),
        layouts={
            ExpertLayout.STACKED: Layout(
                experts=(
                    Weight("block_sparse_moe.input_linear.weight", ("gate", "up"), 0),
                    Weight("block_sparse_moe.output_linear.weight", ("down",), 1),
                ),
                router="block_sparse_moe.router.layer.weight",
            ),
            ExpertLayout.FUSED: Layout(
                experts=stacked("block_sparse_moe.experts", gated=True),
                router="block_sparse_moe.router.weight",
            ),
        },
        keys=Keys(
            num_experts="num_local_experts",
            aliases=("num_experts",),
            expert_size="intermediate_size",
        ),
        layers=ALL,
    ),
    Target(
        model_type="nemotron_h",
        architecture="NemotronHForCausalLM",
        routings=(Routing.SIGMOID_TOPK,),
        layouts=_layouts(
            separate("", "mixer.experts.{expert}.up_proj", "mixer.experts.{expert}.down_proj"),
            "mixer.experts",
            router="mixer.gate.weight",
        ),
        keys=Keys(
            num_experts="n_routed_experts",
            aliases=("num_local_experts",),
            routing=_SIGMOID,
            scale="routed_scaling_factor",
        ),
        layers=BLOCK_TYPES,
        layer="backbone.layers.{layer}.",
        correction_bias="mixer.gate.e_score_correction_bias",
        shared=SharedExpert(
            weights=without_biases(
                separate("", "mixer.shared_experts.up_proj", "mixer.shared_experts.down_proj")
            ),
            size_key="moe_shared_expert_intermediate_size",
            size=64,
        ),
        settings=lambda _: {
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "moe_latent_size": None,
            "norm_topk_prob": True,
        },
    ),
)
NATIVE: Mapping[str, Target] = {row.model_type: row for row in _ROWS}


def shipped(family: DenseFamily, activation: str, *, biased: bool) -> Target:
    """Return the target whose code is shipped with the model; `biased` says that MLPs have biases.

    vLLM replaces a child named `experts` by its own fused SwiGLU, whatever the module computes.
    """
    gated = "gate" in parts_of(family.mlp)
    swiglu = gated and activation in ("silu", "swish") and not biased
    module = family.mlp[0].name.split(".")[0]
    prefix = f"{module}.{'experts' if swiglu else 'expert_mlps'}"
    layout = Layout(
        experts=stacked(prefix, gated=gated, biases=biased, transposed=family.mlp[0].cut == 1),
        router=f"{module}.gate.weight",
    )
    return Target(
        model_type=f"{UPCYCLED_PREFIX}{family.model_type}",
        architecture=ARCHITECTURE,
        routings=(Routing.TOPK_SOFTMAX, Routing.SOFTMAX_TOPK, Routing.SIGMOID_TOPK),
        layouts={ExpertLayout.FUSED: layout},
        keys=Keys(
            num_experts="num_experts",
            usual=family.keys,
            routing=("routing", {str(routing): routing for routing in Routing}),
            scale="routed_scaling_factor",
        ),
        layers=MOE_LAYERS,
        layer=family.layer,
        renamed=family.renamed,
        head=_in_memory(family.head, family.renamed),
        correction_bias=f"{module}.gate.e_score_correction_bias",
        settings=lambda _: {"auto_map": dict(AUTO_MAP)},
    )
