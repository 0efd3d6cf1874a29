"""From the activations of one layer to its router rows, its neuron order and its statistics.

Legend: P positions, H hidden size, I dense intermediate size, E rows of a router.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from upcycle_cli.calibrate import router_rows
from upcycle_cli.calibrate.neuron_clusters import Floats, clustered_order
from upcycle_cli.calibrate.router_rows import Array
from upcycle_cli.checkpoint.arrays import as_float32, rounded, to_float32
from upcycle_cli.checkpoint.checkpoint import Reader
from upcycle_cli.plan.calibration import LayerFound, RouterStatistics
from upcycle_cli.plan.output import OutputTensor
from upcycle_cli.plan.tensor_files import order_name, router_stream
from upcycle_cli.recipe.recipe import NeuronOrder, Recipe, RouterInit
from upcycle_cli.write.evaluate import check_rows, evaluate
from upcycle_cli.write.random_draws import standard_normal


def calibrate_layer(
    recipe: Recipe,
    router: OutputTensor,
    reader: Reader,
    inputs_PH: Array,
    activity_PI: Floats,
    weights_EP: Array | None,
) -> LayerFound:
    """Return the router rows, the neuron order if the recipe wants one, and statistics.

    `weights_EP` has, for prompts, the weight of each position in the mean for each router row.
    """
    assert router.layer is not None
    rows = _rows(recipe, router, reader, inputs_PH, weights_EP)
    shape = recipe.router_rows, inputs_PH.shape[1]
    rows_EH = as_float32(rows, router.dtype, shape).astype(np.float64)
    logits_PE = inputs_PH @ rows_EH.T
    load_E = router_rows.loads(logits_PE, recipe.rows_chosen)
    mean_H, square_H = inputs_PH.mean(0), np.square(inputs_PH).mean(0)
    statistics = RouterStatistics(
        layer=router.layer,
        mean_share=float(np.square(mean_H).sum() / square_H.sum()),
        logit_std=float(logits_PE.std(0).mean()),
        logit_spread=float(logits_PE.mean(0).std()),
        load_cv=float(load_E.std() / load_E.mean()),
        idle=int((load_E == 0).sum()),
        gates=router_rows.chosen_gates(logits_PE, recipe.rows_chosen),
    )
    order = None
    if recipe.neuron_order is NeuronOrder.CLUSTERED:
        stream, draw = order_name(router.layer), partial(standard_normal, recipe.seed)
        order_I = clustered_order(inputs_PH, activity_PI, recipe.granularity, stream, draw)
        order = order_I.astype("<u4").tobytes()
    activity_I = activity_PI.mean(0)
    return LayerFound(statistics=statistics, activity=activity_I, rows=rows, order=order)


def _rows(
    recipe: Recipe,
    router: OutputTensor,
    reader: Reader,
    inputs_PH: Array,
    weights_EP: Array | None,
) -> bytes:
    """Return the router rows in the router's dtype; UpcycleError where they do not fit."""
    assert router.layer is not None
    stream, draw = router_stream(router.layer), partial(standard_normal, recipe.seed)
    match recipe.router_init:
        case RouterInit.BALANCED:
            rows_EH = router_rows.balanced(inputs_PH, recipe, stream, draw)
        case RouterInit.CENTROIDS:
            rows_EH = router_rows.centroids(inputs_PH, recipe, stream, draw)
        case RouterInit.PROMPTS:
            assert weights_EP is not None
            rows_EH = router_rows.prompted(inputs_PH, weights_EP, recipe, stream)
        case _:  # the rows are not fitted: the first of each group
            data = evaluate(router.expr, reader.mapped)
            size, copies = len(data) // recipe.num_experts, recipe.num_experts // recipe.router_rows
            starts = range(0, len(data), size * copies)
            return b"".join(data[start : start + size] for start in starts)
    with np.errstate(over="ignore"):
        rows = rounded(rows_EH, router.dtype)
    check_rows(to_float32(rows, router.dtype), router.dtype, recipe.router_logit_std or 1.0, stream)
    return rows.tobytes()
