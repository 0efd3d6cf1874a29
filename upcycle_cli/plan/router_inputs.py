"""What routers are made from beside the recipe: a text to calibrate on, or rows in a file.

And orders of neurons, of which a calibration tells as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.plan.expressions import Permutation
from upcycle_cli.plan.permutation_file import order_name
from upcycle_cli.plan.prompts import Prompts, read_prompts
from upcycle_cli.plan.router_file import RouterFile, read_router_file
from upcycle_cli.plan.tensors import GivenRows
from upcycle_cli.plan.texts import BUILTIN, CalibrationText, calibration_text
from upcycle_cli.recipe.recipe import NeuronOrder, Recipe, RouterInit

if TYPE_CHECKING:
    from upcycle_cli.plan.calibration import Calibration


@dataclass(frozen=True, kw_only=True)
class RouterInputs:
    """What is there to make routers from; `for_recipe` adds what a recipe cannot do without."""

    text: CalibrationText | Prompts | None = None
    rows: RouterFile | None = None

    @classmethod
    def read(
        cls, *, calibration: Path | str | None, rows: Path | None, prompts: Path | None = None
    ) -> Self:
        """Read a text (a file, or `builtin`), prompts and rows; UpcycleError when they are none.

        Nothing is imported that a conversion without them does not need.
        """
        text: CalibrationText | Prompts | None = None
        if calibration is not None:
            text = calibration_text(calibration)
        if prompts is not None:
            if text is not None:
                raise UpcycleError(
                    "prompts and a text for a calibration are two texts.", "Leave one out."
                )
            text = read_prompts(prompts)
        others = "normal, balanced, centroids, or "
        return cls(text=text, rows=None if rows is None else read_router_file(rows, others=others))

    def for_recipe(self, recipe: Recipe) -> RouterInputs:
        """Return what a resolved recipe needs of this; UpcycleError where they do not agree."""
        if (self.rows is not None) != (recipe.router_init is RouterInit.FILE):
            raise UpcycleError(
                "rows of a router come from a file, and there is none."
                if self.rows is None
                else f"a file of router rows was given, and --router-init is {recipe.router_init}.",
                "Give the file itself: --router-init ROWS.safetensors.",
            )
        text = self.text
        if isinstance(text, Prompts) != (recipe.router_init is RouterInit.PROMPTS):
            raise UpcycleError(
                f"prompts are given, and --router-init is {recipe.router_init}."
                if isinstance(text, Prompts)
                else "rows are to be made of prompts, and there are none.",
                "Give both, or neither: --router-init prompts and --positive-prompts FILE.",
            )
        if text is None and recipe.calibrates:
            text = calibration_text(BUILTIN)
        return RouterInputs(text=text, rows=self.rows)

    def orders_for(
        self, recipe: Recipe, layers: Sequence[int], size: int, calibration: Calibration | None
    ) -> Mapping[int, Permutation]:
        """Return by layer the order of `size` neurons that a calibration finds, as far as known."""
        if recipe.neuron_order is not NeuronOrder.CLUSTERED:
            return {}
        assert self.text is not None
        found = {} if calibration is None else calibration.layers
        return {
            layer: Permutation(
                size,
                order_name(layer),
                origin=self.text.digest,
                indices=found[layer].order if layer in found else None,
            )
            for layer in layers
        }

    def rows_for(
        self,
        recipe: Recipe,
        layers: Sequence[int],
        hidden_size: int,
        calibration: Calibration | None,
    ) -> GivenRows | None:
        """Return the rows that are not drawn, as far as they are known; UpcycleError for others.

        Those that are fitted are known once there is a `calibration`.
        """
        if self.rows is not None:
            return self.rows.given(layers, (recipe.router_rows, hidden_size))
        if recipe.router_init is RouterInit.NORMAL or self.text is None:
            return None
        found = {} if calibration is None else calibration.layers
        by_layer = {layer: found.rows for layer, found in found.items()}
        return GivenRows(origin=self.text.digest, by_layer=by_layer)
