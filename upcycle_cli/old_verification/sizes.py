"""From two checkpoints to the facts: sizes that fit each other, or words on why they do not.

Sizes come from the dense model's tensors and the MoE's config.json. Of the families only their
names are used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.header import TORCH_DTYPES, TensorEntry
from upcycle_cli.checkpoint.storage import CONFIG_NAME
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.models.defaults import defaults_of
from upcycle_cli.models.dense import DenseFamily, why_unread
from upcycle_cli.models.families import dense_family, target_of
from upcycle_cli.models.mlp import find_weight, parts_of, present_weights
from upcycle_cli.models.moe import Layout, Target
from upcycle_cli.models.wrappers import text_config_of
from upcycle_cli.old_verification.facts import Facts
from upcycle_cli.old_verification.recipes import is_positive, mlp_kind, read_record
from upcycle_cli.run.shipped import code_failure

_SAMPLE_ROWS = 64
_MOSTLY = 0.5


class DamagedError(UpcycleError):
    """The MoE contradicts itself or the dense model so far that no other check can run."""


@contextmanager
def _reading_config() -> Iterator[None]:
    """Raise DamagedError for what is found wrong with an MoE's config."""
    try:
        yield
    except ValueError as error:
        raise DamagedError(f"{CONFIG_NAME}: {error}.") from error


def read_tensors(dense: Checkpoint) -> dict[str, TensorEntry]:
    """Return the tensors of a dense checkpoint but those that no model reads."""
    family = dense_family(dense.config, dense.tensors)
    values = {**defaults_of(family.model_type), **text_config_of(dense.config)}
    return {
        name: entry for name, entry in dense.tensors.items() if not why_unread(name, family, values)
    }


def gather_facts(
    dense: Checkpoint, moe: Checkpoint, *, moe_names: Sequence[str], allow_inexact: bool
) -> Facts:
    """Return what is known of the two checkpoints; `moe_names` are all files beside the MoE.

    Raises UpcycleError when the dense model has no MLPs of plain weights, and DamagedError when the
    MoE's config.json does not describe experts that can have been made of them.
    """
    target = find_target(moe)
    family = dense_family(dense.config, dense.tensors)
    layers, dense_size, hidden_size = dense_sizes(dense, family)
    key = family.activation or ""
    activation = text_config_of(dense.config).get(key, defaults_of(family.model_type).get(key))
    kind = mlp_kind(parts_of(family.mlp), activation)
    keys, config, layout = target.keys, text_config_of(moe.config), find_layout(moe, target)
    with _reading_config():
        num_experts, top_k, expert_size = target.sizes(config)
        size = f"{keys.expert_size} {expert_size}"
        if dense_size % expert_size:
            raise ValueError(
                f"{size} does not divide the dense model's intermediate size {dense_size}"
            )
        granularity = dense_size // expert_size
        shared = _shared_experts(moe, target, layout, expert_size)
        no_shards = shared >= granularity or num_experts % (granularity - shared) != 0
        if no_shards and num_experts % granularity == 0:
            shared = 0  # it is to do nothing, and does: the weights show it
        elif shared >= granularity:
            raise ValueError(f"{size} and {shared} shared experts leave no shards to route")
        routed = granularity - shared
        if num_experts % routed:
            shards = f"the {routed} routed shards" if shared else f"the granularity {routed}"
            raise ValueError(
                f"{keys.num_experts} {num_experts} is not a multiple of {shards}, which "
                f"{size} stands for"
            )
        num_layers = target.num_layers(config)
        moe_layers = target.moe_layers(config, num_layers)
        _check_layers(moe_layers, layers)
        routing = str(target.routing(config))
        gate_scale = _gate_scale(moe, target)
    return Facts(
        dense=dense,
        moe=moe,
        moe_names=tuple(moe_names),
        family=family,
        target=target,
        layout=layout,
        record=read_record(moe, kind),
        allow_inexact=allow_inexact,
        layers=moe_layers,
        num_layers=num_layers,
        hidden_size=hidden_size,
        dense_size=dense_size,
        expert_size=expert_size,
        num_experts=num_experts,
        shared_experts=shared,
        top_k=top_k,
        routing=routing,
        gate_scale=gate_scale,
        kind=kind,
    )


def find_target(moe: Checkpoint) -> Target:
    """Return what an MoE is; DamagedError when its config or its code is not sound."""
    try:
        target = target_of(moe.config, moe.tensors)
    except UpcycleError as error:
        raise DamagedError(error.message) from error
    failure = code_failure(moe, target)
    if failure is not None:
        raise DamagedError(failure)
    with _reading_config():
        _check_sizes(moe, target)
    return target


def find_layout(moe: Checkpoint, target: Target) -> Layout:
    """Return how the experts of an MoE are named."""
    return target.layouts[target.stored_layout(moe.tensors, text_config_of(moe.config))]


