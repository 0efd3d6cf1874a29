"""Checks that a source has exactly the tensors that its config implies."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.header import COUNTERS, TORCH_DTYPES
from upcycle_cli.checkpoint.storage import MERGE_WITH_PEFT
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models.dense import DenseModel, why_unread
from upcycle_cli.models.layers import by_layer


def check_source(source: Checkpoint, dense: DenseModel) -> dict[str, str]:
    """Return the tensors to drop, each with the reason.

    Raises UpcycleError for tensors that are missing, unknown, misshapen or of another dtype.
    """
    unread = {name: why_unread(name, dense.family, dense.values) for name in source.tensors}
    dropped = {name: why for name, why in unread.items() if why}
    held = {name: entry.shape for name, entry in source.tensors.items() if name not in dropped}
    shapes = dict(dense.shapes) or _regular(source, dense, held)
    head = dense.family.head
    # Tensors around a text model are copied, whatever their shapes are.
    shapes |= {name: shape for name, shape in held.items() if not dense.family.has(name)}
    if head in held:
        # A tied model may carry its head: it is copied, and engines treat it as before.
        shapes[head] = shapes[dense.family.embedding]
    counters = {name for name, entry in source.tensors.items() if entry.dtype in COUNTERS}
    around = {name for name in counters if not dense.family.has(name)}
    check_tensors(source, shapes, {*dropped, *around})
    if dense.values.get("tie_word_embeddings"):
        refuse_changes(source, (dense.family.embedding, head))
    return dropped


def refuse_changes(source: Checkpoint, tied: Collection[str]) -> None:
    """Raise UpcycleError if an adapter changes a tied embedding or head."""
    for name in {*tied} & {*source.changed}:
        words = f"the adapter changes {name}, which embedding and head share (tie_word_embeddings)"
        raise UpcycleError(f"{source.location}: {words}.", MERGE_WITH_PEFT)


def check_tensors(
    source: Checkpoint, wanted: Mapping[str, tuple[int, ...]], dropped: Collection[str] = ()
) -> None:
    """Raise UpcycleError unless a source has exactly the wanted tensors, in their shapes."""
    for name, entry in source.tensors.items():
        if entry.dtype not in TORCH_DTYPES and name not in dropped:
            words = f"{source.path}: {name} is stored as {entry.dtype}; are the weights quantised?"
            raise UpcycleError(words, f"Only {', '.join(TORCH_DTYPES)} can be converted.")
    missing = [name for name in wanted if name not in source.tensors]
    if missing:
        rest = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise UpcycleError(
            f"{source.path} lacks {missing[0]}{rest}, which its config.json implies.",
            "Only whole causal language models can be converted, not adapters or bare encoders.",
        )
    for name, entry in source.tensors.items():
        if name in dropped:
            continue
        if name not in wanted:
            raise UpcycleError(
                f"{source.path}: unknown tensor {name}.",
                "Dropping it could change the model. If it is not needed, remove it from the "
                "checkpoint.",
            )
        if entry.shape != wanted[name]:
            words = f"{[*entry.shape]}, but config.json implies {[*wanted[name]]}"
            raise UpcycleError(f"{source.path}: {name} has shape {words}.")


def _regular(
    source: Checkpoint, dense: DenseModel, held: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Return the tensors that a source must have, for families without a list of tensors.

    Each layer needs the tensors of the first layer of its kind, and the MLP of the family's row.
    """
    names = by_layer(held, dense.family.layer)
    shapes = {name: held[name] for name in names.get(None, ())}
    hidden, width = dense.hidden_size, dense.intermediate_size
    if dense.family.embedding not in shapes:
        raise UpcycleError(f"{source.path} lacks {dense.family.embedding}.")
    narrow = dense.values.get("word_embed_proj_dim")  # before a projection
    shapes[dense.family.embedding] = (dense.values["vocab_size"], narrow or hidden)
    for layer, kind in enumerate(dense.kinds):
        alike = layer if dense.family.layers_differ else dense.kinds.index(kind)
        prefix, start = dense.prefix(layer), len(dense.prefix(alike))
        shapes |= {prefix + name[start:]: held[name] for name in names.get(alike, ())}
        if layer in dense.mlp_layers:
            for weight in dense.mlp(held, layer):
                shapes[prefix + weight.name] = weight.shape(width, hidden)
            norm = dense.norm(held, layer)
            if norm is not None:
                shapes.setdefault(norm, (hidden,))
    return shapes
