"""Inspections, reports and pushes as rich tables or as JSON; no logic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from upcycle_cli.core.errors import shown
from upcycle_cli.core.text import counted, printable
from upcycle_cli.models.engines import Engine, Support
from upcycle_cli.models.layers import listed

if TYPE_CHECKING:
    from upcycle_cli.checkpoint.header import TensorEntry
    from upcycle_cli.inspection.summary import Inspection
    from upcycle_cli.models.overview import TargetFacts
    from upcycle_cli.models.trainers import Trainer
    from upcycle_cli.old_verification import Report
    from upcycle_cli.plan.tensors import OutputTensor
    from upcycle_cli.publish.push import Push

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


def inspection_rows(inspection: Inspection) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield what is known of a checkpoint: a property and the lines that say it."""
    checkpoint = inspection.checkpoint
    yield "model", [f"{inspection.model_type} ({inspection.kind})"]
    if inspection.num_experts is not None:
        experts = f"{inspection.num_experts} per layer, {inspection.top_k} active"
        stored = f"{inspection.routing}, stored {inspection.expert_layout}"
        yield "experts", [f"{experts}, {stored}"]
        layers, num_layers = inspection.moe_layers or (), inspection.num_layers
        if len(layers) != num_layers:
            yield "MoE layers", [f"{listed(layers)} of {num_layers}"]
    dense, parameters = inspection.dense_parameters, count(inspection.total_parameters)
    if inspection.kind == "moe":
        origin = "" if dense is None else f" (dense {count(dense)})"
        parameters += f", {count(inspection.active_parameters)} active{origin}"
    yield "parameters", [parameters]
    shards = counted(len(checkpoint.shards), "shard")
    yield "size", [f"{size_text(checkpoint.nbytes)} in {shards}"]
    if inspection.becomes:
        able = [target.name for target in inspection.becomes if target.refusal is None]
        yield "can become", [", ".join(able) or "nothing"]
        if refused := [target.refusal for target in inspection.becomes if target.refusal]:
            yield "but not", refused
    if inspection.kind == "moe":
        yield "upcycle.json", [_claims(inspection.record)]
        yield "engines", engine_lines(inspection.engines)
        if inspection.trainers:
            yield "trainers", engine_lines(inspection.trainers)
    if inspection.weights is not None:
        from upcycle_cli.cli.render_weights import weight_rows

        yield from weight_rows(inspection.weights, inspection.num_experts)
    if inspection.load is not None:
        from upcycle_cli.cli.render_weights import load_rows

        yield from load_rows(inspection.load)


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
    table = _properties(between=1)
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


def count(number: int, billion: str = "B") -> str:
    """Return a number of parameters as people say it: 8.03B, 134.5M; of FLOPs with `billion` G."""
    for limit, unit in ((1e12, "T"), (1e9, billion), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.{1 if unit in 'MK' else 2}f}{unit}"
    return str(number)


def size_text(num_bytes: float) -> str:
    """Return a size in decimal units, as disks are sold."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.2f} {unit}"
    return f"{num_bytes:.0f} bytes"


def rows_table(rows: Iterable[tuple[str, Sequence[str]]]) -> Table:
    """Return a table of properties and the lines that say them, which may hold anything."""
    table = _properties()
    for label, lines in rows:
        table.add_row(label, Text("\n".join(map(printable, lines))))
    return table


def _properties(between: int = 0) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    for _ in range(between):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def engine_lines(found: Iterable[Engine | Trainer]) -> list[str]:
    """Return what is known of engines or trainers, those of one kind in a line."""
    lines: dict[Support, list[str]] = {}
    for engine in found:
        lines.setdefault(engine.support, []).append(engine.name)
    return [
        ", ".join(names) + ("" if support is Support.RUNS else f": {support}")
        for support, names in lines.items()
    ]


def engines_json(found: Iterable[Engine]) -> dict[str, str]:
    """Return what is known of engines as a JSON object."""
    return {engine.name: engine.support for engine in found}


def _claims(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "none: nothing says how it was made"
    recipe, source = record.get("recipe"), record.get("source")
    growth = record.get("growth")
    if isinstance(growth, dict) and isinstance(source, dict):
        expand, name = (_claimed(value) for value in (growth.get("expand"), source.get("name")))
        return f"grown: each expert {expand} times, from {name}"
    if not isinstance(recipe, dict) or not isinstance(source, dict):
        return "not in a form that this version reads"
    keys = ("name", "expansion", "granularity", "scaling", "seed")
    name, expansion, granularity, scaling, seed = (_claimed(recipe.get(key)) for key in keys)
    # An earlier version drew all rows.
    rows = _claimed(recipe.get("router_init", "normal"))
    groups = f"{expansion} group{'' if expansion == '1' else 's'} of {granularity}"
    if recipe.get("shared_experts"):
        groups += f" shards, {_claimed(recipe['shared_experts'])} of them shared"
    made = f"{name} ({groups}), {scaling} scaling, {rows} rows, seed {seed}"
    return f"{made}, from {_claimed(source.get('name'))}"


def _claimed(value: object) -> str:
    """Return a value of a record, which can be any, as words."""
    text = value if isinstance(value, str) else shown(value)
    return text if len(text) <= _WIDEST else f"{text[:_WIDEST]}…"
