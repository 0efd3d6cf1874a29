"""What routers and neuron orders are made from beside the recipe: a text, prompts, or rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.plan.calibration import Calibration
from upcycle_cli.plan.expressions import Permutation
from upcycle_cli.plan.tensor_files import RouterFile, RouterRows, order_name, read_router_file
from upcycle_cli.plan.texts import BUILTIN, CalibrationText, Prompts, calibration_text, read_prompts
from upcycle_cli.recipe.recipe import NeuronOrder, Recipe, RouterInit


@dataclass(frozen=True, kw_only=True)
class RouterInputs:
    """The text, the prompts or the rows that routers are made from, as the user gave them."""

    text: CalibrationText | Prompts | None = None
    rows: RouterFile | None = None

    @classmethod
    def read(
        cls,
        *,
        calibration: Path | str | None,
        rows: Path | str | None,
        prompts: Path | str | None = None,
    ) -> Self:
        """Read a text (a file, or `builtin`), prompts and rows; UpcycleError if unreadable."""
        text: CalibrationText | Prompts | None = None
        if calibration is not None:
            text = calibration_text(calibration)
        if prompts is not None:
            if text is not None:
                raise UpcycleError(
                    "prompts and a text for a calibration are two texts.", "Leave one out."
                )
            text = read_prompts(Path(prompts))
        return cls(text=text, rows=None if rows is None else read_router_file(Path(rows)))

    def for_recipe(self, recipe: Recipe) -> RouterInputs:
        """Return the inputs of a resolved recipe, with the built-in text where it needs a text.

        Raises UpcycleError where the recipe needs an input that is missing, or the reverse.
        """
        if (self.rows is not None) != (recipe.router_init is RouterInit.FILE):
            raise UpcycleError(
                f"--router-init is {recipe.router_init}, and "
                f"{'no file' if self.rows is None else 'a file'} of router rows was given.",
                "Give the file itself: --router-init ROWS.safetensors.",
            )
        text = self.text
        if isinstance(text, Prompts) != (recipe.router_init is RouterInit.PROMPTS):
            raise UpcycleError(
                f"--router-init is {recipe.router_init}, and "
                f"{'prompts' if isinstance(text, Prompts) else 'no prompts'} were given.",
                "Give both, or neither: --router-init prompts and --positive-prompts FILE.",
            )
        if text is None and recipe.calibrates:
            text = calibration_text(BUILTIN)
        return RouterInputs(text=text, rows=self.rows)

    def permutations(
        self, recipe: Recipe, layers: Sequence[int], size: int, calibration: Calibration | None
    ) -> Mapping[int, Permutation]:
        """Return by layer the order of `size` neurons that a calibration finds.

        The indices are filled in once there is a `calibration`.
        """
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

    def router_rows(
        self, recipe: Recipe, layers: Sequence[int], hidden: int, calibration: Calibration | None
    ) -> RouterRows | None:
        """Return the router rows that are not drawn; UpcycleError where a file does not fit.

        Rows fitted to a text are filled in once there is a `calibration`.
        """
        if self.rows is not None:
            return self.rows.rows(layers, (recipe.router_rows, hidden))
        if recipe.router_init is RouterInit.NORMAL or self.text is None:
            return None
        found = {} if calibration is None else calibration.layers
        by_layer = {layer: found.rows for layer, found in found.items()}
        return RouterRows(origin=self.text.digest, by_layer=by_layer)
