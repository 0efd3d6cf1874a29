"""`upcycle inspect`: what a checkpoint is, or what a conversion would make of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer  # noqa: TC002 - it reads the annotations of a command

from upcycle_cli.cli import options, render, terminal
from upcycle_cli.cli import parse_options as values
from upcycle_cli.cli.options import MoeOptions
from upcycle_cli.cli.progress import progress_bar
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.text import shell_line
from upcycle_cli.recipe.recipe import NeuronOrder, RouterInit

if TYPE_CHECKING:
    from upcycle_cli.inspection.summary import Inspection
    from upcycle_cli.plan.budget import SizedRecipe


@options.declared
def inspect(
    context: typer.Context,
    path: Path,
    *,
    max_params: str | None = None,
    max_active: str | None = None,
    gpu_memory: str | None = None,
    all_recipes: bool = False,
    targets: bool = False,
    moe: MoeOptions,
    weights: bool = False,
    dense: Path | None = None,
    experts_from: list[Path],
    load: Path | None = None,
    report: Path | None = None,
    revision: str | None = None,
    tensors: bool = False,
    json: bool = False,
) -> None:
    """Show what a model is or would become; reads headers only, except with --weights or --load.

    Example:
      upcycle inspect Llama-3.1-8B --gpu-memory 80GBx8
    """
    if report is not None:
        from upcycle_cli.report.page import check_report_file

        check_report_file(report, dense)
    values.check_pairs(context)
    from upcycle_cli.inspection import summary

    budget = values.to_budget(max_params, max_active, gpu_memory, every=all_recipes)
    recipe = files = inputs = None
    if budget is None and values.needs_recipe(context):
        from upcycle_cli.plan.inputs import Inputs

        inputs = Inputs.read(
            calibration=moe.calibration,
            rows=values.file_of(moe.router_init, RouterInit),
            orders=values.file_of(moe.neuron_order, NeuronOrder),
        )
        files = values.to_options(moe)
        recipe = values.to_recipe(moe, context, allow_inexact=True)
    silent = json or not (weights or load)
    with progress_bar(silent=silent) as watch:
        found = summary.inspect(
            path,
            recipe,
            revision=revision,
            target=moe.target,
            options=files,
            inputs=inputs,
            weights=weights,
            dense=[each for each in (dense, *experts_from) if each is not None],
            load=load,
            watch=watch,
        )
    if targets and found.kind == "moe":
        words = f"{path} is a mixture of experts, and only dense models can become others."
        raise UpcycleError(words, "Remove --targets.")
    if report is not None:
        _write_report(report, found, path, silent=json)
    fits: Sequence[SizedRecipe] = ()
    command = ""
    if budget is not None:
        from upcycle_cli.plan.budget import fitting

        fits = fitting(found.checkpoint, budget, **values.to_shared_choices(moe, context))
        command = values.convert_command(context, fits[0].recipe.name)
    if json:
        from upcycle_cli.cli import render_json

        terminal.print_json(render_json.inspection_json(found, fits, command, tensors=tensors))
        return
    if budget is not None:
        render.show_fits(fits, budget.gpu_bytes, command, every=all_recipes)
    else:
        _print_tables(found, targets=targets)
    if tensors:
        # One line a tensor, whatever the width of the screen, so that grep finds it.
        terminal.stdout().out("", *render.tensor_lines(found), sep="\n", highlight=False)
    elif not (budget or found.plan or found.weights or found.load):
        terminal.talk("", f"Next: {_next_command(found, path)}")


def _print_tables(found: Inspection, *, targets: bool) -> None:
    compared = []
    if targets:
        from upcycle_cli.models.overview import target_rows

        compared.append(terminal.rows_table(target_rows(found.becomes)))
    terminal.show(found, *compared)
    terminal.warn(*found.warnings)


def _next_command(found: Inspection, path: Path) -> str:
    place = shell_line([str(path)])
    if found.kind == "dense":
        return f"upcycle inspect {place} --gpu-memory 80GBx8 suggests a recipe for your GPUs."
    if found.record is not None:
        return f"upcycle verify DENSE {place} compares it with its dense model."
    return f"upcycle inspect {place} --weights --dense DENSE measures how far training moved it."


def _write_report(report: Path, found: Inspection, path: Path, *, silent: bool) -> None:
    from upcycle_cli.core.safe_files import write_whole
    from upcycle_cli.report.contents import inspection_html

    if found.kind != "moe":
        raise UpcycleError(f"{path} is a dense model; --report needs an MoE.", "Remove --report.")
    html = inspection_html(found, name=str(path), command=render.command_line())
    write_whole(report, options.with_flags(html).encode())
    if not silent:
        terminal.talk(f"Wrote {report}.")
