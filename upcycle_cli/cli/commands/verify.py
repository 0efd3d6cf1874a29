"""`upcycle verify`: whether an MoE computes what its dense model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from upcycle_cli.cli import shared_options as shared
from upcycle_cli.cli import terminal
from upcycle_cli.cli.process import EXIT_ERROR, raise_signal
from upcycle_cli.cli.shared_options import for_hub, for_path, option, path_argument

_CHECKS = "structure,files,claims,weights,outputs"


def verify(
    dense: Annotated[
        Path,
        for_path(
            metavar="DENSE",
            help="The dense checkpoint, or the MoE that MOE grew from: a directory, or a repo on "
            "the Hub.",
        ),
    ],
    moe: Annotated[
        Path,
        for_path(metavar="MOE", help="The MoE made from it: a directory, or a repo on the Hub."),
    ],
    experts_from: Annotated[
        list[Path],
        option(
            "--experts-from",
            metavar="MODEL",
            parser=path_argument,
            help="Another dense model that experts were made of: a directory, or REPO or "
            "REPO@REVISION on the Hub; once for each.",
        ),
    ] = [],  # noqa: B006 - typer copies it
    router_init: Annotated[
        Path | None,
        option(
            "--router-init",
            metavar="FILE",
            help="The file that the rows of the routers were given in: they must be those.",
        ),
    ] = None,
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
        Path | None,
        option(
            help="File to run both models on, instead of the built-in texts: text, or JSON Lines."
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        option(metavar="N", help="Tokens of text to run both models on, 1792 unless given."),
    ] = None,
    context: Annotated[
        int | None,
        option(
            metavar="N",
            help="Run them on one text of N tokens, for what shows only far from its beginning.",
        ),
    ] = None,
    fail_fast: Annotated[
        bool, option("--fail-fast", help="Run no check after one that failed.")
    ] = False,
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
    report: Annotated[
        Path | None, shared.report_option("what was found, with figures by layer and by token,")
    ] = None,
    json: shared.JsonOption = False,
    quiet: shared.QuietOption = False,
) -> None:
    """Prove that an MoE computes what its dense model computes; exit code 1 when it does not.

    Example: upcycle verify Llama-3.1-8B Llama-3.1-8B-E8G1T2
    """
    with terminal.errors_to_exit_codes(as_json=json):
        page = shared.report_file(report, dense)
        from upcycle_cli import old_verification as verification
        from upcycle_cli.cli import render
        from upcycle_cli.cli.progress import progress_bar
        from upcycle_cli.old_verification import TextOptions

        shared.quiet_hub(silent=quiet or json)
        names = [name.strip() for name in checks.split(",") if name.strip()]
        with progress_bar(terminal.stderr(), total=0, silent=quiet or json) as watch:
            found = verification.verify(
                dense,
                moe,
                experts_from=experts_from,
                router_init=router_init,
                checks=names,
                texts=TextOptions(prompts=prompts, tokens=tokens, context=context),
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
            from upcycle_cli import report as report_page

            html = report_page.verification_html(
                found,
                dense=str(dense),
                moe=str(moe),
                command=shared.command_line(),
                experts_from=[str(model) for model in experts_from],
            )
            page.write(html)
        shared.announce_report(page, silent=quiet or json)
        if json:
            terminal.print_json(found.to_json())
        if found.status == "skipped":
            terminal.fail("no check could run, so nothing is proven.", EXIT_ERROR)
        if found.status == "measured" and not allow_inexact:
            terminal.talk(
                "Nothing is proven of an MoE that promises no equality; --allow-inexact accepts it."
            )
        if not found.accepted:
            raise typer.Exit(terminal.EXIT_VERIFICATION_FAILED)
