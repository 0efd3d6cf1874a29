"""Random draws: a pure function of a seed and the name of a stream."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from upcycle_cli.plan.expressions import Permutation

if TYPE_CHECKING:
    from numpy.typing import NDArray


def standard_normal(seed: int, stream: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Draw normal values; float64 draws are the same on every CPU, float32 ones are not."""
    return generator(seed, stream).standard_normal(shape)


def generator(seed: int, stream: str) -> np.random.RandomState:
    """Return the generator of a stream."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    # The only generator that numpy promises never to change.
    return np.random.RandomState(np.frombuffer(digest, "<u4"))


def permutation(order: Permutation) -> NDArray[np.intp]:
    """Return the indices of a permutation."""
    if order.seed is not None:
        return _drawn_permutation(order)
    if order.indices is None:
        raise ValueError(f"{order.stream} has no indices yet")
    # Not cached: permutations that a calibration found can be equal and have other indices.
    return np.frombuffer(order.indices, "<u4").astype(np.intp)


@lru_cache(maxsize=64)
def _drawn_permutation(order: Permutation) -> NDArray[np.intp]:
    """Draw a permutation: the order that sorts float64 draws."""
    assert order.seed is not None
    drawn = generator(order.seed, order.stream).random_sample(order.size)
    return np.argsort(drawn, kind="stable")
