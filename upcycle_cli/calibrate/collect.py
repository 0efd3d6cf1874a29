"""Run the dense model on a text, layer by layer, and collect inputs and activations of its MLPs.

The activations of a layer are evaluated before the next layer runs, and then dropped.
transformers' own code runs the model in float32, with the weights left on disk.

Legend: B texts, S positions, P positions that are not padding, H hidden size, I dense intermediate
size, E rows of a router.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from upcycle_cli.calibrate import fitting
from upcycle_cli.calibrate.fitting import Array, Floats
from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader
from upcycle_cli.checkpoint.header import as_float32, rounded, to_float32
from upcycle_cli.core.callbacks import Progress
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.safe_files import read_small, write_whole
from upcycle_cli.models.mlp import find_weight
from upcycle_cli.models.wrappers import replace_parts
from upcycle_cli.plan.calibration import Calibration, LayerFound, RouterStatistics
from upcycle_cli.plan.inputs import order_name, router_stream
from upcycle_cli.plan.output import OutputTensor, Role
from upcycle_cli.plan.plan import Plan
from upcycle_cli.plan.texts import CalibrationText, Prompts
from upcycle_cli.plan.upcycle import bind
from upcycle_cli.recipe.recipe import NeuronOrder, Recipe, RouterInit
from upcycle_cli.run.models import Model, load_config, source_errors
from upcycle_cli.run.texts import ROW_TOKENS, as_rows, longest_text, shares, tokenized
from upcycle_cli.write.distributed import Team
from upcycle_cli.write.evaluate import check_rows, evaluate
from upcycle_cli.write.random_draws import standard_normal
from upcycle_cli.write.staging import CALIBRATION, Staging

if TYPE_CHECKING:
    import torch

TOKENS = 2048
"""The largest number of tokens: SmolLM2-135M takes ten seconds for them on two cores."""
_FEWEST = 256
"""Fewer tokens say little about the mean of a layer's inputs."""
_MOST_CACHED_BYTES = 4_000_000_000


def with_calibration(plan: Plan, staging: Staging | None, team: Team, watch: Progress) -> Plan:
    """Return the plan with its calibration, on every rank; a resumed conversion keeps its own."""
    if plan.inputs.text is None:
        return plan

    def find() -> Calibration | None:
        if staging is None:
            return None
        path = staging.directory / CALIBRATION
        # If the file is damaged, calibrate again.
        with suppress(OSError, UpcycleError, ValueError, KeyError, TypeError):
            return Calibration.from_bytes(read_small(path, _MOST_CACHED_BYTES))
        found = calibrate(plan, watch)
        write_whole(path, found.to_bytes(), durable=staging.durable)
        return found

    found = team.gather(find)[0]
    assert found is not None
    return bind(plan, found)


def calibrate(plan: Plan, watch: Progress) -> Calibration:
    """Run the plan's dense model on the plan's text; its files must be local. UpcycleError."""
    source, text = plan.source, plan.inputs.text
    assert text is not None
    with source_errors(source.path):
        tokens = _prompts(plan, text) if isinstance(text, Prompts) else _text(source, text)
        watch.begins("calibrating")
        with plan.reader() as reader:
            layers = {layer.statistics.layer: layer for layer in _run(plan, reader, tokens, watch)}
    return Calibration(tokens=len(tokens.positions), layers=layers)


@dataclass(frozen=True, eq=False)
class _Tokens:
    """Rows of tokens (B, S), and the positions of the text in them (P,)."""

    ids: torch.Tensor
    positions: torch.Tensor
    weights: Array | None = None
    """For prompts: the weight of each position in the mean of each router row (E, P)."""


def _prompts(plan: Plan, prompts: Prompts) -> _Tokens:
    """Return a row for each prompt, padded at its end; UpcycleError for a prompt without tokens."""
    import torch

    assert plan.merge is not None
    of_groups = prompts.of_groups([plan.sources[number] for number in plan.merge.cycle])
    config = load_config(plan.source.path).get_text_config()
    longest = min(ROW_TOKENS, longest_text(config))
    texts: list[list[int]] = []
    weights: list[tuple[int, float]] = []
    for group, of in enumerate(of_groups):
        for several, sign in ((of.positive, 1.0), (of.negative, -1.0)):
            tokens, _, reason = tokenized(plan.source, several, config.vocab_size)
            if len(tokens) < len(several):
                raise UpcycleError(f"a prompt of {of.model} cannot be tokenized: {reason}.")
            texts += [each[:longest] for each in tokens]
            weights += [(group, sign / len(several)) for _ in several]
    length = max(map(len, texts))
    ids_BS = torch.tensor([each + each[:1] * (length - len(each)) for each in texts])
    # A token that begins all prompts says nothing, and would weigh more in a short prompt.
    skipped = len({each[0] for each in texts}) == 1 and min(map(len, texts)) > 1
    held = [(b, s) for b, each in enumerate(texts) for s in range(skipped, len(each))]
    weights_EP = np.zeros((len(of_groups), len(held)))
    for position, (b, _) in enumerate(held):
        group, weight = weights[b]
        weights_EP[group, position] = weight / (len(texts[b]) - skipped)
    positions_P = torch.tensor([b * length + s for b, s in held])
    return _Tokens(ids_BS, positions_P, weights_EP)


