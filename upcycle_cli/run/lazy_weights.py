"""Models whose weights stay in their files: what a layer multiplies by is read as it does.

A weight is read a block of rows at a time, an embedding only in the rows that the text needs, and
an expert when its turn comes, so a model of any size runs in the memory of its activations. The
code that runs is transformers' own; only where its weights come from is not.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.models.wrapper import Inside
from upcycle_cli.run.models import (
    Model,
    TransformersError,
    decoder_layers,
    empty_model,
    load_config,
    names_on_disk,
    transformers_says,
)

_BLOCK = 1 << 24
"""Elements of a weight that are in memory at once: 64 MB in float32."""

Cast = Callable[[torch.Tensor], torch.Tensor]
Find = Callable[[str, str], "Stored | None"]
"""Returns a weight by the names that it has on disk and in memory; None when there is none."""


class _Unread:
    """What torch and transformers ask of a weight before they use it."""

    device = torch.device("cpu")
    requires_grad = False

    def is_floating_point(self) -> bool:
        """Answer for torch, without reading anything."""
        return True


@dataclass(frozen=True, eq=False)
class Stored(_Unread):
    """A matrix in a file, or some of them one below the other, in the place of a model's weight.

    Torch's functions read it: a linear layer block by block, an embedding the rows it needs, and
    any other the whole of it.
    """

    pieces: tuple[torch.Tensor, ...]
    """Views of mapped files, of as many columns each."""
    cast: Cast
    """Takes what was read to what is computed with."""
    dtype: torch.dtype = torch.float32
    observe: Callable[[torch.Tensor], None] | None = None
    """Sees what the weight multiplies, and each product."""

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        first = self.pieces[0]
        if not first.dim():
            return first.shape
        return torch.Size((sum(len(piece) for piece in self.pieces), *first.shape[1:]))

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Read some rows."""
        found, start = [], 0
        for piece in self.pieces:
            low, high = max(begin - start, 0), min(end - start, len(piece))
            if low < high:
                found.append(self.cast(piece[low:high]))
            start += len(piece)
        return found[0] if len(found) == 1 else torch.cat(found)

    def whole(self) -> torch.Tensor:
        """Read it all."""
        if not self.pieces[0].dim():
            return self.cast(self.pieces[0])
        return self.rows(0, self.shape[0])

    def block(self, begin: int, end: int) -> Stored:
        """Return some of the rows, unread."""
        pieces = []
        for piece in self.pieces:
            part = piece[max(begin, 0) : max(end, 0)]
            begin, end = begin - len(piece), end - len(piece)
            if len(part):
                pieces.append(part)
        return replace(self, pieces=tuple(pieces))

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self.whole(), name)

    def __getitem__(self, index: object) -> torch.Tensor:
        return self.whole()[index]  # type: ignore[index]

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        _types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        own = len(args) > 1 and isinstance(args[1], cls)
        if own and function is functional.linear:
            return _observed(args[1].observe, args[0], _linear(*args, **kwargs))
        if own and function is functional.embedding:
            ids, stored, *_ = args
            needed, place = torch.unique(ids, return_inverse=True)
            # The others are about training, or about a row that is there already.
            return functional.embedding(place, stored.cast(stored.pieces[0][needed]))
        observers = [arg.observe for arg in args if isinstance(arg, cls)]
        args, kwargs = tree_map_only(cls, cls.whole, (args, dict(kwargs)))
        found = function(*args, **kwargs)
        multiplies = function in (torch.addmm, torch.matmul, torch.bmm)
        return _observed(observers[0], args[-2], found) if multiplies and observers else found


def _observed(
    observe: Callable[[torch.Tensor], None] | None, factor: torch.Tensor, product: torch.Tensor
) -> torch.Tensor:
    if observe is not None:
        observe(factor)
        observe(product)
    return product


