"""Weights that stay in their files until torch's functions use them.

A linear layer reads a block of rows at a time, an embedding only the rows that it needs, and
experts are read one by one, so a model of any size runs in the memory of its activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader
from upcycle_cli.checkpoint.header import TORCH_DTYPES

_BLOCK = 1 << 24
"""Elements of a weight in memory at once: 64 MB in float32."""


class _Unread:
    """The attributes that torch and transformers read before they use a weight."""

    device = torch.device("cpu")
    dtype = torch.float32
    requires_grad = False

    def is_floating_point(self) -> bool:
        """Tell torch that this is a weight."""
        return True


@dataclass(frozen=True, eq=False)
class Computed:
    """Rows of a tensor that are computed whenever they are read, in place of a mapped tensor."""

    rows: Callable[[Any], torch.Tensor]
    """Computes the rows of a slice, or those of which an array has the numbers."""
    shape: torch.Size
    dtype: torch.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> torch.Tensor:  # noqa: ANN401
        return self.rows(index.numpy() if isinstance(index, torch.Tensor) else index)


def unread(checkpoint: Checkpoint, reader: Reader, name: str) -> torch.Tensor | Computed:
    """Return a tensor of a model that takes no memory."""
    if name not in checkpoint.made:
        return reader.tensor(name)
    made = checkpoint.made[name]
    dtype = getattr(torch, TORCH_DTYPES[made.dtype])
    return Computed(partial(reader.tensor, name), torch.Size(made.shape), dtype)


@dataclass(frozen=True, eq=False)
class Stored(_Unread):
    """One tensor of a file, or several concatenated ones, in place of a weight in float32."""

    pieces: tuple[torch.Tensor | Computed, ...]
    """Views of mapped files, or computed, with equal numbers of columns."""
    round_to: torch.dtype
    """The dtype that the values are rounded to first."""
    observe: Callable[[torch.Tensor], None] | None = None
    """Receives each input and product of the weight."""

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        first = self.pieces[0]
        if not first.shape:
            return first.shape
        return torch.Size((sum(len(piece) for piece in self.pieces), *first.shape[1:]))

    def cast(self, values: torch.Tensor) -> torch.Tensor:
        """Return values of a file in float32, rounded first."""
        return values.to(self.round_to).float()

    def whole(self) -> torch.Tensor:
        """Read all of it."""
        found = [self.cast(piece[...]) for piece in self.pieces]
        return found[0] if len(found) == 1 else torch.cat(found)

    def block(self, begin: int, end: int) -> Stored:
        """Return some rows, unread."""
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
        second = args[1] if len(args) > 1 and isinstance(args[1], cls) else None
        if second is not None and function is functional.linear:
            return second.observed(args[0], _linear(*args, **kwargs))
        if second is not None and function is functional.embedding:
            needed, place = torch.unique(args[0], return_inverse=True)
            # The other arguments only matter for training or padding.
            return functional.embedding(place, second.cast(second.pieces[0][needed]))
        weights = [arg for arg in args if isinstance(arg, cls)]
        args, kwargs = tree_map_only(cls, cls.whole, (args, dict(kwargs)))
        found = function(*args, **kwargs)
        multiplies = function in (torch.addmm, torch.matmul, torch.bmm)
        return weights[0].observed(args[-2], found) if multiplies and weights else found

    def observed(self, factor: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        """Return the product, once `observe` has seen both."""
        if self.observe is not None:
            self.observe(factor)
            self.observe(product)
        return product


def _linear(
    input: torch.Tensor,  # noqa: A002 - as torch calls it
    weight: Stored,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    num_rows, columns = weight.shape
    size = max(1, _BLOCK // columns)
    if size >= num_rows:
        return functional.linear(input, weight.whole(), bias)
    output = input.new_empty((*input.shape[:-1], num_rows))
    for begin in range(0, num_rows, size):
        end = min(begin + size, num_rows)
        part = None if bias is None else bias[begin:end]
        # Without a name, which would keep the block in memory while the next one is read.
        output[..., begin:end] = functional.linear(input, weight.block(begin, end).whole(), part)
    return output


@dataclass(frozen=True, eq=False)
class Stack(_Unread):
    """The matrices or biases of all experts of a layer, in place of one weight."""

    expert: Callable[[int], Stored]

    def __getitem__(self, expert: int | torch.Tensor) -> Stored:
        return self.expert(int(expert))
