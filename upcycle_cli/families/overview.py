"""What can become what, as a whole: the rows of both tables, and what runs the results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from upcycle_cli.families import SHIPPED, targets_of
from upcycle_cli.families.dense_rows import DENSE, REFUSED
from upcycle_cli.families.engines import Support, engines
from upcycle_cli.families.moe import NATIVE, ExpertLayout, Target, shipped
from upcycle_cli.recipe import Routing


@dataclass(frozen=True, kw_only=True)
class TargetFacts:
    """What is known of a target."""

    name: str
    """As --target has it."""
    routings: tuple[Routing, ...]
    """That which convert takes first."""
    layers: str
    """Which layers can be mixtures of experts: any, the last ones, all."""
    engines: Mapping[str, tuple[Routing, ...]]
    """The engines that were seen to run it, and with which routings."""


@dataclass(frozen=True, kw_only=True)
class Overview:
    """All that can be upcycled, what it can become, and what cannot be upcycled."""

    dense: Mapping[str, tuple[str, ...]]
    """By dense model type its targets; that which convert takes first."""
    targets: tuple[TargetFacts, ...]
    refused: Mapping[str, str]
    """Dense model types that cannot be upcycled, with the reason."""


def overview() -> Overview:
    """Return what all rows say."""
    dense = {name: targets_of(DENSE[name]) for name in sorted(DENSE)}
    return Overview(
        dense=dense, targets=tuple(_targets(dense)), refused=dict(sorted(REFUSED.items()))
    )


def _targets(dense: Mapping[str, tuple[str, ...]]) -> Iterator[TargetFacts]:
    for name, row in NATIVE.items():
        yield _facts(name, row)
    # Of any family, since not each was run in every engine.
    anyone = next(name for name, targets in dense.items() if targets == (SHIPPED,))
    yield _facts(SHIPPED, shipped(DENSE[anyone], "silu", biased=False))


def _facts(name: str, row: Target) -> TargetFacts:
    runs: dict[str, tuple[Routing, ...]] = {}
    for routing in row.routings:
        for engine in engines(
            row.model_type,
            routing,
            tied=False,
            fused=row.layout(None) is ExpertLayout.FUSED,
            plain_attention=True,
        ):
            if engine.support is Support.RUNS:
                runs[engine.name] = (*runs.get(engine.name, ()), routing)
    return TargetFacts(name=name, routings=row.routings, layers=row.layers.words, engines=runs)
