"""Plans, inspections, conversions and reports as rich tables or as JSON; no logic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from upcycle_cli.advice import no_promise, warnings
from upcycle_cli.conversion import Conversion
from upcycle_cli.errors import shown
from upcycle_cli.expr import describe
from upcycle_cli.families.engines import Engine, Support
from upcycle_cli.inspection import Inspection
from upcycle_cli.plan import Plan
from upcycle_cli.printable import counted, printable
from upcycle_cli.recipe import Promise

if TYPE_CHECKING:
    from upcycle_cli.hub.pushing import Push
    from upcycle_cli.verification import Report

_STATUS_STYLE = {"passed": "green", "failed": "bold red", "measured": "yellow", "skipped": "yellow"}


def plan_table(plan: Plan) -> Table:
    """Return the summary of a plan, one property a row."""
    recipe, factors = plan.recipe, plan.factors
    size = plan.family.decoder.intermediate_size // recipe.granularity
    table = _properties()
    _add(table, "model", f"{plan.family.dense.model_type} → {plan.family.target.model_type}")
    _add(table, "recipe", f"{recipe.name}, {recipe.routing}, seed {recipe.seed}")
    _add(
        table, "experts", f"{recipe.num_experts} per layer, {recipe.top_k} active, each {size} wide"
    )
    _add(
        table,
        "parameters",
        f"{count(plan.total_parameters)}, {count(plan.active_parameters)} active "
        f"(dense {count(plan.dense_parameters)})",
    )
    _add(table, "FLOPs per token", f"{plan.flops_ratio:.2f} × dense, attention scores left out")
    _add(table, "size", f"{size_text(plan.nbytes)} in {counted(len(plan.shards), 'shard')}")
    _add(
        table,
        "scale factors",
        f"gate × {factors.gate:g}, up × {factors.up:g}, down × {factors.down:g} "
        f"({'lossless' if plan.lossless else 'rounded'})",
    )
    _add(table, "router", f"logit std {recipe.router_logit_std:g}, {_groups(plan)}")
    _add(table, "promise", _promise(plan))
    if plan.dropped:
        _add(table, "left out", _dropped(plan.dropped))
    _add(table, "engines", *_engines(plan.engines))
    return table


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as a JSON object."""
    return {
        "model_type": plan.family.target.model_type,
        "source_type": plan.family.dense.model_type,
        "source": plan.source.name,
        "source_revision": plan.source.revision,
        "recipe": plan.recipe.name,
        "routing": plan.recipe.routing,
        "scaling": plan.recipe.scaling,
        "router_logit_std": plan.recipe.router_logit_std,
        "virtual_groups": plan.recipe.virtual_groups,
        "seed": plan.recipe.seed,
        "num_experts": plan.recipe.num_experts,
        "top_k": plan.recipe.top_k,
        "expert_layout": plan.options.expert_layout,
        "total_parameters": plan.total_parameters,
        "active_parameters": plan.active_parameters,
        "dense_parameters": plan.dense_parameters,
        "flops_ratio": plan.flops_ratio,
        "bytes": plan.nbytes,
        "shards": len(plan.shards),
        "factors": asdict(plan.factors),
        "lossless": plan.lossless,
        "promise": plan.promise,
        "engines": _engines_json(plan.engines),
        "dropped": dict(plan.dropped),
        "warnings": list(warnings(plan)),
        "plan_sha256": plan.digest,
    }


def conversion_json(conversion: Conversion, push: Push | None) -> dict[str, Any]:
    """Return what a conversion, and the push after it, did as a JSON object."""
    status = "converted" if conversion.published else "verification failed"
    planned = plan_json(conversion.plan)
    planned["warnings"] += conversion.warnings
    return {
        "status": "already done" if conversion.already_done and conversion.published else status,
        "output": str(conversion.output),
        **planned,
        "seconds": round(conversion.seconds, 3),
        "shared_bytes": conversion.shared_bytes,
        "reused_bytes": conversion.reused_bytes,
        "verification": None if conversion.report is None else conversion.report.to_json(),
        "push": None if push is None else push_json(push),
    }


