"""What several commands print: a plan with its notes, a push, a report file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle_cli.cli.terminal import rows_table, show, stdout, talk, warn
from upcycle_cli.core.text import counted, shell_line, size_text

if TYPE_CHECKING:
    from upcycle_cli.plan.plan import Plan
    from upcycle_cli.publish.push import Push
    from upcycle_cli.report.report_file import ReportFile


def command_line() -> str:
    """Return the command that runs, as one types it."""
    return shell_line(["upcycle", *sys.argv[1:]])


def show_hub_bars(*places: Path | None, silent: bool) -> None:
    """Let huggingface_hub show progress bars on a terminal only.

    Does nothing, and does not import it, if all of these places are local.
    """
    if places and all(place is None or place.exists() for place in places):
        return
    from upcycle_cli.hub.client import silence_library

    silence_library(bars=not silent and sys.stderr.isatty())


def report_file(path: Path | None, dense: Path | None) -> ReportFile | None:
    """Return the file for a report, None without one; raises UpcycleError before any work."""
    if path is None:
        return None
    from upcycle_cli.report.report_file import ReportFile

    file = ReportFile(path)
    file.check(dense)
    return file


def show_plan(plan: Plan) -> None:
    """Print a plan, and the notes about it."""
    from upcycle_cli.cli.render import plan_table
    from upcycle_cli.plan.warnings import warnings

    show(plan_table(plan))
    warn(*warnings(plan))


def announce_push(repo: str, files: int, nbytes: int) -> None:
    """Say that a push begins."""
    talk(f"Pushing {counted(files, 'file')}, {size_text(nbytes)}, to {repo} …")


def show_push(done: Push) -> None:
    """Print what a push did, and what the licence requires."""
    from upcycle_cli.cli.render import push_rows

    # Without a terminal, keep addresses in one piece.
    show(rows_table(push_rows(done)), stdout(None if sys.stdout.isatty() else 200))
    warn(*done.reminders)
