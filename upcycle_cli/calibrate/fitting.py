"""Fit router rows and the order of neurons to the inputs of an MLP, with numpy alone.

Legend: P positions, H hidden size, I dense intermediate size, E rows (one per group or expert),
K groups that a token chooses, C clusters of inputs, G shards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.recipe.recipe import Recipe

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[np.float64]"
Floats: TypeAlias = "NDArray[np.float32]"
Draw: TypeAlias = Callable[[str, tuple[int, int]], Array]
"""Returns standard normal values by the name of their stream."""

_DIRECTIONS = 3
"""The largest number of principal directions that are removed together with the mean."""
_DIMENSIONS_EACH = 8
"""Dimensions of the input per removed direction."""
_POWER_STEPS = 8
_CENTROID_STEPS = 24
_TRIES = 4
_FAIR = 0.25
"""A draw is good if its least loaded row has at least this share of the mean load."""
_CLUSTERS = 32
_CLUSTER_STEPS = 2
_SHARD_STEPS = 8
"""More clusters or steps change little on SmolLM2."""
_SILENT = 1e-3
"""A neuron with less than this share of the layer's mean activity counts as silent."""


def balanced(inputs_PH: Array, recipe: Recipe, stream: str, draw: Draw) -> Array:
    """Return random rows without the directions that all tokens share; `stream` is the router's.

    The mean can dominate an MLP's input: then a row that is not orthogonal to it gives every token
    about the same logit, and one group always wins. So the mean and the strongest principal
    directions are removed, and each row is scaled to the wanted standard deviation of its logits.
    If a row's load on the text is still small, all rows are drawn again.
    """
    common_HC = _common(inputs_PH, stream, draw)
    found: list[tuple[float, Array]] = []
    while len(found) < _TRIES and not (found and found[-1][0] >= _FAIR):
        # The first draw is the one for normal rows.
        attempt = f"{stream}.{len(found)}" if found else stream
        rows_EH = _without(draw(attempt, (recipe.router_rows, inputs_PH.shape[1])), common_HC)
        rows_EH = _scaled(rows_EH, inputs_PH, recipe, stream)
        load_E = loads(inputs_PH @ rows_EH.T, recipe.rows_chosen)
        found.append((float(load_E.min() / load_E.mean()), rows_EH))
    return max(found, key=lambda each: each[0])[1]


def centroids(inputs_PH: Array, recipe: Recipe, stream: str, draw: Draw) -> Array:
    """Return centres of clusters of the inputs by k-means on the sphere, scaled like `balanced`."""
    positions, rows = len(inputs_PH), recipe.router_rows
    if positions < rows:
        words = f"{rows} clusters of a layer's inputs need {rows} tokens, and the text has"
        hint = "Give `calibration` more text, or use `router_init` balanced."
        raise UpcycleError(f"{words} {positions}.", hint)
    seen_PH = _without(inputs_PH - inputs_PH.mean(0), _common(inputs_PH, stream, draw))
    seen_PH /= np.maximum(np.linalg.norm(seen_PH, axis=1, keepdims=True), np.finfo(float).tiny)
    centres_EH = seen_PH[_random_places(positions, rows, f"{stream}.centres", draw)]
    for _ in range(_CENTROID_STEPS):
        nearest_P = (seen_PH @ centres_EH.T).argmax(1)
        sums_EH = np.zeros_like(centres_EH)
        np.add.at(sums_EH, nearest_P, seen_PH)
        lengths_E = np.linalg.norm(sums_EH, axis=1)
        kept = lengths_E > 0  # an empty cluster stays where it is
        centres_EH[kept] = sums_EH[kept] / lengths_E[kept, None]
    return _scaled(centres_EH, inputs_PH, recipe, stream)


