"""A mixture of experts with its weights left on disk, and where its routers are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch

from upcycle_cli.models.moe import Target
from upcycle_cli.run.layerwise import Span
from upcycle_cli.run.lazy_weights import Stack, Stored, stored_model
from upcycle_cli.run.models import Model, decoder_layers, transformers_says

Expert: TypeAlias = Callable[[int, Sequence[str], int], Stored]
"""Gives some parts of an expert, one below the other, by its layer, their names and its number."""


def stored_mixture(
    path: Path,
    target: Target,
    tensor: Callable[[str], Stored | None],
    experts: tuple[Sequence[int], Collection[str], Expert],
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Return an MoE to be run in a dtype; raises TransformersError.

    `tensor` gives one that is no expert's by the name that transformers saves it under. `experts`
    are the layers that have some, the parts of each, and what gives them.
    """
    layers, parts, expert = experts
    stacks = {
        (layer, weight.name): Stack(partial(expert, layer, weight.parts), dtype)
        for layer in layers
        for weight in target.in_memory.experts
        if {*weight.parts} <= {*parts}
    }
    return stored_model(path, lambda name, _: tensor(name), stacks, dtype)


def routers_of(model: Model, target: Target, layers: Sequence[int]) -> dict[int, Model]:
    """Return by layer the modules that return logits, gates and the experts that are chosen.

    TransformersError where there are none.
    """
    layout = target.in_memory
    with transformers_says():
        return {layer: decoder_layers(model)[layer].get_submodule(layout.gate) for layer in layers}


def beside_mlp(layer: Model, target: Target, *, is_moe: bool) -> Span:
    """Return what a layer adds by its MLP, and by the experts that lie beside it if it has some."""
    names = target.parallel_mlp
    assert names is not None
    module = layer.get_submodule

    def whole(x_PH: torch.Tensor) -> torch.Tensor:
        # Not by calling them, which would call hooks.
        made: torch.Tensor = module(names.mlp).forward(module(names.mlp_before).forward(x_PH))
        if is_moe:
            layout = target.in_memory
            _, gates_PT, chosen_PT = module(layout.gate).forward(x_PH)
            states_PH = module(names.before).forward(x_PH)
            routed_PH = module(layout.module).forward(states_PH, chosen_PT, gates_PT)
            made = module(names.mlp_after).forward(made) + module(names.after).forward(routed_PH)
        last: torch.Tensor = module(names.last).forward(made)
        return last

    return Span(module(names.mlp_before), module(names.last), whole)
