"""`upcycle families`: the supported model types, their targets, engines and trainers."""

from __future__ import annotations

from upcycle_cli.cli import options, render
from upcycle_cli.cli.terminal import print_json, show


def families(*, json: bool = options.JSON) -> None:
    """List the supported model types with their targets, engines and trainers."""
    from upcycle_cli.cli.render_json import overview_json
    from upcycle_cli.models.overview import families as supported

    found = supported()
    if json:
        print_json(overview_json(found))
    else:
        show(*render.overview_tables(found))
