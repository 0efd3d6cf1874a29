"""`upcycle verify`: whether an MoE computes what its dense model computes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from upcycle_cli import terminal
from upcycle_cli.commands import shared
from upcycle_cli.commands.shared import for_hub, for_path, option

_CHECKS = "structure,files,weights,outputs,claims"


def verify(
    dense: Annotated[
        Path,
        for_path(metavar="DENSE", help="The dense checkpoint: a directory, or a repo on the Hub."),
    ],
    moe: Annotated[
        Path,
        for_path(metavar="MOE", help="The MoE made from it: a directory, or a repo on the Hub."),
    ],
    checks: Annotated[
        str,
        option(
            metavar="NAMES",
            help=f"Which checks to run, with commas between: {_CHECKS.replace(',', ', ')}; all "
            "unless given.",
            show_default=False,
        ),
    ] = _CHECKS,
    prompts: Annotated[
        Path | None, option(help="Text file to run both models on, instead of the built-in text.")
    ] = None,
    dense_revision: Annotated[
        str | None, for_hub(metavar="REV", help="Branch, tag or commit of DENSE's repo.")
    ] = None,
    moe_revision: Annotated[
        str | None, for_hub(metavar="REV", help="Branch, tag or commit of MOE's repo.")
    ] = None,
    allow_inexact: Annotated[
        bool,
        option(
            "--allow-inexact",
            help="Accept an MoE that does not promise equality: it is measured, not passed.",
        ),
    ] = False,
    json: shared.JsonOption = False,
    quiet: shared.QuietOption = False,
) -> None:
    """Prove that an MoE computes what its dense model computes; exit code 1 when it does not.

    Example: upcycle verify Llama-3.1-8B Llama-3.1-8B-E8G1T2
    """
    with terminal.errors_to_exit_codes(as_json=json):
        from upcycle_cli import render, verification

        watched = sys.stderr.isatty() and not (quiet or json)
        shared.quiet_hub(silent=quiet or json)
        names = [name.strip() for name in checks.split(",") if name.strip()]
        report = verification.verify(
            dense,
            moe,
            checks=names,
            prompts=prompts,
            dense_revision=dense_revision,
            moe_revision=moe_revision,
            allow_inexact=allow_inexact,
            on_start=(lambda name: terminal.talk(f"checking {name} …")) if watched else None,
        )
        terminal.raise_signal()
        if json:
            terminal.print_json(report.to_json())
        elif not quiet:
            terminal.show(render.report_table(report))
        elif not report.accepted:
            terminal.show(render.report_table(report), terminal.stderr())
        if report.status == "skipped":
            terminal.fail("no check could run, so nothing is proven.", terminal.EXIT_ERROR)
        if report.status == "measured" and not allow_inexact:
            terminal.talk(
                "Nothing is proven of an MoE that promises no equality; --allow-inexact accepts it."
            )
        if not report.accepted:
            raise typer.Exit(terminal.EXIT_VERIFICATION_FAILED)
