"""Dense models and mixtures of experts as transformers runs them, with their weights left on disk.

Which tensors hold an expert, and where a layer keeps its MLP, its router and its experts, follows
from the checkpoint's own config and names, by the rows of the model types. Nothing here knows how a
conversion makes a mixture of experts.

Legend: S tokens, N experts, T top-k, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader, raw_bytes
from upcycle_cli.checkpoint.storage import CONFIG_NAME
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models.families import dense_family, is_target, target_of
from upcycle_cli.models.mlp import find_weight, locate, parts_of, present_weights
from upcycle_cli.models.moe import Layout, Target
from upcycle_cli.models.wrappers import text_config_of
from upcycle_cli.run.layerwise import Span
from upcycle_cli.run.lazy_weights import Stack, Stored, finder, stored_model
from upcycle_cli.run.models import Model, TransformersError, decoder_layers, transformers_says

Round = Callable[[str, torch.Tensor], torch.dtype]
"""Returns the dtype that a weight is rounded to first, by its name in memory and what is stored."""
Observe = Callable[[str, torch.Tensor], None]
"""Sees what each stored weight multiplies, and the products; called with the weight's name."""


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


@dataclass(frozen=True, eq=False)
class LazyModel:
    """A model of transformers whose weights are read as it runs."""

    checkpoint: Checkpoint
    net: Model
    experts: MoeTensors | None
    """None for a dense model."""
    mlp: str
    """The module of a layer that is its MLP, or has its router and experts."""
    weights: Mapping[str, torch.Tensor]
    """The weights as they are stored, by their names in memory; of experts and other weights that
    are made of several tensors, the first."""

    def layer(self, layer: int) -> Model:
        """Return the module of a layer."""
        return decoder_layers(self.net)[layer]

    @property
    def num_layers(self) -> int:
        """The number of layers, of whatever kind."""
        return len(decoder_layers(self.net))

    @property
    def expert_dtype(self) -> torch.dtype:
        """The dtype in which the first expert is stored."""
        assert self.experts is not None
        weight = self.experts.target.in_memory.experts[0].name
        return self.weights[f"layers.{self.experts.layers[0]}.{weight}"].dtype

    def block(self, layer: int, target: Target) -> Model | Span:
        """Return the part of a layer that a conversion to `target` replaces, before or after it."""
        with transformers_says():
            if target.parallel_mlp is not None:
                return beside_mlp(self.layer(layer), target, is_moe=self.experts is not None)
            return self.layer(layer).get_submodule(self.mlp)

    def router(self, layer: int) -> Model:
        """Return the module that returns logits, gates and chosen experts; TransformersError."""
        assert self.experts is not None
        with transformers_says():
            return self.layer(layer).get_submodule(self.experts.target.in_memory.gate)


def lazy_model(
    checkpoint: Checkpoint,
    reader: Reader,
    *,
    round_to: Round | None = None,
    observe: Observe | None = None,
    merge_copies: bool = False,
) -> LazyModel:
    """Return a dense model or an MoE, to be run in float32 with its weights left on disk.

    With `merge_copies` a token that chose several experts of the same bytes is sent to one of them,
    with the sum of their gates. Raises TransformersError when transformers cannot make the model of
    its config, or a tensor is missing or has another shape.
    """
    weights: dict[str, torch.Tensor] = {}

    def stored(name: str, *pieces: torch.Tensor) -> Stored:
        weights.setdefault(name, pieces[0])
        narrow = pieces[0].dtype if round_to is None else round_to(name, pieces[0])
        sees = None if observe is None else partial(observe, name)
        return Stored(pieces, lambda held: held.to(narrow).float(), observe=sees)

    experts, stacks = None, {}
    if is_target(checkpoint.config):
        experts = moe_tensors(checkpoint)
        target, mlp = experts.target, experts.target.in_memory.block
        find, parts = finder(checkpoint, target.inside, target.name_prefix), {*experts.parts}
        for layer in experts.layers:
            for weight in target.in_memory.experts:
                if {*weight.parts} <= parts:
                    one = partial(_expert, experts, reader, stored, layer, weight.name)
                    stacks[layer, weight.name] = Stack(one)
    else:
        family = dense_family(checkpoint.config, checkpoint.tensors)
        find, mlp = finder(checkpoint, family.inside, "model."), family.mlp[0].name.split(".")[0]

    def tensor(disk_name: str, name: str) -> Stored | None:
        found = find(disk_name)
        return None if found is None else stored(name, reader.tensor(found))

    net = stored_model(checkpoint.path, tensor, stacks)
    model = LazyModel(checkpoint, net, experts, mlp, weights)
    if experts is not None:
        for layer in experts.layers if merge_copies else ():
            module = model.layer(layer).get_submodule(experts.target.in_memory.module)
            merge = _MergeCopies(experts, reader, layer)
            module.register_forward_pre_hook(merge)
    return model


def _expert(
    experts: MoeTensors,
    reader: Reader,
    stored: Callable[..., Stored],
    layer: int,
    weight: str,
    number: int,
) -> Stored:
    """Return one weight of one expert, of the parts that it holds in memory."""
    held = next(each for each in experts.target.in_memory.experts if each.name == weight)
    pieces = [experts.part(reader, layer, number, part) for part in held.parts]
    return stored(f"layers.{layer}.{weight}", *pieces)


class _MergeCopies:
    """A hook on a layer's experts: copies of one expert are run once, with the sum of their gates.

    Which experts are copies is found by comparing their bytes, when the layer is first run.
    """

    def __init__(self, experts: MoeTensors, reader: Reader, layer: int) -> None:
        self._experts, self._reader, self._layer = experts, reader, layer
        self._first_N: torch.Tensor | None = None

    def __call__(
        self, _module: Model, inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
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
        return all(torch.equal(_bits(left), _bits(right)) for left, right in pairs)


_SAMPLE = 32
"""Elements of each part that tell most different experts apart."""


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bits as integers, as large as its last dimension allows."""
    for dtype in (torch.int64, torch.int32):
        size = dtype.itemsize // tensor.element_size()
        if size and tensor.stride(-1) == 1 and tensor.shape[-1] % size == 0 and size > 1:
            try:
                return tensor.view(dtype)
            except RuntimeError:  # it does not begin where such an integer can
                continue
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def beside_mlp(layer: Model, target: Target, *, is_moe: bool) -> Span:
    """Return what a layer adds by its MLP, and by the experts that lie beside it if it has some."""
    names = target.parallel_mlp
    assert names is not None
    module = layer.get_submodule

    def whole(x_SH: torch.Tensor) -> torch.Tensor:
        # `forward`, since calling a module would call its hooks.
        made: torch.Tensor = module(names.mlp).forward(module(names.mlp_before).forward(x_SH))
        if is_moe:
            layout = target.in_memory
            _, gates_ST, chosen_ST = module(layout.gate).forward(x_SH)
            states_SH = module(names.before).forward(x_SH)
            routed_SH = module(layout.module).forward(states_SH, chosen_ST, gates_ST)
            made = module(names.mlp_after).forward(made) + module(names.after).forward(routed_SH)
        last: torch.Tensor = module(names.last).forward(made)
        return last

    return Span(module(names.mlp_before), module(names.last), whole)
