"""The experts of an existing MoE: their sizes and their tensors.

Legend: N experts, H hidden size, I expert intermediate size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader, raw_bytes
from upcycle_cli.checkpoint.header import TORCH_DTYPES
from upcycle_cli.checkpoint.storage import RECORD_NAME, read_json
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models.lookup import target_of
from upcycle_cli.models.mlp import Weight, find_weight, locate, parts_of, present_weights
from upcycle_cli.models.moe import Target
from upcycle_cli.models.wrappers import text_config_of
from upcycle_cli.recipe.recipe import ExpertLayout, Routing

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Experts:
    """The experts of a checkpoint, and how to read them."""

    moe: Checkpoint
    target: Target
    num_experts: int
    top_k: int
    expert_size: int
    routing: Routing
    layers: tuple[int, ...]
    """The layers that are mixtures of experts."""
    num_layers: int

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.target.value(text_config_of(self.moe.config), "hidden_size"))

    @cached_property
    def layout(self) -> ExpertLayout:
        """How the experts are named on disk."""
        return self.target.stored_layout(self.moe.tensors, self.moe.config)

    @property
    def num_parameters(self) -> int:
        """The elements of all experts."""
        rows = self.target.layouts[self.layout].experts
        templates = (re.escape(self.target.layer + weight.name) for weight in rows)
        any_of = "|".join(re.sub(r"\\{\w+\\}", r"\\d+", template) for template in templates)
        entries = self.moe.tensors.values()
        return sum(entry.num_elements for entry in entries if re.fullmatch(any_of, entry.name))

    @property
    def part_names(self) -> tuple[str, ...]:
        """The parts of an expert, including biases if it has some."""
        return parts_of(self._weights(self.layers[0]))

    def group_size(self, reader: Reader, layer: int) -> int:
        """Return how many neighbouring experts have equal router rows; 1 if that varies."""
        rows = [bytes(raw_bytes(row)) for row in self.router(reader, layer)]
        runs = {len(list(run)) for _, run in groupby(rows)}
        return runs.pop() if len(runs) == 1 else 1

    def router_name(self, layer: int) -> str:
        """Return the name of a layer's router in the checkpoint."""
        return self.target.prefix(layer) + self.target.layouts[self.layout].router

    def router(self, reader: Reader, layer: int) -> torch.Tensor:
        """Return the router's rows, (N, H)."""
        shape = (self.num_experts, self.hidden_size)
        return self._read(reader, self.router_name(layer), shape)

    def parts(self, reader: Reader, layer: int, expert: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the parts of one expert: gate and up (I, H), down (H, I), and biases."""
        for part in self.part_names:
            yield part, self.part(reader, layer, expert, part)

    def part(self, reader: Reader, layer: int, expert: int, part: str) -> torch.Tensor:
        """Return one part of one expert."""
        weights = self._weights(layer)
        found = locate(weights, part, width=self.expert_size, expert=expert)
        shape = find_weight(weights, part).shape(self.expert_size, self.hidden_size)
        shape = shape if found.row is None else (self.num_experts, *shape)
        held = self._read(reader, self.target.prefix(layer) + found.tensor, shape)[found.index]
        return held.swapaxes(0, 1) if {self.cut(part), found.split_dim} == {0, 1} else held

    @property
    def shared_width(self) -> int:
        """The intermediate size of the shared expert in the config; 0 without one."""
        shared, config = self.target.shared, text_config_of(self.moe.config)
        if shared is None:
            return 0
        key = shared.size_key or shared.count_key
        found = self.target.value(config, key) if key else 1
        if type(found) is not int:
            return 0
        return found if shared.size_key else found * self.expert_size

    @cached_property
    def record(self) -> dict[str, Any] | None:
        """The content of upcycle.json, if there is one."""
        storage = self.moe.storage
        return read_json(storage.local(RECORD_NAME)) if storage.has(RECORD_NAME) else None

    @property
    def shares(self) -> bool:
        """Whether a shared expert contributes, by the recorded recipe or else by its existence."""
        recipe = (self.record or {}).get("recipe")
        if isinstance(recipe, dict):
            return bool(recipe.get("shared_experts"))
        return self.shared_width > 0

    def shared_part(self, reader: Reader, layer: int, part: str) -> torch.Tensor | None:
        """Return one part of the shared expert; None if it is missing."""
        weights = self.target.layouts[self.layout].shared
        if part not in parts_of(weights):
            return None
        found = locate(weights, part, width=self.shared_width)
        name = self.target.prefix(layer) + found.tensor
        return self._read(reader, name)[found.index] if name in self.moe.tensors else None

    def cut(self, part: str) -> int | None:
        """Return the dimension of a part's neurons in memory; None for a down bias."""
        return find_weight(self.target.in_memory.experts, part).split_dim

    def _read(
        self, reader: Reader, name: str, shape: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """Return a tensor; UpcycleError if it is missing or does not have the `shape`."""
        path = self.moe.path
        if name not in self.moe.tensors:
            raise UpcycleError(f"{path} lacks {name}, which its config.json implies.")
        dtype = self.moe.tensors[name].dtype
        if dtype not in TORCH_DTYPES:
            raise UpcycleError(f"{path}: {name} is stored as {dtype}, which cannot be read.")
        tensor = reader.tensor(name)
        if shape not in (None, tensor.shape):
            words = f"{[*tensor.shape]}, but config.json implies {[*(shape or ())]}"
            raise UpcycleError(f"{path}: {name} has shape {words}.")
        return tensor

    def _weights(self, layer: int) -> tuple[Weight, ...]:
        rows = self.target.layouts[self.layout].experts
        return present_weights(rows, self.moe.tensors, self.target.prefix(layer))


def find_experts(moe: Checkpoint) -> Experts:
    """Return the experts of an MoE; raises UpcycleError for an invalid config."""
    config, target = text_config_of(moe.config), target_of(moe.config, moe.tensors)
    keys = target.keys.num_experts, target.keys.top_k, target.keys.expert_size
    num_experts, top_k, expert_size = (target.count(config, key) for key in keys)
    num_layers, routing = target.num_layers(config), target.routing(config)
    entries = moe.tensors.values()
    rows = max((entry.shape[0] for entry in entries if entry.shape), default=0)
    # Building a model with more layers or experts than tensors would take forever.
    if num_layers > len(entries) or num_experts > max(len(entries), rows):
        words = f"{num_layers} layers of {num_experts} experts are more than all tensors"
        raise UpcycleError(f"config.json: {words}.")
    layers = target.moe_layers(config, num_layers)
    if not layers:
        raise UpcycleError("config.json: no layer is a mixture of experts.")
    if top_k > num_experts:
        words = f"{target.keys.top_k} is {top_k}, more than the {num_experts} experts"
        raise UpcycleError(f"config.json: {words}.")
    return Experts(moe, target, num_experts, top_k, expert_size, routing, layers, num_layers)
