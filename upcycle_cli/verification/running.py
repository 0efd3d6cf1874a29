"""Both models, run by transformers' own code side by side, with their weights left on disk.

The dense model runs as it was published and, where the MoE's dtypes are narrower, once more with
its weights rounded to them, which tells the price of the dtype from that of the conversion. After
each layer the three wait for each other: what a layer adds is measured where it is added, and
nothing of a layer is kept.

Legend: B texts, S positions, H hidden size, P positions that are not padding, K sampled positions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from upcycle_cli.checkpoint import TORCH_DTYPES, Checkpoint, Reader
from upcycle_cli.errors import UpcycleError
from upcycle_cli.families.wrappers import Inside
from upcycle_cli.verification.facts import Facts
from upcycle_cli.verification.models import Model, TransformersError, decoder_layers
from upcycle_cli.verification.steps import Steps
from upcycle_cli.verification.stored import Stack, Stored, stored_model


def dense_model(facts: Facts, reader: Reader, *, rounded: bool = False) -> Model:
    """Return the dense model, with its weights rounded to the MoE's dtypes if asked for.

    Raises UpcycleError when transformers cannot make it.
    """
    find = _finder(facts.dense, facts.family.inside, "model.")

    def tensor(name: str) -> Stored | None:
        found = find(name)
        if found is None:
            return None
        name = found
        entry = facts.moe.tensors.get(facts.in_moe(name)[0])
        # An untied head in the dense model, a tied one in the MoE: nothing was rounded.
        narrow = rounded and entry is not None
        dtype = getattr(torch, TORCH_DTYPES[entry.dtype]) if narrow and entry else torch.float32
        return Stored((reader.tensor(name),), lambda held: held.to(dtype).float())

    try:
        return stored_model(facts.dense.path, tensor, {})
    except TransformersError as error:
        raise UpcycleError(f"transformers cannot run {facts.dense.path}: {error}") from error


def _finder(
    checkpoint: Checkpoint, inside: Inside | None, root: str
) -> Callable[[str], str | None]:
    """Return what finds a tensor by the name that transformers writes, or has in memory."""
    if inside is None:

        def names(name: str) -> Iterator[str]:
            # Fused experts come with the names that a model has in memory, but for the beginning.
            yield from (name, root + name.removeprefix("model."))
    else:
        loaded = {inside.loaded(name): name for name in checkpoint.tensors}
        released = Inside(inside.wrapper, inside.wrapper.released)

        def names(name: str) -> Iterator[str]:
            yield from (loaded.get(name, ""), released.moved(name, inside))

    return lambda name: next((known for known in names(name) if known in checkpoint.tensors), None)


def rounds(facts: Facts) -> bool:
    """Whether the MoE's dtypes can have changed a weight of the dense model."""
    for name, entry in facts.dense.tensors.items():
        became = (facts.moe.tensors.get(held) for held in facts.in_moe(name))
        if any(held and held.dtype not in (entry.dtype, "F32") for held in became):
            return True
    return False


def moe_model(
    facts: Facts,
    reader: Reader,
    dtype: torch.dtype = torch.float32,
    copied: Collection[int] = (),
) -> Model:
    """Return the MoE, to be run in a dtype; raises TransformersError.

    `copied` are the layers in which the experts of a shard were found to be the same bytes: each of
    them is run once for a token, with the sum of its copies' gates.
    """
    find = _finder(facts.moe, facts.target.inside, facts.target.root)

    def stored(*pieces: torch.Tensor) -> Stored:
        return Stored(pieces, lambda held: held.to(dtype), dtype)

    def tensor(name: str) -> Stored | None:
        found = find(name)
        return None if found is None else stored(reader.tensor(found))

    def stack(layer: int, parts: Sequence[str]) -> Stack:
        def expert(number: int) -> Stored:
            spots = [facts.place(part, layer, number) for part in parts]
            return stored(*(reader.tensor(spot.tensor)[spot.index] for spot in spots))

        return Stack(expert, dtype)

    *_, layout = facts.target.layouts.values()  # in memory, experts are as fused ones
    stacks = {
        (layer, weight.name): stack(layer, weight.holds)
        for layer in facts.layers
        for weight in layout.experts
        if set(weight.holds) <= {*facts.parts}
    }
    model = stored_model(facts.moe.path, tensor, stacks, dtype)
    module = layout.experts[0].name.rpartition(".")[0]
    for layer in {*copied} & {*facts.layers}:
        experts = decoder_layers(model)[layer].get_submodule(module)
        experts.register_forward_pre_hook(partial(_merge_copies, facts.granularity))
    return model


def _merge_copies(
    granularity: int, _experts: Model, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Send each token once to the first copy of a shard, with the gates of all copies."""
    states_SH, experts_ST, gates_ST = inputs
    gates_SG = gates_ST.new_zeros(len(gates_ST), granularity)
    gates_SG.scatter_add_(1, experts_ST % granularity, gates_ST)
    chosen_SG = torch.zeros_like(gates_SG).scatter_(1, experts_ST % granularity, 1.0)
    # Where a token chose fewer shards than another, what fills the row up has a gate of 0.
    most = int(chosen_SG.sum(-1).max())
    shards_ST = chosen_SG.topk(most).indices
    return states_SH, shards_ST, gates_SG.gather(1, shards_ST)


@dataclass
class Run:
    """A model on its way through the text, and what its hooks saw in the layer that ran last."""

    model: Model
    steps: Steps
    hidden: torch.Tensor = field(init=False)
    """What the layer returned."""
    mlp_input: torch.Tensor = field(init=False)
    mlp_output: torch.Tensor = field(init=False)
    extra: torch.Tensor | None = None
    """Further inputs for the MLP; what it makes of them is then in their place."""
    output: Any = None
    """What the base model returned in the end."""


@contextmanager
def started(model: Model, ids_BS: torch.Tensor, mlps: Sequence[Model]) -> Iterator[Run]:
    """Run a model on text, to be taken from layer to layer by `steps.advance()`.

    `mlps` are the modules, one a layer at most, whose input and output are wanted.
    """

    def work(pause: Callable[[], None]) -> None:
        def end_layer(_module: Model, _inputs: object, output: Any) -> None:  # noqa: ANN401
            run.hidden = _first(output)
            pause()

        handles = [layer.register_forward_hook(end_layer) for layer in decoder_layers(model)]
        try:
            with torch.no_grad():
                # Padding comes last, where causal attention keeps it from what counts, and
                # positions are counted from the first token.
                run.output = model.base_model(input_ids=ids_BS, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def enter(_module: Model, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        run.mlp_input = inputs[0]
        if run.extra is None:
            return None
        flat = inputs[0].flatten(0, -2)
        return (torch.cat([flat, run.extra.to(flat)])[None], *inputs[1:])

    def leave(_module: Model, _inputs: object, output: Any) -> Any:  # noqa: ANN401
        made = _first(output)
        if run.extra is None:
            run.mlp_output = made
            return None
        count = made.shape[-2] - len(run.extra)
        run.extra = made[0, count:]
        run.mlp_output = made[0, :count].reshape(run.mlp_input.shape)
        return (run.mlp_output, *output[1:]) if isinstance(output, tuple) else run.mlp_output

    with Steps(work) as steps:
        run = Run(model, steps)
        handles = [
            handle
            for mlp in mlps
            for handle in (mlp.register_forward_pre_hook(enter), mlp.register_forward_hook(leave))
        ]
        try:
            yield run
        finally:
            for handle in handles:
                handle.remove()


def _first(output: Any) -> torch.Tensor:  # noqa: ANN401
    """Return the hidden states of what a module returned; some return more."""
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found
