"""Names of experts, shared experts and routers that several MoE architectures have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from upcycle_cli.models.mlp import (
    Weight,
    gated_linear,
    linear_layers,
    matrices_of,
    parts_of,
    stacked,
    swiglu,
)
from upcycle_cli.models.moe import Layout, SharedExpert
from upcycle_cli.recipe.recipe import ExpertLayout

Layouts = Mapping[ExpertLayout, Layout]


def layouts(
    per_expert: Sequence[Weight], fused: str, *, router: str, fused_router: str | None = None
) -> Layouts:
    """Return experts with released names, and stacked below `fused` as in transformers 5."""
    gated = "gate" in parts_of(per_expert)
    return {
        ExpertLayout.PER_EXPERT: Layout(experts=matrices_of(per_expert), router=router),
        ExpertLayout.FUSED: Layout(
            experts=stacked(fused, gated=gated), router=fused_router or router
        ),
    }


def shared_swiglu(prefix: str) -> tuple[Weight, ...]:
    """Return the weights of a shared expert without biases."""
    return matrices_of(swiglu(prefix))


MIXTRAL_LAYOUTS = layouts(
    linear_layers(*(f"block_sparse_moe.experts.{{expert}}.w{i}" for i in (1, 3, 2))),
    "mlp.experts",
    router="block_sparse_moe.gate.weight",
    fused_router="mlp.gate.weight",
)
QWEN_LAYOUTS = layouts(swiglu("mlp.experts.{expert}"), "mlp.experts", router="mlp.gate.weight")
GRANITE_LAYOUTS = {
    ExpertLayout.STACKED: Layout(
        experts=gated_linear("block_sparse_moe.input_linear", "block_sparse_moe.output_linear"),
        router="block_sparse_moe.router.layer.weight",
    ),
    ExpertLayout.FUSED: Layout(
        experts=stacked("block_sparse_moe.experts"), router="block_sparse_moe.router.weight"
    ),
}
GRANITE_SHARED = gated_linear("shared_mlp.input_linear", "shared_mlp.output_linear")
GATED_SHARED = SharedExpert(
    weights=shared_swiglu("mlp.shared_expert"),
    router="mlp.shared_expert_gate.weight",
    size_key="shared_expert_intermediate_size",
    size=64,
)