def push_table(push: Push) -> Table:
    """Return what a push did, one property a row."""
    table = _properties()
    _add(table, "repo", push.url)
    _add(table, "commit", push.commit)
    if push.pull_request is not None:
        _add(table, "pull request", push.pull_request)
    what = f"{counted(push.files, 'file')}, {size_text(push.nbytes)}"
    _add(table, "uploaded", what if push.changed else f"nothing: all {what}, were there already")
    if push.card_kept:
        _add(table, "card", "README.md was edited there and is kept (--replace-card replaces it)")
    for label, names in (("removed there", push.removed), ("left out", push.left_out)):
        if names:
            _add(table, label, *names[:8], *_more(names[8:]))
    return table


def _more(hidden: Sequence[str]) -> list[str]:
    return [f"and {len(hidden)} more"] if hidden else []


def push_json(push: Push) -> dict[str, Any]:
    """Return what a push did as a JSON object."""
    return {
        "status": "pushed" if push.changed else "already there",
        "repo": push.repo,
        "url": push.url,
        "commit": push.commit,
        "pull_request": push.pull_request,
        "files": push.files,
        "bytes": push.nbytes,
        "card_kept": push.card_kept,
        "left_out": list(push.left_out),
        "removed": list(push.removed),
        "reminders": list(push.reminders),
    }


def inspection_table(inspection: Inspection) -> Table:
    """Return what is known of a checkpoint, one property a row."""
    table = _properties()
    checkpoint = inspection.checkpoint
    _add(table, "model", f"{inspection.model_type} ({inspection.kind})")
    if inspection.num_experts is not None:
        _add(
            table,
            "experts",
            f"{inspection.num_experts} per layer, {inspection.top_k} active, "
            f"{inspection.routing}, stored {inspection.expert_layout}",
        )
    active = inspection.active_parameters
    dense = inspection.dense_parameters
    parameters = count(inspection.total_parameters)
    if inspection.kind == "moe":
        origin = "" if dense is None else f" (dense {count(dense)})"
        parameters += f", {count(active)} active{origin}"
    _add(table, "parameters", parameters)
    _add(
        table,
        "size",
        f"{size_text(checkpoint.nbytes)} in {counted(len(checkpoint.shards), 'shard')}",
    )
    if inspection.targets:
        _add(table, "can become", " or ".join(inspection.targets))
    if inspection.kind == "moe":
        _add(table, "upcycle.json", _claims(inspection.record))
        _add(table, "engines", *_engines(inspection.engines))
    _add_weights(table, inspection)
    return table


