"""The tables and messages that commands print."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from upcycle_cli.cli import terminal
from upcycle_cli.cli.render_json import tensors_json
from upcycle_cli.core.text import counted, parameter_text, printable, shell_line, size_text

if TYPE_CHECKING:
    from upcycle_cli.inspection.summary import Inspection
    from upcycle_cli.plan.budget import SizedRecipe
    from upcycle_cli.publish.push import Push

_MOST_RECIPES = 20
"""More recipes are listed with --all."""
_MEMORY_NOTE = (
    "training takes 16 bytes per parameter over all GPUs together (AdamW with bfloat16 weights and "
    "gradients, float32 master weights and two moments); activations need more."
)


def command_line() -> str:
    """Return the command that runs, as one types it."""
    return shell_line(["upcycle", *sys.argv[1:]])


def announce_push(repo: str, files: int, nbytes: int) -> None:
    """Say that a push begins."""
    terminal.talk(f"Pushing {counted(files, 'file')}, {size_text(nbytes)}, to {repo} …")


def show_push(push: Push) -> None:
    """Print what a push did, and what the licence requires."""
    # Without a terminal, keep addresses in one piece.
    to = terminal.stdout(None if sys.stdout.isatty() else 200)
    terminal.show(push, to=to)
    terminal.warn(*push.reminders)


def tensor_lines(inspection: Inspection) -> Iterator[str]:
    """Yield a line for every tensor."""
    last = "file" if inspection.plan is None else "made_from"
    for tensor in tensors_json(inspection):
        shape = "×".join(map(str, tensor["shape"]))
        name = printable(tensor["name"])
        yield f"{name:60}  {tensor['dtype']:4}  {shape:14}  {printable(tensor[last])}"


def show_fits(
    fits: Sequence[SizedRecipe], memory: int | None, command: str, *, every: bool
) -> None:
    """Print the recipes that fit a budget, best first: the suggestion, then what can be trained.

    Recipes that can only run come last. `memory` is the limit in bytes, if there is one, and
    `command` converts with the best recipe.
    """
    shown = fits if every else fits[:_MOST_RECIPES]
    limit = "" if memory is None else size_text(memory)
    title = f"Can be trained in {limit}" if limit else "Recipes that fit"
    title += ", best first (T = 2G, then E near 8, then small G)"
    groups = {title: [fit for fit in shown if fit.trains is not False]}
    groups["Can only run there"] = [fit for fit in shown if fit.trains is False]
    terminal.show(terminal.rows_table(_suggestion(fits, limit)))
    if fits[0].trains is not False:
        terminal.stdout().out(f"\nNext: {command}", highlight=False)  # in one piece
    terminal.stdout().out("")
    terminal.show(*(_fits_table(name, rows) for name, rows in groups.items() if rows))
    notes = {name: f"{name}: {text}" for fit in shown for name, text in fit.warnings.items()}
    if more := len(fits) - len(shown):
        notes[""] = f"{counted(more, 'more recipe')} fit; --all lists them."
    terminal.warn(_MEMORY_NOTE, *notes.values())


def _suggestion(fits: Sequence[SizedRecipe], limit: str) -> Iterator[tuple[str, Sequence[str]]]:
    from upcycle_cli.plan.budget import suggestion

    found = suggestion(fits)
    if found is None:
        least = min(fits, key=lambda fit: fit.training_bytes)
        needs = f"the smallest, {least.recipe.name}, needs {size_text(least.training_bytes)}"
        yield "suggested", [f"nothing can be trained in {limit}: {needs}"]
        return
    best, reason = found
    total, active = parameter_text(best.total_parameters), parameter_text(best.active_parameters)
    flops = f"{best.flops_ratio:.2f} × the dense model's FLOPs"
    name = f"{best.recipe.name} as {best.target}"
    yield "suggested", [f"{name}: {total} parameters, {active} active, {flops}"]
    yield "why", [reason]
    yield from (("warning", [text]) for text in best.warnings.values())
    of = f" of {limit}" if limit else ""
    yield "training", [f"takes {size_text(best.training_bytes)}{of}, plus activations"]


def _fits_table(title: str, fits: Sequence[SizedRecipe]) -> Table:
    trains = fits[0].trains is not False
    memory = "training" if trains else "weights"
    columns = ("recipe", "params", "active", "FLOPs", memory, "warning")
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.title, table.title_justify, table.title_style = title, "left", "bold"
    table.columns[0].no_wrap = True
    for fit in fits:
        table.add_row(
            fit.recipe.name,
            parameter_text(fit.total_parameters),
            parameter_text(fit.active_parameters),
            f"{fit.flops_ratio:.2f} ×",
            size_text(fit.training_bytes if trains else fit.weight_bytes),
            ", ".join(fit.warnings),
        )
    return table
