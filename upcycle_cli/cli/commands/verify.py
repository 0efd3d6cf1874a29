"""`upcycle verify`: check that an MoE computes what its dense model computes."""

from __future__ import annotations

from pathlib import Path

import typer

from upcycle_cli.cli import options, render, terminal
from upcycle_cli.cli.process import EXIT_ERROR, raise_signal
from upcycle_cli.cli.progress import progress_bar
from upcycle_cli.verification.result import TEXT_TOKENS


@options.declared
def verify(
    dense: Path,
    moe: Path,
    experts_from: list[Path],
    engine: list[str],
    router_init: Path | None = None,
    calibration: Path | None = None,
    checks: str = "directory,weights,outputs",
    prompts: Path | None = None,
    tokens: int = TEXT_TOKENS,
    context: int | None = None,
    engine_python: Path | None = None,
    engine_dtype: str = "float32",
    engine_timeout: int = 3600,
    llama_cpp: Path | None = None,
    fail_fast: bool = False,
    dense_revision: str | None = None,
    moe_revision: str | None = None,
    allow_inexact: bool = False,
    report: Path | None = None,
    json: bool = False,
    json_full: bool = False,
    quiet: bool = False,
) -> None:
    """Check that an MoE computes what its dense model computes; exit code 1 if it does not.

    Example:
      upcycle verify Llama-3.1-8B Llama-3.1-8B-E8G1T2
    """
    if report is not None:
        from upcycle_cli.report.page import check_report_file

        check_report_file(report, dense)
    from upcycle_cli.verification import verify as verification
    from upcycle_cli.verification.engines import EngineOptions
    from upcycle_cli.verification.prompts import TextOptions

    json = json or json_full
    silent = quiet or json
    with progress_bar(silent=silent) as watch:
        found = verification.verify(
            dense,
            moe,
            experts_from=experts_from,
            router_init=router_init,
            calibration=calibration,
            checks=checks,
            texts=TextOptions(prompts=prompts, tokens=tokens, context=context),
            fail_fast=fail_fast,
            dense_revision=dense_revision,
            moe_revision=moe_revision,
            allow_inexact=allow_inexact,
            watch=watch,
            engines=engine,
            engine_options=EngineOptions(
                engine_python=engine_python,
                engine_dtype=engine_dtype,
                engine_timeout=engine_timeout,
                llama_cpp=llama_cpp,
            ),
        )
    raise_signal()
    if not json and not (quiet and found.accepted):
        terminal.show(found, to=terminal.stderr() if quiet else None)
    if report is not None:
        from upcycle_cli.core.safe_files import write_whole
        from upcycle_cli.report.contents import verification_html

        models = [*map(str, (dense, *experts_from, moe))]
        html = verification_html(found, models=models, command=render.command_line())
        write_whole(report, options.with_flags(html).encode())
        if not silent:
            terminal.talk(f"Wrote {report}.")
    if json:
        terminal.print_json(found.to_json(full=json_full))
    if found.status == "skipped":
        terminal.fail("no check could run, so nothing is proven.", EXIT_ERROR)
    if found.not_run:
        hint = "This is about the engine: what the other checks found holds."
        terminal.fail(options.with_flags(" ".join(found.not_run)), EXIT_ERROR, hint)
    if found.status == "measured" and not found.accepted:
        terminal.talk("Not everything is proven. --allow-inexact accepts this result.")
    if not found.accepted:
        raise typer.Exit(terminal.EXIT_VERIFICATION_FAILED)
