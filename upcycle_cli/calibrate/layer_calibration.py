"""From the activations of one layer to its router rows, its neuron order and its statistics.

Legend: P positions, H hidden size, I dense intermediate size, E rows of a router.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from upcycle_cli.calibrate.neuron_clusters import Floats, clustered_order
from upcycle_cli.calibrate.router_rows import (
    Array,
    Fit,
    RowSpec,
    balanced,
    centroids,
    chosen_gates,
    loads,
    prompted,
)
from upcycle_cli.checkpoint.arrays import as_float32, rounded, to_float32
from upcycle_cli.checkpoint.checkpoint import Reader
from upcycle_cli.plan.calibration import LayerFound, RouterStatistics
from upcycle_cli.plan.merge import MergedReader
from upcycle_cli.plan.output import OutputTensor
from upcycle_cli.plan.plan import Plan
from upcycle_cli.plan.tensor_files import order_name, router_stream
from upcycle_cli.recipe.recipe import NeuronOrder, RouterInit
from upcycle_cli.write.evaluate import check_rows, evaluate
from upcycle_cli.write.random_draws import standard_normal


@dataclass(frozen=True)
class LayerCalibration:
    """Fits what the recipe asks for to the activations of one layer."""

    plan: Plan
    reader: Reader | MergedReader
    router: OutputTensor
    layer: int
    weights: Array | None = None
    """Of prompts: the weight of each position in the mean for each router row (E, P)."""

    def evaluate(self, inputs_PH: Array, activity_PI: Floats) -> LayerFound:
        """Return the router rows, the neuron order if the recipe wants one, and statistics."""
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
        order = None
        if recipe.neuron_order is NeuronOrder.CLUSTERED:
            stream, draw = order_name(self.layer), partial(standard_normal, recipe.seed)
            order_I = clustered_order(inputs_PH, activity_PI, recipe.granularity, stream, draw)
            order = order_I.astype("<u4").tobytes()
        return LayerFound(
            statistics=statistics,
            activity=activity_PI.mean(0),
            rows=rows,
            order=order,
        )

    def _rows(self, inputs_PH: Array) -> bytes:
        """Return the router rows in the router's dtype; UpcycleError where they do not fit."""
        recipe, dtype = self.plan.recipe, self.router.dtype
        fits: dict[RouterInit, Fit] = {
            RouterInit.BALANCED: balanced,
            RouterInit.CENTROIDS: centroids,
            RouterInit.PROMPTS: partial(prompted, self.weights),
        }
        fit = fits.get(recipe.router_init)
        if fit is None:
            return self._drawn_rows()
        std = recipe.router_logit_std or 1.0
        wanted = RowSpec(
            rows=recipe.router_rows,
            chosen=recipe.rows_chosen,
            logit_std=std,
            stream=router_stream(self.layer),
        )
        with np.errstate(over="ignore"):
            rows = rounded(fit(inputs_PH, wanted, partial(standard_normal, recipe.seed)), dtype)
        check_rows(to_float32(rows, dtype), dtype, std, wanted.stream)
        return rows.tobytes()

    def _drawn_rows(self) -> bytes:
        """Return the different rows of a router that is not fitted: the first of each group."""
        recipe, data = self.plan.recipe, evaluate(self.router.expr, self.reader.mapped)
        size, copies = len(data) // recipe.num_experts, recipe.num_experts // recipe.router_rows
        starts = range(0, len(data), size * copies)
        return b"".join(data[start : start + size] for start in starts)
