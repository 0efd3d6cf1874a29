"""What several commands have: options, and what they say."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upcycle_cli.cli.terminal import rows_table, show, stdout, talk, warn
from upcycle_cli.core.text import counted, shell_line

if TYPE_CHECKING:
    from upcycle_cli.plan.base import Planned
    from upcycle_cli.publish.push import Push
    from upcycle_cli.report.target import ReportFile

DEMO = "demo"  # the object of a context whose command is run by the demo

# Options can be set by variables, too; a line for each would double the length of --help.
option = functools.partial(typer.Option, show_envvar=False)

# The same in the panels that --help groups the options in.
for_recipe = functools.partial(option, rich_help_panel="Recipe")
for_weights = functools.partial(option, rich_help_panel="Routers and scaling")
for_groups = functools.partial(option, rich_help_panel="Virtual groups")
for_merge = functools.partial(option, rich_help_panel="Several models")
for_budget = functools.partial(option, rich_help_panel="Recipes that fit")
for_files = functools.partial(option, rich_help_panel="Output files")
for_hub = functools.partial(option, rich_help_panel="Hugging Face Hub")
for_run = functools.partial(option, rich_help_panel="Run")

JsonOption = Annotated[bool, for_run("--json", help="Print one JSON object on stdout.")]
QuietOption = Annotated[bool, for_run("--quiet", "-q", help="Print errors only.")]
RevisionOption = Annotated[
    str | None, for_hub(metavar="REV", help="Branch, tag or commit of a repo on the Hub.")
]
PrivateOption = Annotated[bool, for_hub("--private", help="Make the repo a private one.")]
PullRequestOption = Annotated[
    bool, for_hub("--create-pr", help="Open a pull request instead of changing the branch.")
]


def path_argument(text: str) -> Path:
    """Read a path; an empty one is an unset variable, not the current directory."""
    if not text.strip():
        raise typer.BadParameter("it is empty")
    return Path(text)


for_path = functools.partial(typer.Argument, parser=path_argument)


def quiet_hub(*places: Path | None, silent: bool) -> None:
    """Let huggingface_hub show its bars only where somebody looks.

    Where these places are given and all here, it is not needed, nor the time to import it taken.
    """
    if places and all(place is None or place.exists() for place in places):
        return
    from upcycle_cli.hub.client import silence_library

    silence_library(bars=not silent and sys.stderr.isatty())


def report_option(what: str) -> Any:  # noqa: ANN401 - typer's
    """Return the option that asks for a page, whose help says `what` is on it."""
    return for_run(
        "--report",
        metavar="FILE",
        help=f"Write {what} to an HTML page that needs no network; takes the extra 'report'.",
    )


def report_file(path: Path | None, dense: Path | None) -> ReportFile | None:
    """Return where a report goes, None when none is asked for; raises UpcycleError at once."""
    if path is None:
        return None
    from upcycle_cli.report.target import ReportFile

    file = ReportFile(path)
    file.check(dense)
    return file


def announce_report(file: ReportFile | None, *, silent: bool) -> None:
    """Say that a page has been written, if it was."""
    if file is not None and not silent:
        talk(f"Wrote {file.path}.")


def command_line() -> str:
    """Return the command that runs, as one types it."""
    return shell_line(["upcycle", *sys.argv[1:]])


def show_plan(plan: Planned) -> None:
    """Print what is, or would be, made, and warn of what is to be known of it."""
    from upcycle_cli.cli.render_plan import plan_table
    from upcycle_cli.plan.warnings import warnings

    show(plan_table(plan))
    warn(*warnings(plan))


def announce_push(repo: str, files: int, nbytes: int, *, silent: bool) -> None:
    """Say that a push begins."""
    from upcycle_cli.core.text import size_text

    if not silent:
        talk(f"Pushing {counted(files, 'file')}, {size_text(nbytes)}, to {repo} …")


def show_push(done: Push) -> None:
    """Print what a push did, and what the licence asks for."""
    from upcycle_cli.cli.render import push_rows

    # Where no terminal folds lines, an address stays in one piece.
    show(rows_table(push_rows(done)), stdout(None if sys.stdout.isatty() else 200))
    warn(*done.reminders)
