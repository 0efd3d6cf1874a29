"""The MoE architecture whose experts lie beside an MLP, and not in its place.

What each of the two puts out goes through a norm. That of the MLP has a weight of zero, so the MLP
adds nothing, can be small, and learns; that of the experts takes out what their gates are
multiplied by. With √ε for that, the norm behind both makes of small outputs what it made of the
dense MLP's: docs/decisions.md has the derivation.
"""

from __future__ import annotations

from upcycle_cli.models.layers import ENABLED
from upcycle_cli.models.mlp import stacked, swiglu, without_biases
from upcycle_cli.models.moe import Added, Beside, Keys, Layout, SharedExpert, Target
from upcycle_cli.recipe.recipe import ExpertLayout, Routing

_BEFORE_MLP = "pre_feedforward_layernorm.weight"
GEMMA4_TEXT = Target(
    model_type="gemma4_text",
    architecture="Gemma4ForCausalLM",
    routings=(Routing.TOPK_SOFTMAX,),
    layouts={
        ExpertLayout.FUSED: Layout(
            experts=stacked("experts", gated=True), router="router.proj.weight"
        )
    },
    keys=Keys(num_experts="num_experts", top_k="top_k_experts"),
    layers=ENABLED,
    shared=SharedExpert(
        weights=without_biases(swiglu("mlp")),
        size_key="intermediate_size",
        size=64,
        norm="post_feedforward_layernorm_1.weight",
    ),
    added=(
        Added(name="post_feedforward_layernorm_1.weight", factor=0.0),
        Added(name="post_feedforward_layernorm_2.weight"),
        Added(name="pre_feedforward_layernorm_2.weight", of=_BEFORE_MLP),
        # The router divides by √H what it sees, which then is what the experts see.
        Added(name="router.scale", root="hidden_size", of=_BEFORE_MLP),
        Added(name="router.per_expert_scale", root="rms_norm_eps", per_expert=True, frozen=True),
    ),
    beside=Beside(
        mlp="mlp",
        mlp_before="pre_feedforward_layernorm",
        mlp_after="post_feedforward_layernorm_1",
        before="pre_feedforward_layernorm_2",
        after="post_feedforward_layernorm_2",
        last="post_feedforward_layernorm",
    ),
    refusal=lambda dense: (
        None
        if dense.values["rms_norm_eps"]
        else "rms_norm_eps is 0, and its gates are times the root"
    ),
)
