"""Where an MoE keeps its experts and routers, by its own config and names.

The rows of the model types say what the tensors are called. Nothing here knows how a conversion
makes a mixture of experts.

Legend: S tokens, N experts, T top-k, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader, raw_bytes
from upcycle_cli.checkpoint.storage import CONFIG_NAME
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models.lookup import target_of
from upcycle_cli.models.mlp import find_weight, locate, parts_of, present_weights
from upcycle_cli.models.moe import Layout, Target
from upcycle_cli.models.wrappers import text_config_of
from upcycle_cli.run.models import Model, TransformersError

_SAMPLE = 32
"""Elements of each part that tell most different experts apart."""


@dataclass(frozen=True, eq=False)
class MoeTensors:
    """The tensors of an MoE's experts and routers, by its config and their names."""

    checkpoint: Checkpoint
    target: Target
    layout: Layout
    num_experts: int
    top_k: int
    expert_size: int
    layers: tuple[int, ...]
    num_layers: int

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of an expert, biases among them where the experts have some."""
        prefix = self.target.prefix(self.layers[0])
        return parts_of(present_weights(self.layout.experts, self.checkpoint.tensors, prefix))

    def router_name(self, layer: int) -> str:
        """Return the name of a layer's router on disk."""
        return self.target.prefix(layer) + self.layout.router

    def part(self, reader: Reader, layer: int, expert: int, part: str) -> torch.Tensor:
        """Return one part of one expert, as it lies in memory; TransformersError without it."""
        found = locate(self.layout.experts, part, width=self.expert_size, expert=expert)
        name = self.target.prefix(layer) + found.tensor
        entry = self.checkpoint.tensors.get(name)
        if entry is None:
            raise TransformersError(f"{name} is missing")
        width = self.expert_size * len(find_weight(self.layout.experts, part).parts)
        if found.dimension is not None and entry.shape[found.dimension :][:1] != (width,):
            raise TransformersError(
                f"{name} has shape {[*entry.shape]}, and experts are {width} wide"
            )
        split_dim = find_weight(self.target.in_memory.experts, part).split_dim
        return found.select(reader.tensor(name), split_dim)


def moe_tensors(moe: Checkpoint) -> MoeTensors:
    """Return where an MoE keeps its experts; UpcycleError when its config makes no sense."""
    config, target = text_config_of(moe.config), target_of(moe.config, moe.tensors)
    where, entries = moe.path / CONFIG_NAME, moe.tensors.values()
    try:
        num_experts, top_k, expert_size = target.sizes(config)
        num_layers = target.num_layers(config)
        largest = max((entry.shape[0] for entry in entries if entry.shape), default=0)
        # A model of more layers or experts than tensors would take forever to make.
        for key, count, most in (
            (target.keys.num_experts, num_experts, max(len(entries), largest)),
            ("num_hidden_layers", num_layers, len(entries)),
        ):
            if count > most:
                raise UpcycleError(f"{where}: {key} {count} is more than there are tensors of.")
        layers = target.moe_layers(config, num_layers)
    except ValueError as error:
        raise UpcycleError(f"{where}: {error}.") from error
    layout = target.layouts[target.stored_layout(moe.tensors, config)]
    return MoeTensors(
        moe, target, layout, num_experts, top_k, expert_size, tuple(layers), num_layers
    )


class MergeCopies:
    """A hook on a layer's experts: copies of one expert are run once, with the sum of their gates.

    That is faster, with larger matrix products. Which experts are copies is found by comparing
    their bytes, when the layer is first run.
    """

    def __init__(self, experts: MoeTensors, reader: Reader, layer: int) -> None:
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
        known: dict[bytes, list[int]] = {}
        found = []
        for expert in range(self._experts.num_experts):
            start = b"".join(bytes(raw_bytes(p.flatten()[:_SAMPLE])) for p in self._parts(expert))
            alike = known.setdefault(start, [])
            same = next((other for other in alike if self._same(expert, other)), expert)
            if same == expert:
                alike.append(expert)
            found.append(same)
        return found

    def _parts(self, expert: int) -> list[torch.Tensor]:
        experts = self._experts
        return [experts.part(self._reader, self._layer, expert, part) for part in experts.parts]

    def _same(self, one: int, other: int) -> bool:
        pairs = zip(self._parts(one), self._parts(other), strict=True)
        return all(_same_bytes(left, right) for left, right in pairs)


def _same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    # As integers, since a nan is equal to nothing; numpy is several times as fast as torch.
    dtype = torch.int32 if left.element_size() == 4 else torch.int16
    return np.array_equal(left.view(dtype).numpy(), right.view(dtype).numpy())
