"""What a narrower dtype loses of the dense weights, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle_cli.old_verification.bits import same

if TYPE_CHECKING:
    import torch

_MOST_ZEROED = 0.1
_MOST_ERROR = 0.01
"""Relative, of a tensor's norm. Rounding alone costs 0.0017 in bfloat16 and 0.0002 in float16."""
_PIECE_ELEMENTS = 1 << 24


@dataclass
class Rounding:
    """Casts weights as a conversion does, and notes what is lost."""

    lossless: bool = True
    """Whether every weight is still what it was."""
    error: float = 0.0
    """The largest ‖cast - weight‖ / ‖weight‖ of all tensors."""
    zeroed: float = 0.0
    """The largest share of a tensor's weights other than 0 that became 0."""
    _worst: str = ""
    _worst_zeroed: str = ""
    _dtype: str = ""

    def cast(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a dense tensor in another dtype."""
        from torch import promote_types

        cast = tensor.to(dtype)
        if promote_types(dtype, tensor.dtype) == dtype or same(cast.to(tensor.dtype), tensor):
            return cast  # what is as wide, or wider, holds every weight
        self.lossless, self._dtype = False, str(dtype).removeprefix("torch.")
        lost = whole = 0.0
        zeroed = nonzero = 0
        flat, flat_cast = tensor.reshape(-1), cast.reshape(-1)
        for start in range(0, flat.numel(), _PIECE_ELEMENTS):
            part = slice(start, start + _PIECE_ELEMENTS)
            before, after = flat[part], flat_cast[part]
            wide = before.double()
            lost += float((after.double() - wide).nan_to_num().square().sum())
            whole += float(wide.nan_to_num().square().sum())
            nonzero += int((before != 0).sum())
            zeroed += int(((before != 0) & (after == 0)).sum())
        error = (lost / whole) ** 0.5 if whole else 0.0
        share = zeroed / nonzero if nonzero else 0.0
        if error > self.error:
            self.error, self._worst = error, name
        if share > self.zeroed:
            self.zeroed, self._worst_zeroed = share, name
        return cast

    def failures(self) -> Iterator[str]:
        """Say which tensor is no longer what it was, and what it lost."""
        if self.zeroed > _MOST_ZEROED:
            yield (
                f"{self._dtype} cannot hold {self.zeroed:.0%} of {self._worst_zeroed}: so many of "
                "its weights became 0; convert to bfloat16 or float32"
            )
        elif self.error > _MOST_ERROR:
            yield (
                f"{self._worst} is off by {self.error:.2%} of its norm in {self._dtype}, more than "
                "rounding explains: its weights are too small for it; convert to another dtype"
            )
