"""The tensors of an upcycled model, and the expression that makes each.

Expert e = g·G + s holds shard s of virtual group g: the neurons [s·I/G, (s+1)·I/G) of the dense
MLP, in the group's order, in every part of the MLP. With K shared experts the first K shards become
one expert for every token, the same for all groups, and the routed experts are
e = g·(G − K) + s − K. Targets add the shared expert's output without a gate, or with a gate of 1/2,
so it is scaled differently. Everything else is copied.

In a merge each virtual group comes from one model; everything else comes from the source or is the
mean of all models.

Each perturbed expert draws its own random numbers, so copies of a shard differ. Noise is relative
to the standard deviation of the expert's matrix; biases get none. Reinitializing a neuron replaces
its row of gate and up, its column of down and its biases; each part keeps its mean and standard
deviation (Drop-Upcycling, Nakamura et al., arXiv 2502.19261).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import NamedTuple

from upcycle_cli.checkpoint.checkpoint import tensor_of
from upcycle_cli.checkpoint.header import COUNTERS
from upcycle_cli.checkpoint.made import renamed
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models.defaults import dimension
from upcycle_cli.models.layers import by_layer
from upcycle_cli.models.mlp import BIAS, Weight, find_weight, locate, parts_of
from upcycle_cli.plan import expressions as ex
from upcycle_cli.plan.inputs import order_name, router_stream
from upcycle_cli.plan.merge import NonExpertWeights
from upcycle_cli.plan.output import OutputTensor, Role
from upcycle_cli.plan.plan import Plan
from upcycle_cli.recipe.recipe import NeuronOrder, RouterInit

_SAMPLE_ROWS = 16  # enough rows of a matrix to tell its scale
_HALF_LOGIT_STD = 1e-9
"""The logit std for a gate of 1/2: float32 rounds the gate to 1/2, and llama.cpp divides by the
logit, so it must not be 0."""


class VirtualGroup(NamedTuple):
    """The model that a virtual group comes from, and the order of its neurons."""

    model: int = 0
    order: ex.Permutation | None = None
    """None for the dense MLP's own order."""


