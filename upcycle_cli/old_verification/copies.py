"""What the MoE must hold of the dense tensors that are copied: whole, some rows, in another order.

Which pieces there are is in the rows of the families; how many rows they have, and which of a
head's rows positions turn, comes from transformers' own config of the dense model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.old_verification.facts import Facts
from upcycle_cli.old_verification.sizes import read_tensors
from upcycle_cli.run.models import Config, TransformersError, load_config

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Copy:
    """A tensor of the MoE, and the dense tensor whose rows it holds."""

    name: str
    source: str
    rows: tuple[int, int] | None = None
    """From which to which; None for all."""
    head: tuple[int, int] | None = None
    """The rows of a head, and how many of them are ordered anew; None where none are."""

    def shape(self, source: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that it must have; `source` is that of the dense tensor."""
        return source if self.rows is None else (self.rows[1] - self.rows[0], *source[1:])

    def of(self, source: torch.Tensor) -> torch.Tensor:
        """Return what it must hold of the dense tensor: a view, if no row changes its place."""
        if self.rows is not None:
            source = source[slice(*self.rows)]
        if self.head is None:
            return source
        size, rotary = self.head
        order = (*range(0, rotary, 2), *range(1, rotary, 2), *range(rotary, size))
        return source[[first + row for first in range(0, len(source), size) for row in order]]


def copies_of(facts: Facts) -> Iterator[Copy]:
    """Yield all that must be there of the dense tensors that are copied; raises UpcycleError."""
    tensors = read_tensors(facts.dense)
    changed = changed_form(facts, tensors)
    for name in (name for name in tensors if name not in facts.became):
        yield from changed.get(name) or (Copy(facts.in_moe(name)[0], name),)


def changed_form(
    facts: Facts, tensors: Mapping[str, Any], config: Config = None
) -> Mapping[str, tuple[Copy, ...]]:
    """Return by dense tensor what becomes of it, of those that the MoE holds in another form.

    `tensors` have shapes; `config` is transformers' of the model that they are of, that of the
    dense checkpoint unless given. Raises UpcycleError when the two do not fit.
    """
    if config is None and facts.pieces:
        try:
            config = load_config(facts.dense.path).get_text_config()
        except TransformersError as error:
            raise UpcycleError(f"transformers cannot read {facts.dense.path}: {error}") from error
    found = {}
    for source, pieces in facts.pieces.items():
        copies, start = [], 0
        for name, piece in pieces:
            stop = start + math.prod(_size(facts, config, key) for key in piece.rows.split("*"))
            head = _head(facts, config) if piece.halves else None
            copies.append(Copy(name, source, (start, stop), head))
            start = stop
        if source in tensors and tensors[source].shape[0] != start:
            raise UpcycleError(
                f"{facts.dense.path}: {source} has {tensors[source].shape[0]} rows, "
                f"but config.json implies {start}."
            )
        found[source] = tuple(copies)
    return found


def _size(facts: Facts, config: Config, key: str) -> int:
    if key == "head_dim" and getattr(config, key, None) is None:
        return int(config.hidden_size // config.num_attention_heads)
    return int(getattr(config, facts.family.key(key)))


def _head(facts: Facts, config: Config) -> tuple[int, int]:
    size = _size(facts, config, "head_dim")
    return size, int(size * config.rope_parameters.get("partial_rotary_factor", 1.0))
