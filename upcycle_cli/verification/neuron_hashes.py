"""Recognise neurons by their weights, in any order.

A neuron's hash is the sum of the bits of its weights, each times an odd 64-bit number, modulo 2^64.
It is computed at the speed of memory. Callers compare neurons with equal hashes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Hashes: TypeAlias = NDArray[np.uint64]

_BLOCK_ITEMS = 1 << 18


def neuron_hashes(matrix: NDArray[Any], dim: int, part: str) -> Hashes:
    """Return a hash for each neuron of a matrix or vector; the neurons lie along `dim`.

    `matrix` has the bits of the weights as integers. Hashes of several parts of the same neurons
    can be added up, since each `part` of the MLP has its own factors.
    """
    columns = matrix.reshape(len(matrix), -1)
    factors = _factors(part, columns.shape[1 - dim])
    total = np.zeros(columns.shape[dim], np.uint64)
    step = max(1, _BLOCK_ITEMS // max(1, columns.shape[1]))
    for start in range(0, len(columns), step):
        block = columns[start : start + step].astype(np.uint64)
        if dim == 0:
            total[start : start + step] = block @ factors
        else:
            total += factors[start : start + step] @ block
    return total


@lru_cache(maxsize=32)
def _factors(part: str, count: int) -> Hashes:
    seed = np.frombuffer(part.encode(), np.uint8).astype(np.uint32)
    drawn = np.random.RandomState(seed).bytes(8 * count)
    return np.frombuffer(drawn, "<u8") | np.uint64(1)
