"""Router rows: do they look like what a conversion makes, whatever text they will see?

A text shows how rows behave on that text. Rows can be made that are fine there and tie, explode or
are far from uniform elsewhere; all of those are unlike random rows. So they are held to what random
rows of their shape have, as the MLP's norm lets them see its input: behind the norm's weight γ.

Rows that are not drawn (centres of clusters, a user's own) may hang on some dimensions and have
much in common. They are held to what keeps groups apart on any text, and to what they do where they
are run: `routing.py`. Other rows could do that as well, or the same ones with another sign; where
the file that they are said to be from is given, they are held to that, bit for bit.

Legend: E rows (one a group), H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from upcycle_cli.checkpoint.header import LARGEST, TORCH_DTYPES
from upcycle_cli.old_verification.bits import bits

if TYPE_CHECKING:
    from upcycle_cli.plan.router_file import RouterFile

_SMALLEST_DISTANCE = 0.1
"""Relative: random rows are √2 apart, and bfloat16 rounds each of their values by up to 0.004."""
_LARGEST_PEAK = 10.0
"""In standard deviations: no normal sample comes close to it."""
_MOST_SHARED = 1.5
"""How much more of their squares rows may have in one direction than random ones."""
_HONEST_DRAWS = 3
_MOST_IN_ONE = 0.9
"""Of the squares of given rows: so much may be in one dimension, or in one direction."""
_LARGEST_RATIO = 100.0
"""Of the sizes of given rows."""


def row_failures(rows_EH: torch.Tensor, gamma_H: torch.Tensor, dtype: str) -> Iterator[str]:
    """Say what is odd about finite rows, one of each group, that are stored in `dtype`."""
    rows, gamma = rows_EH.double(), gamma_H.double()
    seen = rows * gamma
    yield from size_failures(rows_EH, gamma_H, dtype)
    yield from _close_failures(seen)
    if len(rows) > 1:
        shared, honest = _shared(seen), _honest_shared(gamma, len(rows))
        if shared > _MOST_SHARED * honest:
            yield (
                f"its rows have {shared:.0%} of their size in one direction, and random rows have "
                f"{honest:.0%}: text in which that direction is strong ties or overruns them"
            )


def given_failures(rows_EH: torch.Tensor, gamma_H: torch.Tensor, dtype: str) -> Iterator[str]:
    """Say what is wrong with finite rows that were not drawn, one of each group."""
    seen = rows_EH.double() * gamma_H.double()
    yield from _overflow_failures(seen, dtype)
    yield from _close_failures(seen)
    squares_H = seen.square().sum(0)
    if len(seen) > 1 and float(squares_H.max() / squares_H.sum()) > _MOST_IN_ONE:
        yield "its rows are all but one of their dimensions nothing"
    # The centres of two clusters lie on the two sides of what all have in common, the nearer one
    # that of the larger cluster: no direction is strong for both.
    apart = len(seen) == 2 and float(seen[0] @ seen[1]) < 0
    if len(seen) > 1 and _shared(seen) > _MOST_IN_ONE and not apart:
        yield (
            f"its rows have {_shared(seen):.0%} of their size in one direction: text in which that "
            "direction is strong ties or overruns them"
        )
    sizes_E = seen.norm(dim=1)
    if float(sizes_E.max()) > _LARGEST_RATIO * float(sizes_E.min()):
        yield "its largest row is more than a hundred times the smallest, and outweighs it always"


def other_rows(router_NH: torch.Tensor, file: RouterFile, layer: int) -> Iterator[str]:
    """Say which row of a layer's router is not the file's, rounded to the router's dtype."""
    stream = f"layers.{layer}.router"
    if stream not in file.tensors:
        yield f"{file.path} has no {stream}"
        return
    entry, data = file.tensors[stream], bytearray(file.data[stream])
    rows_EH = torch.frombuffer(data, dtype=getattr(torch, TORCH_DTYPES[entry.dtype]))
    rows_EH = rows_EH.reshape(entry.shape).to(router_NH.dtype)
    (count, width), (rows, hidden) = rows_EH.shape, router_NH.shape
    if rows % count or width != hidden:
        yield f"{stream} of {file.path} is of shape {[count, width]}, which is not for this router"
        return
    wanted_NH = rows_EH.repeat_interleave(rows // count, 0)
    odd = (bits(router_NH) != bits(wanted_NH)).any(dim=1).nonzero().flatten().tolist()
    for row in odd[:1]:
        turned = "the opposite of " if bool((router_NH[row] == -wanted_NH[row]).all()) else "not "
        yield f"row {row} is {turned}that of {stream} in {file.path}"


def _close_failures(seen: torch.Tensor) -> Iterator[str]:
    for one, other, distance in _close(seen):
        how = "are the same" if distance == 0 else f"differ by {distance:.1%} of their size"
        yield (
            f"rows {one} and {other} of its groups {how}, so nothing tells them apart in the "
            "precision that models run in"
        )


def size_failures(rows_EH: torch.Tensor, gamma_H: torch.Tensor, dtype: str) -> Iterator[str]:
    """Say where rows can overflow, or hang on a few dimensions; gates have but one row."""
    rows = rows_EH.double()
    peak = float(rows.abs().max() / rows.square().mean().sqrt()) if bool(rows.any()) else 0.0
    if peak > _LARGEST_PEAK:
        yield (
            f"its largest weight is {peak:.0f} standard deviations: it hangs on a few dimensions, "
            "and is no random router"
        )
    yield from _overflow_failures(rows * gamma_H.double(), dtype)


def _overflow_failures(seen: torch.Tensor, dtype: str) -> Iterator[str]:
    # What leaves the norm has a length of √H before γ, so no token has a larger logit.
    logit = float(seen.norm(dim=1).max()) * math.sqrt(seen.shape[-1])
    if not logit <= LARGEST[dtype]:
        yield f"its logits can reach {logit:.2g}, and {dtype.lower()} ends at {LARGEST[dtype]:g}"


def _close(rows: torch.Tensor) -> Iterator[tuple[int, int, float]]:
    """Yield pairs of rows that are too close, and how far apart they are, relative to their size.

    Each row is named once, with the first of the rows before it that it is close to.
    """
    norms = rows.norm(dim=1)
    distances = torch.cdist(rows, rows)
    smaller = torch.minimum(norms[:, None], norms[None])
    close = (distances <= _SMALLEST_DISTANCE * smaller).tril(-1)
    for row in close.any(dim=1).nonzero().flatten().tolist():
        first = int(close[row].nonzero()[0])
        # The difference of large squares is no measure of a small distance.
        gap = float((rows[row] - rows[first]).norm())
        yield first, row, gap / float(smaller[row, first]) if gap else 0.0


def _shared(rows: torch.Tensor) -> float:
    """Return the share of all squares that lies in the direction that has most."""
    squares = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    values = torch.linalg.eigvalsh(squares)
    return float(values.max() / values.sum()) if bool(values.any()) else 0.0


def _honest_shared(gamma_H: torch.Tensor, num_rows: int) -> float:
    found = []
    for seed in range(_HONEST_DRAWS):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(num_rows, len(gamma_H), generator=generator, dtype=torch.double)
        found.append(_shared(drawn * gamma_H))
    return max(found)
