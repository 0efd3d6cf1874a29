"""The page of an inspection: what headers, and the weights when they were read, say of an MoE."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from upcycle_cli.checkpoint.storage import CONFIG_NAME
from upcycle_cli.core.text import parameter_text, size_text
from upcycle_cli.inspection.describe import inspection_rows
from upcycle_cli.inspection.expert_load import Load
from upcycle_cli.inspection.experts import WeightFacts
from upcycle_cli.inspection.summary import Inspection
from upcycle_cli.report.figures import Series, draw_bars, draw_lines
from upcycle_cli.report.layers import load_section
from upcycle_cli.report.origin import FOOTER, origin_section
from upcycle_cli.report.page import Figure, Page, Section, Table
from upcycle_cli.report.recipe import recipe_section

_MOST_KINDS = 200


def inspection_page(inspection: Inspection, *, name: str, command: str) -> Page:
    """Return the page of an inspected MoE."""
    title = name.rstrip("/").rsplit("/", maxsplit=1)[-1] or name
    rows = [(label, "; ".join(lines)) for label, lines in inspection_rows(inspection)]
    facts = Table(caption="What is known of the checkpoint", rows=rows)
    digests: dict[str, str | None]
    digests = {f"{CONFIG_NAME} of the MoE": inspection.checkpoint.config_digest}
    digests |= {f"header of {s.name}": s.digest for s in inspection.checkpoint.shards}
    return Page(
        title=f"{title} (upcycle inspect)",
        kind="Inspection of a Mixture of Experts",
        heading=title,
        verdict="What headers, settings and weights say by themselves. Whether the MoE computes "
        "what a dense model computes is what upcycle verify finds out.",
        sections=[
            Section(key="facts", title="Checkpoint", tables=[facts]),
            recipe_section(inspection.record or {}, _found(inspection.weights)),
            *_movement(inspection.weights),
            *_load(inspection.load),
            _parameters(inspection),
            origin_section({"MoE": name}, digests, inspection.record or {}, command),
        ],
        footer=FOOTER,
    )


def _found(weights: WeightFacts | None) -> dict[str, object]:
    """Return what the weights show, by the names that verify has for it."""
    if weights is None:
        return {}
    factors = {f"{matrix}_factor": factor for matrix, factor in (weights.factors or {}).items()}
    return {"granularity": weights.granularity, **factors}


def _movement(weights: WeightFacts | None) -> Iterator[Section]:
    """Draw how far training has moved experts, where it was measured."""
    layers = (weights and weights.movement) or ()
    if not layers:
        return
    series = [
        Series(name="most moved expert", values=[max(each.moved) for each in layers]),
        Series(name="mean", values=[sum(each.moved) / len(each.moved) for each in layers]),
        Series(name="apart", values=[each.apart for each in layers]),
    ]
    split, groups = sum(each.split_groups for each in layers), sum(e.num_groups for e in layers)
    drawn = draw_lines(
        "movement", [each.layer for each in layers], series, unit="relative distance", log=True
    )
    figure = Figure(
        svg=drawn,
        title="How far experts have come",
        description="From their dense shards, and from the mean of the copies of their shard, "
        f"relative to the shards' norm. {split:,} of {groups:,} virtual groups are split.",
    )
    yield Section(key="movement", title="Training", figures=[figure])


def _load(load: Load | None) -> Iterator[Section]:
    """Draw which experts a text chooses, where it was asked for."""
    found = None if load is None else load_section(load.layers)
    if found is not None:
        yield found


def _parameters(inspection: Inspection) -> Section:
    dense = inspection.dense_parameters
    found = {} if dense is None else {"dense model": dense}
    found |= {"active": inspection.active_parameters, "all": inspection.total_parameters}
    units = ((1e9, "billions"), (1e6, "millions"), (1.0, ""))
    unit, name = next(each for each in units if found["all"] > each[0])
    figure = Figure(
        svg=draw_bars(
            "parameters",
            {key: value / unit for key, value in found.items()},
            unit=f"parameters{f', {name}' if name else ''}",
        ),
        title="Parameters",
        description="; ".join(f"{key}: {parameter_text(value)}" for key, value in found.items())
        + ".",
    )
    rows = sorted(_kinds(inspection), key=lambda kind: -kind.nbytes)
    total = sum(kind.nbytes for kind in rows) or 1
    table = Table(
        caption="Tensors by name, with # for the number of a layer or an expert",
        columns=("name", "tensors", "shape", "dtype", "size", "share"),
        rows=[
            (
                kind.name,
                f"{kind.tensors:,}",
                " or ".join(sorted(kind.shapes)),
                ", ".join(sorted(kind.dtypes)),
                size_text(kind.nbytes),
                f"{kind.nbytes / total:.2%}",
            )
            for kind in rows[:_MOST_KINDS]
        ],
        folded=f"Tensors of {len(rows):,} kinds",
    )
    return Section(key="parameters", title="Parameters", figures=[figure], tables=[table])


@dataclass
class _Kind:
    """Tensors whose names differ by numbers only."""

    name: str
    tensors: int
    nbytes: int
    shapes: set[str]
    dtypes: set[str]


def _kinds(inspection: Inspection) -> Iterator[_Kind]:
    found: dict[str, _Kind] = {}
    for entry in inspection.checkpoint.tensors.values():
        name = re.sub(r"(?<=\.)\d+(?=\.)", "#", entry.name)
        kind = found.setdefault(name, _Kind(name, 0, 0, set(), set()))
        kind.tensors += 1
        kind.nbytes += entry.nbytes
        kind.shapes.add("×".join(map(str, entry.shape)))
        kind.dtypes.add(entry.dtype)
    yield from found.values()