def _linear(
    input: torch.Tensor,  # noqa: A002 - as torch calls it
    weight: Stored,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    rows, columns = weight.shape
    size = max(1, _BLOCK // columns)
    if size >= rows:
        return functional.linear(input, weight.whole(), bias)
    output = input.new_empty((*input.shape[:-1], rows))
    for begin in range(0, rows, size):
        end = min(begin + size, rows)
        part = None if bias is None else bias[begin:end]
        output[..., begin:end] = functional.linear(input, weight.rows(begin, end), part)
    return output


@dataclass(frozen=True, eq=False)
class Stack(_Unread):
    """The matrices, or biases, of all experts of a layer, in the place of a model's one tensor."""

    expert: Callable[[int], Stored]
    dtype: torch.dtype = torch.float32

    def __getitem__(self, expert: int | torch.Tensor) -> Stored:
        return self.expert(int(expert))


def finder(checkpoint: Checkpoint, inside: Inside | None, root: str) -> Callable[[str], str | None]:
    """Return what finds a tensor by the name that transformers writes, or has in memory."""
    if inside is None:

        def names(name: str) -> Iterator[str]:
            # Fused experts come with the names that a model has in memory, but for the beginning.
            yield from (name, root + name.removeprefix("model."))
    else:
        loaded = {inside.in_memory(name): name for name in checkpoint.tensors}
        released = Inside(inside.wrapper, inside.wrapper.released)

        def names(name: str) -> Iterator[str]:
            yield from (loaded.get(name, ""), released.moved(name, inside))

    return lambda name: next((known for known in names(name) if known in checkpoint.tensors), None)


def stored_model(
    path: Path,
    tensor: Find,
    stacks: Mapping[tuple[int, str], Stack],
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Return a model whose weights stay in their files.

    `stacks` are the experts' weights by layer and name within the layer, as they are in memory.
    Raises TransformersError when a weight is missing or has another shape than the config implies.
    """
    config = load_config(path)
    config._experts_implementation = "eager"  # noqa: SLF001 - the others want one tensor of all
    config.dtype = dtype
    with transformers_says(), torch.no_grad():
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
    """Compute what no file holds, such as the frequencies of rotary embeddings."""
    owners = {}
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, leaf = name.rpartition(".")
        owners[owner] = model.get_submodule(owner)
        owners[owner]._buffers[leaf] = torch.empty_like(buffer, device="cpu")  # noqa: SLF001
    for name, owner in owners.items():
        # As from_pretrained does: by the model that it is a part of, which may be inside another.
        whole = model
        for end in (i for i, letter in enumerate(f"{name}.") if letter == "."):
            inner = model.get_submodule(name[:end])
            whole = inner if hasattr(inner, "_initialize_weights") else whole
        whole._initialize_weights(owner)  # noqa: SLF001


def _check_shape(name: str, held: torch.Size, implied: torch.Size) -> None:
    if held != implied:
        raise TransformersError(f"{name} has shape {[*held]}, and config.json implies {[*implied]}")


def _untie(model: Model, tensor: Find) -> None:
    """Give a head a weight of its own where files have one, as from_pretrained does."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    name = next(name for name, module in model.named_modules() if module is head)
    if tensor(f"{name}.weight", f"{name}.weight") is not None:
        head._parameters["weight"] = torch.empty_like(head.weight)  # noqa: SLF001


def _fill(model: Model, tensor: Find) -> None:
    """Put each stored weight in its place, except those of experts.

    Some weights have memory and random values by now: not all code that makes a tensor asks which
    device to use.
    """
    _untie(model, tensor)
    state = model.state_dict(keep_vars=True)
    named = {name: held for name, held in state.items() if isinstance(held, torch.Tensor)}
    in_memory = {id(held): name for name, held in reversed(named.items())}
    places = _places(model, in_memory)
    found: dict[int, Stored] = {}
    # A tied head is the embedding, and only one of the two names may be on disk; and some save a
    # model under the names that it has in memory.
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
            # A vector is read whole: all sorts of functions use it.
            slots[leaf] = stored if held.dim() > 1 else stored.whole()


def _places(model: Model, wanted: Container[int]) -> dict[int, list[tuple[dict[str, Any], str]]]:
    """Return where a model keeps each of its tensors, by their ids."""
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for slots in (module._parameters, module._buffers):  # noqa: SLF001
            for leaf, held in slots.items():
                if id(held) in wanted:
                    places.setdefault(id(held), []).append((slots, leaf))
    return places
