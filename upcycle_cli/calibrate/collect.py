"""The run of a calibration: the dense model on a text, a layer at a time, its weights left on disk.

What a layer's MLP is given is looked at while the model waits behind that layer, and is let go of
before the next one. The model is run by transformers' own code, in float32.

Legend: B texts, S positions, P positions that are not padding, H hidden size, I dense intermediate
size, E rows of a router.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader
from upcycle_cli.core.callbacks import Watch
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models.mlp import find_weight
from upcycle_cli.plan.calibration import Calibration, LayerFound, RouterStatistics
from upcycle_cli.plan.merge import MergedReader
from upcycle_cli.plan.output import OutputTensor, Role
from upcycle_cli.plan.permutation_file import order_name
from upcycle_cli.plan.plan import Plan
from upcycle_cli.plan.prompts import Prompts
from upcycle_cli.plan.router_file import router_stream
from upcycle_cli.plan.texts import CalibrationText
from upcycle_cli.recipe.recipe import NeuronOrder, RouterInit
from upcycle_cli.run.models import (
    Model,
    TransformersError,
    decoder_layers,
    load_config,
    transformers_says,
)
from upcycle_cli.run.texts import ROW_TOKENS, as_rows, shares, tokenized

if TYPE_CHECKING:
    import torch

    from upcycle_cli.calibrate.neuron_clusters import Floats
    from upcycle_cli.calibrate.router_rows import Array, Fit

TOKENS = 2048
"""Of text, at most: SmolLM2-135M takes about ten seconds for them on two cores."""
_FEWEST = 256
"""Fewer say little of what a layer's inputs have in common."""


def calibrate(plan: Plan, watch: Watch) -> Calibration:
    """Run the plan's dense model on the plan's text; its files must be here.

    Raises UpcycleError for a text that is too short, a model without a tokenizer, and a model
    that transformers cannot run.
    """
    source, text = plan.source, plan.inputs.text
    assert text is not None
    try:
        rows = _prompts_of(plan, text) if isinstance(text, Prompts) else _rows_of(source, text)
        watch.begins("calibrating")
        with plan.reader() as reader:
            layers = {layer.statistics.layer: layer for layer in _run(plan, reader, rows, watch)}
    except TransformersError as error:
        raise UpcycleError(f"transformers cannot run {source.path}: {error}") from error
    watch.calibrated()
    return Calibration(tokens=len(rows.positions), layers=layers)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of tokens, (B, S), and where in them text is, (P,)."""

    ids: torch.Tensor
    positions: torch.Tensor
    weights: Array | None = None
    """Of prompts: what share each position has in what a row of a router is made of, (E, P)."""


def _prompts_of(plan: Plan, prompts: Prompts) -> _Rows:
    """Return a row for each prompt, padded behind it; UpcycleError for one of no tokens."""
    import numpy as np
    import torch

    assert plan.merge is not None
    of_groups = prompts.of_groups([plan.sources[number] for number in plan.merge.cycle])
    config = load_config(plan.source.path).get_text_config()
    longest = min(ROW_TOKENS, getattr(config, "max_position_embeddings", None) or ROW_TOKENS)
    texts: list[list[int]] = []
    shares: list[tuple[int, float]] = []
    for group, of in enumerate(of_groups):
        for several, sign in ((of.positive, 1.0), (of.negative, -1.0)):
            tokens, _, reason = tokenized(plan.source, several, config.vocab_size)
            if len(tokens) < len(several):
                raise UpcycleError(f"a prompt of {of.model} cannot be made tokens: {reason}.")
            texts += [each[:longest] for each in tokens]
            shares += [(group, sign / len(several)) for _ in several]
    length = max(map(len, texts))
    ids_BS = torch.tensor([each + each[:1] * (length - len(each)) for each in texts])
    # A token that begins all of them tells nothing, and weighs more where a prompt is short.
    skipped = len({each[0] for each in texts}) == 1 and min(map(len, texts)) > 1
    held = [(b, s) for b, each in enumerate(texts) for s in range(skipped, len(each))]
    weights_EP = np.zeros((len(of_groups), len(held)))
    for position, (b, _) in enumerate(held):
        group, share = shares[b]
        weights_EP[group, position] = share / (len(texts[b]) - skipped)
    positions_P = torch.tensor([b * length + s for b, s in held])
    return _Rows(ids_BS, positions_P, weights_EP)


def _rows_of(source: Checkpoint, text: CalibrationText) -> _Rows:
    """Return rows of tokens, in which what is no text comes last; raises UpcycleError."""
    import torch

    config = load_config(source.path).get_text_config()
    texts, _, reason = tokenized(source, text.texts, config.vocab_size)
    if not texts:
        raise UpcycleError(
            f"a calibration needs text as tokens: {reason}.",
            "Put the model's tokenizer beside it, or use --router-init normal and --neuron-order "
            "sliced without --calibration.",
        )
    tokens = [token for share in shares(texts, TOKENS) for token in share]
    if len(tokens) < _FEWEST:
        raise UpcycleError(
            f"the calibration text {text.name} is too short: it has {len(tokens)} tokens.",
            f"Give at least {_FEWEST}; up to {TOKENS} are used.",
        )
    return _Rows(as_rows(tokens, config), torch.arange(len(tokens)))


def _run(
    plan: Plan, reader: Reader | MergedReader, rows: _Rows, watch: Watch
) -> Iterator[LayerFound]:
    """Yield what is found in each layer that becomes a mixture of experts; TransformersError."""
    import torch

    from upcycle_cli.run.layerwise import started
    from upcycle_cli.run.lazy_weights import Stored, finder, stored_model

    source, dense = plan.source, plan.family.dense
    routers = {tensor.layer: tensor for tensor in plan.tensors if tensor.role is Role.ROUTER}

    held, find = source.tensors, finder(source, dense.family.inside, "model.")

    def tensor(name: str) -> Stored | None:
        found = find(name)
        return None if found is None else Stored((reader.tensor(found),), torch.Tensor.float)

    model = stored_model(source.path, lambda name, _: tensor(name), {})
    layers = decoder_layers(model)
    parts = dense.mlp(held, plan.family.layers[0])
    mlp, down = parts[0].name.split(".")[0], find_weight(parts, "down").name.removesuffix(".weight")
    with ExitStack() as stack, transformers_says():
        modules = [layers[layer].get_submodule(mlp) for layer in plan.family.layers]
        run = stack.enter_context(started(model, rows.ids, modules))
        for layer in range(dense.num_layers):
            if layer not in plan.family.layers:
                run.steps.advance()
                continue
            with _activity(layers[layer].get_submodule(down), rows.positions) as magnitudes:
                run.steps.advance()
            inputs_PH = run.mlp_input.flatten(0, -2)[rows.positions]
            fitted = _Fitting(plan, reader, routers[layer], layer, rows.weights)
            yield fitted.found(inputs_PH.double().numpy(), magnitudes.pop())
            reader.release()
            watch.checked(layer + 1, dense.num_layers, "layers")


@contextmanager
def _activity(down: Model, positions_P: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Note the magnitude of what each neuron gives to a down matrix at each position, (P, I)."""
    found: list[torch.Tensor] = []

    def note(_module: Model, inputs: tuple[torch.Tensor, ...]) -> None:
        found.append(inputs[0].flatten(0, -2)[positions_P].abs())

    handle = down.register_forward_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()


