"""How an MoE grows: each expert and its router row become k copies, side by side.

Expert e of the source becomes the experts k·e to k·e + k - 1. Their logits are equal, so a top-k of
k·T chooses all copies of the T experts that the source chooses, each with a k-th of the gate. That
is exact for every routing whose gates sum to 1, and for a softmax over all experts. (Expert
upcycling, arXiv 2604.19835.) Copies lie side by side so that ties are broken as in the source. A
virtual group of G experts becomes a group of k·G that holds each shard k times.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.unsafe_settings import refuse_unsafe_settings
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models.layers import by_layer
from upcycle_cli.models.lookup import growable
from upcycle_cli.models.mlp import Weight, locate
from upcycle_cli.models.moe import MoeBlock
from upcycle_cli.models.moe_config import remove_local_path
from upcycle_cli.models.moe_experts import Experts, find_experts
from upcycle_cli.plan.expressions import Expr, Repeat, Select, Slice, Stack, joined, type_of
from upcycle_cli.plan.output import Options, OutputTensor, Role, fill_shards
from upcycle_cli.plan.plan import Growing, Plan
from upcycle_cli.plan.validate import check_tensors, refuse_changes
from upcycle_cli.recipe.recipe import MAX_EXPERTS, ExpertLayout, Growth

_EMBEDDING = "model.embed_tokens.weight"
_ALWAYS = (_EMBEDDING, "model.norm.weight")


def build_growth(growth: Growth, source: Checkpoint, options: Options | None = None) -> Plan:
    """Plan the growth of an MoE from its headers.

    Raises UpcycleError for an MoE that cannot be grown, for tensors that do not match the config,
    and for an inexact result, unless `growth` allows it.
    """
    options = options or Options()
    source = source.computed_in(options.storage_dtype)
    target = growable(source.config, source.tensors)
    refuse_unsafe_settings(source)
    experts = find_experts(source)
    num_experts, exact = growth.expand * experts.num_experts, growth.expand * experts.top_k
    top_k = growth.top_k or exact
    if num_experts > MAX_EXPERTS:
        words = f"`expand` {growth.expand} makes {num_experts} experts per layer of"
        raise UpcycleError(f"{words} {experts.num_experts}.", f"At most {MAX_EXPERTS} can be made.")
    if top_k > num_experts:
        words = f"top-k {top_k} is more than the {num_experts} experts that the growth makes."
        raise UpcycleError(words, f"Use a top-k of at most {num_experts}.")
    if top_k != exact and not growth.allow_inexact:
        raise UpcycleError(
            f"top-k {top_k} is not {growth.expand} times the source's {experts.top_k}, so a token "
            "would miss some copies of its experts, and the outputs would differ.",
            f"Leave out `top_k` to use {exact}, or pass `allow_inexact=True` to convert anyway.",
        )
    config = dict(source.config)
    # transformers treats these as aliases: an old value of one would override the new one.
    names = {target.keys.num_experts, *target.keys.aliases}
    names = names & config.keys() or {target.keys.num_experts}
    config |= {**dict.fromkeys(names, num_experts), target.keys.top_k: top_k}
    if options.untie_embeddings:
        config["tie_word_embeddings"] = False
    if options.dtype is not None:
        config |= {"dtype": options.dtype, "torch_dtype": options.dtype}
    remove_local_path(config)
    layout = target.layout(options.expert_layout or experts.layout)
    tensors = tuple(_Grower(growth, options, experts, layout).tensors())
    return Plan(
        options=options,
        source=source,
        config=config,
        shards=fill_shards(tensors, options.max_shard_bytes),
        target=target,
        num_experts=num_experts,
        top_k=top_k,
        expert_size=experts.expert_size,
        routing=experts.routing,
        layers=experts.layers,
        num_layers=experts.num_layers,
        shares=experts.shares,
        expert_layout=layout,
        dense_parameters=source.num_parameters,
        dropped=source.left_out,
        growing=Growing(
            expand=growth.expand, source_num_experts=experts.num_experts, source_top_k=experts.top_k
        ),
    )


@dataclass(frozen=True)
class _Grower:
    """Makes the expression of each output tensor."""

    growth: Growth
    options: Options
    experts: Experts
    layout: ExpertLayout
    """Of the output."""

    def tensors(self) -> Iterator[OutputTensor]:
        """Yield every tensor of the output; UpcycleError if the source has unexpected tensors."""
        source, target = self.experts.moe, self.experts.target
        held = by_layer(source.tensors, target.layer)
        layers = {*range(self.experts.num_layers), *(each for each in held if each is not None)}
        growing = {layer: self._growing(layer) for layer in sorted(layers)}
        self._check(held, growing)
        for layer, names in held.items():
            for name in names:
                if layer is None or name not in growing[layer]:
                    yield OutputTensor.of(name, self._source(name), Role.COPIED, layer)
            if layer is not None and growing[layer]:
                yield from self._grown(layer)
        if self.options.untie_embeddings and target.head not in source.tensors:
            yield OutputTensor.of(target.head, self._source(_EMBEDDING), Role.HEAD)

    @property
    def _held(self) -> MoeBlock:
        return self.experts.target.layouts[self.experts.layout]

    def _growing(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Return the tensors of a layer that grow, with their required shapes."""
        experts, prefix = self.experts, self.experts.target.prefix(layer)
        router = prefix + self._held.router
        # Multi-token prediction layers come after the layers that the config counts.
        if layer not in experts.layers and router not in experts.moe.tensors:
            return {}
        N, hidden = experts.num_experts, experts.hidden_size
        found: dict[str, tuple[int, ...]] = {router: (N, hidden)}
        bias = experts.target.correction_bias(self._held, experts.routing)
        if bias is not None:
            found[prefix + bias] = (N,)
        for weight in self._held.experts:
            shape = weight.shape(experts.expert_size, hidden)
            each = range(N) if "{expert}" in weight.name else ()
            found |= {prefix + weight.name.format(expert=e): shape for e in each}
            if not each:
                found[prefix + weight.name] = (N, *shape)
        return found

    def _check(
        self,
        names: Mapping[int | None, Sequence[str]],
        growing: Mapping[int, Mapping[str, tuple[int, ...]]],
    ) -> None:
        """Raise UpcycleError unless each layer has the tensors of the first layer of its kind."""
        experts, target, tensors = self.experts, self.experts.target, self.experts.moe.tensors
        tied = bool(target.value(experts.moe.config, "tie_word_embeddings"))
        if tied:
            refuse_changes(experts.moe, (_EMBEDDING, target.head))
        wanted = {*names.get(None, ()), *_ALWAYS, *(() if tied else (target.head,))}
        first: dict[object, set[str]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, grows in growing.items():
            prefix = target.prefix(layer)
            # Unknown tensors beside the experts' weights, such as scales, could change the model.
            beside = tuple(re.sub(r"\d+\.\w+\.\w+$|\w+$", "", name) for name in grows)
            own = {name for name in names.get(layer, ()) if not name.startswith(beside)}
            kind = layer in experts.layers if layer < experts.num_layers else layer
            alike = first.setdefault(kind, {name.removeprefix(prefix) for name in own})
            wanted |= {prefix + name for name in alike}
            shapes |= grows
        held = {name: tensors[name].shape if name in tensors else () for name in sorted(wanted)}
        check_tensors(experts.moe, held | shapes)

    def _grown(self, layer: int) -> Iterator[OutputTensor]:
        experts, target, k = self.experts, self.experts.target, self.growth.expand
        prefix, held = target.prefix(layer), self._held
        made = target.layouts[self.layout]
        rows = Repeat(self._source(prefix + held.router), k)
        yield OutputTensor.of(prefix + made.router, rows, Role.ROUTER, layer)
        bias, renamed = (target.correction_bias(at, experts.routing) for at in (held, made))
        if bias is not None:
            # It keeps its dtype: training moves it by steps that narrower dtypes would lose.
            grown = Repeat(experts.moe.tensor(prefix + bias), k)
            yield OutputTensor.of(f"{prefix}{renamed}", grown, Role.CORRECTION_BIAS, layer)
        for weight in made.experts:
            each = [self._expert(layer, weight, e) for e in range(experts.num_experts)]
            copies = [expr for expr in each for _ in range(k)]
            per_expert = "{expert}" in weight.name
            for e, expr in enumerate(copies) if per_expert else [(None, Stack((*copies,)))]:
                name = prefix + weight.name.format(expert=e)
                yield OutputTensor.of(name, expr, Role.EXPERT, layer, e, weight.parts)

    def _expert(self, layer: int, weight: Weight, expert: int) -> Expr:
        """Return one expert of the source in the form of an output weight."""
        parts, size = [], self.experts.expert_size
        for part in weight.parts:
            found = locate(self._held.experts, part, width=size, expert=expert)
            whole: Expr = self.experts.moe.tensor(self.experts.target.prefix(layer) + found.tensor)
            if found.row is not None:
                whole = Select(whole, found.row)
            dim, width = found.split_dim, found.stop - found.start
            if dim is not None and type_of(whole).shape[dim] != width:
                whole = Slice(whole, dim, found.start, found.stop)
            parts.append(self.options.cast(whole))
        return joined(parts)

    def _source(self, name: str) -> Expr:
        return self.options.cast(self.experts.moe.tensor(name))
