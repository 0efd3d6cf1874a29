"""Headers: are the tensors of an MoE those of the model that its config.json describes?

Nothing is loaded before they are: a config can ask for more memory than there is.
"""

from __future__ import annotations

from collections.abc import Iterator

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.models.moe import Layout, Target
from upcycle_cli.models.wrapper import IN_MEMORY_PREFIXES, Inside
from upcycle_cli.models.wrappers import text_config_of
from upcycle_cli.old_verification.facts import Facts
from upcycle_cli.old_verification.sizes import find_layout
from upcycle_cli.run.models import Shapes, TransformersError, empty_shapes


def header_failures(moe: Checkpoint, target: Target) -> Iterator[str]:
    """Hold names and shapes against those of transformers' model, made on the meta device."""
    try:
        wanted = expected(moe, target)
    except TransformersError as error:
        yield f"transformers cannot make a model from config.json: {error}"
        return
    turned = _turned(target, find_layout(moe, target))
    for name, shape in wanted.items():
        entry = moe.tensors.get(name)
        if entry is None:
            # A tied head is the embedding, and needs no tensor of its own.
            if name != target.head or not text_config_of(moe.config).get(
                "tie_word_embeddings", False
            ):
                yield f"{name} is missing"
        elif entry.shape != shape:
            yield f"{name} has shape {list(entry.shape)}, config.json implies {list(shape)}"
        elif name.endswith(turned) and shape[-1] == shape[-2]:
            yield f"{name} has square matrices, which transformers takes as they are, not turned"
    for name in moe.tensors:
        if name not in wanted:
            yield f"{name} is not a tensor of the model that config.json describes"


def expected(moe: Checkpoint, target: Target, *, layers: int | None = None, **sizes: int) -> Shapes:
    """Return the tensors that an MoE's config.json implies, in the layout that it is stored in.

    `layers` and `sizes` are as for `empty_shapes`. Raises TransformersError.
    """
    in_memory, written = empty_shapes(moe.path, layers=layers, **sizes)
    layout, inside = find_layout(moe, target), target.inside
    is_fused, turned = layout == target.in_memory, _turned(target, layout)
    # transformers writes matrices as it has them, whichever way it has read them.
    for name in [name for name in written if name.endswith(turned)]:
        *first, rows, columns = written[name]
        written[name] = (*first, columns, rows)
    if inside is not None:
        shapes, form = (
            (in_memory, IN_MEMORY_PREFIXES) if is_fused else (written, inside.wrapper.released)
        )
        held = {inside.in_memory(name): name for name in moe.tensors}
        loaded = {inside.in_memory(name, form): shape for name, shape in shapes.items()}
        return {held.get(name, inside.from_memory(name)): shape for name, shape in loaded.items()}
    if not is_fused:
        return written
    # All but the experts have the names of released checkpoints, if the experts have.
    memory, disk = "model.", target.name_prefix
    return {
        disk + name.removeprefix(memory) if name.startswith(memory) else name: shape
        for name, shape in in_memory.items()
    }


def _turned(target: Target, layout: Layout) -> tuple[str, ...]:
    """Return how the names of the tensors end whose matrices lie the other way in memory."""
    return tuple(f".{weight.name}" for weight in target.transposed_weights(layout))


def _released(facts: Facts, layers: int, **sizes: int) -> Shapes:
    """Return the tensors that the dense model's config.json implies, by the names it has."""
    _, written = empty_shapes(facts.dense.path, layers=layers, **sizes)
    inside = facts.family.inside
    if inside is None:
        return written
    released = Inside(inside.wrapper, inside.wrapper.released)
    return {released.moved(name, inside): shape for name, shape in written.items()}


def geometry_failures(facts: Facts) -> Iterator[str]:
    """Name tensors that the intermediate size does not run along where it is taken to.

    A model of another size tells: what differs in its shapes is what counts that size.
    """
    layer = facts.layers[0]
    twice_dense = {facts.family.key("intermediate_size"): 2 * facts.dense_size}
    twice_moe = {facts.target.keys.expert_size: 2 * facts.expert_size}
    num = layer + 1
    try:
        dense = [_released(facts, num, **sizes) for sizes in ({}, twice_dense)]
        moe = [expected(facts.moe, facts.target, layers=num, **s) for s in ({}, twice_moe)]
    except TransformersError as error:
        yield f"transformers cannot make the models to compare their shapes: {error}"
        return
    for part in facts.parts:
        places = (facts.dense_place(part, layer, 0), dense), (facts.locate(part, layer, 0), moe)
        for spot, (usual, other) in places:
            shapes = usual.get(spot.tensor), other.get(spot.tensor)
            if None in shapes:
                yield f"transformers has no {spot.tensor} where {part} is taken to be"
                continue
            pairs = zip(*shapes, strict=True)  # type: ignore[arg-type]
            cut = next((dim for dim, (one, two) in enumerate(pairs) if one != two), None)
            if cut != spot.dimension:
                yield f"{spot.tensor} is cut along another dimension than transformers' own model"
