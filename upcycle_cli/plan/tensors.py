"""The tensors of an upcycled model, and the expression that makes each.

Expert e = g·G + s holds shard s of virtual group g: the neurons [s·I/G, (s+1)·I/G) of the dense
MLP, in the order that the group has for them, in every part of the MLP. With K shared experts the
first K shards become one expert for every token, the same for all groups, and the routed experts
are e = g·(G − K) + s − K. Everything else is copied. The targets add the shared expert's output
without a router's gate, or halve it by a gate of its own, so it is not scaled as they are.

Every perturbed expert draws for itself, so that all N differ, copies of one shard too. Noise is
relative to the standard deviation of the expert's own matrix; biases get none. A neuron that is
initialised again is its row of gate and of up, its column of down and its entries of their biases,
the same neurons in all parts; each part keeps the mean and standard deviation of the values that it
replaces (Drop-Upcycling, Nakamura et al., arXiv 2502.19261).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from upcycle_cli.models.dense import Piece
from upcycle_cli.models.layers import layer_finder
from upcycle_cli.models.mlp import BIAS, Weight, find_weight, parts_of
from upcycle_cli.models.moe import MoeBlock
from upcycle_cli.plan import expressions as ex
from upcycle_cli.plan.dense_parts import DenseParts, VirtualGroup
from upcycle_cli.plan.output import OutputTensor, Role
from upcycle_cli.plan.tensor_files import RouterRows, order_name, router_stream
from upcycle_cli.recipe.recipe import NeuronOrder, Recipe
from upcycle_cli.recipe.scaling import Factors

_SAMPLE_ROWS = 16  # enough rows of a matrix to tell its scale
_HALF_LOGIT_STD = 1e-9
"""The logit std of a gate of 1/2: float32 rounds the gate to 1/2, and llama.cpp, which divides by
the logit, needs one other than 0."""


@dataclass(frozen=True)
class TensorMaker:
    """Makes every tensor of one upcycled model."""

    parts: DenseParts
    factors: Factors
    rows: RouterRows | None
    """Router rows that are not drawn."""
    permutations: Mapping[int, ex.Permutation]
    """By layer, the order of the neurons that a calibration finds."""

    def tensors(self, names: Sequence[str]) -> Iterator[OutputTensor]:
        """Yield every output tensor in the order in which they are written.

        `names` are the source's tensors that are used, in order. Raises UpcycleError when matrices
        of different dtypes would be joined.
        """
        parts, dense, target = self.parts, self.parts.family.dense, self.parts.family.target
        embedding = dense.family.embedding
        layer_of = layer_finder(dense.family.layer)
        by_layer: dict[int | None, list[str]] = {}
        for name in names:
            by_layer.setdefault(layer_of(name), []).append(name)
        yield from self._copied(embedding)
        for layer in range(dense.num_layers):
            own, upcycled = by_layer.get(layer, []), layer in parts.family.layers
            replaced = {dense.prefix(layer) + weight.name for weight in parts.mlps.get(layer, ())}
            for name in own:
                if name not in replaced:
                    yield from self._copied(name, layer)
            yield from self._zero_biases(layer, own)
            if upcycled:
                yield from self._mixture(layer)
        for name in by_layer.get(None, []):
            if name != embedding:
                yield from self._copied(name)
        untied = target.head not in map(parts.family.name, parts.source.tensors)
        if parts.options.untie_embeddings and untied:
            yield OutputTensor.of(target.head, parts.tensor(embedding), Role.HEAD)

    def _copied(self, name: str, layer: int | None = None) -> Iterator[OutputTensor]:
        """Yield a tensor under its new name, or the several tensors that hold its rows."""
        family = self.parts.family
        pieces: tuple[Piece, ...] = ()
        if layer is not None:
            pieces = family.pieces.get(name.removeprefix(family.dense.prefix(layer)), ())
        if layer is None or not pieces:
            copy = self.parts.tensor(name)
            yield OutputTensor.of(family.name(name), copy, Role.COPIED, layer)
            return
        start, stored = 0, self.parts.uncast(name)
        for piece in pieces:
            stop = start + family.dense.size(piece.rows)
            whole = stop - start == ex.type_of(stored).shape[0]
            expr: ex.Expr = stored if whole else ex.Slice(stored, 0, start, stop)
            if piece.halves:
                expr = ex.DeinterleaveRotary(
                    expr, family.dense.size("head_dim"), family.dense.rotary_dim
                )
            new_name = family.target.prefix(layer) + piece.name
            yield OutputTensor.of(new_name, self.parts.options.cast(expr), Role.COPIED, layer)
            start = stop

    def _zero_biases(self, layer: int, names: Sequence[str]) -> Iterator[OutputTensor]:
        """Yield the biases that the target's architecture has and the source lacks."""
        prefix = self.parts.family.target.prefix(layer)
        for linear in self.parts.family.target.required_biases:
            if f"{prefix}{linear}.bias" not in names:
                weight = ex.type_of(self.parts.tensor(f"{prefix}{linear}.weight"))
                bias = ex.Full(weight.dtype, weight.shape[:1])
                yield OutputTensor.of(f"{prefix}{linear}.bias", bias, Role.ZERO_BIAS, layer)

    def _mixture(self, layer: int) -> Iterator[OutputTensor]:
        """Yield the tensors that a dense MLP becomes."""
        parts, target, recipe = self.parts, self.parts.family.target, self.parts.recipe
        layout = target.layouts[target.layout(parts.options.expert_layout)]
        prefix = target.prefix(layer)
        yield OutputTensor.of(prefix + layout.router, self._router(layer), Role.ROUTER, layer)
        name = target.correction_bias(layout, str(recipe.routing))
        if name is not None:
            bias = ex.Full("F32", (*target.bias_rows, recipe.num_experts))
            yield OutputTensor.of(prefix + name, bias, Role.CORRECTION_BIAS, layer)
        groups = self._groups(layer)
        weights = [
            weight for weight in layout.experts if {*weight.parts} <= {*parts_of(parts.mlps[layer])}
        ]
        experts = [self._experts(layer, weight, groups) for weight in weights]
        per_expert = any("{expert}" in weight.name for weight in weights)
        for e in range(recipe.num_experts) if per_expert else (None,):
            for weight, exprs in zip(weights, experts, strict=True):
                name = prefix + weight.name.format(expert=e)
                expr = ex.Stack((*exprs,)) if e is None else exprs[e]
                yield OutputTensor.of(name, expr, Role.EXPERT, layer, e, weight.parts)
        for name, expr in _shared_expert(parts, layer, layout, groups[0]):
            yield OutputTensor.of(prefix + name, expr, Role.SHARED_EXPERT, layer)
        for name, expr in self._added(layer):
            yield OutputTensor.of(prefix + name, expr, Role.ADDED, layer)

    def _router(self, layer: int) -> ex.Expr:
        expr: ex.Expr
        recipe, rows = self.parts.recipe, self.rows
        if rows is None:
            std = recipe.router_logit_std or 1.0
            expr = self.parts.random_rows(layer, "router", recipe.router_rows, std)
        else:
            stored = self.parts.mlp_dtype(layer)
            dtype, data = rows.dtype or stored, rows.by_layer.get(layer)
            shape = recipe.router_rows, self.parts.family.dense.hidden_size
            expr = ex.Constant(router_stream(layer), dtype, shape, rows.origin, data)
            expr = expr if dtype == stored else ex.Cast(expr, stored)
        repeated = recipe.virtual_groups and recipe.group_size > 1
        return ex.Repeat(expr, recipe.group_size) if repeated else expr

    def _groups(self, layer: int) -> list[VirtualGroup]:
        """Return the model and the order of neurons of each virtual group."""
        recipe, merge, options = self.parts.recipe, self.parts.merge, self.parts.options
        count = recipe.expansion
        models = (0,) * count if merge is None else merge.of_groups(count)
        orders: list[ex.Permutation | None] = [None] * count
        match recipe.neuron_order:
            case NeuronOrder.FILE:
                assert options.neuron_orders is not None
                orders = options.neuron_orders.of_layer(layer, count)
            case NeuronOrder.CLUSTERED:
                # One order for all groups: the copies of a shard then stay equal.
                orders = [self.permutations[layer]] * count
            case NeuronOrder.SHUFFLED:
                # Shared experts are the same for all groups, and are not shuffled. The first group
                # keeps its order, so that its experts can be compared with the dense model.
                width = self.parts.family.dense.intermediate_size // recipe.granularity
                size = width * recipe.group_size
                for group in range(1, count):
                    orders[group] = ex.Permutation(size, order_name(layer, group), recipe.seed)
        return [VirtualGroup(*pair) for pair in zip(models, orders, strict=True)]

    def _experts(self, layer: int, weight: Weight, groups: Sequence[VirtualGroup]) -> list[ex.Expr]:
        """Return one weight of each expert of a layer."""
        recipe = self.parts.recipe
        routed = range(recipe.shared_experts, recipe.granularity)
        # Equal groups share their expressions.
        shards = {
            group: [self._shard(layer, weight, shard, group) for shard in routed]
            for group in {*groups}
        }
        # Noise is drawn in the layout of the dense matrices, whatever the output's layout is.
        cut = find_weight(self.parts.mlps[layer], weight.parts[0]).split_dim
        plain = (expr for group in groups for expr in shards[group])
        experts = _perturbed_experts(recipe, replace(weight, split_dim=cut), layer, plain)
        transposed = {cut, weight.split_dim} == {0, 1}
        return [ex.Transpose(expr) for expr in experts] if transposed else experts

    def _shard(self, layer: int, weight: Weight, shard: int, group: VirtualGroup) -> ex.Expr:
        """Return one shard of the dense MLP as a weight of an expert holds it."""
        size = self.parts.family.dense.intermediate_size // self.parts.recipe.granularity
        parts = []
        for part in weight.parts:
            places = shard * size, (shard + 1) * size
            expr = self.parts.neurons(layer, part, places, group)
            factor = self.factors.of(part)
            parts.append(expr if factor == 1.0 else ex.Scale(expr, factor))
        return ex.Concat(tuple(parts)) if len(parts) > 1 else parts[0]

    def _added(self, layer: int) -> Iterator[tuple[str, ex.Expr]]:
        """Yield what the target's row adds to a layer: a constant, or a scaled dense tensor."""
        dense, target = self.parts.family.dense, self.parts.family.target
        for row in target.extra_tensors:
            value = row.value(dense.values)
            if row.of is None:
                size = self.parts.recipe.num_experts if row.per_expert else dense.hidden_size
                yield row.name, ex.Full(self.parts.mlp_dtype(layer), (size,), value)
            else:
                stored = self.parts.tensor(dense.prefix(layer) + row.of)
                yield row.name, stored if value == 1.0 else ex.Scale(stored, value)


