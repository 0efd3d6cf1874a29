"""The bytes of tensors as numpy arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NUMPY_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""numpy's dtype for each safetensors dtype; numpy has no bfloat16, so its bits are held."""


def as_float32(data: bytes, dtype: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return a tensor's bytes as float32 values."""
    import numpy as np

    return to_float32(np.ndarray(shape, NUMPY_DTYPES[dtype], data), dtype)


def to_float32(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Return the values of an array of `NUMPY_DTYPES` as float32."""
    if dtype == "BF16":
        from ml_dtypes import bfloat16

        values = values.view(bfloat16)
    return values.astype("<f4", copy=False)


def rounded(values: NDArray[np.floating[Any]], dtype: str) -> NDArray[Any]:
    """Round to an array of `NUMPY_DTYPES`, ties to even; too large values become infinite."""
    if dtype != "BF16":
        return values.astype(NUMPY_DTYPES[dtype], copy=False)
    from ml_dtypes import bfloat16

    # By way of float32, as torch does.
    bits: NDArray[Any] = values.astype("<f4", copy=False).astype(bfloat16).view("<u2")
    return bits
