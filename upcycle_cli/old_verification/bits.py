"""Tensors compared bit for bit, and bytes."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_MADV_POPULATE_READ = 22 if sys.platform == "linux" else mmap.MADV_WILLNEED  # since Linux 5.14


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
    where: tuple[int, ...] = ()
    while len(where) < different.dim():  # all places at once would take more than the tensors
        part = different[where]
        rows = part.flatten(1).any(dim=1) if part.dim() > 1 else part
        where += (int(rows.nonzero()[0]),)
    return (
        f"differs in {int(different.sum())} of {different.numel()} elements, first at {[*where]}: "
        f"{float(held[where]):.8g} instead of {float(wanted[where]):.8g}"
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch compute in one thread: for what is small, several only wait for one another."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_bytes(left: int, right: int, nbytes: int) -> bool:
    """Whether as many bytes are the same at two addresses; other threads run meanwhile."""
    return not _libc().memcmp(left, right, nbytes)


def expect_bytes(address: int, nbytes: int, *, soon: bool = False) -> None:
    """Have the pages of a mapped file there, in few steps instead of one for each; or `soon`."""
    # Where a system does not know the advice, the pages come one by one when they are touched.
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    advice = mmap.MADV_WILLNEED if soon else _MADV_POPULATE_READ
    _libc().madvise(start, address + nbytes - start, advice)


@cache
def _libc() -> ctypes.CDLL:
    """The C library, whose functions ctypes calls without the interpreter's lock."""
    libc = ctypes.CDLL(None)
    libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
