"""What every plan has, whatever it makes: the files that are to be written, and their identity."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Self

from upcycle_cli.checkpoint.card_metadata import CardMetadata, read_card_metadata
from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader
from upcycle_cli.checkpoint.header import TORCH_DTYPES, TensorEntry
from upcycle_cli.checkpoint.storage import CARD_NAME, CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from upcycle_cli.models.engines import Engine, engines
from upcycle_cli.models.moe import Target
from upcycle_cli.models.moe_config import has_plain_attention
from upcycle_cli.models.shipped import CODE_NAME
from upcycle_cli.models.wrappers import text_config_of
from upcycle_cli.plan.expressions import sources
from upcycle_cli.plan.merge import MergedReader
from upcycle_cli.plan.tensors import Options, OutputTensor, Role
from upcycle_cli.recipe.recipe import ExpertLayout, Promise, Routing

_MEANING = 2
"""Another number whenever an expression comes to mean other bytes: 2 since numpy draws routers."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the output, with its final name and its tensors in order."""

    name: str
    tensors: tuple[OutputTensor, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Planned(ABC):
    """Everything that is to be written, before a byte of it is."""

    options: Options
    source: Checkpoint
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]
    carried: CardMetadata
    """What the source's card says that the new one takes over."""
    target: Target
    """The architecture of the output."""
    num_experts: int
    """N, the experts of one layer."""
    top_k: int
    """T, the experts that a token uses."""
    routing: Routing
    """How gates come from logits."""
    layers: tuple[int, ...]
    """Those that are mixtures of experts."""
    every_layer: bool
    """Whether no dense MLP is left."""
    shares: bool
    """Whether a shared expert computes something."""
    expert_layout: ExpertLayout
    """How the experts are named on disk."""

    @property
    @abstractmethod
    def promise(self) -> Promise:
        """What the output owes its source."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Identify the output: equal digests mean equal files."""

    @property
    @abstractmethod
    def how(self) -> dict[str, Any]:
        """What the record says of how it was made, as JSON values."""

    @property
    def dense_parameters(self) -> int:
        """Parameters of the source, without what is dropped."""
        return self.source.num_parameters

    @property
    def rounded_to(self) -> str | None:
        """The dtype that weights are rounded to, or None when no bit of them is lost."""
        return self.narrowed()

    def narrowed(self, drawn: Collection[Role] = ()) -> str | None:
        """Return a dtype that lacks values of a source's, None without; not of what is `drawn`."""
        # Copies have the expression of the first, which is looked at once.
        for tensor in {id(tensor.expr): tensor for tensor in self.tensors}.values():
            for name in () if tensor.role in drawn else sources(tensor.expr):
                # bf16 and fp16 each hold values that the other does not; fp32 holds all of both.
                if tensor.dtype not in {self.entry(name).dtype, "F32"}:
                    return TORCH_DTYPES[tensor.dtype]
        return None

    @property
    def rotary_share(self) -> float:
        """The part of each head that positions turn in the target's own attention."""
        return self.target.rotary_share(text_config_of(self.config))

    @property
    def sources(self) -> tuple[Checkpoint, ...]:
        """All checkpoints that tensors are read of, the source first."""
        return (self.source,)

    def with_sources(self, sources: Sequence[Checkpoint]) -> Self:
        """Return the same plan for the same sources, brought to another place."""
        [source] = sources
        if source is self.source:
            return self
        return replace(self, source=source, carried=read_card_metadata(source.path, CARD_NAME))

    def entry(self, name: str) -> TensorEntry:
        """Return the tensor that an expression names."""
        return self.source.tensors[name]

    def reader(self) -> AbstractContextManager[Reader | MergedReader]:
        """Map the sources' files as they are asked for, by the names that expressions have."""
        return self.source.reader()

    @property
    def file_names(self) -> list[str]:
        """What the output consists of, beside its record, card and checksums."""
        extra = [INDEX_NAME] if len(self.shards) > 1 else []
        extra += [CODE_NAME] if self.target.ships_code else []
        names = [shard.name for shard in self.shards]
        return [CONFIG_NAME, *extra, *names, *(file.name for file in self.source.companions)]

    @property
    def tensors(self) -> Iterator[OutputTensor]:
        """All output tensors in file order."""
        for shard in self.shards:
            yield from shard.tensors

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.nbytes for shard in self.shards)

    @cached_property
    def total_parameters(self) -> int:
        """Parameters of the MoE."""
        return sum(tensor.num_elements for tensor in self.tensors)

    @cached_property
    def active_parameters(self) -> int:
        """Parameters that one token uses: all but the experts that were not chosen."""
        experts = sum(t.num_elements for t in self.tensors if t.role is Role.EXPERT)
        idle = self.num_experts - self.top_k
        return self.total_parameters - experts // self.num_experts * idle

    @property
    def engines(self) -> tuple[Engine, ...]:
        """What is known of each inference engine and this output."""
        config = text_config_of(self.config)
        return engines(
            self.target.title,
            self.routing,
            tied=bool(config.get("tie_word_embeddings", False)),
            fused=self.expert_layout is ExpertLayout.FUSED,
            plain_attention=has_plain_attention(config, rotary_share=self.rotary_share),
            every_layer=self.every_layer,
            scaled=config.get(self.target.keys.scale or "", 1.0) != 1.0,
            shared=self.shares,
        )

    def identity(self) -> dict[str, Any]:
        """Return what a digest covers of every plan.

        That is each source file's size and modification time, since headers alone cannot tell two
        models of one shape apart; of a commit on the Hub, the commit can.
        """
        return {
            "meaning": _MEANING,
            "options": asdict(replace(self.options, expert_layout=self.expert_layout))
            | {"neuron_orders": None},  # which the expressions have, by a digest
            "config": self.config,
            **self.source.identity,
            "shards": [
                [shard.name, [(t.name, t.dtype, t.shape, repr(t.expr)) for t in shard.tensors]]
                for shard in self.shards
            ],
        }


def fill_shards(tensors: Sequence[OutputTensor], max_bytes: int) -> tuple[Shard, ...]:
    """Fill shards in order; a tensor larger than `max_bytes` gets one of its own."""
    groups: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    if len(groups) == 1:
        return (Shard(WEIGHTS_NAME, tuple(groups[0])),)
    return tuple(
        Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for i, group in enumerate(groups, start=1)
    )
