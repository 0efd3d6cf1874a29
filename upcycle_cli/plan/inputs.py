"""The inputs of a recipe beside the source: a text, prompts, router rows, neuron orders."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.plan.tensor_files import NEURON_ORDERS, ROUTER_ROWS, TensorFile, read_tensor_file
from upcycle_cli.plan.texts import BUILTIN, CalibrationText, Prompts, calibration_text, read_prompts
from upcycle_cli.recipe.recipe import NeuronOrder, Recipe, RouterInit


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The text or prompts, the router rows and the neuron orders that the user gave."""

    text: CalibrationText | Prompts | None = None
    rows: TensorFile | None = None
    orders: TensorFile | None = None
    complete: bool = True
    """False if some may be missing: verify then reads their values from the output."""

    @property
    def text_digest(self) -> str:
        """The digest of the text or the prompts; "" without any."""
        return "" if self.text is None else self.text.digest

    @classmethod
    def read(
        cls,
        *,
        calibration: Path | str | None = None,
        rows: Path | str | None = None,
        orders: Path | str | None = None,
        prompts: Path | str | None = None,
    ) -> Self:
        """Read a text (a file, or `builtin`) and files; UpcycleError if one is unreadable."""
        if calibration is not None and prompts is not None:
            words = "`positive_prompts` and `calibration` exclude each other."
            raise UpcycleError(words, "Leave one out.")
        text = None if prompts is None else read_prompts(Path(prompts))
        return cls(
            text=text if calibration is None else calibration_text(calibration),
            rows=None if rows is None else read_tensor_file(Path(rows), ROUTER_ROWS),
            orders=None if orders is None else read_tensor_file(Path(orders), NEURON_ORDERS),
        )

    def for_recipe(
        self, recipe: Recipe, layers: Collection[int], *, width: int, hidden: int
    ) -> Inputs:
        """Return the inputs of a resolved recipe, with the built-in text if it needs one.

        Raises UpcycleError for a missing or superfluous input, and for a file that does not fit the
        layers, I = `width` and H = `hidden`.
        """
        prompts = self.text if isinstance(self.text, Prompts) else None
        init, order = recipe.router_init, recipe.neuron_order
        by_init, by_order = f"`router_init` is {init}", f"`neuron_order` is {order}"
        needed = (
            (self.rows, init is RouterInit.FILE, by_init, "a file of router rows"),
            (prompts, init is RouterInit.PROMPTS, by_init, "`positive_prompts`"),
            (self.orders, order is NeuronOrder.FILE, by_order, "a file of neuron orders"),
        )
        for found, is_needed, chosen, name in needed:
            if (found is not None) != is_needed and (self.complete or not is_needed):
                given = f"{'without' if found is None else 'with'} {name}"
                raise UpcycleError(f"{chosen}, {given}.", "Give both, or neither.")
        if self.rows is not None:
            self.rows.check(layers, (recipe.router_rows, hidden))
        if self.orders is not None:
            self.orders.check(layers, (width,), (recipe.expansion, width))
            self.orders.check_shared(width // recipe.granularity * recipe.shared_experts)
        if self.text is None and self.complete and recipe.calibrates:
            return replace(self, text=calibration_text(BUILTIN))
        return self
