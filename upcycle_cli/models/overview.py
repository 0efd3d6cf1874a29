"""What can become what, as a whole: the rows of both tables, and what runs the results."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models import choose, dense_family, targets_of
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.engines import Support, engines
from upcycle_cli.models.moe import Target
from upcycle_cli.models.moe_config import has_plain_attention
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.models.refused import REFUSED
from upcycle_cli.models.shipped_row import shipped
from upcycle_cli.models.trainers import trainers
from upcycle_cli.models.wrappers import (
    INSIDE,
    LOADED,
    WRAPPERS,
    Inside,
    inner,
    native_target,
    wrapped_family,
)
from upcycle_cli.recipe.recipe import SHIPPED, ExpertLayout, Routing


@dataclass(frozen=True, kw_only=True)
class TargetFacts:
    """What is known of a target, of any model or of one."""

    name: str
    """As --target has it."""
    routings: tuple[Routing, ...] = ()
    """That which convert takes first."""
    layers: str = ""
    """Which layers can be mixtures of experts: any, a range, the last ones, all."""
    engines: Mapping[str, tuple[Routing, ...]] = field(default_factory=dict)
    """The engines that were seen to run it, and with which routings."""
    trainers: Mapping[str, tuple[Routing, ...]] = field(default_factory=dict)
    """The trainers that were seen to take it, and with which routings."""
    balanced: str = ""
    """By what transformers balances its experts in training: an auxiliary loss, a bias, nothing."""
    shared_experts: str = ""
    """How many shards can be an expert for every token: any, 1, none."""
    scaled_by: tuple[str, ...] = ()
    """What can make up for the gates: a key of its config, its weights. That which convert takes
    first."""
    refusal: str | None = None
    """Why a model cannot become it; None where it can, and where no model is asked about."""


@dataclass(frozen=True, kw_only=True)
class Overview:
    """All that can be upcycled, what it can become, and what cannot be upcycled."""

    dense: Mapping[str, tuple[str, ...]]
    """By dense model type its targets; that which convert takes first."""
    wrappers: Mapping[str, Mapping[str, tuple[str, ...]]]
    """Model types that have a text model inside, by its type what that can become there."""
    targets: tuple[TargetFacts, ...]
    refused: Mapping[str, str]
    """Dense model types that cannot be upcycled, with the reason."""


def overview() -> Overview:
    """Return what all rows say."""
    dense = {name: targets_of(DENSE[name]) for name in sorted(DENSE)}
    # Of any family, since not each was run in every engine.
    anyone = next(name for name, targets in dense.items() if targets == (SHIPPED,))
    code = shipped(DENSE[anyone], "silu", biased=False)
    around = {
        name: Inside(wrapper, LOADED) for wrapper in WRAPPERS.values() for name in wrapper.natives
    }
    inside = {name: native_target(name, around[name]) for name in INSIDE}
    rows = {**NATIVE, **inside, SHIPPED: code}
    targets = tuple(_facts(name, row) for name, row in rows.items())
    refused = dict(sorted(REFUSED.items()))
    return Overview(dense=dense, wrappers=_wrappers(), targets=targets, refused=refused)


def _wrappers() -> Mapping[str, Mapping[str, tuple[str, ...]]]:
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for name, row in sorted(WRAPPERS.items()):
        for text_type in row.texts:
            config = {"model_type": name, "text_config": {"model_type": text_type}}
            found.setdefault(name, {})[text_type] = targets_of(wrapped_family(config, ()))
    return found


def becomes(config: Mapping[str, Any], names: Collection[str]) -> tuple[TargetFacts, ...]:
    """Return what a dense model can become, and what it cannot, with the reason.

    `names` are those of its tensors. Raises UpcycleError when its config makes no sense.
    """
    return tuple(_of_model(config, names, name) for name in targets_of(dense_family(config)))


def _of_model(config: Mapping[str, Any], names: Collection[str], name: str) -> TargetFacts:
    try:
        family = choose(config, name, None, names=names)
    except UpcycleError as error:
        return TargetFacts(name=name, refusal=error.message)
    tied = bool(family.dense.values.get("tie_word_embeddings", False))
    plain = has_plain_attention(inner(config), rotary_share=family.rotary_share)
    return _facts(name, family.target, tied=tied, plain_attention=plain)


def _facts(
    name: str, row: Target, *, tied: bool = False, plain_attention: bool = True
) -> TargetFacts:
    runs: dict[str, tuple[Routing, ...]] = {}
    trains: dict[str, tuple[Routing, ...]] = {}
    fused = row.layout(None) is ExpertLayout.FUSED
    for routing in row.routings:
        for engine in engines(
            row.title,
            routing,
            tied=tied,
            fused=fused,
            plain_attention=plain_attention,
            scaled=row.keys.scale is not None,
        ):
            if engine.support is Support.RUNS:
                runs[engine.name] = (*runs.get(engine.name, ()), routing)
        for trainer in trainers(row, routing, tied=tied, fused=fused):
            if trainer.support is Support.RUNS:
                trains[trainer.name] = (*trains.get(trainer.name, ()), routing)
    balanced = "nothing" if row.correction_bias is None else "bias"
    if row.balances:
        balanced = "auxiliary loss of each layer" if row.ships_code else "auxiliary loss"
    return TargetFacts(
        name=name,
        routings=row.routings,
        layers=row.layers.words,
        engines=runs,
        trainers=trains,
        balanced=balanced,
        shared_experts="none" if row.shared is None else row.shared.words,
        scaled_by=("weights",) if row.keys.scale is None else (row.keys.scale, "weights"),
    )