class TensorMaker:
    """Makes every tensor of one upcycled model."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._recipe, self._options = plan, plan.recipe, plan.options
        self._dense, self._target = plan.family.dense, plan.family.target
        self._layout = self._target.layouts[plan.expert_layout]
        names, layers = plan.source.tensors, plan.layers
        self._mlps = {layer: self._dense.mlp(names, layer) for layer in layers}

    def tensors(self) -> Iterator[OutputTensor]:
        """Yield every output tensor in the order in which they are written.

        Raises UpcycleError for matrices of different dtypes in one tensor, and for unusable router
        rows of a file.
        """
        plan, dense, target = self._plan, self._dense, self._target
        embedding = dense.family.embedding
        kept = (name for name in plan.source.tensors if name not in plan.dropped)
        names = by_layer(kept, dense.family.layer)
        yield from self._copied(embedding)
        for layer in range(dense.num_layers):
            own = names.get(layer, [])
            replaced = {dense.prefix(layer) + weight.name for weight in self._mlps.get(layer, ())}
            for name in own:
                if name not in replaced:
                    yield from self._copied(name, layer)
            yield from self._zero_biases(layer, own)
            if layer in plan.layers:
                yield from self._mixture(layer)
        for name in names.get(None, []):
            if name != embedding:
                yield from self._copied(name)
        untied = target.head not in map(plan.family.name, plan.source.tensors)
        if plan.options.untie_embeddings and untied:
            yield OutputTensor.of(target.head, self._tensor(embedding), Role.HEAD)

    def _tensor(self, name: str) -> ex.Expr:
        """Return a tensor outside the experts, in the output dtype."""
        return self._options.cast(self._uncast(name))

    def _uncast(self, name: str) -> ex.Held | ex.Mean:
        """Return a tensor outside the experts: the source's, or the mean of all models."""
        stored, merge = self._stored(name), self._plan.merge
        if merge is None or merge.rest is NonExpertWeights.FIRST or stored.dtype in COUNTERS:
            return stored
        several = (self._stored(name, model) for model in range(len(self._plan.sources)))
        # The mean is rounded once, to the dtype in which it is written; its parts are not.
        parts = (s if isinstance(s, ex.Source) else replace(s, dtype="F32") for s in several)
        return ex.Mean((*parts,), self._options.storage_dtype or stored.dtype)

    def _stored(self, name: str, model: int = 0) -> ex.Held:
        tensor = self._plan.sources[model].tensor(name)
        return renamed(tensor, partial(tensor_of, model)) if model else tensor

    def _mlp_dtype(self, layer: int) -> str:
        """Return the dtype of a layer's MLP in the output."""
        first = self._dense.prefix(layer) + self._mlps[layer][0].name
        return ex.type_of(self._tensor(first)).dtype

    def _neurons(self, layer: int, part: str, places: tuple[int, int], of: VirtualGroup) -> ex.Expr:
        """Return a part of the dense MLP for the neurons at [start, stop) of a group's order.

        A permutation of fewer neurons than the MLP has applies to the last ones.
        """
        whole, order = self._dense.intermediate_size, of.order
        found = locate(self._mlps[layer], part, width=whole, shard=places)
        name = self._dense.prefix(layer) + found.tensor
        stored, first = self._stored(name, of.model), self._stored(name)
        if stored.dtype != first.dtype and self._options.dtype is None:
            one, other = self._plan.source, self._plan.sources[of.model]
            words = f"{name} is {stored.dtype} in {other.path}, but {first.dtype} in {one.path}."
            raise UpcycleError(words, "Choose one with `dtype`.")
        dim, width = found.split_dim, found.stop - found.start
        if order is not None and dim is not None:
            # Gathering before casting, as slicing before casting, reads only the bytes needed.
            start, stop = (place - (whole - order.size) for place in places)
            offset = found.start - start
            return self._options.cast(ex.Gather(stored, dim, order, start, stop, offset))
        if dim is None or stored.shape[dim] == width:
            return self._options.cast(stored)
        return self._options.cast(ex.Slice(stored, dim, found.start, found.stop))

    def _random_rows(self, layer: int, purpose: str, rows: int, logit_std: float) -> ex.Expr:
        """Return random rows that give logits of this standard deviation behind the MLP's norm."""
        norm = self._dense.norm(self._plan.source.tensors, layer)
        return ex.Normal(
            seed=self._recipe.seed,
            stream=f"layers.{layer}.{purpose}",
            dtype=self._mlp_dtype(layer),
            shape=(rows, self._dense.hidden_size),
            logit_std=logit_std,
            norm=None if norm is None else self._uncast(norm),
            offset=self._dense.family.norm_offset,
        )

    def _copied(self, name: str, layer: int | None = None) -> Iterator[OutputTensor]:
        """Yield a tensor under its new name, or the tensors that its rows are split into."""
        family, dense = self._plan.family, self._dense
        own_name = name if layer is None else name.removeprefix(dense.prefix(layer))
        if layer is None or own_name not in family.pieces:
            whole = self._options.cast(self._rotated(own_name, self._uncast(name)))
            yield OutputTensor.of(family.name(name), whole, Role.COPIED, layer)
            return
        start, stored = 0, self._uncast(name)
        for piece, rows in family.pieces[own_name].items():
            stop = start + dimension(rows, dense.values)
            is_all = stop - start == ex.type_of(stored).shape[0]
            expr: ex.Expr = stored if is_all else ex.Slice(stored, 0, start, stop)
            expr = self._options.cast(self._rotated(piece, expr))
            new_name = self._target.prefix(layer) + piece
            yield OutputTensor.of(new_name, expr, Role.COPIED, layer)
            start = stop

    def _rotated(self, own_name: str, expr: ex.Expr) -> ex.Expr:
        """Return a tensor with its rows in the order in which the target's rope rotates them."""
        interleaved = self._target.interleaved_rope
        alike = self._target.ships_code or self._dense.family.interleaved_rope is interleaved
        if alike or not own_name.startswith(("self_attn.q_proj.", "self_attn.k_proj.")):
            return expr
        size = self._dense.values["head_dim"]
        pairs = math.ceil(int(size * self._dense.rotary_share) / 2)  # as transformers rounds
        return ex.RotaryRows(expr, size, 2 * pairs, interleaved)

    def _zero_biases(self, layer: int, names: Sequence[str]) -> Iterator[OutputTensor]:
        """Yield the biases that the target needs and the source lacks."""
        for linear in self._target.required_biases:
            name = self._target.prefix(layer) + linear
            if f"{name}.bias" not in names:
                weight = ex.type_of(self._tensor(f"{name}.weight"))
                bias = ex.Full(weight.dtype, weight.shape[:1])
                yield OutputTensor.of(f"{name}.bias", bias, Role.ZERO_BIAS, layer)

    def _added(self, layer: int) -> Iterator[tuple[str, ex.Expr]]:
        """Yield the target's extra tensors of a layer: constants, or scaled dense tensors."""
        rows = (row for row in self._target.extra_tensors if not self._dense.has(row.name))
        for row in rows:
            value = row.value(self._dense.values)
            if row.of is None:
                size = self._dense.values[row.size]
                size = self._recipe.num_experts if row.per_expert else size
                yield row.name, ex.Full(self._mlp_dtype(layer), (size,), value)
            else:
                yield row.name, ex.scaled(self._tensor(self._dense.prefix(layer) + row.of), value)

    def _mixture(self, layer: int) -> Iterator[OutputTensor]:
        target, layout, recipe = self._target, self._layout, self._recipe
        prefix = target.prefix(layer)
        yield OutputTensor.of(prefix + layout.router, self._router(layer), Role.ROUTER, layer)
        name = target.correction_bias(layout, str(recipe.routing))
        if name is not None:
            bias = ex.Full("F32", (*target.bias_rows, recipe.num_experts))
            yield OutputTensor.of(prefix + name, bias, Role.CORRECTION_BIAS, layer)
        groups, held = self._groups(layer), parts_of(self._mlps[layer])
        weights = [weight for weight in layout.experts if {*weight.parts} <= {*held}]
        experts = [self._experts(layer, weight, groups) for weight in weights]
        per_expert = any("{expert}" in weight.name for weight in weights)
        for e in range(recipe.num_experts) if per_expert else (None,):
            for weight, exprs in zip(weights, experts, strict=True):
                name = prefix + weight.name.format(expert=e)
                expr = ex.Stack((*exprs,)) if e is None else exprs[e]
                yield OutputTensor.of(name, expr, Role.EXPERT, layer, e, weight.parts)
        for name, expr in self._shared_expert(layer, groups[0]):
            yield OutputTensor.of(prefix + name, expr, Role.SHARED_EXPERT, layer)
        for name, expr in self._added(layer):
            yield OutputTensor.of(prefix + name, expr, Role.ADDED, layer)

    def _router(self, layer: int) -> ex.Expr:
        recipe, inputs, dtype = self._recipe, self._plan.inputs, self._mlp_dtype(layer)
        if recipe.router_init is RouterInit.NORMAL:
            std = recipe.router_logit_std or 1.0
            expr = self._random_rows(layer, "router", recipe.router_rows, std)
        elif inputs.rows is not None:
            expr = inputs.rows.router_rows(layer, dtype)
            expr = expr if expr.dtype == dtype else ex.Cast(expr, dtype)
        else:
            found, origin = self._plan.found(layer), inputs.text_digest
            shape = recipe.router_rows, self._dense.hidden_size
            data = None if found is None else found.rows
            expr = ex.Constant(router_stream(layer), dtype, shape, origin, data)
        repeated = recipe.virtual_groups and recipe.group_size > 1
        return ex.Repeat(expr, recipe.group_size) if repeated else expr

    def _groups(self, layer: int) -> list[VirtualGroup]:
        """Return the model and the order of neurons of each virtual group."""
        recipe, plan, inputs = self._recipe, self._plan, self._plan.inputs
        count, size = recipe.expansion, self._dense.intermediate_size
        models = (0,) * count if plan.merge is None else plan.merge.of_groups(count)
        orders: list[ex.Permutation | None] = [None] * count
        match recipe.neuron_order:
            case NeuronOrder.FILE if inputs.orders is not None:
                orders = [*inputs.orders.orders(layer, count)]
            case NeuronOrder.FILE:
                orders = [ex.Permutation(size, order_name(layer, group)) for group in range(count)]
            case NeuronOrder.CLUSTERED:
                # One order for all groups: the copies of a shard then stay equal.
                found, origin = plan.found(layer), inputs.text_digest
                indices = None if found is None else found.order
                order = ex.Permutation(size, order_name(layer), origin=origin, indices=indices)
                orders = [order] * count
            case NeuronOrder.SHUFFLED:
                # Shared experts are the same for all groups, and are not shuffled. The first group
                # keeps its order, so that its experts can be compared with the dense model.
                size = plan.expert_size * recipe.group_size
                for group in range(1, count):
                    orders[group] = ex.Permutation(size, order_name(layer, group), recipe.seed)
        return [VirtualGroup(*pair) for pair in zip(models, orders, strict=True)]

    def _experts(self, layer: int, weight: Weight, groups: Sequence[VirtualGroup]) -> list[ex.Expr]:
        recipe, made = self._recipe, dict[tuple[VirtualGroup, int, int], ex.Expr]()
        cut = find_weight(self._mlps[layer], weight.parts[0]).split_dim
        transposed = {cut, weight.split_dim} == {0, 1}
        found = []
        routed = range(recipe.shared_experts, recipe.granularity)
        for expert, (group, shard) in enumerate(product(groups, routed)):
            # Equal experts share their expression; perturbed ones are all different.
            key = group, shard, expert if recipe.perturbed else 0
            if key not in made:
                parts = [self._part(layer, part, shard, group, expert) for part in weight.parts]
                expr = ex.joined(parts)
                made[key] = ex.Transpose(expr) if transposed else expr
            found.append(made[key])
        return found

    def _part(self, layer: int, part: str, shard: int, group: VirtualGroup, expert: int) -> ex.Expr:
        """Return a part of one expert: neurons of the dense MLP, scaled and perturbed."""
        recipe, size = self._recipe, self._plan.expert_size
        expr = self._neurons(layer, part, (shard * size, (shard + 1) * size), group)
        expr = ex.scaled(expr, self._plan.factors.of(part))
        stream = f"layers.{layer}.experts.{expert}"
        cut = find_weight(self._mlps[layer], part).split_dim
        # Noise is drawn in the layout of the dense matrices, whatever the output's layout is.
        if recipe.noise and not part.endswith(BIAS):
            return ex.AddNoise(expr, recipe.noise, recipe.seed, f"{stream}.{part}")
        if not recipe.reinit or cut is None:
            return expr
        order = ex.Permutation(size, f"{stream}.neurons", recipe.seed)
        count = recipe.reinit_count(size)
        return ex.Reinit(expr, cut, order, count, recipe.seed, f"{stream}.{part}")

    def _shared_expert(self, layer: int, group: VirtualGroup) -> Iterator[tuple[str, ex.Expr]]:
        """Yield the names and expressions of a layer's shared expert, if it has one.

        `group` is the first group: all groups agree on the neurons that they share.
        """
        shared, count = self._target.shared, self._recipe.shared_experts
        if shared is None or not (count or shared.required):
            return
        size, held = self._plan.expert_size, list[ex.Expr]()
        for weight in self._layout.shared:
            if count:
                places = 0, count * size
                held = [self._neurons(layer, part, places, group) for part in weight.parts]
                if weight.parts == ("down",):
                    held = [ex.scaled(held[0], shared.down_factor)]
            else:
                width = shared.size or size
                held = [self._inert(layer, part, width) for part in weight.parts]
            yield weight.name, ex.joined(held)
        if shared.router is not None:
            std = _HALF_LOGIT_STD if count else 1.0
            yield shared.router, self._random_rows(layer, "shared_expert_gate", 1, std)

    def _inert(self, layer: int, part: str, size: int) -> ex.Expr:
        """Return a part of a shared expert that outputs zero but can learn.

        Its down matrix is zero, or the weight of the norm behind it is.
        """
        shape = (self._dense.hidden_size, size)
        if part == "down" and self._target.shared and self._target.shared.norm is None:
            return ex.Full(self._mlp_dtype(layer), shape)
        rows = min(_SAMPLE_ROWS, self._dense.intermediate_size)
        sample = self._neurons(layer, part, (0, rows), VirtualGroup())
        stream = f"layers.{layer}.shared_expert.{part}"
        shape = shape if part == "down" else shape[::-1]
        return ex.RandomLike(self._recipe.seed, stream, shape, sample)
