"""The HTML page of a verification or an inspection: one file, which needs no network and no script.

`page` holds the elements and the template, `figures` the plots, `sections` the sections that both
pages share, `contents` the two pages, `report_file` the place where a page is written.
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
    """Return the page of a verification of `moe` against `dense` and the models `experts_from`."""
    from upcycle_cli.report.contents import verification_page
    from upcycle_cli.report.page import render

    models = [dense, *experts_from, moe]
    return render(verification_page(report, models=models, command=command))


def inspection_html(inspection: Inspection, *, name: str, command: str) -> str:
    """Return the page of the inspection of the MoE `name`."""
    from upcycle_cli.report.contents import inspection_page
    from upcycle_cli.report.page import render

    return render(inspection_page(inspection, name=name, command=command))
