"""Cluster the neurons of an MLP by the inputs that make them active, with numpy alone.

Legend: P positions, H hidden size, I dense intermediate size, C clusters of inputs,
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
"""More clusters or steps change little on SmolLM2."""
_SILENT = 1e-3
"""A neuron with less than this share of the layer's mean activity counts as silent."""


def clustered_order(
    inputs_PH: NDArray[Any], activity_PI: Floats, granularity: int, stream: str, draw: Draw
) -> NDArray[np.intp]:
    """Return an order of the neurons (I,): each of its G slices has neurons that act together.

    `activity_PI` is the magnitude of each neuron's activation. The profile of a neuron is its mean
    activity in clusters of the inputs, as logarithms relative to the mean over neurons. k-means on
    the sphere clusters the profiles into shards of equal size. The most active shard comes first;
    in a shard neurons keep their order. (MoEfication groups neurons that fire together as well:
    Zhang et al., arXiv 2110.01786.) Raises UpcycleError if the activity is not finite.
    """
    if not (np.isfinite(inputs_PH).all() and np.isfinite(activity_PI).all()):
        raise UpcycleError(f"the dense model's own activations are not finite ({stream}).")
    profiles_IC = _profiles(inputs_PH, activity_PI, stream, draw)
    shard_I = _shards(profiles_IC, granularity, stream, draw)
    order_GS = np.argsort(shard_I, kind="stable").reshape(granularity, -1)
    active_G = activity_PI.mean(0)[order_GS].mean(1)
    return order_GS[np.argsort(-active_G, kind="stable")].reshape(-1)


def _profiles(inputs_PH: NDArray[Any], activity_PI: Floats, stream: str, draw: Draw) -> Floats:
    """Return the profile of each neuron over clusters of the inputs, rows of length 1."""
    seen_PH = _unit((inputs_PH - inputs_PH.mean(0)).astype(np.float32))
    centres_CH = seen_PH[_random_places(len(seen_PH), _CLUSTERS, f"{stream}.inputs", draw)]
    for _ in range(_CLUSTER_STEPS):
        centres_CH = _unit(_one_hot(seen_PH @ centres_CH.T).T @ seen_PH)
    members_PC = _one_hot(seen_PH @ centres_CH.T)
    members_PC = members_PC[:, members_PC.any(0)]
    mean_CI = members_PC.T @ activity_PI / members_PC.sum(0)[:, None]
    least = max(_SILENT * mean_CI.mean(), np.finfo(np.float32).tiny)
    logs_CI = np.log(np.maximum(mean_CI, least))
    return _unit((logs_CI - logs_CI.mean(1, keepdims=True)).T)


def _shards(profiles_IC: Floats, granularity: int, stream: str, draw: Draw) -> NDArray[np.intp]:
    """Return the shard of each neuron (I,); all shards have the same size."""
    centres_GC = profiles_IC[
        _random_places(len(profiles_IC), granularity, f"{stream}.shards", draw)
    ]
    shard_I = _assign(profiles_IC @ centres_GC.T)
    for _ in range(_SHARD_STEPS):
        own_IG = np.eye(granularity, dtype=np.float32)[shard_I]
        shard_I = _assign(profiles_IC @ _unit(own_IG.T @ profiles_IC).T)
    return shard_I


def _assign(similarity_IG: Floats) -> NDArray[np.intp]:
    """Assign each neuron to the most similar shard with room; the most similar neurons go first."""
    neurons, granularity = similarity_IG.shape
    shard_I, room_G = np.full(neurons, -1), np.full(granularity, neurons // granularity)
    while room_G.any():
        left = np.flatnonzero(shard_I < 0)
        free_G = np.flatnonzero(room_G)
        similarity = similarity_IG[np.ix_(left, free_G)]
        best = similarity.argmax(1)
        for place, shard in enumerate(free_G):
            candidates = np.flatnonzero(best == place)
            first = np.argsort(-similarity[candidates, place], kind="stable")[: room_G[shard]]
            shard_I[left[candidates[first]]] = shard
            room_G[shard] -= len(first)
    return shard_I


def _random_places(size: int, count: int, stream: str, draw: Draw) -> NDArray[np.intp]:
    """Return `count` random places of `size`, or all."""
    return np.argsort(draw(stream, (1, size))[0], kind="stable")[:count]


def _one_hot(similarity: Floats) -> Floats:
    """Return 1 at the largest value of each row, 0 elsewhere."""
    found: Floats = np.eye(similarity.shape[1], dtype=np.float32)[similarity.argmax(1)]
    return found


def _unit(rows: Floats) -> Floats:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    found: Floats = rows / np.maximum(lengths, np.finfo(np.float32).tiny)
    return found
