"""`upcycle families`: the supported model types, their targets, engines and trainers."""

from __future__ import annotations

from upcycle_cli.cli import options
from upcycle_cli.cli.terminal import print_json, rows_table, show, talk


@options.declared
def families(name: str | None = None, *, targets: bool = False, json: bool = False) -> None:
    """List the supported model types, or what one of them can become.

    Example:
      upcycle families qwen3
    """
    from upcycle_cli.cli.render_json import overview_json
    from upcycle_cli.models import overview

    found = overview.families()
    if name is not None:
        found = overview.only(found, name)
    if json:
        print_json(overview_json(found))
    elif targets:
        show(rows_table(overview.target_rows(found.targets)))
    else:
        show(found)
        if name is None:
            talk("", "Next: upcycle families NAME shows targets, engines and trainers.")