def _check_sizes(moe: Checkpoint, target: Target) -> None:
    """Raise ValueError for sizes that no model of these tensors has, and that take forever."""
    keys, config = target.keys, text_config_of(moe.config)
    num_experts, top_k, _ = target.sizes(config)
    if top_k > num_experts:
        raise ValueError(f"{keys.top_k} {top_k} is more than {keys.num_experts} {num_experts}")
    layer = re.compile(re.escape(target.layer).replace(r"\{layer\}", r"(\d+)"))
    layers = {match[1] for match in map(layer.match, moe.tensors) if match}
    entries = moe.tensors.values()
    # A layer has a tensor of each expert, or one of all.
    fused = (entry.shape[0] for entry in entries if len(entry.shape) == 3 and entry.num_elements)
    for key, count, most in (
        (keys.num_experts, num_experts, max(len(entries), *fused, 0)),
        ("num_hidden_layers", target.num_layers(config), len(layers)),
    ):
        if count > most:
            raise ValueError(f"{key} {shown(count)} is more than there are tensors of")


def _shared_experts(moe: Checkpoint, target: Target, layout: Layout, expert_size: int) -> int:
    """Return K, how many experts wide the shared expert is; 0 where it does nothing, or is not."""
    shared, config = target.shared, text_config_of(moe.config)
    if shared is None:
        return 0
    key = shared.size_key or shared.count_key
    width = target.value(config, key) if key else expert_size
    if type(width) is not int or width < 0:
        raise ValueError(f"{key} must be an integer, not {shown(width)}")
    width *= 1 if shared.size_key or not key else expert_size
    inert = (
        width % expert_size
        or shared.norm is not None
        or (shared.required and _is_inert(moe, target, layout))
    )
    return 0 if inert else width // expert_size


def _is_inert(moe: Checkpoint, target: Target, layout: Layout) -> bool:
    """Whether the down matrix of the shared expert is zero, by and large, in the first layer."""
    down = find_weight(target.shared_weights(layout), "down").name
    before, after = (target.layer + down).split("{layer}")
    entries = moe.tensors.values()
    names = (entry.name for entry in entries if entry.dtype in TORCH_DTYPES and entry.num_elements)
    found = next((n for n in names if n.startswith(before) and n.endswith(after)), None)
    if found is None:
        return True
    with moe.reader() as reader:
        return float((reader.tensor(found)[:_SAMPLE_ROWS] != 0).double().mean()) < _MOSTLY


def dense_sizes(dense: Checkpoint, family: DenseFamily) -> tuple[tuple[int, ...], int, int]:
    """Return the layers that have an MLP, I and H, from the tensors themselves."""
    tensors = read_tensors(dense)
    for name, entry in tensors.items():
        if entry.dtype not in TORCH_DTYPES:
            raise UpcycleError(f"{dense.path}: {name} is {entry.dtype}, not a plain weight.")
    first = family.mlp[0]
    before, after = (family.layer + first.name).split("{layer}")
    pattern = re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}")
    layers = tuple(sorted(int(match[1]) for match in map(pattern.fullmatch, tensors) if match))
    name = family.layer.format(layer=layers[0] if layers else 0) + first.name
    for wanted in (family.embedding, name):
        if wanted not in tensors or len(tensors[wanted].shape) != 2:
            raise UpcycleError(
                f"{dense.path} has no matrix {wanted}.",
                "Give the dense model that the MoE was made of.",
            )
    assert first.split_dim is not None
    shape = tensors[name].shape
    width, hidden_size = shape[first.split_dim] // len(first.parts), shape[1 - first.split_dim]
    for layer in layers:
        prefix = family.layer.format(layer=layer)
        rows = present_weights(family.mlp, tensors, prefix)
        implied = [(weight.name, weight.shape(width, hidden_size)) for weight in rows]
        norm = family.norm_name(tensors, prefix)
        if norm is not None:
            implied.append((norm, (hidden_size,)))
        for name, shape in implied:
            held = tensors.get(prefix + name)
            if held is None or held.shape != shape:
                raise UpcycleError(f"{dense.path} has no {prefix}{name} of shape {list(shape)}.")
    return layers, width, hidden_size


def _check_layers(layers: Sequence[int], having: Sequence[int]) -> None:
    odd = sorted({*layers} - {*having})
    if odd or not layers:
        what = f"layer {odd[0]} is" if odd else "no layer is"
        raise ValueError(
            f"{what} a mixture of experts, and the dense model has MLPs in {len(having)} layers"
        )


def _gate_scale(moe: Checkpoint, target: Target) -> float:
    key = target.keys.scale
    value = 1.0 if key is None else target.value(text_config_of(moe.config), key)
    if not is_positive(value):
        raise ValueError(f"{key} must be a positive number, not {shown(value)}")
    return float(value)