def prompted(inputs_PH: Array, weights_EP: Array, recipe: Recipe, stream: str) -> Array:
    """Return the mean input of each row's prompts, without what all prompts or inputs share."""
    rows_EH = weights_EP @ inputs_PH  # negative prompts have negative weights
    # The mean of the rows shifts all logits of a token alike; along the mean input one row would
    # win for every token.
    rows_EH = rows_EH - rows_EH.mean(0)
    mean_H = inputs_PH.mean(0)
    length = np.linalg.norm(mean_H)
    if length > 0:
        rows_EH = _without(rows_EH, mean_H[:, None] / length)
    return _scaled(rows_EH, inputs_PH, recipe, stream)


def loads(logits_PE: Array, chosen: int) -> Array:
    """Return how many positions choose each row (E,); ties go to the first row."""
    chosen_PK = np.argsort(-logits_PE, axis=1, kind="stable")[:, :chosen]
    return np.bincount(chosen_PK.ravel(), minlength=logits_PE.shape[1]).astype(np.float64)


def chosen_gates(logits_PE: Array, chosen: int) -> float:
    """Return the sum of each position's largest softmax values, mean over positions."""
    exponents_PE = np.exp(logits_PE - logits_PE.max(1, keepdims=True))
    gates_PE = np.sort(exponents_PE / exponents_PE.sum(1, keepdims=True), axis=1)
    return float(gates_PE[:, -chosen:].sum(1).mean())


def _common(inputs_PH: Array, stream: str, draw: Draw) -> Array:
    """Return orthonormal directions (H, C): the mean, and the strongest of the rest."""
    mean_H = inputs_PH.mean(0)
    length = np.linalg.norm(mean_H)
    if not np.isfinite(length):
        raise UpcycleError(f"the dense model's own activations are not finite ({stream}).")
    found: list[Array] = [mean_H[:, None] / length] if length > 0 else []
    count = min(_DIRECTIONS, inputs_PH.shape[1] // _DIMENSIONS_EACH)
    if count:
        left_PH = inputs_PH - mean_H
        for common_HC in found:
            left_PH = _without(left_PH, common_HC)
        # Subspace iteration takes a few products; all directions would take H³.
        directions_HC = draw(f"{stream}.directions", (inputs_PH.shape[1], count))
        for _ in range(_POWER_STEPS):
            directions_HC = np.linalg.qr(left_PH.T @ (left_PH @ directions_HC))[0]
        found.append(directions_HC)
    joined: Array = np.linalg.qr(np.concatenate(found, axis=1))[0]
    return joined


def _without(rows: Array, common_HC: Array) -> Array:
    return rows - (rows @ common_HC) @ common_HC.T


def _scaled(rows_EH: Array, inputs_PH: Array, recipe: Recipe, stream: str) -> Array:
    std_E = (inputs_PH @ rows_EH.T).std(0)
    if not (np.isfinite(std_E).all() and (std_E > 0).all()):
        words = f"the text gives every token the same input ({stream}), so no router can tell"
        raise UpcycleError(f"{words} them apart.", "Give `calibration` another text.")
    scaled: Array = rows_EH * ((recipe.router_logit_std or 1.0) / std_E[:, None])
    return scaled


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
    places_G = _random_places(len(profiles_IC), granularity, f"{stream}.shards", draw)
    shard_I = _assign(profiles_IC @ profiles_IC[places_G].T)
    for _ in range(_SHARD_STEPS):
        own_IG = np.eye(granularity, dtype=np.float32)[shard_I]
        shard_I = _assign(profiles_IC @ _unit(own_IG.T @ profiles_IC).T)
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
    return np.argsort(draw(stream, (1, size))[0], kind="stable")[:count]


def _one_hot(similarity: Floats) -> Floats:
    """Return 1 at the largest value of each row, 0 elsewhere."""
    found: Floats = np.eye(similarity.shape[1], dtype=np.float32)[similarity.argmax(1)]
    return found


def _unit(rows: Floats) -> Floats:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    found: Floats = rows / np.maximum(lengths, np.finfo(np.float32).tiny)
    return found
