"""Several dense models in one MoE: which source model each virtual group comes from.

Model 0, the source of the conversion, gives the config, the tokenizer and, unless the mean of all
models is taken, every weight that is no expert's. An expression names its tensors by their own
names, and those of the other models by `tensor_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from upcycle_cli.checkpoint.card_metadata import CardMetadata, read_card_metadata
from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.storage import CARD_NAME
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.recipe.recipe import Recipe


class NonExpertWeights(StrEnum):
    """Where attention, norms and embeddings come from: the source, or the mean of all models."""

    FIRST = "first"
    MEAN = "mean"


@dataclass(frozen=True, kw_only=True)
class Merge:
    """The models beside the source, and the model of each virtual group, repeated in a cycle.

    Model 0 is the source.
    """

    others: tuple[Checkpoint, ...]
    cycle: tuple[int, ...]
    rest: NonExpertWeights = NonExpertWeights.FIRST

    def of_groups(self, expansion: int) -> tuple[int, ...]:
        """Return the model of each virtual group; UpcycleError where the cycle does not fit."""
        count = len(self.cycle)
        if expansion % count:
            raise UpcycleError(
                f"expansion {expansion} is not a multiple of the {count} models that give experts, "
                "so some would give more than others.",
                f"Use an expansion of {count} or {2 * count}.",
            )
        return self.cycle * (expansion // count)

    def check(self, recipe: Recipe) -> None:
        """Raise UpcycleError for a recipe that several models cannot follow."""
        self.of_groups(recipe.expansion)
        if recipe.shared_experts or recipe.perturbed:
            raise UpcycleError(
                "several models have no neurons in common, and their experts differ already.",
                "Leave out --shared-experts, --noise and --reinit, or --experts-from.",
            )


def merged_card_metadata(sources: Sequence[Checkpoint]) -> CardMetadata:
    """Return the metadata for the new card; a licence only where all sources have the same one."""
    first, *others = (read_card_metadata(source.path, CARD_NAME) for source in sources)
    license_of = first.values.get("license")
    notes = tuple(
        f"{model.name} is under the licence {found or 'that its card does not name'}, and "
        f"{sources[0].name} under {license_of or 'one that its card does not name'}: the new card "
        "names none; see what each asks for."
        for model, other in zip(sources[1:], others, strict=True)
        if (found := other.values.get("license")) != license_of
    )
    if not notes:
        return first
    kept = {key: value for key, value in first.values.items() if not key.startswith("license")}
    return CardMetadata(kept, first.notes + notes)
