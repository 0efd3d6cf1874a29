"""`upcycle clean`: what an unfinished conversion has left."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from upcycle_cli.cli.shared_options import JsonOption, for_path, option
from upcycle_cli.cli.terminal import errors_to_exit_codes, print_json, stdout, talk, warn
from upcycle_cli.core.text import printable, shell_line


def clean(
    output: Annotated[Path, for_path(metavar="OUTPUT", help="Directory that was to be made.")],
    yes: Annotated[bool, option("--yes", "-y", help="Remove it, not only show it.")] = False,
    json: JsonOption = False,
) -> None:
    """Show what an unfinished conversion left in OUTPUT.partial; remove it with --yes."""
    with errors_to_exit_codes(as_json=json):
        from upcycle_cli.core.text import size_text
        from upcycle_cli.write import transaction as publish

        found = publish.clean(output.absolute(), remove=yes)
        size = size_text(found.nbytes)
        if json:
            status = "removed" if yes else "found"
            print_json({"status": status, "partial": str(found.path), "bytes": found.nbytes})
        elif yes:
            talk(f"Removed {found.path} ({size}).")
            warn(*filter(None, [found.note]))
        else:
            line = f"{printable(str(found.path))}: {size} of {found.what}"
            stdout().print(line, markup=False, soft_wrap=True)
            talk(f"Remove it with: {shell_line(['upcycle', 'clean', '--yes', str(output)])}")
