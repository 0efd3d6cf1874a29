"""Run copies of an expert once if the router chooses several of them.

Legend: S tokens, N experts, T top-k, H hidden size.
"""

from __future__ import annotations

import numpy as np
import torch

from upcycle_cli.checkpoint.checkpoint import Reader, raw_bytes
from upcycle_cli.models.moe_experts import Experts
from upcycle_cli.run.models import Model

_SAMPLE = 32
"""How many elements of each part are compared first; most different experts differ there."""


class MergeCopies:
    """A hook on a layer's experts: copies of an expert run once, with the sum of their gates."""

    def __init__(self, experts: Experts, reader: Reader, layer: int) -> None:
        self._experts, self._reader, self._layer = experts, reader, layer
        self._first_N: torch.Tensor | None = None

    def __call__(
        self, _module: Model, inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        """Return the inputs with each chosen expert replaced by the first of its copies."""
        states_SH, experts_ST, gates_ST, *rest = inputs
        if self._first_N is None:
            self._first_N = torch.tensor(self._find())
        first_ST = self._first_N[experts_ST]
        if torch.equal(first_ST, experts_ST):
            return None
        gates_SN = gates_ST.new_zeros(len(gates_ST), len(self._first_N))
        gates_SN.scatter_add_(1, first_ST, gates_ST)
        chosen_SN = torch.zeros_like(gates_SN).scatter_(1, first_ST, 1.0)
        # A token with fewer different experts than another has gates of 0 in the rest of its row.
        most = int(chosen_SN.sum(-1).max())
        merged_ST = chosen_SN.topk(most).indices
        return (states_SH, merged_ST, gates_SN.gather(1, merged_ST), *rest)

    def _find(self) -> list[int]:
        """Return for each expert the first one that has the same bytes."""
        first: dict[bytes, int] = {}
        found = []
        for expert in range(self._experts.num_experts):
            parts = self._parts(expert)
            start = b"".join(bytes(raw_bytes(part.flatten()[:_SAMPLE])) for part in parts)
            other = first.setdefault(start, expert)
            same = zip(parts, self._parts(other), strict=True)
            found.append(other if all(self._same_bytes(*pair) for pair in same) else expert)
        return found

    def _parts(self, expert: int) -> list[torch.Tensor]:
        return [part for _, part in self._experts.parts(self._reader, self._layer, expert)]

    def _same_bytes(self, left: torch.Tensor, right: torch.Tensor) -> bool:
        if left.data_ptr() == right.data_ptr():
            return True
        if left.is_contiguous() and right.is_contiguous():
            place = self._reader.on_disk(raw_bytes(left))
            if place and place == self._reader.on_disk(raw_bytes(right)):
                return True
        # As integers, since a nan is equal to nothing; numpy is several times as fast as torch.
        dtype = torch.int32 if left.element_size() == 4 else torch.int16
        return np.array_equal(left.view(dtype).numpy(), right.view(dtype).numpy())
