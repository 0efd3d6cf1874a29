"""The tables and messages that commands print."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from rich.table import Table
from rich.text import Text

from upcycle_cli.cli import terminal
from upcycle_cli.core.text import counted, parameter_text, printable, shell_line, size_text

if TYPE_CHECKING:
    from upcycle_cli.inspection.describe import Inspection
    from upcycle_cli.models.overview import Families, TargetFacts
    from upcycle_cli.plan.budget import SizedRecipe
    from upcycle_cli.plan.plan import Plan
    from upcycle_cli.publish.push import Push
    from upcycle_cli.verification.result import Report

_Value = TypeVar("_Value")
_STATUS_STYLES = {"passed": "green", "failed": "bold red"}
_MAX_WIDTH = 100
"""A longer cell in a list of tensors moves the rest of its own line only."""
SIZES_NOTE = (
    "FLOPs are those of matrix products in the forward pass, without attention scores; × compares "
    "them with the dense model's. Sizes are those of the parameters: weights in bfloat16, training "
    "with AdamW (bfloat16 weights and gradients, float32 master weights and moments, 16 bytes "
    "each). A KV cache and activations need more."
)


def command_line() -> str:
    """Return the command that runs, as one types it."""
    return shell_line(["upcycle", *sys.argv[1:]])


def plan_table(plan: Plan) -> Table:
    """Return the table of a plan."""
    from upcycle_cli.plan.facts import plan_rows

    return terminal.rows_table(plan_rows(plan))


def report_table(report: Report) -> Table:
    """Return the results of verify: a row per check, its failures below its detail."""
    (rows,) = report.tables()
    coloured = []
    for label, lines in rows:
        status = label.split()[-1]
        style = _STATUS_STYLES.get(status, "yellow")
        coloured.append((Text.assemble(label.removesuffix(status), (status, style)), lines))
    return terminal.rows_table(coloured)


def announce_push(repo: str, files: int, nbytes: int) -> None:
    """Say that a push begins."""
    terminal.talk(f"Pushing {counted(files, 'file')}, {size_text(nbytes)}, to {repo} …")


def show_push(push: Push) -> None:
    """Print what a push did, and what the licence requires."""
    # Without a terminal, keep addresses in one piece.
    to = terminal.stdout(None if sys.stdout.isatty() else 200)
    terminal.show(*map(terminal.rows_table, push.tables()), to=to)
    terminal.warn(*push.reminders)


def tensor_lines(inspection: Inspection) -> Iterator[str]:
    """Yield a line for every tensor."""
    from upcycle_cli.cli.render_json import tensors_json

    last = "file" if inspection.plan is None else "made_from"
    rows = [("tensor", "dtype", "shape", last.replace("_", " "))]
    for tensor in tensors_json(inspection):
        shape = "×".join(map(str, tensor["shape"]))
        rows.append((printable(tensor["name"]), tensor["dtype"], shape, printable(tensor[last])))
    widths = [min(_MAX_WIDTH, max(map(len, column))) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, strict=True)
        yield "  ".join(text.ljust(width) for text, width in cells).rstrip()


def fits_tables(fits: Sequence[SizedRecipe]) -> list[Table]:
    """Return the recipes that fit a budget, and what the paper says about them."""
    table = _table("recipe", "parameters", "active", "FLOPs per token", "weights", "training")
    comments: dict[str, list[str]] = {}
    for fit in fits:
        training = size_text(fit.training_bytes)
        table.add_row(
            fit.recipe.name,
            parameter_text(fit.total_parameters),
            parameter_text(fit.active_parameters),
            f"{parameter_text(fit.flops_per_token, 'G')} ({fit.flops_ratio:.2f} ×)",
            size_text(fit.weight_bytes),
            f"{training}, too large" if fit.trains is False else training,
        )
        for words in fit.paper:
            comments.setdefault(words, []).append(fit.recipe.name)
    rows = [("sizes of", [fits[0].target])]
    if comments:
        # A comment on more than four recipes is a general one.
        names = ("" if len(names) > 4 else f"{', '.join(names)}: " for names in comments.values())
        lines = [name + words for name, words in zip(names, comments, strict=True)]
        rows.append(("arXiv 2410.07524", lines))
    return [table, terminal.rows_table(rows)]


def overview_tables(found: Families) -> Iterator[Table]:
    """Yield the supported model types, the targets, and the model types that are not supported."""
    dense = _by_value(found.dense)
    table = _table("dense model types", "targets (default first)")
    for targets in sorted(dense, key=len, reverse=True):
        table.add_row(", ".join(dense[targets]), ", ".join(targets))
    yield table
    table = _table("wrapper", "text model inside", "targets (default first)")
    for wrapper, texts in found.wrappers.items():
        for text_type, targets in texts.items():
            table.add_row(wrapper, text_type, ", ".join(targets))
    yield table
    yield from target_tables(found.targets)
    table = _table("not supported", "because")
    for reason, names in _by_value(found.refused).items():
        table.add_row(", ".join(names), reason)
    yield table


def target_tables(targets: Iterable[TargetFacts]) -> Iterator[Table]:
    """Yield what targets can express, and their engines and trainers; refused ones are left out."""
    targets = [target for target in targets if target.refusal is None]
    if not targets:
        return
    table = _table("target", "routings", "MoE layers", "shared\nexperts", "scaled by")
    for target in targets:
        routings, scaled_by = "\n".join(target.routings), "\n".join(target.scaled_by)
        table.add_row(target.name, routings, target.layers, target.shared_experts, scaled_by)
    yield table
    table = _table("target", "runs in", "trains in", "balanced by")
    for target in targets:
        runs = "\n".join(_software(target.engines, target))
        trains = "\n".join(_software(target.trainers, target))
        table.add_row(target.name, runs, trains, target.balanced)
    yield table


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in names:
        # Names in the first column are copied: never fold a recipe or a target.
        table.add_column(name, overflow="fold", no_wrap=name in {"recipe", "target"})
    return table


def _by_value(values: Mapping[str, _Value]) -> dict[_Value, list[str]]:
    """Return the names of a mapping by their value."""
    names: dict[_Value, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(name)
    return names


def _software(found: Mapping[str, Sequence[str]], target: TargetFacts) -> list[str]:
    """Return the software that supports a target, with its routings if they are not all."""
    return [
        name if len(routings) == len(target.routings) else f"{name} ({', '.join(routings)})"
        for name, routings in found.items()
    ]
