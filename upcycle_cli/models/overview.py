"""The supported model types and targets, and what one model can become."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from upcycle_cli.core.display import Compact, Result, Row
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.text import any_of, did_you_mean
from upcycle_cli.models import engines as software
from upcycle_cli.models import lookup
from upcycle_cli.models.attention import attention_class
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.lookup import choose
from upcycle_cli.models.moe import Target
from upcycle_cli.models.moe_config import moe_text_config
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.models.wrappers import WRAPPERS, Inside
from upcycle_cli.recipe.recipe import SHIPPED, ExpertLayout, Routing


@dataclass(frozen=True, kw_only=True, repr=False)
class TargetFacts(Compact):
    """The properties of a target, in general or for one model."""

    name: str
    """The value of `target`."""
    routings: tuple[Routing, ...] = ()
    """The first is the default."""
    layers: str = ""
    """Which layers can be mixtures of experts: any, a range, the last ones, all."""
    attention: str = ""
    """The attention class that engines and trainers are stated for: the model's, or the usual."""
    engines: Mapping[str, tuple[Routing, ...]] = field(default_factory=dict)
    """The engines that run it, with the routings they support."""
    other_engines: tuple[software.Engine, ...] = ()
    """The engines that run it with no routing, or were not tried."""
    trainers: Mapping[str, tuple[Routing, ...]] = field(default_factory=dict)
    """The trainers that take it, with the routings they support."""
    other_trainers: tuple[software.Engine, ...] = ()
    """The trainers that take it with no routing, or were not tried."""
    advice: tuple[str, ...] = ()
    """The other target to use for software that computes something else with this one."""
    balanced: str = ""
    """How transformers balances the experts in training: auxiliary loss or nothing."""
    shared_experts: str = ""
    """How many shards can be a shared expert: any, 1, none."""
    scaled_by: tuple[str, ...] = ()
    """Where the scale factor can go: a config key, the weights. The first is the default."""
    refusal: str | None = None
    """Why a model cannot become it."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Families(Result):
    """The supported model types with their targets, and the others with the reasons."""

    dense: Mapping[str, tuple[str, ...]]
    """The targets by dense model type; the first is the default."""
    wrappers: Mapping[str, Mapping[str, tuple[str, ...]]]
    """The targets by wrapper, then by the type of its text model."""
    targets: tuple[TargetFacts, ...]
    refused: Mapping[str, str]
    """The reasons by dense model type."""

    def tables(self) -> Iterator[Iterable[Row]]:
        """Yield one table: the names of model types and targets."""
        inside = (f"{name} ({', '.join(texts)})" for name, texts in self.wrappers.items())
        yield [
            ("supported", [", ".join(self.dense)]),
            ("vision models", [", ".join(inside)]),
            ("not supported", [", ".join(self.refused)]),
            ("targets", [", ".join(target.name for target in self.targets)]),
        ]


class Selection(Families):
    """The part of the families that concerns one name."""

    def tables(self) -> Iterator[Iterable[Row]]:
        """Yield what each model type can become, or why it is not supported, and the targets."""
        wrapped = (
            (f"{t} in {name}", ts) for name, of in self.wrappers.items() for t, ts in of.items()
        )
        able = [*self.dense.items(), *wrapped]
        rows = [(k, ["can become " + ", ".join(v).replace(",", " (default),", 1)]) for k, v in able]
        rows += [(name, [f"not supported: {reason}"]) for name, reason in self.refused.items()]
        yield from filter(None, (rows, [*target_rows(self.targets)]))


def families() -> Families:
    """Return the supported model types: `families().dense["llama"]` are the targets of llama.

    `dense` maps each dense model type to its targets, the default first; `wrappers` does the same
    for multimodal models; `targets` says what each target can express and which software runs it;
    `refused` says why other types are not supported.
    """
    dense = {name: lookup.targets_of(DENSE[name]) for name in sorted(DENSE)}
    wrapped = {
        target: lookup.native_target(target, Inside(wrapper))
        for wrapper in WRAPPERS.values()
        for target in wrapper.natives
        if target not in NATIVE
    }
    # A family without own tests stands for all shipped code.
    anyone = next(name for name, targets in dense.items() if targets == (SHIPPED,))
    shipped = lookup.shipped_target(DENSE[anyone], "silu", biased=False)
    rows = {**NATIVE, **wrapped, SHIPPED: shipped}
    return Families(
        dense=dense,
        wrappers={
            name: {text_type: lookup.targets_of(family) for text_type, family in families.items()}
            for name, families in lookup.wrapped_families().items()
        },
        targets=tuple(_facts(name, row) for name, row in rows.items()),
        refused=lookup.REFUSED,
    )


def only(found: Families, name: str) -> Selection:
    """Return the part that concerns a model type or a target; UpcycleError for an unknown name."""
    name = name.strip().lower()
    dense = {key: targets for key, targets in found.dense.items() if key == name}
    refused = {key: reason for key, reason in found.refused.items() if key == name}
    wrappers = {
        key: {text: targets for text, targets in texts.items() if name in (key, text)}
        for key, texts in found.wrappers.items()
        if name in (key, *texts)
    }
    inside = (targets for texts in wrappers.values() for targets in texts.values())
    names = {name, *chain(*dense.values(), *inside)}
    targets = tuple(target for target in found.targets if target.name in names)
    if (row := WRAPPERS.get(name)) is not None:  # not all that runs a target runs it in a wrapper
        wrapped = {t: _facts(t, lookup.native_target(t, Inside(row))) for t in row.natives}
        targets = tuple(wrapped.get(target.name, target) for target in targets)
    if not targets and not refused:
        known = {*found.dense, *found.wrappers, *found.refused, *(t.name for t in found.targets)}
        message = f"upcycle does not know the model type {shown(name)}."
        raise UpcycleError(message, did_you_mean(name, sorted(known)))
    return Selection(dense=dense, wrappers=wrappers, targets=targets, refused=refused)


def becomes(config: Mapping[str, Any], names: Collection[str]) -> tuple[TargetFacts, ...]:
    """Return each target of a dense model's family, with a reason if the model cannot become it.

    `names` are the model's tensors. Raises UpcycleError for an invalid config.
    """
    targets = lookup.targets_of(lookup.dense_family(config))
    found = [_of_model(config, names, name) for name in targets]
    return tuple(replace(facts, advice=tuple(_advice(facts, found))) for facts in found)


def instead(each: software.Engine, facts: Iterable[TargetFacts]) -> str:
    """Return the advice to use the first target that an engine or a trainer runs, or ""."""
    kind = "trainers" if isinstance(each, software.Trainer) else "engines"
    name = next((target.name for target in facts if each.name in getattr(target, kind)), None)
    return "" if name is None else f" With `--target {name}` it computes the same."


def _advice(facts: TargetFacts, every: Collection[TargetFacts]) -> Iterator[str]:
    for each in (*facts.other_engines, *facts.other_trainers):
        if each.support in software.SILENTLY_WRONG and (words := instead(each, every)):
            yield f"{each.name}:{words}"


def _of_model(config: Mapping[str, Any], names: Collection[str], name: str) -> TargetFacts:
    try:
        family = choose(config, name, None, names=names)
    except UpcycleError as error:
        return TargetFacts(name=name, refusal=error.message)
    tied = bool(family.dense.values.get("tie_word_embeddings", False))
    attention = attention_class(moe_text_config(config, family))
    return _facts(name, family.target, tied=tied, attention=attention)


def _facts(name: str, row: Target, *, tied: bool = False, attention: str = "") -> TargetFacts:
    attention = attention or software.usual_attention(row)
    fused, scale = row.layout(None) is ExpertLayout.FUSED, row.keys.scale
    applies = {software.TIED: tied, software.FUSED: fused, software.SCALED: scale is not None}
    properties = frozenset(name for name, holds in applies.items() if holds)
    traits = {r: software.Traits(r, properties, attention) for r in row.routings}
    runs = {r: software.engines(row.title, each) for r, each in traits.items()}
    trains = {r: software.trainers(row, each) for r, each in traits.items()}
    engines, others = _split(runs)
    trainers, other_trainers = _split(trains)
    balanced = "nothing"
    if row.in_memory.correction_bias is not None:
        balanced += ": no tested trainer updates the correction bias"
    if row.has_balancing_loss:
        balanced = "auxiliary loss of each layer" if row.ships_code else "auxiliary loss"
    return TargetFacts(
        name=name,
        routings=row.routings,
        layers=row.layers.scope,
        attention=attention,
        engines=engines,
        other_engines=others,
        trainers=trainers,
        other_trainers=other_trainers,
        balanced=balanced,
        shared_experts="none" if row.shared is None else row.shared.possible_widths,
        scaled_by=("weights",) if scale is None else (scale, "weights"),
    )


def _split(
    found: Mapping[Routing, Sequence[software.Engine]],
) -> tuple[dict[str, tuple[Routing, ...]], tuple[software.Engine, ...]]:
    """Return the software that runs a target, with the routings, and the rest by the first."""
    able: dict[str, tuple[Routing, ...]] = {}
    for routing, every in found.items():
        for each in every:
            if each.support is software.Support.RUNS:
                able[each.name] = (*able.get(each.name, ()), routing)
    first, *_ = found.values()
    return able, tuple(each for each in first if each.name not in able)


def target_rows(targets: Iterable[TargetFacts]) -> Iterator[Row]:
    """Yield what each target can express, and its engines and trainers."""
    for target in targets:
        yield target.name, [*_lines(target)] if target.refusal is None else [target.refusal]


def _lines(target: TargetFacts) -> Iterator[str]:
    yield f"routing {any_of(target.routings)}; scale factor in {any_of(target.scaled_by)}"
    shared = f"shared experts: {target.shared_experts}; balanced by {target.balanced}"
    yield f"MoE layers: {target.layers}; {shared}"
    for label, known, others in (
        ("runs", target.engines, target.other_engines),
        ("trains", target.trainers, target.other_trainers),
    ):
        every = len(target.routings)
        names = (n if len(of) == every else f"{n} ({', '.join(of)})" for n, of in known.items())
        able = f"{label} in {', '.join(names) or 'none yet'}"
        yield "; ".join([able, *software.support_lines(others)])
    yield from target.advice
    yield f"attention: {target.attention}"
