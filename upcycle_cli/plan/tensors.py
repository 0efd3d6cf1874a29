"""The output tensors: what each is for, and the expression that makes it.

Expert e = g·G + s holds shard s of virtual group g: of each part of the dense MLP the entries
[s·I/G, (s+1)·I/G) along the dimension that counts the intermediate size, in the order that the
group has for its neurons, the same for all parts. With K shared experts the first K shards are one
expert for every token, the same for all groups, and e = g·(G − K) + s − K. Everything else is
copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TypeAlias

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.header import TORCH_DTYPES, Tensor
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models.choose import Family
from upcycle_cli.models.layers import layer_finder
from upcycle_cli.models.mlp import BIAS, Weight, find_weight, locate, parts_of
from upcycle_cli.models.tensor_pieces import Piece
from upcycle_cli.plan.expressions import (
    Cast,
    Concat,
    Constant,
    Expr,
    Gather,
    Halves,
    Mean,
    Normal,
    Permutation,
    Repeat,
    Scale,
    Slice,
    Source,
    Stack,
    Transpose,
    Zeros,
    type_of,
)
from upcycle_cli.plan.extra_tensors import added_tensors
from upcycle_cli.plan.merge import Merge, Rest, tensor_of
from upcycle_cli.plan.permutation_file import OrderFile, order_name
from upcycle_cli.plan.perturbation import perturbed
from upcycle_cli.plan.shared_expert import shared_expert
from upcycle_cli.recipe.recipe import ExpertLayout, NeuronOrder, Recipe

DEFAULT_SHARD_BYTES = 5_000_000_000
Group: TypeAlias = tuple[int, Permutation | None]
"""Of a virtual group: the model that it is made of, and the order of its neurons."""


class Role(StrEnum):
    """What an output tensor is for."""

    COPIED = "copied"
    ROUTER = "router"
    CORRECTION_BIAS = "correction_bias"
    ADDED = "added"
    EXPERT = "expert"
    SHARED_EXPERT = "shared_expert"
    ZERO_BIAS = "zero_bias"
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class OutputTensor(Tensor):
    """One tensor to write: what it is, and how it is made."""

    expr: Expr
    role: Role
    layer: int | None = None
    expert: int | None = None
    holds: tuple[str, ...] = ()
    """The parts of the dense MLP that it has of an expert, or of all of them."""

    @classmethod
    def made(
        cls,
        name: str,
        expr: Expr,
        role: Role,
        layer: int | None = None,
        expert: int | None = None,
        holds: tuple[str, ...] = (),
    ) -> OutputTensor:
        """Return the tensor that an expression makes; UpcycleError where it joins dtypes."""
        try:
            kind = type_of(expr)
        except ValueError as error:
            raise UpcycleError(
                f"{name} would join matrices of different dtypes.",
                "Choose one with --dtype, or write --expert-layout per-expert.",
            ) from error
        return cls(name, kind.dtype, kind.shape, expr, role, layer, expert, holds)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user wants of the files, beside the recipe."""

    dtype: str | None = None
    """bfloat16, float16 or float32 for every tensor, or None to keep each one's own."""
    expert_layout: ExpertLayout | None = None
    """None for the one that the target's released models have."""
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    untie_embeddings: bool = False
    neuron_orders: OrderFile | None = None
    """The permutations of a recipe whose neuron order is a file."""

    def __post_init__(self) -> None:
        if self.expert_layout is not None:
            if self.expert_layout not in set(ExpertLayout):
                raise UpcycleError(
                    f"'{self.expert_layout}' is not an expert layout.",
                    f"Choose from {', '.join(ExpertLayout)}.",
                )
            # Python callers may write "fused"; it must not compare unequal to the member.
            object.__setattr__(self, "expert_layout", ExpertLayout(self.expert_layout))
        if self.dtype is not None and self.dtype not in TORCH_DTYPES.values():
            raise UpcycleError(
                f"'{self.dtype}' is not a dtype for weights.",
                f"Use one of {', '.join(TORCH_DTYPES.values())}.",
            )
        if self.max_shard_bytes < 1:
            size = self.max_shard_bytes
            raise UpcycleError(f"the largest shard size must be positive, not {size}.")

    @property
    def storage_dtype(self) -> str | None:
        """The dtype in safetensors' notation, or None to keep each tensor's own."""
        names = {torch_name: name for name, torch_name in TORCH_DTYPES.items()}
        return None if self.dtype is None else names[self.dtype]

    def cast(self, expr: Expr) -> Expr:
        """Return an expression in the dtype that is wanted."""
        dtype = self.storage_dtype
        return expr if dtype in (None, type_of(expr).dtype) else Cast(expr, dtype)


