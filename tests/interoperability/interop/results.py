"""What came out, what upcycle says of it, and the table of both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markdown_table import header, row

from interop.conversions import Case
from upcycle_cli.models.engines import DIFFERS, FAILS, SAME, Engine, Support, Trainer
from upcycle_cli.verification.engines import HESITATION, ROUNDING, Output, compare

NOT_TRIED = "–"


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


def judge(found: Output, expected: Output, *, approximate: bool = False) -> Cell:
    """Return whether two outputs are the same, `approximate` by what softmax-topk promises."""
    tolerance = HESITATION if approximate else ROUNDING
    difference, _ = compare(found, expected, tolerance, on_average=approximate)
    return Cell(DIFFERS, difference) if difference else Cell(SAME)


def contradiction(
    case: Case, software: str, cell: Cell, said: Iterable[Engine | Trainer]
) -> str | None:
    """Return how what was found contradicts what upcycle says, or that a control went unnoticed."""
    where = f"{software}, {case.name}"
    if case.control:
        # An engine that cannot load it, or is known to be wrong, proves nothing.
        return f"{where}: not told from the dense model" if cell.verdict == SAME else None
    listed = {each.name: each.support for each in said}
    support = listed.get(software, listed.get(software.rstrip(" 45")))  # any transformers
    if support in (None, Support.NOT_TRIED) or (support is Support.RUNS) == (cell.verdict == SAME):
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
