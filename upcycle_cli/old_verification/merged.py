"""An MoE whose virtual groups are those of several dense models, and readers of these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader

if TYPE_CHECKING:
    import torch

    from upcycle_cli.old_verification.facts import Facts


@dataclass(frozen=True)
class Merged:
    """The other models, and the model of each group; the dense model is 0."""

    others: tuple[Checkpoint, ...]
    groups: tuple[int, ...]
    mean: bool
    """Whether what is no expert's is the mean of all models', not the dense one's."""


def by_model(facts: Facts) -> Iterator[Facts]:
    """Yield the facts of each model that gave experts, the groups of it alone in view."""
    merged = facts.merged
    if merged is None:
        yield facts
        return
    for number, model in enumerate((facts.dense, *merged.others)):
        groups = tuple(g for g, of in enumerate(merged.groups) if of == number)
        if groups:
            yield replace(facts, dense=model, merged=None, only=groups)


@dataclass(frozen=True)
class MeanReader:
    """Hands out the means of several models' tensors, in float32: summed in order, then divided."""

    readers: Sequence[Reader]

    def tensor(self, name: str) -> torch.Tensor:
        """Return the mean of the tensors of a name."""
        first, *others = self.readers
        total = first.tensor(name).float().clone()
        for each in others:
            total += each.tensor(name).float()
        return total.div_(len(self.readers))


@contextmanager
def rest_reader(facts: Facts) -> Iterator[Reader | MeanReader]:
    """Map what all but the experts must be: the dense model, or the mean of all."""
    merged = facts.merged
    with ExitStack() as stack:
        models = (facts.dense, *(merged.others if merged is not None and merged.mean else ()))
        readers = [stack.enter_context(model.reader()) for model in models]
        yield readers[0] if len(readers) == 1 else MeanReader(readers)