def inspection_json(inspection: Inspection) -> dict[str, Any]:
    """Return an inspection as a JSON object; a planned conversion is under `plan`."""
    record, weights = inspection.record, inspection.weights
    claimed = record.get("recipe") if record is not None else None
    name = claimed.get("name") if isinstance(claimed, dict) else None
    return {
        "status": "inspected",
        "kind": inspection.kind,
        "model_type": inspection.model_type,
        "targets": list(inspection.targets),
        "recipe": name if isinstance(name, str) else None,
        "num_experts": inspection.num_experts,
        "top_k": inspection.top_k,
        "routing": inspection.routing,
        "expert_layout": inspection.expert_layout,
        "total_parameters": inspection.total_parameters,
        "active_parameters": inspection.active_parameters,
        "dense_parameters": inspection.dense_parameters,
        "bytes": inspection.checkpoint.nbytes,
        "shards": len(inspection.checkpoint.shards),
        "engines": _engines_json(inspection.engines),
        "claims": record,
        "weights": None if weights is None else asdict(weights),
        "plan": None if inspection.plan is None else plan_json(inspection.plan),
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
        padded = (
            text + " " * (width - cell_len(text)) for text, width in zip(row, widths, strict=True)
        )
        yield "  ".join(padded).rstrip()


def tensors_json(inspection: Inspection) -> list[dict[str, Any]]:
    """Return every tensor as a JSON object, in file order."""
    if inspection.plan is None:
        entries = inspection.checkpoint.tensors.values()
        return [
            {"name": e.name, "dtype": e.dtype, "shape": list(e.shape), "file": e.shard}
            for e in entries
        ]
    return [
        {
            "name": tensor.name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "file": shard.name,
            "role": tensor.role,
            "made_from": describe(tensor.expr),
        }
        for shard in inspection.plan.shards
        for tensor in shard.tensors
    ]


def report_table(report: Report) -> Table:
    """Return what verify found: a row per check, its failures below its detail."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in report.checks:
        detail = Text(printable(check.detail))
        for failure in check.failures:
            detail.append(f"\n- {printable(failure)}", style="red")
        table.add_row(check.name, Text(check.status, style=_STATUS_STYLE[check.status]), detail)
    return table


def count(parameters: int) -> str:
    """Return a number of parameters as people say it: 8.03B, 134.5M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= limit:
            return f"{parameters / limit:.{1 if unit in 'MK' else 2}f}{unit}"
    return str(parameters)


def size_text(num_bytes: float) -> str:
    """Return a size in decimal units, as disks are sold."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.2f} {unit}"
    return f"{num_bytes:.0f} bytes"


def _properties() -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _add(table: Table, label: str, *lines: str) -> None:
    """Add a property, whose lines may hold anything."""
    table.add_row(label, Text("\n".join(map(printable, lines))))


def _groups(plan: Plan) -> str:
    if not plan.recipe.virtual_groups:
        return "a row of its own per expert"
    return f"{counted(plan.recipe.expansion, 'virtual group')} of {plan.recipe.granularity}"


def _promise(plan: Plan) -> str:
    match plan.promise:
        case Promise.EXACT:
            rounding = f", rounded to {plan.rounded_to}" if plan.rounded_to else ""
            return f"exact: the function of the dense model{rounding}"
        case Promise.APPROXIMATE:
            return (
                f"approximate: equal up to the router logits (std {plan.recipe.router_logit_std:g})"
            )
        case Promise.NONE:
            return f"none: {no_promise(plan.recipe)}"


def _dropped(dropped: Mapping[str, str]) -> str:
    reasons = sorted(set(dropped.values()))
    return f"{counted(len(dropped), 'tensor')}: {'; '.join(reasons)}"


def _engines(found: Iterable[Engine]) -> list[str]:
    lines: dict[Support, list[str]] = {}
    for engine in found:
        lines.setdefault(engine.support, []).append(engine.name)
    return [
        ", ".join(names) + ("" if support is Support.RUNS else f": {support}")
        for support, names in lines.items()
    ]


def _engines_json(found: Iterable[Engine]) -> dict[str, str]:
    return {engine.name: engine.support for engine in found}


def _claims(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "none: nothing says how it was made"
    recipe, source = record.get("recipe"), record.get("source")
    if not isinstance(recipe, dict) or not isinstance(source, dict):
        return "not in a form that this version reads"
    keys = ("name", "expansion", "granularity", "scaling", "seed")
    name, expansion, granularity, scaling, seed = (_claimed(recipe.get(key)) for key in keys)
    groups = f"{expansion} group{'' if expansion == '1' else 's'} of {granularity}"
    return f"{name} ({groups}), {scaling} scaling, seed {seed}, from {_claimed(source.get('name'))}"


def _claimed(value: object) -> str:
    """Return a value of a record, which can be any, as words."""
    text = value if isinstance(value, str) else shown(value)
    return text if len(text) <= _WIDEST else f"{text[:_WIDEST]}…"


def _add_weights(table: Table, inspection: Inspection) -> None:
    weights = inspection.weights
    if weights is None:
        return
    _add(
        table,
        "weights",
        f"{counted(weights.distinct_experts, 'different expert')} of {inspection.num_experts}, "
        f"{weights.granularity} per group by their router rows",
    )
    whole = "yes, in every layer" if weights.whole_groups else "no:"
    _add(table, "whole groups", whole, *weights.differing)
    if weights.factors is not None:
        measured = ", ".join(f"{name} × {value:.6g}" for name, value in weights.factors.items())
        _add(table, "scale factors", f"{measured} (measured against the dense model)")