def _shared_expert(
    parts: DenseParts, layer: int, layout: MoeBlock, group: VirtualGroup
) -> Iterator[tuple[str, ex.Expr]]:
    """Yield the names and expressions of a layer's shared expert; nothing where there is none.

    `group` is the first group: all groups agree on the neurons that they share.
    """
    shared, count = parts.family.target.shared, parts.recipe.shared_experts
    if shared is None or not (count or shared.required):
        return
    expert_size = parts.family.dense.intermediate_size // parts.recipe.granularity
    for weight in layout.shared:
        held: list[ex.Expr] = []
        for part in weight.parts:
            if not count:
                held.append(_inert(parts, layer, part, shared.size or expert_size))
                continue
            expr = parts.neurons(layer, part, (0, count * expert_size), group)
            factor = shared.down_factor if part == "down" else 1.0
            held.append(expr if factor == 1.0 else ex.Scale(expr, factor))
        yield weight.name, ex.Concat(tuple(held)) if len(held) > 1 else held[0]
    if shared.router is not None:
        std = _HALF_LOGIT_STD if count else 1.0
        yield shared.router, parts.random_rows(layer, "shared_expert_gate", 1, std)


def _inert(parts: DenseParts, layer: int, part: str, size: int) -> ex.Expr:
    """Return a part of a shared expert that outputs zero but can learn.

    Its down matrix is zero, or the weight of the norm behind it is.
    """
    hidden = parts.family.dense.hidden_size
    shared = parts.family.target.shared
    if part == "down" and shared is not None and shared.norm is None:
        return ex.Full(parts.mlp_dtype(layer), (hidden, size))
    rows = min(_SAMPLE_ROWS, parts.family.dense.intermediate_size)
    sample = parts.neurons(layer, part, (0, rows))
    stream = f"layers.{layer}.shared_expert.{part}"
    shape = (hidden, size) if part == "down" else (size, hidden)
    return ex.RandomLike(parts.recipe.seed, stream, shape, sample)


