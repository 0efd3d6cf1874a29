"""Both models, run by transformers' own code side by side, with their weights left on disk.

The dense model runs as it was published and, where the MoE's dtypes are narrower, once more with
its weights rounded to them, which tells the price of the dtype from that of the conversion. After
each layer the three wait for each other: what a layer adds is measured where it is added, and
nothing of a layer is kept.

Legend: B texts, S positions, H hidden size, P positions that are not padding, K sampled positions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial

import torch

from upcycle_cli.checkpoint.checkpoint import Reader
from upcycle_cli.checkpoint.header import TORCH_DTYPES
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models.mlp import find_weight
from upcycle_cli.old_verification.facts import Facts, Moe
from upcycle_cli.run.lazy_weights import Stored, finder, stored_model
from upcycle_cli.run.mixtures import stored_mixture
from upcycle_cli.run.models import Model, TransformersError, decoder_layers


def dense_model(facts: Facts, reader: Reader, *, rounded: bool = False) -> Model:
    """Return the dense model, with its weights rounded to the MoE's dtypes if asked for.

    Raises UpcycleError when transformers cannot make it.
    """
    find = finder(facts.dense, facts.family.inside, "model.")

    def tensor(name: str) -> Stored | None:
        found = find(name)
        if found is None:
            return None
        name = found
        entry = facts.moe.tensors.get(facts.in_moe(name)[0])
        # An untied head in the dense model, a tied one in the MoE: nothing was rounded.
        narrow = rounded and entry is not None
        dtype = getattr(torch, TORCH_DTYPES[entry.dtype]) if narrow and entry else torch.float32
        return Stored((reader.tensor(name),), lambda held: held.to(dtype).float())

    try:
        return stored_model(facts.dense.path, lambda name, _: tensor(name), {})
    except TransformersError as error:
        raise UpcycleError(f"transformers cannot run {facts.dense.path}: {error}") from error


def rounds(facts: Facts) -> bool:
    """Whether the MoE's dtypes can have changed a weight of the dense model."""
    for name, entry in facts.dense.tensors.items():
        became = (facts.moe.tensors.get(held) for held in facts.in_moe(name))
        if any(held and held.dtype not in (entry.dtype, "F32") for held in became):
            return True
    return False


def moe_model(
    facts: Moe,
    reader: Reader,
    dtype: torch.dtype = torch.float32,
    copied: Collection[int] = (),
    rounded: Mapping[str, torch.dtype] | None = None,
) -> Model:
    """Return the MoE, to be run in a dtype; raises TransformersError.

    `rounded` has the dtypes that tensors are rounded to first, by their names on disk.

    `copied` are the layers in which the experts of a shard were found to be the same bytes: each of
    them is run once for a token, with the sum of its copies' gates.
    """
    find = finder(facts.moe, facts.target.inside, facts.target.name_prefix)
    in_memory = facts.target.in_memory.experts

    def stored(name: str, *pieces: torch.Tensor) -> Stored:
        narrow = (rounded or {}).get(name)
        if narrow is None:
            return Stored(pieces, lambda held: held.to(dtype), dtype)
        return Stored(pieces, lambda held: held.to(narrow).to(dtype), dtype)

    def tensor(name: str) -> Stored | None:
        found = find(name)
        return None if found is None else stored(found, reader.tensor(found))

    def expert(layer: int, parts: Sequence[str], number: int) -> Stored:
        spots = [facts.locate(part, layer, number) for part in parts]
        cut = find_weight(in_memory, parts[0]).split_dim
        pieces = (spot.select(reader.tensor(spot.tensor), cut) for spot in spots)
        return stored(spots[0].tensor, *pieces)

    experts = facts.layers, facts.parts, expert
    model = stored_mixture(facts.moe.path, facts.target, tensor, experts, dtype)
    module = facts.target.in_memory.module
    for layer in {*copied} & {*facts.layers}:
        held = decoder_layers(model)[layer].get_submodule(module)
        held.register_forward_pre_hook(partial(_merge_copies, facts.group_size))
    return model


def _merge_copies(
    group_size: int, _experts: Model, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Send each token once to the first copy of a shard, with the gates of all copies."""
    states_SH, experts_ST, gates_ST = inputs
    gates_SG = gates_ST.new_zeros(len(gates_ST), group_size)
    gates_SG.scatter_add_(1, experts_ST % group_size, gates_ST)
    chosen_SG = torch.zeros_like(gates_SG).scatter_(1, experts_ST % group_size, 1.0)
    # Where a token chose fewer shards than another, what fills the row up has a gate of 0.
    most = int(chosen_SG.sum(-1).max())
    shards_ST = chosen_SG.topk(most).indices
    return states_SH, shards_ST, gates_SG.gather(1, shards_ST)
