"""`upcycle verify`: check that an MoE computes what its dense model computes."""

from __future__ import annotations

from pathlib import Path

import typer

from upcycle_cli.cli import messages, options, terminal
from upcycle_cli.cli.options import for_hub, option, path_argument
from upcycle_cli.cli.process import EXIT_ERROR, raise_signal

_CHECKS = "directory,weights,outputs"


def verify(
    dense: Path = path_argument(
        ...,
        metavar="DENSE",
        help="The dense checkpoint, or the MoE that MOE grew from: a directory, or a repo on the "
        "Hub.",
    ),
    moe: Path = path_argument(
        ..., metavar="MOE", help="The MoE made from it: a directory, or a repo on the Hub."
    ),
    experts_from: list[Path] = option(
        [],
        "--experts-from",
        metavar="MODEL",
        parser=options.read_path,
        help="Another dense model that experts were made from: a directory, or REPO or "
        "REPO@REVISION on the Hub; repeatable.",
    ),
    router_init: Path | None = option(
        None, "--router-init", metavar="FILE", help="The file that gave the router rows."
    ),
    calibration: Path | None = option(
        None,
        "--calibration",
        metavar="FILE",
        help="The text that the routers were fitted to, unless it was the built-in one.",
    ),
    checks: str = option(
        _CHECKS,
        metavar="NAMES",
        help=f"Checks to run, separated by commas: {_CHECKS.replace(',', ', ')}. Default: all.",
        show_default=False,
    ),
    prompts: Path | None = option(
        None, help="Text or JSON Lines file to run both models on, instead of the built-in texts."
    ),
    tokens: int | None = option(
        None, metavar="N", help="Number of tokens to run both models on. Default: 1792."
    ),
    context: int | None = option(
        None,
        metavar="N",
        help="Use a single text of N tokens, to see differences far from its beginning.",
    ),
    fail_fast: bool = option(False, "--fail-fast", help="Stop after the first check that fails."),
    dense_revision: str | None = for_hub(
        None, metavar="REV", help="Branch, tag or commit of DENSE's repo."
    ),
    moe_revision: str | None = for_hub(
        None, metavar="REV", help="Branch, tag or commit of MOE's repo."
    ),
    allow_inexact: bool = option(
        False,
        "--allow-inexact",
        help="Accept an MoE that is not exact by its recipe: it is measured, not passed.",
    ),
    report: Path | None = options.report_option("the results, with figures by layer and token,"),
    json: bool = options.JSON,
    quiet: bool = options.QUIET,
) -> None:
    """Prove that an MoE computes what its dense model computes; exit code 1 if it does not.

    Example: upcycle verify Llama-3.1-8B Llama-3.1-8B-E8G1T2
    """
    with terminal.errors_to_exit_codes(as_json=json):
        page = messages.report_file(report, dense)
        from upcycle_cli.cli import render
        from upcycle_cli.cli.progress import progress_bar
        from upcycle_cli.verification import verify as verification
        from upcycle_cli.verification.prompts import TextOptions

        messages.show_hub_bars(silent=quiet or json)
        names = [name.strip() for name in checks.split(",") if name.strip()]
        with progress_bar(terminal.stderr(), total=0, silent=quiet or json) as watch:
            found = verification.verify(
                dense,
                moe,
                experts_from=experts_from,
                router_init=router_init,
                calibration=calibration,
                checks=names,
                texts=TextOptions(
                    prompts=prompts, tokens=tokens, context=context, continuation=page is not None
                ),
                fail_fast=fail_fast,
                dense_revision=dense_revision,
                moe_revision=moe_revision,
                allow_inexact=allow_inexact,
                watch=watch,
            )
        raise_signal()
        if not quiet and not json:
            terminal.show(render.report_table(found))
        elif not json and not found.accepted:
            terminal.show(render.report_table(found), terminal.stderr())
        if page is not None:
            from upcycle_cli.report import verification_html

            html = verification_html(
                found,
                dense=str(dense),
                moe=str(moe),
                command=messages.command_line(),
                experts_from=[str(model) for model in experts_from],
            )
            page.write(html)
            if not quiet and not json:
                terminal.talk(f"Wrote {page.path}.")
        if json:
            terminal.print_json(found.to_json())
        if found.status == "skipped":
            terminal.fail("no check could run, so nothing is proven.", EXIT_ERROR)
        if found.status == "measured" and not found.accepted:
            terminal.talk("Not everything is proven; --allow-inexact accepts what was measured.")
        if not found.accepted:
            raise typer.Exit(terminal.EXIT_VERIFICATION_FAILED)
