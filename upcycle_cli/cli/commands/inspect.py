"""`upcycle inspect`: what a checkpoint is, or what a conversion would make of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import typer  # noqa: TC002 - it reads the annotations of a command

from upcycle_cli.cli import messages, options
from upcycle_cli.cli import option_values as values
from upcycle_cli.cli.options import MoeOptions
from upcycle_cli.cli.terminal import (
    errors_to_exit_codes,
    print_json,
    rows_table,
    show,
    show_all,
    stderr,
    stdout,
    talk,
    warn,
)
from upcycle_cli.core.callbacks import Watch
from upcycle_cli.core.errors import UpcycleError

if TYPE_CHECKING:
    from upcycle_cli.inspection.summary import Inspection
    from upcycle_cli.plan.budget import Fit

_option = options.options_of("inspect")


@options.takes_moe_options
def inspect(
    context: typer.Context,
    path: Path = _option("path", ..., parser=options.read_path),
    *,
    moe: MoeOptions,
    tensors: bool = _option("tensors", False),
    weights: bool = _option("weights", False),
    dense: Path | None = _option("dense", None),
    experts_from: list[Path] = _option("experts_from", [], parser=options.read_path),
    load: str | None = _option("load", None),
    max_params: str | None = _option("max_params", None),
    max_active: str | None = _option("max_active", None),
    gpu_memory: str | None = _option("gpu_memory", None),
    report: Path | None = _option("report", None),
    revision: str | None = options.REVISION,
    json: bool = options.JSON,
) -> None:
    """Show what a checkpoint is, or what converting it would make; reads headers only.

    Example: upcycle inspect Llama-3.1-8B --recipe E8G8T8
    """
    with errors_to_exit_codes(as_json=json):
        page = messages.report_file(report, dense)
        from upcycle_cli.inspection import summary

        budget = values.to_budget(max_params, max_active, gpu_memory)
        wanted = None if budget is None else values.to_wanted(moe, context)
        if dense is not None and not weights and load is None:
            raise UpcycleError("--dense needs --weights.", "Add --weights.")
        if experts_from and (dense is None or not weights):
            raise UpcycleError(
                "--experts-from needs --weights and --dense.",
                "Add --weights, and --dense for the first of the models.",
            )
        recipe = files = inputs = None
        if budget is None and values.needs_recipe(context):
            files, inputs = values.to_options(moe), values.to_inputs(moe)
            recipe = values.to_recipe(moe, context, allow_inexact=True)
        silent = json or not (weights or load)
        messages.show_hub_bars(path, dense, silent=silent)
        with _progress(silent=silent) as watch:
            found = summary.inspect(
                path,
                recipe,
                revision=revision,
                target=moe.target,
                options=files,
                inputs=inputs,
                weights=weights,
                dense=[] if dense is None else [dense, *experts_from],
                load=load,
                watch=watch,
            )
        if page is not None:
            page.write(_html(found, path))
        fits = None if budget is None else summary.fits(found, budget, wanted)
        if json:
            _print_json(found, fits, tensors=tensors)
            return
        _print_tables(found, fits)
        if page is not None:
            talk(f"Wrote {page.path}.")
        if tensors:
            from upcycle_cli.cli.render import tensor_lines

            # One line a tensor, whatever the width of the screen, so that grep finds it.
            stdout().out("", *tensor_lines(found), sep="\n", highlight=False)


def _progress(*, silent: bool) -> AbstractContextManager[Watch]:
    if silent:
        return nullcontext(Watch())
    from upcycle_cli.cli.progress import progress_bar

    return progress_bar(stderr(), total=0, silent=False)


def _print_json(found: Inspection, fits: tuple[Fit, ...] | None, *, tensors: bool) -> None:
    from upcycle_cli.cli import render_json

    value = render_json.inspection_json(found)
    if tensors:
        value["tensors"] = render_json.tensors_json(found)
    if fits is not None:
        value["fits"] = render_json.fits_json(fits)
    print_json(value)


def _print_tables(found: Inspection, fits: tuple[Fit, ...] | None) -> None:
    from upcycle_cli.cli import render
    from upcycle_cli.inspection.describe import inspection_rows

    tables = [rows_table(inspection_rows(found)), *render.target_tables(found.becomes)]
    if fits is None:
        show_all(tables)
    else:
        from upcycle_cli.plan.budget import notable

        shown = notable(fits)
        show_all([*tables, *render.fits_tables(shown)])
        warn(*render.fits_notes(fits, shown))
    if found.plan is not None:
        show("")
        messages.show_plan(found.plan)


def _html(found: Inspection, path: Path) -> str:
    from upcycle_cli.report import inspection_html

    if found.kind != "moe":
        raise UpcycleError(f"{path} is a dense model; --report needs an MoE.", "Remove --report.")
    return inspection_html(found, name=str(path), command=messages.command_line())
