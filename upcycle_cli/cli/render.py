"""Inspections, reports and pushes as rich tables or as JSON; no logic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.text import Text

from upcycle_cli.cli.terminal import properties_table
from upcycle_cli.core.text import counted, printable, size_text
from upcycle_cli.models.engines import Engine

if TYPE_CHECKING:
    from rich.table import Table

    from upcycle_cli.checkpoint.header import TensorEntry
    from upcycle_cli.inspection.summary import Inspection
    from upcycle_cli.models.overview import TargetFacts
    from upcycle_cli.plan.output import OutputTensor
    from upcycle_cli.publish.push import Push
    from upcycle_cli.verification.result import Report

_STATUS_STYLE = {"passed": "green", "failed": "bold red", "measured": "yellow", "skipped": "yellow"}


def picked(source: object, *names: str) -> dict[str, Any]:
    """Return some attributes by their names."""
    return {name: getattr(source, name) for name in names}


def push_rows(push: Push) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield what a push did: a property and the lines that say it."""
    yield "repo", [push.url]
    yield "commit", [push.commit]
    if push.pull_request is not None:
        yield "pull request", [push.pull_request]
    what = f"{counted(push.files, 'file')}, {size_text(push.nbytes)}"
    yield "uploaded", [what if push.changed else f"nothing: all {what}, were there already"]
    if push.card_kept:
        yield "card", ["README.md was edited there and is kept (--replace-card replaces it)"]
    for label, names in (("removed there", push.removed), ("left out", push.left_out)):
        if names:
            more = [f"and {len(names) - 8} more"] if len(names) > 8 else []
            yield label, [*names[:8], *more]


def push_json(push: Push) -> dict[str, Any]:
    """Return what a push did as a JSON object."""
    return {
        "status": "pushed" if push.changed else "already there",
        **picked(push, "repo", "url", "commit", "pull_request", "files"),
        "bytes": push.nbytes,
        **picked(push, "card_kept", "left_out", "removed", "reminders"),
    }


def inspection_json(inspection: Inspection) -> dict[str, Any]:
    """Return an inspection as a JSON object; a planned conversion is under `plan`."""
    plan, weights = None, inspection.weights
    if inspection.plan is not None:
        from upcycle_cli.cli.render_plan import plan_json

        plan = plan_json(inspection.plan)
    claimed = (inspection.record or {}).get("recipe")
    name = claimed.get("name") if isinstance(claimed, dict) else None
    return {
        "status": "inspected",
        **picked(inspection, "kind", "model_type", "targets"),
        "becomes": {target.name: target_json(target) for target in inspection.becomes},
        "recipe": name if isinstance(name, str) else None,
        **picked(inspection, "num_experts", "top_k", "routing", "expert_layout", "moe_layers"),
        **picked(inspection, "total_parameters", "active_parameters", "dense_parameters"),
        "bytes": inspection.checkpoint.nbytes,
        "shards": len(inspection.checkpoint.shards),
        "engines": engines_json(inspection.engines),
        "trainers": {
            trainer.name: picked(trainer, "support", "settings", "precision")
            for trainer in inspection.trainers
        },
        "claims": inspection.record,
        "weights": None if weights is None else asdict(weights),
        "load": None if inspection.load is None else asdict(inspection.load),
        "plan": plan,
    }


_WIDEST = 100
"""Longer names push the rest of their line aside, and not that of all others."""


def tensor_lines(inspection: Inspection) -> Iterator[str]:
    """Yield a line for every tensor: of the plan with how it is made, else of the checkpoint."""
    last = "file" if inspection.plan is None else "made_from"
    rows = [("tensor", "dtype", "shape", last.replace("_", " "))]
    for tensor in tensors_json(inspection):
        shape = "×".join(str(length) for length in tensor["shape"])
        rows.append((tensor["name"], tensor["dtype"], shape, tensor[last]))
    shown = [[printable(text) for text in row] for row in rows]
    widths = [min(_WIDEST, max(map(cell_len, column))) for column in zip(*shown, strict=True)]
    for row in shown:
        cells = zip(row, widths, strict=True)
        yield "  ".join(text + " " * (width - cell_len(text)) for text, width in cells).rstrip()


def tensors_json(inspection: Inspection) -> list[dict[str, Any]]:
    """Return every tensor as a JSON object, in file order."""
    if inspection.plan is None:
        held = inspection.checkpoint.tensors.values()
        return [_tensor_json(entry, entry.shard) for entry in held]
    from upcycle_cli.plan.describe import describe

    return [
        _tensor_json(tensor, shard.name)
        | {"role": "_".join(tensor.holds) or tensor.role, "made_from": describe(tensor.expr)}
        for shard in inspection.plan.shards
        for tensor in shard.tensors
    ]


def _tensor_json(tensor: TensorEntry | OutputTensor, file: str) -> dict[str, Any]:
    return {**picked(tensor, "name", "dtype"), "shape": list(tensor.shape), "file": file}


def report_table(report: Report) -> Table:
    """Return what verify found: a row per check, its failures below its detail."""
    table = properties_table(columns_between=1)
    for check in report.checks:
        detail = Text(printable(check.detail))
        for failure in check.failures:
            detail.append(f"\n- {printable(failure)}", style="red")
        table.add_row(check.name, Text(check.status, style=_STATUS_STYLE[check.status]), detail)
    return table


def target_json(target: TargetFacts) -> dict[str, Any]:
    """Return what is known of a target as a JSON object."""
    return {
        "routings": list(target.routings),
        "layers": target.layers,
        "scaled_by": list(target.scaled_by),
        "engines": {name: list(routings) for name, routings in target.engines.items()},
        "trainers": {name: list(routings) for name, routings in target.trainers.items()},
        **picked(target, "balanced", "shared_experts", "refusal"),
    }


def engines_json(found: Iterable[Engine]) -> dict[str, str]:
    """Return what is known of engines as a JSON object."""
    return {engine.name: engine.support for engine in found}
