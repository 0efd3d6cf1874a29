"""Tensors compared bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a weight's bits as integers of its size."""
    import torch

    # Equal as numbers is not enough: -0 equals 0, and nan does not equal itself.
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are of one type and hold the same bits, or one nan for another."""
    import torch

    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    if torch.equal(bits(left), bits(right)):
        return True
    return bool(left.isnan().any()) and not bool(unequal(left, right).any())


def unequal(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return where two tensors differ in their bits, if one of them is a number there."""
    # Which nan comes out of a cast or a product differs between libraries and processors.
    return (bits(left) != bits(right)) & ~(left.isnan() & right.isnan())


def difference(held: torch.Tensor, wanted: torch.Tensor) -> str:
    """Say where two tensors of one shape differ first, and in how many elements."""
    different = unequal(held, wanted)
    rows = different.flatten(1).any(dim=1) if different.dim() > 1 else different
    where: tuple[int, ...] = (int(rows.nonzero()[0]),)
    if different.dim() > 1:
        where += (int(different[where].nonzero()[0]),)
    return (
        f"differs in {int(different.sum())} of {different.numel()} elements, first at {[*where]}: "
        f"{float(held[where]):.8g} instead of {float(wanted[where]):.8g}"
    )
