"""`upcycle verify`: check that an MoE computes what its dense model computes."""

from __future__ import annotations

from pathlib import Path

import typer

from upcycle_cli.cli import messages, options, terminal
from upcycle_cli.cli.process import EXIT_ERROR, raise_signal

_option = options.options_of("verify")


def verify(
    dense: Path = _option("dense", ..., parser=options.read_path),
    moe: Path = _option("moe", ..., parser=options.read_path),
    experts_from: list[Path] = _option("experts_from", [], parser=options.read_path),
    router_init: Path | None = _option("router_init", None),
    calibration: Path | None = _option("calibration", None),
    checks: str = _option("checks", "directory,weights,outputs"),
    prompts: Path | None = _option("prompts", None),
    tokens: int | None = _option("tokens", None),
    context: int | None = _option("context", None),
    fail_fast: bool = _option("fail_fast", False),
    dense_revision: str | None = _option("dense_revision", None),
    moe_revision: str | None = _option("moe_revision", None),
    allow_inexact: bool = _option("allow_inexact", False),
    report: Path | None = _option("report", None),
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
