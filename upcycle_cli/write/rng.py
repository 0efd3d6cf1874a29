"""What is drawn at random: a pure function of a seed and the name of a stream."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from upcycle_cli.plan.expressions import Permutation

if TYPE_CHECKING:
    from numpy.typing import NDArray


def standard_normal(seed: int, stream: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Draw normal values; float64 draws agree between CPUs where float32 ones do not."""
    return generator(seed, stream).standard_normal(shape)


def generator(seed: int, stream: str) -> np.random.RandomState:
    """Return what draws for a stream."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    # The one generator of which numpy promises that it will never draw anything else.
    return np.random.RandomState(np.frombuffer(digest, "<u4"))


def permutation(order: Permutation) -> NDArray[np.intp]:
    """Return an order's indices."""
    if order.seed is not None:
        return _drawn_permutation(order)
    if order.indices is None:
        raise ValueError(f"{order.stream} is to be given, and was not")
    # Not remembered: orders that a calibration finds can be equal, and of two models.
    return np.frombuffer(order.indices, "<u4").astype(np.intp)


@lru_cache(maxsize=64)
def _drawn_permutation(order: Permutation) -> NDArray[np.intp]:
    """Draw an order; draws are float64, as in `_normal`, and a sort of them is one."""
    assert order.seed is not None
    drawn = generator(order.seed, order.stream).random_sample(order.size)
    return np.argsort(drawn, kind="stable")
