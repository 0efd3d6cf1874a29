"""Experts that hold neurons in another order, compared bit for bit a few rows at a time.

What they must hold is gathered from the dense MLP in that order and scaled, in pieces that stay in
a processor's cache; so a group costs no memory, however large it is.

Legend: G shards, I dense intermediate size, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from upcycle_cli.old_verification.bits import bits, same

if TYPE_CHECKING:
    from upcycle_cli.inspection.neuron_matching import Indices

_PIECE_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Gathered:
    """A part of a virtual group's experts, and where each of their neurons comes from."""

    held: tuple[torch.Tensor, ...]
    """By shard, what the MoE holds; views of its files."""
    source: torch.Tensor
    """The part of the dense MLP in their dtype, not yet multiplied."""
    cut: int
    """The dimension that counts neurons."""
    order: Indices
    factor: float

    @property
    def nbytes(self) -> int:
        """The bytes that are compared."""
        return sum(each.nbytes for each in self.held)

    def pieces(self) -> Iterator[tuple[int | None, slice]]:
        """Yield what to ask `holds` for: a shard and rows of it, or None and rows of all shards."""
        if self.cut:
            # A row of the dense MLP is read once for all shards.
            yield from ((None, rows) for rows in _rows(self.source))
        else:
            for shard, held in enumerate(self.held):
                yield from ((shard, rows) for rows in _rows(held))

    def holds(self, shard: int | None, rows: slice) -> bool:
        """Whether these rows are what they must be; one nan is as good as another."""
        size = self.held[0].shape[self.cut]
        if shard is not None:
            own = self.order[shard * size : (shard + 1) * size]
            wanted = self._made(self.source, own[rows], axis=0)
            return _equal(self.held[shard][rows], wanted)
        wanted = self._made(self.source[rows], self.order, axis=1)
        return all(
            _equal(held[rows], wanted[:, shard * size : (shard + 1) * size])
            for shard, held in enumerate(self.held)
        )

    def all_hold(self) -> bool:
        """Whether every row is what it must be."""
        return all(self.holds(shard, rows) for shard, rows in self.pieces())

    def wanted(self, shard: int) -> torch.Tensor:
        """Return what an expert must hold; for words about one that does not."""
        size = self.held[0].shape[self.cut]
        own = self.order[shard * size : (shard + 1) * size]
        return self._made(self.source, own, axis=self.cut)

    def _made(self, source: torch.Tensor, neurons: Indices, *, axis: int) -> torch.Tensor:
        # numpy gathers 16-bit columns several times as fast as torch.
        taken = torch.from_numpy(bits(source).numpy().take(neurons, axis)).view(source.dtype)
        return taken if self.factor == 1.0 else taken.mul_(self.factor)


def _rows(matrix: torch.Tensor) -> Iterator[slice]:
    step = max(1, _PIECE_ELEMENTS * len(matrix) // max(1, matrix.numel()))
    for start in range(0, len(matrix), step):
        yield slice(start, start + step)


def _equal(held: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.equal(bits(held), bits(wanted)) or same(held, wanted)
