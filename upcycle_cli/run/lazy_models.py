"""Models that transformers runs while their weights stay in their files.

Only the weights are replaced; the code is transformers' own. The rows of the model types say which
modules of a layer are its MLP, router and experts.

Legend: S tokens, N experts, T top-k, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader, raw_bytes
from upcycle_cli.models.lookup import dense_family, is_target
from upcycle_cli.models.mlp import Weight
from upcycle_cli.models.moe import Target
from upcycle_cli.models.moe_experts import Experts, find_experts
from upcycle_cli.models.wrappers import Inside
from upcycle_cli.run.layerwise import Span, first_of
from upcycle_cli.run.lazy_weights import Computed, Stack, Stored, unread
from upcycle_cli.run.models import (
    Model,
    TransformersError,
    decoder_layers,
    empty_model,
    load_config,
    names_on_disk,
    transformers_errors,
)

Find = Callable[[str, str], "Stored | None"]
"""Returns a weight by its names on disk and in memory; None if it is missing."""
Round = Callable[[str, torch.Tensor | Computed], torch.dtype]
"""Returns the dtype that a weight is rounded to first, from its name in memory and its values."""
Observe = Callable[[str, torch.Tensor], None]
"""Receives, by name, the inputs and products of each weight, and the outputs of layers."""
_SAMPLE = 32
"""How many elements of each part are compared first; most different experts differ there."""


@dataclass(frozen=True, eq=False)
class LazyModel:
    """A transformers model that reads its weights while it runs."""

    checkpoint: Checkpoint
    net: Model
    experts: Experts | None
    """None for a dense model."""
    mlp: str
    """The module of a layer that is its MLP, or that contains its router and experts."""
    weights: Mapping[str, torch.Tensor | Computed]
    """The stored weights by their names in memory; for experts and other weights of several
    tensors, the first tensor."""

    def layer(self, layer: int) -> Model:
        """Return the module of a layer."""
        return decoder_layers(self.net)[layer]

    @property
    def num_layers(self) -> int:
        """The number of layers of all kinds."""
        return len(decoder_layers(self.net))

    @property
    def expert_dtype(self) -> torch.dtype:
        """The dtype in which the first expert is stored."""
        assert self.experts is not None
        weight = self.experts.target.in_memory.experts[0].name
        return self.weights[f"layers.{self.experts.layers[0]}.{weight}"].dtype

    def block(self, layer: int, target: Target) -> Model | Span:
        """Return the part of a layer that a conversion to `target` replaces, in either model."""
        if target.keeps_mlp:
            return beside_mlp(self.layer(layer), target, is_moe=self.experts is not None)
        module = self.layer(layer).get_submodule
        if self.experts is not None or self.mlp != "fc1":
            return module(self.mlp)
        # The layer itself runs the MLP, and no dense model gets extra inputs.
        return Span(module("fc1"), module("fc2"), torch.nn.Identity())

    def router(self, layer: int) -> Model:
        """Return the module that returns logits, gates and chosen experts."""
        assert self.experts is not None
        return self.layer(layer).get_submodule(self.experts.target.in_memory.gate)


def lazy_model(
    checkpoint: Checkpoint,
    reader: Reader,
    *,
    round_to: Round | None = None,
    observe: Observe | None = None,
) -> LazyModel:
    """Return a dense model or an MoE that runs in float32, with its weights left on disk.

    Equal experts that a token chose run once, with the sum of their gates. Raises TransformersError
    if transformers cannot make the model, or if a tensor is missing or has another shape;
    UpcycleError for such a tensor of an expert, here or when the expert runs.
    """
    weights: dict[str, torch.Tensor | Computed] = {}

    def stored(name: str, *pieces: torch.Tensor | Computed) -> Stored:
        weights.setdefault(name, pieces[0])
        narrow = pieces[0].dtype if round_to is None else round_to(name, pieces[0])
        sees = None if observe is None else partial(observe, name)
        return Stored(pieces, narrow, sees)

    def expert(layer: int, weight: Weight, number: int) -> Stored:
        assert experts is not None
        pieces = [experts.part(reader, layer, number, part) for part in weight.parts]
        return stored(f"layers.{layer}.{weight.name}", *pieces)

    experts, stacks = None, {}
    if is_target(checkpoint.config):
        experts = find_experts(checkpoint)
        target, mlp = experts.target, experts.target.in_memory.block
        find = _finder(checkpoint, target.inside, target.name_prefix, "model.")
        parts = {*experts.part_names}
        stacks = {
            (layer, weight.name): Stack(partial(expert, layer, weight))
            for layer in experts.layers
            for weight in target.in_memory.experts
            if {*weight.parts} <= parts
        }
    else:
        family = dense_family(checkpoint.config, checkpoint.tensors)
        find = _finder(checkpoint, family.inside, "", family.root)
        mlp = family.mlp[0].name.split(".")[0]

    def tensor(disk_name: str, name: str) -> Stored | None:
        found = find(disk_name)
        return None if found is None else stored(name, unread(checkpoint, reader, found))

    net = _net(checkpoint.path, tensor, stacks)
    model = LazyModel(checkpoint, net, experts, mlp, weights)

    def note(name: str, _layer: Model, _inputs: object, output: Any) -> None:  # noqa: ANN401
        assert observe is not None
        observe(name, first_of(output))

    for number, layer in enumerate(decoder_layers(net) if observe else ()):
        layer.register_forward_hook(partial(note, f"layers.{number}"))
    if experts is not None:
        for layer in experts.layers:
            module = model.layer(layer).get_submodule(experts.target.in_memory.module)
            module.register_forward_pre_hook(MergeCopies(experts, reader, layer))
    return model


def beside_mlp(layer: Model, target: Target, *, is_moe: bool) -> Span:
    """Return the part of a layer with its MLP and the experts beside it, if any."""
    module = layer.get_submodule
    first, last = module("pre_feedforward_layernorm"), module("post_feedforward_layernorm")

    def whole(x_SH: torch.Tensor) -> torch.Tensor:
        # `forward`, since calling a module would call its hooks.
        made: torch.Tensor = module("mlp").forward(first.forward(x_SH))
        if is_moe:
            block = target.in_memory
            _, gates_ST, chosen_ST = module(block.gate).forward(x_SH)
            states_SH = module("pre_feedforward_layernorm_2").forward(x_SH)
            routed_SH = module(block.module).forward(states_SH, chosen_ST, gates_ST)
            routed_SH = module("post_feedforward_layernorm_2").forward(routed_SH)
            made = module("post_feedforward_layernorm_1").forward(made) + routed_SH
        added: torch.Tensor = last.forward(made)
        return added

    return Span(first, last, whole)


def _finder(
    checkpoint: Checkpoint, inside: Inside | None, root: str, removed: str
) -> Callable[[str], str | None]:
    """Return a function that maps a name in memory, or one that transformers writes, to disk."""
    if inside is None:

        def names(name: str) -> tuple[str, str]:
            # Fused experts have the names in memory, except for the prefix.
            return name, root + name.removeprefix(removed)
    else:
        loaded = {inside.in_memory(name): name for name in checkpoint.tensors}
        released = inside.wrapper.inside()

        def names(name: str) -> tuple[str, str]:
            return loaded.get(name, ""), released.moved(name, inside)

    return lambda name: next((known for known in names(name) if known in checkpoint.tensors), None)


def _net(path: Path, tensor: Find, stacks: Mapping[tuple[int, str], Stack]) -> Model:
    """Return a model with its weights left in their files; `stacks` are the experts' weights."""
    config = load_config(path)
    config._experts_implementation = "eager"  # noqa: SLF001 - others need one tensor of all
    config.dtype = torch.float32
    with transformers_errors(), torch.no_grad():
        model = empty_model(config, "meta")
        _compute_buffers(model)
        for (layer, name), stack in stacks.items():
            module, _, leaf = name.rpartition(".")
            slots = decoder_layers(model)[layer].get_submodule(module)._parameters  # noqa: SLF001
            _check_shape(f"{name} of layer {layer}", stack[0].shape, slots[leaf].shape[1:])
            slots[leaf] = stack
        _fill(model, tensor)
    return model


