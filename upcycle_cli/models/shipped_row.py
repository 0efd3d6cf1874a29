"""The target with shipped code: its row is derived from the row of the dense family."""

from __future__ import annotations

from upcycle_cli.models.dense import DenseFamily
from upcycle_cli.models.layers import MOE_LAYERS
from upcycle_cli.models.mlp import parts_of, stacked
from upcycle_cli.models.moe import CorrectionBias, Keys, Layout, Target
from upcycle_cli.models.shipped import ARCHITECTURE, UPCYCLED_PREFIX, WRAPPED_ARCHITECTURE
from upcycle_cli.models.wrapper import replace_parts
from upcycle_cli.recipe.recipe import ExpertLayout, Routing


def shipped(family: DenseFamily, activation: str, *, biased: bool) -> Target:
    """Return the row of shipped code for a family; `biased` says whether its MLPs have biases."""
    gated = "gate" in parts_of(family.mlp)
    swiglu = gated and activation in ("silu", "swish") and not biased
    module = family.mlp[0].name.split(".")[0]
    # vLLM replaces any child named `experts` by its own SwiGLU.
    prefix = f"{module}.{'experts' if swiglu else 'expert_mlps'}"
    layout = Layout(
        experts=stacked(
            prefix, gated=gated, biases=biased, transposed=family.mlp[0].split_dim == 1
        ),
        router=f"{module}.gate.weight",
    )
    return Target(
        model_type=f"{UPCYCLED_PREFIX}{family.model_type}",
        architecture=ARCHITECTURE if family.inside is None else WRAPPED_ARCHITECTURE,
        routings=(Routing.TOPK_SOFTMAX, Routing.SOFTMAX_TOPK, Routing.SIGMOID_TOPK),
        layouts={ExpertLayout.FUSED: layout},
        keys=Keys(
            num_experts="num_experts",
            renamed=family.keys,
            routing=("routing", {str(routing): routing for routing in Routing}),
            scale="routed_scaling_factor",
        ),
        layers=MOE_LAYERS,
        layer=family.layer,
        renamed=family.renamed,
        head=replace_parts(family.head, family.renamed),
        correction_bias=CorrectionBias(name=f"{module}.gate.e_score_correction_bias"),
        inside=family.inside,
    )
