"""How experts, shared ones and routers are named, where several MoE architectures share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from upcycle_cli.models.mlp import Weight, stacked, swiglu, without_biases
from upcycle_cli.models.moe import Layout, SharedExpert
from upcycle_cli.recipe.recipe import ExpertLayout


def layouts(
    per_expert: Sequence[Weight], fused: str, *, router: str, fused_router: str | None = None
) -> Mapping[ExpertLayout, Layout]:
    """Return experts by their released names, and as transformers 5 holds them below `fused`."""
    gated = "gate" in {part for weight in per_expert for part in weight.holds}
    return {
        ExpertLayout.PER_EXPERT: Layout(experts=without_biases(per_expert), router=router),
        ExpertLayout.FUSED: Layout(
            experts=stacked(fused, gated=gated), router=fused_router or router
        ),
    }


QWEN_LAYOUTS = layouts(swiglu("mlp.experts.{expert}"), "mlp.experts", router="mlp.gate.weight")
GRANITE_LAYOUTS = {
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
}
GRANITE_SHARED = (
    Weight("shared_mlp.input_linear.weight", ("gate", "up"), 0),
    Weight("shared_mlp.output_linear.weight", ("down",), 1),
)
GATED_SHARED = SharedExpert(
    weights=without_biases(swiglu("mlp.shared_expert")),
    router="mlp.shared_expert_gate.weight",
    size_key="shared_expert_intermediate_size",
    size=64,
)
