"""Run both models side by side, layer by layer, and measure each layer.

If the MoE's dtypes are narrower, the dense model runs a second time with its weights rounded to
them, so that rounding and conversion are measured separately. All models wait for each other after
every layer, so nothing of an earlier layer is kept.

Legend: P positions, K sampled positions, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from upcycle_cli.core.callbacks import Progress
from upcycle_cli.run.layerwise import Run, started
from upcycle_cli.run.lazy_models import LazyModel, Round
from upcycle_cli.run.lazy_weights import Computed
from upcycle_cli.run.models import source_errors, transformers_errors
from upcycle_cli.verification.logit_divergence import Divergence, compare
from upcycle_cli.verification.prompts import Prompt
from upcycle_cli.verification.result import LayerMeasure
from upcycle_cli.verification.routing import ObservedRouting, observed_routers

_SAMPLED = 64
"""Positions at which the experts of each layer also run on the dense model's own MLP input."""


def rounding(dense: LazyModel, moe: LazyModel) -> Round | None:
    """Return the dtype that each dense weight has in the MoE; None if no weight is rounded."""
    assert moe.experts is not None
    # MLP weights have other names in the MoE: those of its experts' matrices and biases.
    names = [weight.name for weight in moe.experts.target.in_memory.experts]
    experts = (moe.weights.get(f"layers.{moe.experts.layers[0]}.{name}") for name in names)
    usual = {len(held.shape): held.dtype for held in experts if held is not None}

    def round_to(name: str, stored: torch.Tensor | Computed) -> torch.dtype:
        held = moe.weights.get(name)
        dtype = usual.get(len(stored.shape), torch.float32) if held is None else held.dtype
        return stored.dtype if dtype == torch.float32 else dtype

    narrower = (round_to(name, held) != held.dtype for name, held in dense.weights.items())
    return round_to if any(narrower) else None


def run_side_by_side(
    sources: Sequence[LazyModel],
    moe: LazyModel,
    prompt: Prompt,
    group_size: int,
    watch: Progress,
) -> tuple[list[Divergence], list[LayerMeasure], ObservedRouting]:
    """Run the dense model, again with rounded weights if that matters, and the MoE.

    Raises TransformersError for the MoE, UpcycleError for the dense model.
    """
    assert moe.experts is not None
    target, P = moe.experts.target, prompt.ids.numel()
    sample = torch.arange(0, P, max(1, P // _SAMPLED))[:_SAMPLED]
    with ExitStack() as stack:

        def start(model: LazyModel) -> Run:
            blocks = [model.block(layer, target) for layer in moe.experts.layers]  # type: ignore[union-attr]
            return stack.enter_context(started(model.net, prompt.ids, blocks))

        def advance_dense() -> None:
            with source_errors(sources[0].checkpoint.path):
                for each in runs:
                    each.steps.advance()

        runs = [start(model) for model in sources]
        run, own = start(moe), runs[-1]
        routing = stack.enter_context(observed_routers(moe, P, group_size))
        measures = []
        for layer in range(moe.num_layers):
            advance_dense()
            has_experts = layer in moe.experts.layers
            if has_experts:
                run.extra = own.mlp_input.flatten(0, -2)[sample]
            with transformers_errors():
                run.steps.advance()
            if has_experts:
                measures.append(_measure(own, run, routing.measures[layer], layer, sample))
            watch.checked(layer + 1, moe.num_layers, "layers")
        advance_dense()
        with transformers_errors():
            run.steps.advance()
            endings = []
            for each in (*runs, run):
                output = each.output
                output.last_hidden_state = output.last_hidden_state.flatten(0, -2)[None]
                endings.append((each.model, output))
            return compare(endings, prompt.targets), measures, routing


def _measure(
    dense: Run, moe: Run, routing: Mapping[str, Any], layer: int, sample: torch.Tensor
) -> LayerMeasure:
    wanted_KH, found_KH = dense.mlp_output.flatten(0, -2)[sample].double(), moe.extra
    assert found_KH is not None
    error_KH = found_KH.double() - wanted_KH
    size = float(wanted_KH.square().mean().sqrt()) or math.nan
    hidden_error = float((moe.hidden - dense.hidden).norm())
    return LayerMeasure(
        layer=layer,
        added_rms=float(error_KH.square().mean().sqrt()) / size,
        added_max=float(error_KH.abs().max()) / size,
        gain=float((found_KH * wanted_KH).sum() / wanted_KH.square().sum()),
        hidden_rms=hidden_error / (float(dense.hidden.norm()) or math.nan),
        **routing,
    )
