"""Where an MoE keeps its experts and routers, by its own config and names.

The rows of the model types say what the tensors are called. Nothing here knows how a conversion
makes a mixture of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader
from upcycle_cli.checkpoint.storage import CONFIG_NAME
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models.families import target_of
from upcycle_cli.models.mlp import find_weight, locate, parts_of, present_weights
from upcycle_cli.models.moe import Layout, Target
from upcycle_cli.models.wrappers import text_config_of
from upcycle_cli.run.models import TransformersError

if TYPE_CHECKING:
    import torch


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
