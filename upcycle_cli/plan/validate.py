"""Whether a source has exactly the tensors that its config implies."""

from __future__ import annotations

from collections.abc import Mapping

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.header import TORCH_DTYPES, TensorEntry
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models.dense import DenseModel, why_unread
from upcycle_cli.models.layers import layer_finder


def check_source(source: Checkpoint, dense: DenseModel) -> dict[str, str]:
    """Return the tensors to drop, each with the reason.

    Raises UpcycleError for tensors that are missing, unknown, misshapen or quantised.
    """
    dropped: dict[str, str] = {}
    for name, entry in source.tensors.items():
        if why := why_unread(name, dense.family, dense.values):
            dropped[name] = why
        else:
            check_dtype(source, entry)
    held = {name: entry.shape for name, entry in source.tensors.items() if name not in dropped}
    shapes = dict(dense.shapes) or _regular(source, dense, held)
    head = dense.family.head
    # Tensors around a text model are copied, whatever their shapes are.
    shapes |= {name: shape for name, shape in held.items() if not dense.family.has(name)}
    if head in held:
        # A tied model may carry its head: it is copied, and engines treat it as before.
        shapes[head] = shapes[dense.family.embedding]
    missing = [name for name in shapes if name not in held]
    if missing:
        rest = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise UpcycleError(
            f"{source.path} lacks {missing[0]}{rest}, which its config.json implies.",
            "Only whole causal language models can be upcycled, not adapters or bare encoders.",
        )
    for name, shape in held.items():
        if name not in shapes:
            raise UpcycleError(
                f"{source.path}: unknown tensor {name}.",
                f"A {dense.family.title} model has no such tensor, so dropping it could "
                "change the model. If it is not needed, remove it from the checkpoint.",
            )
        if shape != shapes[name]:
            raise UpcycleError(
                f"{source.path}: {name} has shape {list(shape)}, "
                f"but config.json implies {list(shapes[name])}."
            )
    return dropped


def check_dtype(source: Checkpoint, entry: TensorEntry) -> None:
    """Raise UpcycleError for a tensor whose dtype is not float32, float16 or bfloat16."""
    if entry.dtype not in TORCH_DTYPES:
        raise UpcycleError(
            f"{source.path}: {entry.name} is stored as {entry.dtype}; the weights are quantised, "
            "or of a dtype that no model is trained in.",
            f"Only {', '.join(TORCH_DTYPES)} can be converted.",
        )


def _regular(
    source: Checkpoint, dense: DenseModel, held: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Return the tensors that a source must have where no list of the family's tensors exists.

    Every layer of a kind needs the tensors of the first layer of that kind, and the MLP those of
    the family's row.
    """
    layer_of = layer_finder(dense.family.layer)
    by_layer: dict[int | None, dict[str, tuple[int, ...]]] = {}
    for name, shape in held.items():
        layer = layer_of(name)
        start = 0 if layer is None else len(dense.prefix(layer))
        by_layer.setdefault(layer, {})[name[start:]] = shape
    shapes = by_layer.pop(None, {})
    hidden, width = dense.hidden_size, dense.intermediate_size
    if dense.family.embedding not in shapes:
        raise UpcycleError(f"{source.path} lacks {dense.family.embedding}.")
    shapes[dense.family.embedding] = (dense.values["vocab_size"], hidden)
    for layer, kind in enumerate(dense.kinds):
        alike = layer if dense.family.layers_differ else dense.kinds.index(kind)
        wanted = dict(by_layer.get(alike, {}))
        if layer in dense.mlp_layers:
            for weight in dense.mlp(held, layer):
                wanted[weight.name] = weight.shape(width, hidden)
            norm = dense.family.norm_name(held, dense.prefix(layer))
            if norm is not None:
                wanted.setdefault(norm, (hidden,))
        shapes |= {dense.prefix(layer) + name: shape for name, shape in wanted.items()}
    return shapes