@dataclass(frozen=True, kw_only=True)
class GivenRows:
    """Router rows that are not drawn: where they are from, and what they are once that is known."""

    origin: str
    """The digest of what they follow from."""
    dtype: str | None = None
    """None for the dtype in which routers are stored."""
    by_layer: Mapping[int, bytes] = field(default_factory=dict)


def output_tensors(
    recipe: Recipe,
    options: Options,
    family: Family,
    source: Checkpoint,
    names: Sequence[str],
    rows: GivenRows | None = None,
    orders: Mapping[int, Permutation] | None = None,
    merge: Merge | None = None,
) -> Iterator[OutputTensor]:
    """Yield every tensor of the MoE, in the order in which they are written.

    `names` are the source's tensors that are used, in order; `rows` are those of routers that are
    not drawn, and `orders` by layer those of neurons that a calibration finds. Raises UpcycleError
    when matrices of different dtypes are to be joined.
    """
    maker = Maker(recipe, options, family, source, rows, orders or {}, merge)
    embedding, dense = family.dense.family.embedding, family.dense
    layer_of = layer_finder(dense.family.layer)
    by_layer: dict[int | None, list[str]] = {}
    for name in names:
        by_layer.setdefault(layer_of(name), []).append(name)
    yield from maker.copied(embedding)
    for layer in range(dense.num_layers):
        own, upcycled = by_layer.get(layer, []), layer in family.layers
        mlp = dense.mlp(source.tensors, layer) if upcycled else ()
        taken = {dense.prefix(layer) + weight.name for weight in mlp}
        for name in own:
            if name not in taken:
                yield from maker.copied(name, layer)
        yield from maker.required_biases(layer, own)
        if upcycled:
            yield from maker.experts(layer, mlp)
    for name in by_layer.get(None, []):
        if name != embedding:
            yield from maker.copied(name)
    head = family.target.head
    if options.untie_embeddings and head not in map(family.name, source.tensors):
        yield OutputTensor.made(head, maker.source(embedding), Role.HEAD)


def router_stream(layer: int) -> str:
    """Return what the rows of a layer's router are called, where they are drawn or given."""
    return f"layers.{layer}.router"


