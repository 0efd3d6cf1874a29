"""Which neurons of an MLP belong together: those that the same inputs make active.

By numpy alone. Legend: P positions, H hidden size, I dense intermediate size, C clusters of inputs,
G shards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from upcycle_cli.core.errors import UpcycleError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from upcycle_cli.calibrate.router_rows import Draw

Floats: TypeAlias = "NDArray[np.float32]"

_CLUSTERS = 32
_CLUSTER_STEPS = 2
_SHARD_STEPS = 8
"""More of any of these change little on SmolLM2."""
_SILENT = 1e-3
"""Of a layer's mean activity: a neuron that has less has none."""


def clustered_order(
    inputs_PH: NDArray[Any], activity_PI: Floats, granularity: int, stream: str, draw: Draw
) -> NDArray[np.intp]:
    """Return an order of the neurons (I,) of which each of G slices has those that act together.

    `activity_PI` is how large each neuron's activation is at each position. The inputs are
    clustered, and a neuron is known by its mean activity in each cluster: by the logarithms of
    these, each beside the mean over all neurons. These profiles are clustered into shards of one
    size by k-means on the sphere. The most active shard comes first, and within a shard neurons
    are in the order of the dense MLP. (That neurons which fire together are put together is
    MoEfication's idea: Zhang et al., arXiv 2110.01786.)

    Raises UpcycleError where the activity is not finite.
    """
    if not (np.isfinite(inputs_PH).all() and np.isfinite(activity_PI).all()):
        raise UpcycleError(f"the dense model's own activations are not finite ({stream}).")
    profiles_IC = _profiles(inputs_PH, activity_PI, stream, draw)
    shard_I = _shards(profiles_IC, granularity, stream, draw)
    order_GS = np.argsort(shard_I, kind="stable").reshape(granularity, -1)
    active_G = activity_PI.mean(0)[order_GS].mean(1)
    return order_GS[np.argsort(-active_G, kind="stable")].reshape(-1)


def _profiles(inputs_PH: NDArray[Any], activity_PI: Floats, stream: str, draw: Draw) -> Floats:
    """Return what tells in which clusters of the inputs a neuron is active, rows of length 1."""
    seen_PH = _unit((inputs_PH - inputs_PH.mean(0)).astype(np.float32))
    centres_CH = seen_PH[_any(len(seen_PH), _CLUSTERS, f"{stream}.inputs", draw)]
    for _ in range(_CLUSTER_STEPS):
        centres_CH = _unit(_members(seen_PH @ centres_CH.T).T @ seen_PH)
    members_PC = _members(seen_PH @ centres_CH.T)
    members_PC = members_PC[:, members_PC.any(0)]
    mean_CI = members_PC.T @ activity_PI / members_PC.sum(0)[:, None]
    least = max(_SILENT * mean_CI.mean(), np.finfo(np.float32).tiny)
    logs_CI = np.log(np.maximum(mean_CI, least))
    return _unit((logs_CI - logs_CI.mean(1, keepdims=True)).T)


def _shards(profiles_IC: Floats, granularity: int, stream: str, draw: Draw) -> NDArray[np.intp]:
    """Return the shard of each neuron (I,), of which all get as many."""
    centres_GC = profiles_IC[_any(len(profiles_IC), granularity, f"{stream}.shards", draw)]
    shard_I = _dealt(profiles_IC @ centres_GC.T)
    for _ in range(_SHARD_STEPS):
        own_IG = np.eye(granularity, dtype=np.float32)[shard_I]
        shard_I = _dealt(profiles_IC @ _unit(own_IG.T @ profiles_IC).T)
    return shard_I


def _dealt(likeness_IG: Floats) -> NDArray[np.intp]:
    """Return a shard for each neuron, of the most alike that has room; the most alike go first."""
    neurons, granularity = likeness_IG.shape
    shard_I, room_G = np.full(neurons, -1), np.full(granularity, neurons // granularity)
    while room_G.any():
        left = np.flatnonzero(shard_I < 0)
        open_G = np.flatnonzero(room_G)
        likeness = likeness_IG[np.ix_(left, open_G)]
        best = likeness.argmax(1)
        for place, shard in enumerate(open_G):
            wanting = np.flatnonzero(best == place)
            first = np.argsort(-likeness[wanting, place], kind="stable")[: room_G[shard]]
            shard_I[left[wanting[first]]] = shard
            room_G[shard] -= len(first)
    return shard_I


def _any(size: int, count: int, stream: str, draw: Draw) -> NDArray[np.intp]:
    """Return `count` of `size` places, or all."""
    return np.argsort(draw(stream, (1, size))[0], kind="stable")[:count]


def _members(likeness: Floats) -> Floats:
    """Return 1 where each row has its largest value, and 0 elsewhere."""
    found: Floats = np.eye(likeness.shape[1], dtype=np.float32)[likeness.argmax(1)]
    return found


def _unit(rows: Floats) -> Floats:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    found: Floats = rows / np.maximum(lengths, np.finfo(np.float32).tiny)
    return found
