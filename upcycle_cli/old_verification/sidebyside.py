"""Both models run side by side, and what is measured as they run.

Legend: P positions, K sampled positions, H hidden size, I dense intermediate size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from upcycle_cli.checkpoint.checkpoint import Reader
from upcycle_cli.core.callbacks import Watch
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models.mlp import find_weight
from upcycle_cli.old_verification.distributions import Comparison, Ending, compare
from upcycle_cli.old_verification.factors import factor_of, recover_factors
from upcycle_cli.old_verification.facts import Facts
from upcycle_cli.old_verification.neurons import Neurons
from upcycle_cli.old_verification.prompts import Prompt
from upcycle_cli.old_verification.routing import LayerRouting, Routing, watched_routers
from upcycle_cli.old_verification.running import dense_model, moe_model, rounds
from upcycle_cli.run.layerwise import Run, Span, started
from upcycle_cli.run.mixtures import beside_mlp
from upcycle_cli.run.models import Model, TransformersError, decoder_layers, transformers_says
from upcycle_cli.verification.result import Continuation, LayerMeasure

_SAMPLED = 256
"""Positions at which each layer's experts are held against the dense MLP on its own input."""

_OPENING = 24
"""Tokens of text that both models go on from."""
_CONTINUED = 16
_CONTINUED_PARAMETERS = 5e8
"""A dense model of so many parameters or more goes on for one token, for each takes a pass."""


@dataclass(frozen=True)
class Found:
    """What running the models showed."""

    comparison: Comparison
    layers: tuple[LayerMeasure, ...]
    routing: Routing
    largest: float | None
    """The largest output of an expert stored in float16, None when there is none."""
    has_rounded: bool
    continuation: Continuation | None