@dataclass(frozen=True)
class _Fitting:
    """Makes the rows of one layer's router, and measures what they make of its inputs."""

    plan: Plan
    reader: Reader | MergedReader
    router: OutputTensor
    layer: int
    weights: Array | None = None

    def found(self, inputs_PH: Array, activity_PI: torch.Tensor) -> LayerFound:
        """Return all that is to be known of the layer."""
        import numpy as np

        from upcycle_cli.calibrate.router_rows import chosen_gates, loads
        from upcycle_cli.checkpoint.arrays import as_float32

        recipe = self.plan.recipe
        rows = self._rows(inputs_PH)
        shape = recipe.router_rows, inputs_PH.shape[1]
        rows_EH = as_float32(rows, self.router.dtype, shape).astype(np.float64)
        logits_PE = inputs_PH @ rows_EH.T
        load_E = loads(logits_PE, recipe.rows_chosen)
        mean_H, square_H = inputs_PH.mean(0), np.square(inputs_PH).mean(0)
        statistics = RouterStatistics(
            layer=self.layer,
            mean_share=float(np.square(mean_H).sum() / square_H.sum()),
            logit_std=float(logits_PE.std(0).mean()),
            logit_spread=float(logits_PE.mean(0).std()),
            load_cv=float(load_E.std() / load_E.mean()),
            idle=int((load_E == 0).sum()),
            gates=chosen_gates(logits_PE, recipe.rows_chosen),
        )
        return LayerFound(
            statistics=statistics,
            input_mean=mean_H.astype(np.float32),
            input_square=square_H.astype(np.float32),
            activity=activity_PI.mean(0).numpy(),
            rows=rows,
            order=self._order(inputs_PH, activity_PI.numpy()),
        )

    def _order(self, inputs_PH: Array, activity_PI: Floats) -> bytes | None:
        """Return the order of the neurons, where the recipe wants one to be found."""
        from upcycle_cli.calibrate.neuron_clusters import clustered_order
        from upcycle_cli.write.rng import standard_normal

        recipe = self.plan.recipe
        if recipe.neuron_order is not NeuronOrder.CLUSTERED:
            return None
        draw = partial(standard_normal, recipe.seed)
        stream = order_name(self.layer)
        order = clustered_order(inputs_PH, activity_PI, recipe.granularity, stream, draw)
        return order.astype("<u4").tobytes()

    def _rows(self, inputs_PH: Array) -> bytes:
        """Return the rows as they are to be stored; UpcycleError where they cannot be."""
        import numpy as np

        from upcycle_cli.calibrate.router_rows import Wanted, balanced, centroids, prompted
        from upcycle_cli.checkpoint.arrays import to_float32
        from upcycle_cli.write.evaluate import check_rows, evaluate, rounded
        from upcycle_cli.write.rng import standard_normal

        recipe, dtype = self.plan.recipe, self.router.dtype
        fits: dict[RouterInit, Fit] = {
            RouterInit.BALANCED: balanced,
            RouterInit.CENTROIDS: centroids,
            RouterInit.PROMPTS: partial(prompted, self.weights),
        }
        fit = fits.get(recipe.router_init)
        if fit is None:
            data = evaluate(self.router.expr, self.reader.mapped)
            step = len(data) // self.plan.recipe.num_experts
            each = recipe.num_experts // recipe.router_rows
            return b"".join(
                data[row * step * each : (row * each + 1) * step]
                for row in range(recipe.router_rows)
            )
        std = recipe.router_logit_std or 1.0
        wanted = Wanted(
            rows=recipe.router_rows,
            chosen=recipe.rows_chosen,
            logit_std=std,
            stream=router_stream(self.layer),
        )
        with np.errstate(over="ignore"):
            rows = rounded(fit(inputs_PH, wanted, partial(standard_normal, recipe.seed)), dtype)
        check_rows(to_float32(rows, dtype), dtype, std, wanted.stream)
        return rows.tobytes()