@dataclass(frozen=True)
class Maker:
    """Writes down the expression of each output tensor of one conversion."""

    recipe: Recipe
    options: Options
    family: Family
    checkpoint: Checkpoint
    rows: GivenRows | None
    found_orders: Mapping[int, Permutation]
    merge: Merge | None

    def source(self, name: str) -> Expr:
        """A dense tensor that is no expert's, in the output dtype."""
        return self.options.cast(self._rest(name))

    def _rest(self, name: str) -> Source | Mean:
        """Return such a tensor: the source's, or the mean of all models'."""
        stored = self._stored(name)
        if self.merge is None or self.merge.rest is Rest.FIRST:
            return stored
        others = (self._stored(name, model + 1) for model in range(len(self.merge.others)))
        # Rounded once, to what it is stored in here.
        return Mean((stored, *others), self.options.storage_dtype or stored.dtype)

    def _stored(self, name: str, model: int = 0) -> Source:
        others = () if self.merge is None else self.merge.others
        entry = (self.checkpoint, *others)[model].tensors[name]
        return Source(tensor_of(model, name), entry.dtype, entry.shape)

    def copied(self, name: str, layer: int | None = None) -> Iterator[OutputTensor]:
        """A tensor that stays what it is, or several that hold its rows."""
        dense, target = self.family.dense, self.family.target
        pieces: tuple[Piece, ...] = ()
        if layer is not None:
            pieces = self.family.pieces.get(name.removeprefix(dense.prefix(layer)), ())
        if layer is None or not pieces:
            found = self.family.name(name)
            yield OutputTensor.made(found, self.source(name), Role.COPIED, layer)
            return
        start, stored = 0, self._rest(name)
        for piece in pieces:
            stop = start + dense.size(piece.rows)
            whole = stop - start == type_of(stored).shape[0]
            expr: Expr = stored if whole else Slice(stored, 0, start, stop)
            if piece.halves:
                expr = Halves(expr, dense.size("head_dim"), dense.rotary_dim)
            found = target.prefix(layer) + piece.name
            yield OutputTensor.made(found, self.options.cast(expr), Role.COPIED, layer)
            start = stop

    def required_biases(self, layer: int, names: Sequence[str]) -> Iterator[OutputTensor]:
        """Biases that the architecture has, and the source has not."""
        prefix = self.family.target.prefix(layer)
        for linear in self.family.target.required_biases:
            if f"{prefix}{linear}.bias" not in names:
                weight = type_of(self.source(f"{prefix}{linear}.weight"))
                bias = Zeros(weight.dtype, weight.shape[:1])
                yield OutputTensor.made(f"{prefix}{linear}.bias", bias, Role.ZERO_BIAS, layer)

    def experts(self, layer: int, mlp: Sequence[Weight]) -> Iterator[OutputTensor]:
        """Everything that a dense MLP becomes: router, experts, and what goes with them."""
        target, recipe = self.family.target, self.recipe
        layout = target.layouts[target.layout(self.options.expert_layout)]
        prefix = target.prefix(layer)
        yield OutputTensor.made(
            prefix + layout.router, self._router(layer, mlp), Role.ROUTER, layer
        )
        name = target.correction_bias_name(layout, str(recipe.routing))
        if target.correction_bias is not None and name is not None:
            bias = Zeros("F32", target.correction_bias.shape(recipe.num_experts))
            yield OutputTensor.made(prefix + name, bias, Role.CORRECTION_BIAS, layer)
        weights = [weight for weight in layout.experts if {*weight.parts} <= {*parts_of(mlp)}]
        groups = [*zip(self._models(), self._orders(layer), strict=True)]
        experts, routed = [], range(recipe.shared_experts, recipe.granularity)
        for weight in weights:
            shards = {
                group: [self._shard(layer, mlp, weight, i, group) for i in routed]
                for group in {*groups}
            }
            plain = (expr for group in groups for expr in shards[group])
            # Made, and drawn upon, the way that the dense matrices lie.
            cut = find_weight(mlp, weight.parts[0]).split_dim
            made = perturbed(recipe, replace(weight, split_dim=cut), layer, plain)
            experts.append(
                made if {cut, weight.split_dim} != {0, 1} else [Transpose(e) for e in made]
            )
        per_expert = any("{expert}" in weight.name for weight in weights)
        for e in range(recipe.num_experts) if per_expert else (None,):
            for weight, exprs in zip(weights, experts, strict=True):
                name = weight.name.format(expert=e)
                expr = Stack((*exprs,)) if e is None else exprs[e]
                yield OutputTensor.made(prefix + name, expr, Role.EXPERT, layer, e, weight.parts)
        for name, expr in shared_expert(self, layer, mlp, layout, groups[0]):
            yield OutputTensor.made(prefix + name, expr, Role.SHARED_EXPERT, layer)
        dtype, count = self.mlp_dtype(layer, mlp), recipe.num_experts
        for name, expr in added_tensors(
            self.family, layer, num_experts=count, dtype=dtype, source=self.source
        ):
            yield OutputTensor.made(prefix + name, expr, Role.ADDED, layer)

    def _router(self, layer: int, mlp: Sequence[Weight]) -> Expr:
        expr: Expr
        recipe, given = self.recipe, self.rows
        if given is None:
            std = recipe.router_logit_std or 1.0
            expr = self.normal(layer, mlp, "router", recipe.router_rows, std)
        else:
            stored = self.mlp_dtype(layer, mlp)
            dtype, stream = given.dtype or stored, router_stream(layer)
            shape = recipe.router_rows, self.family.dense.hidden_size
            expr = Constant(stream, dtype, shape, given.origin, given.by_layer.get(layer))
            expr = expr if dtype == stored else Cast(expr, stored)
        repeated = recipe.virtual_groups and recipe.group_size > 1
        return Repeat(expr, recipe.group_size) if repeated else expr

    def normal(
        self, layer: int, mlp: Sequence[Weight], purpose: str, rows: int, logit_std: float
    ) -> Expr:
        """Random rows that give logits of this standard deviation; `purpose` names the stream."""
        dense = self.family.dense
        name = dense.norm(self.checkpoint.tensors, layer)
        return Normal(
            seed=self.recipe.seed,
            stream=f"layers.{layer}.{purpose}",
            dtype=self.mlp_dtype(layer, mlp),
            shape=(rows, dense.hidden_size),
            logit_std=logit_std,
            norm=None if name is None else self._rest(name),
            offset=dense.family.norm_offset,
        )

    def mlp_dtype(self, layer: int, mlp: Sequence[Weight]) -> str:
        """The dtype of a layer's MLP in the output."""
        return type_of(self.source(self.family.dense.prefix(layer) + mlp[0].name)).dtype

    def _models(self) -> tuple[int, ...]:
        """Return the model that each virtual group is made of."""
        count = self.recipe.expansion
        return (0,) * count if self.merge is None else self.merge.of_groups(count)

    def _orders(self, layer: int) -> list[Permutation | None]:
        """Return the order of each virtual group's neurons, None for that of the dense MLP."""
        recipe, size = self.recipe, self.family.dense.intermediate_size
        # What is shared is the same for all groups.
        routed = size // recipe.granularity * recipe.group_size
        if recipe.neuron_order is NeuronOrder.FILE:
            assert self.options.neuron_orders is not None
            return self.options.neuron_orders.of_layer(layer, recipe.expansion)
        if recipe.neuron_order is NeuronOrder.CLUSTERED:
            # The same for all: a shard then is of the same neurons in each, and its copies copies.
            return [self.found_orders[layer]] * recipe.expansion
        orders: list[Permutation | None] = [None] * recipe.expansion
        if recipe.neuron_order is NeuronOrder.SHUFFLED:
            # One group stays as it is: what compares experts with the dense model finds it again.
            for group in range(1, recipe.expansion):
                orders[group] = Permutation(routed, order_name(layer, group), recipe.seed)
        return orders

    def _shard(
        self, layer: int, mlp: Sequence[Weight], weight: Weight, shard: int, group: Group
    ) -> Expr:
        """Return one shard of a dense MLP as one of an expert's weights holds it."""
        dense, recipe = self.family.dense, self.recipe
        size = dense.intermediate_size // recipe.granularity
        factors = recipe.factors(dense.mlp_kind)
        parts = []
        for part in weight.parts:
            here = shard * size, (shard + 1) * size
            expr = self.part_range(layer, mlp, part, here, group)
            # A bias is added before the activation, where the matrix's product is.
            factor = getattr(factors, part.removesuffix(BIAS))
            if part == f"down{BIAS}":
                factor = recipe.down_bias_factor(dense.mlp_kind)
            parts.append(expr if factor == 1.0 else Scale(expr, factor))
        return Concat(tuple(parts)) if len(parts) > 1 else parts[0]

    def part_range(
        self,
        layer: int,
        mlp: Sequence[Weight],
        part: str,
        shard: tuple[int, int],
        group: Group = (0, None),
    ) -> Expr:
        """Return a part of the dense MLP from here to there of its intermediate size, in order.

        An order of fewer neurons is one of the last.
        """
        dense = self.family.dense
        found = locate(mlp, part, width=dense.intermediate_size, shard=shard)
        model, order = group
        stored = self._stored(dense.prefix(layer) + found.tensor, model)
        if order is not None and found.split_dim is not None:
            # Taking before casting, as slicing does, touches only the bytes that are needed.
            before = dense.intermediate_size - order.size
            start, stop = (place - before for place in shard)
            return self.options.cast(
                Gather(stored, found.split_dim, order, start, stop, offset=found.start - start)
            )
        if found.split_dim is None or stored.shape[found.split_dim] == found.stop - found.start:
            return self.options.cast(stored)
        return self.options.cast(Slice(stored, found.split_dim, found.start, found.stop))
