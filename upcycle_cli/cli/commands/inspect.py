"""`upcycle inspect`: what a checkpoint is, or what converting it would give."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer  # noqa: TC002 - it reads the annotations of a command

from upcycle_cli.cli import shared_options as shared
from upcycle_cli.cli.budget_options import (
    GpuMemoryOption,
    MaxActiveOption,
    MaxParamsOption,
    to_budget,
    to_wanted,
)
from upcycle_cli.cli.moe_options import MoeOptions, asks_for_moe, takes_moe_options
from upcycle_cli.cli.shared_options import for_path, for_run, path_argument
from upcycle_cli.cli.terminal import (
    errors_to_exit_codes,
    print_json,
    rows_table,
    show,
    stderr,
    stdout,
    warn,
)
from upcycle_cli.core.callbacks import Watch
from upcycle_cli.core.errors import UpcycleError

if TYPE_CHECKING:
    from upcycle_cli.inspection.summary import Inspection


@takes_moe_options
def inspect(
    context: typer.Context,
    path: Annotated[
        Path,
        for_path(
            metavar="PATH", help="A dense or an MoE checkpoint: a directory, or a repo on the Hub."
        ),
    ],
    *,
    moe: MoeOptions,
    tensors: Annotated[bool, for_run("--tensors", help="List every tensor.")] = False,
    weights: Annotated[
        bool,
        for_run(
            "--weights",
            help="Read the experts of an MoE: which are identical, which groups are whole.",
        ),
    ] = False,
    dense: Annotated[
        Path | None,
        for_run(
            help="With --weights: the dense checkpoint, to measure factors and what training moved."
        ),
    ] = None,
    experts_from: Annotated[
        list[Path],
        for_run(
            "--experts-from",
            metavar="MODEL",
            parser=path_argument,
            help="With --dense: another dense model that experts were made of; once for each.",
        ),
    ] = [],  # noqa: B006 - typer copies it
    load: Annotated[
        str | None,
        for_run(
            metavar="TEXT",
            help="Run an MoE on a text, a file, JSON Lines, or builtin: which experts no token "
            "chooses, and how even their load is.",
        ),
    ] = None,
    max_params: MaxParamsOption = None,
    max_active: MaxActiveOption = None,
    gpu_memory: GpuMemoryOption = None,
    report: Annotated[Path | None, shared.report_option("what is known of an MoE")] = None,
    revision: shared.RevisionOption = None,
    json: shared.JsonOption = False,
) -> None:
    """Show what a checkpoint is, or what converting it would give; reads headers only.

    Example: upcycle inspect Llama-3.1-8B --recipe E8G8T8
    """
    with errors_to_exit_codes(as_json=json):
        page = shared.report_file(report, dense)
        from upcycle_cli.cli import render, render_choices
        from upcycle_cli.inspection import summary as inspection
        from upcycle_cli.inspection.describe import inspection_rows

        budget = to_budget(max_params, max_active, gpu_memory)
        of_all = None if budget is None else to_wanted(context, moe)
        if dense is not None and not weights and load is None:
            raise UpcycleError("--dense says what to compare weights with.", "Add --weights.")
        several = _several(dense, experts_from, weights=weights)
        wanted = options = inputs = None
        if budget is None and asks_for_moe(context):
            options, inputs = moe.to_options(), moe.to_inputs()
            wanted = moe.to_recipe(context, allow_inexact=True)
        takes_time = bool(weights or load)
        shared.quiet_hub(path, dense, silent=json or not takes_time)
        with _progress(silent=json or not takes_time) as watch:
            found = inspection.inspect(
                path,
                wanted,
                revision=revision,
                target=moe.target,
                options=options,
                inputs=inputs,
                weights=weights,
                dense=several,
                load=load,
                watch=watch,
            )
        if page is not None:
            page.write(_html(found, path))
        if budget is not None:
            from upcycle_cli.plan.budget import notable

            fits = inspection.fits(found, budget, of_all)
        if json:
            listed = {"tensors": render.tensors_json(found)} if tensors else {}
            listed |= {"fits": render_choices.fits_json(fits)} if budget is not None else {}
            print_json(render.inspection_json(found) | listed)
            return
        show(rows_table(inspection_rows(found)))
        for table in render_choices.target_tables(found.becomes):
            stdout().print()
            show(table)
        if budget is not None:
            stdout().print()
            shown = notable(fits)
            show(render_choices.fits_table(shown))
            stdout().print()
            show(rows_table(render_choices.fits_rows(shown)))
            warn(*render_choices.fits_notes(fits, shown))
        if found.plan is not None:
            stdout().print()
            shared.show_plan(found.plan)
        shared.announce_report(page, silent=False)
        if tensors:
            # A list is for grep: one line a tensor, however wide the screen is.
            stdout().out("", *render.tensor_lines(found), sep="\n", highlight=False)


def _progress(*, silent: bool) -> AbstractContextManager[Watch]:
    if silent:
        return nullcontext(Watch())
    from upcycle_cli.cli.progress import progress_bar

    return progress_bar(stderr(), total=0, silent=False)


def _html(found: Inspection, path: Path) -> str:
    from upcycle_cli.report import inspection_html

    if found.kind != "moe":
        raise UpcycleError(
            f"{path} is a dense model, and --report shows an MoE.", "Leave out --report."
        )
    return inspection_html(found, name=str(path), command=shared.command_line())


def _several(dense: Path | None, experts_from: list[Path], *, weights: bool) -> list[Path]:
    """Return the dense models; UpcycleError where further ones are of no use."""
    if experts_from and (dense is None or not weights):
        raise UpcycleError(
            "--experts-from says what else to compare weights with.",
            "Add --weights, and --dense for the first of the models.",
        )
    return [] if dense is None else [dense, *experts_from]
