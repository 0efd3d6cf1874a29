"""What is known of an MoE that was grown, and of its source, before a weight is read.

How often an expert is to be there follows from the two configs alone, whoever made the second.

Legend: N experts of the source, k copies of each, T top-k.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.header import TORCH_DTYPES
from upcycle_cli.checkpoint.storage import CONFIG_NAME
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models.mlp import Location, locate, parts_of
from upcycle_cli.models.moe import Layout, Target
from upcycle_cli.old_verification.recipes import Record, read_record
from upcycle_cli.old_verification.sizes import DamagedError, find_layout, find_target


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two MoEs, by its config and the names of its tensors."""

    moe: Checkpoint
    target: Target
    layout: Layout
    num_experts: int
    top_k: int
    expert_size: int
    routing: str
    layers: tuple[int, ...]
    """Those that are mixtures of experts by the config."""

    group_size = 1
    """No two experts are run as one."""

    @cached_property
    def routed(self) -> tuple[int, ...]:
        """Those that have a router: layers that predict further tokens, too."""
        before, after = (self.target.layer + self.layout.router).split("{layer}")
        pattern = re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}")
        found = (pattern.fullmatch(name) for name in self.moe.tensors)
        return tuple(sorted(int(match[1]) for match in found if match))

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of an expert."""
        return parts_of(self.layout.experts)

    def locate(self, part: str, layer: int, expert: int) -> Location:
        """Return where one part of one expert lies on disk, with the tensor's whole name."""
        found = locate(self.layout.experts, part, width=self.expert_size, expert=expert)
        return replace(found, tensor=self.target.prefix(layer) + found.tensor)

    def of_choice(self, layer: int) -> tuple[str, ...]:
        """Return the tensors with an entry per expert that choose: the router, and a bias."""
        bias = self.target.correction_bias_name(self.layout, self.routing)
        names = (self.layout.router, *([] if bias is None else [bias]))
        return tuple(self.target.prefix(layer) + name for name in names)

    def of_experts(self, layer: int) -> set[str]:
        """Return the tensors of a layer that hold experts."""
        each = range(self.num_experts)
        return {self.locate(part, layer, e).tensor for part in self.parts for e in each}

    def shape_failures(self, layer: int) -> Iterator[str]:
        """Name the tensors of a layer's experts and router that are missing or misshapen."""
        N, tensors, prefix = self.num_experts, self.moe.tensors, self.target.prefix(layer)
        router, *bias = self.of_choice(layer)
        hidden = tensors[router].shape[-1] if router in tensors else 0
        wanted: dict[str, tuple[int, ...]] = {router: (N, hidden), **dict.fromkeys(bias, (N,))}
        for weight in self.layout.experts:
            shape = weight.shape(self.expert_size, hidden)
            if "{expert}" in weight.name:
                wanted |= {prefix + weight.name.format(expert=e): shape for e in range(N)}
            else:
                wanted[prefix + weight.name] = (N, *shape)
        for name, shape in wanted.items():
            if name not in tensors:
                yield f"{name} is missing"
            elif tensors[name].shape != shape:
                yield f"{name} has shape {list(tensors[name].shape)}, not {list(shape)}"

    @cached_property
    def copied(self) -> set[str]:
        """The tensors that have nothing to do with experts."""
        own = {name for layer in self.routed for name in self.of_choice(layer)}
        return (
            self.moe.tensors.keys()
            - own
            - {name for layer in self.routed for name in self.of_experts(layer)}
        )


@dataclass(frozen=True, kw_only=True)
class Grown:
    """An MoE, and the one that it was grown from."""

    source: Side
    grown: Side
    moe_names: tuple[str, ...]
    record: Record
    copies: int
    """k."""

    merged = None
    """It grew from one model."""

    @property
    def dense(self) -> Checkpoint:
        """What it was made of."""
        return self.source.moe

    @property
    def moe(self) -> Checkpoint:
        """What grew."""
        return self.grown.moe

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that have experts."""
        return self.grown.routed

    def router_name(self, layer: int) -> str:
        """Return the name of a layer's router on disk."""
        return self.grown.of_choice(layer)[0]

    @property
    def objection(self) -> str | None:
        """Why nothing is promised, if so."""
        before, after = self.source.top_k, self.grown.top_k
        if after == self.copies * before:
            return None
        return f"top-k {after} is not {self.copies} times the source's {before}"

    @cached_property
    def became(self) -> Mapping[str, str]:
        """From each tensor of the source to the first that holds what was in it."""
        found = {name: name for name in self.source.copied}
        for layer in self.source.routed:
            found |= dict(
                zip(*(s.of_choice(layer) for s in (self.source, self.grown)), strict=True)
            )
            for part in self.source.parts:
                for e in range(self.source.num_experts):
                    name = self.source.locate(part, layer, e).tensor
                    found[name] = self.grown.locate(part, layer, e * self.copies).tensor
        return found


def gather_grown(source: Checkpoint, moe: Checkpoint, names: Sequence[str]) -> Grown:
    """Return what is known of two MoEs; `names` are all files beside the second.

    Raises UpcycleError when the first is not sound, DamagedError when the second is not, or cannot
    have been grown from it.
    """
    try:
        before = _side(source)
    except DamagedError as error:
        raise UpcycleError(f"{source.path}: {error.message}", error.hint) from error
    failures = (failure for layer in before.routed for failure in before.shape_failures(layer))
    for failure in failures:
        raise UpcycleError(f"{source.path}: {failure}.", "Give the MoE that was grown.")
    after = _side(moe)
    if source.config["model_type"] != moe.config["model_type"]:
        raise DamagedError(
            f"{CONFIG_NAME}: model_type is {moe.config['model_type']}, the source's is "
            f"{source.config['model_type']}: an MoE grows into one of its own architecture."
        )
    copies, rest = divmod(after.num_experts, before.num_experts)
    if rest or copies < 2:
        raise DamagedError(
            f"{CONFIG_NAME}: {after.num_experts} experts are no multiple, twice or more, of the "
            f"source's {before.num_experts}."
        )
    return Grown(
        source=before, grown=after, moe_names=tuple(names), record=read_record(moe), copies=copies
    )


def _side(moe: Checkpoint) -> Side:
    target = find_target(moe)
    config = moe.config
    try:
        num_experts, top_k, expert_size = target.sizes(config)
        routing = str(target.routing(config))
        layers = target.moe_layers(config, target.num_layers(config))
    except ValueError as error:
        raise DamagedError(f"{CONFIG_NAME}: {error}.") from error
    for name, entry in moe.tensors.items():
        if entry.dtype not in TORCH_DTYPES:
            raise DamagedError(f"{name} is {entry.dtype}, which no weight is.")
    return Side(
        moe=moe,
        target=target,
        layout=find_layout(moe, target),
        num_experts=num_experts,
        top_k=top_k,
        expert_size=expert_size,
        routing=routing,
        layers=layers,
    )
