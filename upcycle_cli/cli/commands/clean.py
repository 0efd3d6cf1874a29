"""`upcycle clean`: remove what an unfinished conversion left behind."""

from __future__ import annotations

from pathlib import Path

from upcycle_cli.cli import options
from upcycle_cli.cli.terminal import print_json, stdout, talk, warn
from upcycle_cli.core.text import printable, shell_line, size_text


@options.declared
def clean(output: Path, yes: bool = False, json: bool = False) -> None:
    """Show what an unfinished conversion left in OUTPUT.partial; remove it with --yes."""
    from upcycle_cli.write import staging

    partial = staging.partial_of(output.absolute())
    nbytes, note = staging.clean(output.absolute(), remove=yes)
    size = size_text(nbytes)
    if json:
        status = "removed" if yes else "found"
        print_json({"status": status, "partial": str(partial), "bytes": nbytes})
    elif yes:
        talk(f"Removed {partial} ({size}).")
        warn(*filter(None, [note]))
    else:
        line = f"{printable(str(partial))}: {size} of an unfinished conversion"
        stdout().print(line, markup=False, soft_wrap=True)
        talk(f"Remove it with: {shell_line(['upcycle', 'clean', '--yes', str(output)])}")