def _text(source: Checkpoint, text: CalibrationText) -> _Tokens:
    """Return the text in rows, padded at the end; raises UpcycleError."""
    import torch

    config = load_config(source.path).get_text_config()
    texts, _, reason = tokenized(source, text.texts, config.vocab_size)
    if not texts:
        raise UpcycleError(
            f"a calibration needs a tokenizer: {reason}.",
            "Put the model's tokenizer beside it, or use `router_init` normal and `neuron_order` "
            "sliced without `calibration`.",
        )
    tokens = [token for share in shares(texts, TOKENS) for token in share]
    if len(tokens) < _FEWEST:
        words = f"the calibration text {text.name} is too short: it has {len(tokens)} tokens."
        raise UpcycleError(words, f"Give at least {_FEWEST}; up to {TOKENS} are used.")
    return _Tokens(as_rows(tokens, config), torch.arange(len(tokens)))


def _run(plan: Plan, reader: Reader, tokens: _Tokens, watch: Progress) -> Iterator[LayerFound]:
    """Yield the calibration of each MoE layer; raises TransformersError."""
    from upcycle_cli.run.layerwise import started
    from upcycle_cli.run.lazy_models import lazy_model

    dense, layers = plan.family.dense, plan.family.layers
    routers = {tensor.layer: tensor for tensor in plan.tensors if tensor.role is Role.ROUTER}
    # Names without a model's number belong to the first model.
    model = lazy_model(plan.source, reader)
    parts = dense.mlp(plan.source.tensors, layers[0])
    down = replace_parts(find_weight(parts, "down").name, dense.family.renamed)
    down = down.removesuffix(".weight")
    activity: list[torch.Tensor] = []

    def note(_: Model, inputs: tuple[torch.Tensor, ...]) -> None:
        # Magnitudes of activations (P, I).
        activity.append(inputs[0].flatten(0, -2)[tokens.positions].abs())

    modules = [model.layer(layer).get_submodule(model.mlp) for layer in layers]
    with started(model.net, tokens.ids, modules) as run:
        for layer in range(dense.num_layers):
            if layer not in layers:
                run.steps.advance()
                continue
            handle = model.layer(layer).get_submodule(down).register_forward_pre_hook(note)
            run.steps.advance()
            handle.remove()
            inputs_PH = run.mlp_input.flatten(0, -2)[tokens.positions].double().numpy()
            rows = _rows(plan.recipe, routers[layer], reader, inputs_PH, tokens.weights)
            found = routers[layer], rows, inputs_PH, activity.pop().numpy()
            yield _calibrate_layer(plan.recipe, *found)
            reader.release()
            watch.checked(layer + 1, dense.num_layers, "layers")


def _calibrate_layer(
    recipe: Recipe, router: OutputTensor, rows: bytes, inputs_PH: Array, activity_PI: Floats
) -> LayerFound:
    """Return the router rows, the neuron order if the recipe has one, and statistics."""
    assert router.layer is not None
    shape = recipe.router_rows, inputs_PH.shape[1]
    rows_EH = as_float32(rows, router.dtype, shape).astype(np.float64)
    logits_PE = inputs_PH @ rows_EH.T
    load_E = fitting.loads(logits_PE, recipe.rows_chosen)
    mean_H, square_H = inputs_PH.mean(0), np.square(inputs_PH).mean(0)
    statistics = RouterStatistics(
        layer=router.layer,
        mean_share=float(np.square(mean_H).sum() / square_H.sum()),
        logit_std=float(logits_PE.std(0).mean()),
        logit_spread=float(logits_PE.mean(0).std()),
        load_cv=float(load_E.std() / load_E.mean()),
        idle=int((load_E == 0).sum()),
        gates=fitting.chosen_gates(logits_PE, recipe.rows_chosen),
    )
    order = None
    if recipe.neuron_order is NeuronOrder.CLUSTERED:
        stream, draw = order_name(router.layer), partial(standard_normal, recipe.seed)
        order_I = fitting.clustered_order(inputs_PH, activity_PI, recipe.granularity, stream, draw)
        order = order_I.astype("<u4").tobytes()
    activity_I = activity_PI.mean(0)
    return LayerFound(statistics=statistics, activity=activity_I, rows=rows, order=order)


def _rows(
    recipe: Recipe, router: OutputTensor, reader: Reader, inputs_PH: Array, weights_EP: Array | None
) -> bytes:
    """Return the router rows in the router's dtype; UpcycleError if they do not fit."""
    assert router.layer is not None
    stream, draw = router_stream(router.layer), partial(standard_normal, recipe.seed)
    match recipe.router_init:
        case RouterInit.BALANCED:
            rows_EH = fitting.balanced(inputs_PH, recipe, stream, draw)
        case RouterInit.CENTROIDS:
            rows_EH = fitting.centroids(inputs_PH, recipe, stream, draw)
        case RouterInit.PROMPTS:
            assert weights_EP is not None
            rows_EH = fitting.prompted(inputs_PH, weights_EP, recipe, stream)
        case _:  # the rows are not fitted: the first of each group
            data = np.frombuffer(evaluate(router.expr, reader.mapped), np.uint8)
            copies = recipe.num_experts // recipe.router_rows
            return data.reshape(recipe.router_rows, copies, -1)[:, 0].tobytes()
    with np.errstate(over="ignore"):
        rows = rounded(rows_EH, router.dtype)
    check_rows(to_float32(rows, router.dtype), router.dtype, recipe.router_logit_std or 1.0, stream)
    return rows.tobytes()