def _perturbed_experts(
    recipe: Recipe, weight: Weight, layer: int, experts: Iterable[ex.Expr]
) -> list[ex.Expr]:
    """Return a weight of each expert of a layer, perturbed as the recipe says."""
    if not recipe.perturbed:
        return [*experts]
    found: list[ex.Expr] = []
    for number, expr in enumerate(experts):
        stream = f"layers.{layer}.experts.{number}"
        held = expr.parts if isinstance(expr, ex.Concat) else (expr,)
        parts = tuple(
            _perturbed(recipe, part, weight.split_dim, stream, each)
            for part, each in zip(weight.parts, held, strict=True)
        )
        found.append(ex.Concat(parts) if len(parts) > 1 else parts[0])
    return found


def _perturbed(recipe: Recipe, part: str, cut: int | None, stream: str, expr: ex.Expr) -> ex.Expr:
    if recipe.noise:
        if part.endswith(BIAS):
            return expr
        return ex.AddNoise(expr, recipe.noise, recipe.seed, f"{stream}.{part}")
    if cut is None:
        return expr
    size = ex.type_of(expr).shape[cut]
    permutation = ex.Permutation(size, f"{stream}.neurons", recipe.seed)
    count = recipe.reinit_count(size)
    return ex.Reinit(expr, cut, permutation, count, recipe.seed, f"{stream}.{part}")
