"""The expressions that read the dense model: a whole tensor, or some neurons of an MLP.

With several models, the source gives everything that is no expert (or all models give its mean),
and each virtual group names the model whose MLP it is made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.models.choose import Family
from upcycle_cli.models.mlp import Weight, locate
from upcycle_cli.plan import expressions as ex
from upcycle_cli.plan.merge import Merge, NonExpertWeights, tensor_of
from upcycle_cli.plan.output import Options
from upcycle_cli.recipe.recipe import Recipe


class VirtualGroup(NamedTuple):
    """The model that a virtual group is made of, and the order of its neurons."""

    model: int = 0
    permutation: ex.Permutation | None = None
    """None for the dense MLP's own order."""


@dataclass(frozen=True)
class DenseParts:
    """Makes the expressions of one conversion that read the dense model."""

    recipe: Recipe
    options: Options
    family: Family
    source: Checkpoint
    merge: Merge | None

    @cached_property
    def mlps(self) -> dict[int, tuple[Weight, ...]]:
        """By layer, the weights of each dense MLP that becomes experts."""
        dense, names = self.family.dense, self.source.tensors
        return {layer: dense.mlp(names, layer) for layer in self.family.layers}

    def tensor(self, name: str) -> ex.Expr:
        """Return a tensor that is no expert's, in the output dtype."""
        return self.options.cast(self.uncast(name))

    def uncast(self, name: str) -> ex.Source | ex.Mean:
        """Return a tensor that is no expert's: the source's, or the mean of all models."""
        stored = self._stored(name)
        if self.merge is None or self.merge.rest is NonExpertWeights.FIRST:
            return stored
        others = (self._stored(name, model + 1) for model in range(len(self.merge.others)))
        # The mean is rounded once, to the dtype in which it is written.
        return ex.Mean((stored, *others), self.options.storage_dtype or stored.dtype)

    def mlp_dtype(self, layer: int) -> str:
        """Return the dtype of a layer's MLP in the output."""
        first = self.family.dense.prefix(layer) + self.mlps[layer][0].name
        return ex.type_of(self.tensor(first)).dtype

    def neurons(
        self, layer: int, part: str, places: tuple[int, int], group: VirtualGroup | None = None
    ) -> ex.Expr:
        """Return a part of the dense MLP for the neurons at [start, stop) of a group's order.

        A permutation of fewer neurons than the MLP has applies to the last ones.
        """
        dense, (model, permutation) = self.family.dense, group or VirtualGroup()
        found = locate(self.mlps[layer], part, width=dense.intermediate_size, shard=places)
        stored = self._stored(dense.prefix(layer) + found.tensor, model)
        dim, width = found.split_dim, found.stop - found.start
        if permutation is not None and dim is not None:
            # Gathering before casting, as slicing before casting, reads only the bytes needed.
            before = dense.intermediate_size - permutation.size
            start, stop = (place - before for place in places)
            offset = found.start - start
            return self.options.cast(ex.Gather(stored, dim, permutation, start, stop, offset))
        if dim is None or stored.shape[dim] == width:
            return self.options.cast(stored)
        return self.options.cast(ex.Slice(stored, dim, found.start, found.stop))

    def random_rows(self, layer: int, purpose: str, rows: int, logit_std: float) -> ex.Expr:
        """Return random rows whose logits have this standard deviation behind the MLP's norm."""
        dense = self.family.dense
        norm = dense.norm(self.source.tensors, layer)
        return ex.Normal(
            seed=self.recipe.seed,
            stream=f"layers.{layer}.{purpose}",
            dtype=self.mlp_dtype(layer),
            shape=(rows, dense.hidden_size),
            logit_std=logit_std,
            norm=None if norm is None else self.uncast(norm),
            offset=dense.family.norm_offset,
        )

    def _stored(self, name: str, model: int = 0) -> ex.Source:
        others = () if self.merge is None else self.merge.others
        entry = (self.source, *others)[model].tensors[name]
        return ex.Source(tensor_of(model, name), entry.dtype, entry.shape)