def run_side_by_side(
    facts: Facts,
    dense: Reader,
    moe: Reader,
    prompt: Prompt,
    copied: Collection[int],
    watch: Watch,
) -> Found:
    """Run the models side by side; raises TransformersError for the MoE, else UpcycleError."""
    P = prompt.ids.numel()
    sample = torch.arange(0, P, max(1, P // _SAMPLED))[:_SAMPLED]
    moe_net = moe_model(facts, moe, copied=copied)
    published = dense_model(facts, dense)
    with ExitStack() as stack:

        def start(model: Model, *, is_moe: bool) -> Run:
            with transformers_says():
                layers = decoder_layers(model)
                mlps = [_mlp(facts, layers[layer], is_moe=is_moe) for layer in facts.layers]
            return stack.enter_context(started(model, prompt.ids, mlps))

        largest = stack.enter_context(_watched_experts(facts, published))
        denses = [start(published, is_moe=False)]
        if rounds(facts):
            denses.append(start(dense_model(facts, dense, rounded=True), is_moe=False))
        run = start(moe_net, is_moe=True)
        # The hooks see what the model really chose, ties in its own arithmetic included.
        routing = stack.enter_context(watched_routers(facts, moe_net, P))
        measures = []
        for layer in range(facts.num_layers):
            for other in denses:
                _advance_dense(facts, other)
            own = denses[-1]
            if layer in facts.layers:
                run.extra = own.mlp_input.flatten(0, -2)[sample]
            with transformers_says():
                run.steps.advance()
            if layer in facts.layers:
                measures.append(_measure(own, run, routing.layers[layer], layer, sample))
            watch.checked(layer + 1, facts.num_layers, "layers")
        for other in denses:
            _advance_dense(facts, other)
        with transformers_says():
            run.steps.advance()
            endings = [ending_of(each) for each in (*denses, run)]
            comparison = compare(
                endings[0], endings[1] if len(denses) > 1 else None, endings[-1], prompt.targets
            )
    with transformers_says():
        continuation = _continuation(facts, prompt, published, moe_net)
    found = float(torch.stack(largest).max()) if largest else None
    return Found(comparison, tuple(measures), routing, found, len(denses) > 1, continuation)


def _mlp(facts: Facts, layer: Model, *, is_moe: bool) -> Model | Span:
    """Return what is to be compared of a layer: an MLP, or what has experts in its place."""
    if facts.target.parallel_mlp is not None:
        return beside_mlp(layer, facts.target, is_moe=is_moe)
    layout = facts.target.in_memory
    return layer.get_submodule(layout.block if is_moe else facts.family.mlp[0].name.split(".")[0])


def _continuation(facts: Facts, prompt: Prompt, dense: Model, moe: Model) -> Continuation | None:
    opening = prompt.ids[:1, : min(_OPENING, len(prompt.words[0]))]
    if not opening.numel():
        return None
    share = _CONTINUED_PARAMETERS / facts.dense.num_parameters
    count = max(1, min(_CONTINUED, int(share)))
    texts = []
    for model in (dense, moe):
        ids = opening
        for _ in range(count):
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=-1)
        texts.append(prompt.decode(ids[0, opening.shape[1] :].tolist()))
    return Continuation(text=prompt.decode(opening[0].tolist()), dense=texts[0], moe=texts[1])


def _advance_dense(facts: Facts, run: Run) -> None:
    try:
        with transformers_says():
            run.steps.advance()
    except TransformersError as error:
        raise UpcycleError(f"transformers cannot run {facts.dense.path}: {error}") from error


def _measure(
    dense: Run, moe: Run, chosen: LayerRouting, layer: int, sample: torch.Tensor
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
        whole_share=float(chosen.whole.double().mean()),
        router_entropy=chosen.entropy,
        router_margin=chosen.margin,
        load_cv=chosen.load_cv,
        idle_experts=int((chosen.load == 0).sum()),
        load=chosen.load.tolist(),
    )


def ending_of(run: Run) -> Ending:
    """Return what the layers of a model that ran to its end made of all texts."""
    output = run.output
    output.last_hidden_state = output.last_hidden_state.flatten(0, -2)[None]
    return Ending(run.model, output)


@contextmanager
def _watched_experts(facts: Facts, model: Model) -> Iterator[list[torch.Tensor]]:
    """Note, per layer in float16, the largest output that an expert has before its gate.

    Experts are shards of the dense MLP, so the dense run shows what each of them, chosen or not,
    makes of every token. It is run in float32, where nothing overflows.
    """
    held = {name for name, entry in facts.moe.tensors.items() if entry.dtype == "F16"}
    matrices, experts = facts.kind.matrices, range(facts.num_experts)
    float16 = [
        layer
        for layer in facts.layers
        if any(facts.locate(m, layer, e).tensor in held for m in matrices for e in experts)
    ]
    largest: list[torch.Tensor] = []
    factors = recover_factors(facts) if float16 else {}
    scale = factors.get("up", math.nan) ** facts.kind.degree * factors.get("down", math.nan)
    if math.isnan(scale):
        yield largest
        return

    def note(
        orders: list[torch.Tensor], down: Model, inputs: tuple[torch.Tensor, ...], _output: object
    ) -> None:
        hidden_PI = inputs[0].flatten(0, -2)
        weight_HI = down.weight[:]
        for part in (shard for order in orders for shard in order.reshape(-1, facts.expert_size)):
            # As a linear layer's weight, whose columns count its input.
            output_PH = hidden_PI[:, part] @ weight_HI[:, part].T
            largest.append(output_PH.abs().max() * scale)

    down = find_weight(facts.dense_mlp, "down").name.removesuffix(".weight")
    with ExitStack() as stack:
        for layer in float16:
            module = decoder_layers(model)[layer].get_submodule(down)
            hook = partial(note, _orders(facts, layer, factors))
            stack.callback(module.register_forward_hook(hook).remove)
        yield largest


def _orders(facts: Facts, layer: int, factors: Mapping[str, float]) -> list[torch.Tensor]:
    """Return each order in which a layer's groups have the dense MLP's neurons."""
    by_part = {part: factor_of(facts, factors, part) for part in facts.parts}
    with facts.dense.reader() as dense, facts.moe.reader() as moe:
        orders = Neurons(facts, dense, moe, by_part).orders(layer, lambda _: True)
    found = [torch.from_numpy(order) for order in orders.values()]
    if len(found) < facts.expansion:
        found.append(torch.arange(facts.shared_width, facts.dense_size))
    return found
