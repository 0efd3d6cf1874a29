"""`upcycle families`: what can become what, and what runs the result."""

from __future__ import annotations

from upcycle_cli.cli.shared_options import JsonOption
from upcycle_cli.cli.terminal import errors_to_exit_codes, print_json, show, stdout


def families(*, json: JsonOption = False) -> None:
    """Show which dense model types can become what, and what runs the result."""
    with errors_to_exit_codes(as_json=json):
        from upcycle_cli.cli import render_choices
        from upcycle_cli.models.overview import overview

        found = overview()
        if json:
            print_json(render_choices.overview_json(found))
            return
        tables = render_choices.overview_tables(found)
        for number, table in enumerate(tables):
            if number:
                stdout().print()
            show(table)
