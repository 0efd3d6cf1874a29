"""What came out, what upcycle says of it, and the table of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from markdown_table import header, row

from interop.conversions import Case
from upcycle_cli.models.engines import DIFFERS, FAILS, SAME, Engine, Support, Trainer

Output = Sequence[Sequence[float]]
"""Token ids of each continuation; or scores; or names of tensors that are wrong."""

NOT_TRIED = "–"
SCORE_TOLERANCE = 1e-3  # rounding, in float32
HESITATION = 0.1
"""A hundred times the router's logits: what softmax-topk can move between two tokens, in nats."""
ENOUGH_TOKENS = 24

Margin = Callable[[int, int], float]
"""By how many nats the dense model prefers a token (its text, its position) to the next best."""


@dataclass(frozen=True)
class Cell:
    """What one software made of one conversion."""

    verdict: str
    detail: str = ""

    def __str__(self) -> str:
        """As results.json has it: a reason belongs to a refusal."""
        return f"{self.verdict}: {self.detail}" if self.verdict == FAILS else self.verdict


def cell_of(text: str) -> Cell:
    """Return what results.json says by a text."""
    return Cell(*text.split(": ", maxsplit=1))


def compare(found: Output, expected: Output, margin: Margin | None = None) -> Cell:
    """Return whether two outputs are the same, and where they part.

    With approximate routing, which `margin` is for, texts may part at a token where the dense model
    itself hesitates, after enough that agree; and scores may be off by as much on average: a rare
    token at which two groups tie moves its own by more.
    """
    agreeing = 0
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        if len(one) != len(other):
            return Cell(DIFFERS, f"{len(one)} items for {len(other)} in output {index}")
        if margin and _are_scores(other):
            off = fmean(abs(a - b) for a, b in zip(one, other, strict=True))
            if not off < HESITATION:
                return Cell(DIFFERS, f"output {index} is off by {off:.3g} on average")
            continue
        for position, (a, b) in enumerate(zip(one, other, strict=True)):
            if not _equal(a, b):
                if margin and abs(margin(index, position)) < HESITATION:
                    break
                return Cell(DIFFERS, f"from item {position} of output {index}: {a} for {b}")
            agreeing += 1
    if agreeing < min(ENOUGH_TOKENS, sum(len(text) for text in expected if not _are_scores(text))):
        return Cell(DIFFERS, f"only {agreeing} items before the outputs part")
    return Cell(SAME)


def _are_scores(output: Sequence[float]) -> bool:
    return any(isinstance(item, float) for item in output)


def _equal(one: float, other: float) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=0, abs_tol=SCORE_TOLERANCE)
    return one == other


def contradiction(
    case: Case,
    software: str,
    cell: Cell,
    said: Iterable[Engine | Trainer],
    *,
    lists_all: bool = False,
) -> str | None:
    """Return how what was found contradicts what upcycle says, or that a control went unnoticed.

    With `lists_all` it says of each software that it does not list that it does not run.
    """
    where = f"{software}, {case.name}"
    if cell.verdict == NOT_TRIED:
        return None
    if case.control:
        # An engine that cannot load it, or is known to be wrong, proves nothing.
        return f"{where}: not told from the dense model" if cell.verdict == SAME else None
    listed = {each.name: each.support for each in said}
    support = listed.get(software, listed.get(software.rstrip(" 45")))  # any transformers
    if (support is Support.RUNS) == (cell.verdict == SAME) or not (support or lists_all):
        return None
    return f"{where}: upcycle says '{support}', found: {cell.verdict} {cell.detail}"


def table(rows: Mapping[Case, Mapping[str, Cell]], software: Sequence[str]) -> str:
    """Return the Markdown table, and below it why something failed."""
    lines, details = [header("conversion", *software)], dict[str, list[str]]()
    for case, cells in rows.items():
        lines.append(row(case.name, *(cells.get(s, Cell(NOT_TRIED)).verdict for s in software)))
        for name in software:
            if name in cells and cells[name].verdict == FAILS:
                details.setdefault(f"{name}: {cells[name].detail}", []).append(case.name)
    reasons = [f"- {reason} ({'; '.join(names)})" for reason, names in details.items()]
    return "\n".join([*lines, "", *reasons]).rstrip()