def _compute_buffers(model: Model) -> None:
    """Compute the buffers that no file holds, such as rotary frequencies."""
    owners = {}
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, leaf = name.rpartition(".")
        owners[owner] = model.get_submodule(owner)
        owners[owner]._buffers[leaf] = torch.empty_like(buffer, device="cpu")  # noqa: SLF001
    for name, owner in owners.items():
        # Like from_pretrained, use the innermost model that contains the module.
        whole = model
        for end in (i for i, letter in enumerate(f"{name}.") if letter == "."):
            inner = model.get_submodule(name[:end])
            whole = inner if hasattr(inner, "_initialize_weights") else whole
        whole._initialize_weights(owner)  # noqa: SLF001


def _check_shape(name: str, held: torch.Size, implied: torch.Size) -> None:
    if held != implied:
        raise TransformersError(f"{name} has shape {[*held]}, but config.json implies {[*implied]}")


def _fill(model: Model, tensor: Find) -> None:
    """Put each stored weight in its place, except the experts' weights."""
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        # Give the head its own weight if the files have one, as from_pretrained does.
        name = next(name for name, module in model.named_modules() if module is head)
        if tensor(f"{name}.weight", f"{name}.weight") is not None:
            head._parameters["weight"] = torch.empty_like(head.weight)  # noqa: SLF001
    state = model.state_dict(keep_vars=True)
    named = {name: held for name, held in state.items() if isinstance(held, torch.Tensor)}
    in_memory = {id(held): name for name, held in reversed(named.items())}
    places = _places(model)
    found: dict[int, Stored] = {}
    # A tied head is the embedding, and only one of the names may be on disk. Some checkpoints use
    # the names in memory.
    for name, held in (*names_on_disk(model, named).items(), *named.items()):
        stored = None if id(held) in found else tensor(name, in_memory.get(id(held), name))
        if stored is not None:
            found[id(held)] = stored
    for name, held in named.items():
        if id(held) not in found:
            raise TransformersError(f"{name} is in no file under its name")
        stored = found[id(held)]
        _check_shape(name, stored.shape, held.shape)
        for slots, leaf in places[id(held)]:
            # Read vectors whole: many functions use them.
            slots[leaf] = stored if held.dim() > 1 else stored.whole()


def _places(model: Model) -> dict[int, list[tuple[dict[str, Any], str]]]:
    """Return the slots of each tensor of a model, by its id."""
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for slots in (module._parameters, module._buffers):  # noqa: SLF001
            for leaf, held in slots.items():
                places.setdefault(id(held), []).append((slots, leaf))
    return places


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
