"""A report as one HTML page, which is read without upcycle, without a network and without a script.

- target.py     where it is put
- page.py       what it is made of, and the HTML of that: page.html, page.css
- figures.py    drawings, by matplotlib
- recipe.py     recipe and factors
- layers.py     what was measured by layer
- texts.py      and by token
- origin.py     versions, digests and the command
- verified.py   the page of a verification
- inspected.py  that of an inspection
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upcycle_cli.inspection.summary import Inspection
    from upcycle_cli.verification.result import Report


def verification_html(
    report: Report, *, dense: str, moe: str, command: str, experts_from: Sequence[str] = ()
) -> str:
    """Return the page of a verification of `moe` against `dense`, which `command` has made.

    `experts_from` are the other models that it was held against.
    """
    from upcycle_cli.report.page import render
    from upcycle_cli.report.verified import Verified, verification_page

    verified = Verified(
        report=report, dense=dense, moe=moe, command=command, experts_from=experts_from
    )
    return render(verification_page(verified))


def inspection_html(inspection: Inspection, *, name: str, command: str) -> str:
    """Return the page of an inspected MoE that goes by `name`, which `command` has made."""
    from upcycle_cli.report.inspected import inspection_page
    from upcycle_cli.report.page import render

    return render(inspection_page(inspection, name=name, command=command))
