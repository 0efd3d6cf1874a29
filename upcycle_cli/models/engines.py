"""Which inference engines run a model correctly, and which trainers train it.

`knowledge/engines.json` is generated from the measurements in tests/interoperability/results.json
(docs/evidence/engines.md and training.md print them). By target and software it has a verdict on
each property that a model can have: its routing, experts in one tensor, its attention class, and
others. A model runs if everything that it has was the same; what was not measured is "not tried".
A software without properties was stopped by the machine of the measurements, which says nothing.
Engines have shipped code by family; failures of all families are stated once. To trainers all
shipped code is one.

`knowledge/trainers.json` has, by target, what docs/evidence/training.md found:

- settings     by trainer and target, or by how the target is balanced (loss, no loss): what to set
- by_routing   by trainer and routing: what else to set; where_tied: by trainer, for a tied head
- precision    by trainer: where float32 master weights come from
- by_source    trainers by their source, not run: its version, and the attention of each target
- all_linear   what peft's `target_modules="all-linear"` reaches; attention only if not listed

Settings may contain $num_experts, $parameters (the experts' weights) and $reached (all_linear).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from string import Template
from typing import Any

from upcycle_cli.models.attention import PLAIN, attention_class
from upcycle_cli.models.defaults import table
from upcycle_cli.models.moe import Target
from upcycle_cli.models.shipped import UPCYCLED_PREFIX
from upcycle_cli.models.wrappers import text_config_of
from upcycle_cli.recipe.recipe import ExpertLayout, Routing


class Support(StrEnum):
    """Whether an engine or a trainer handles a model, in words that follow its name."""

    RUNS = "runs"
    PER_EXPERT_ONLY = "needs --expert-layout per-expert"
    PER_EXPERT_OR_WRONG = "computes something else without --expert-layout per-expert"
    UNTIED_ONLY = "needs --untie-embeddings"
    UNTIED_OR_WRONG = "computes something else without --untie-embeddings"
    BALANCED_OR_WRONG = "computes something else without --scale-split balanced"
    WRONG = "loads, computes something else"
    WRONG_ON_CPU = "loads, computes something else on a CPU"
    CHANGES = "gives back other tensors"
    REFUSES = "does not load it"
    NOT_TRIED = "not tried"
    LOADS_BY_SOURCE = "by its source (not run) loads it"
    WRONG_BY_SOURCE = "by its source (not run) computes something else"


SILENTLY_WRONG = {
    *(Support.UNTIED_OR_WRONG, Support.BALANCED_OR_WRONG, Support.PER_EXPERT_OR_WRONG),
    *(Support.WRONG, Support.WRONG_ON_CPU, Support.CHANGES, Support.WRONG_BY_SOURCE),
}
"""What software does without an error."""


@dataclass(frozen=True)
class Engine:
    """An engine, and its support for one model."""

    name: str
    support: Support
    cause: str = ""
    """The property that it does not support or was not tried with; "" if it is the target."""
    version: str | None = None
    """The version that was measured, or whose source was read; None if none was."""

    @property
    def words(self) -> str:
        """The support and its cause, in words that follow the name."""
        text = self.support.replace("its source", f"the source of {self.version}")
        return f"{text} with {self.cause}" if self.cause else text


@dataclass(frozen=True)
class Traits:
    """What an MoE has that software may not support."""

    routing: Routing
    properties: Collection[str] = ()
    attention: str = PLAIN

    @property
    def parts(self) -> tuple[str, ...]:
        """The properties by which measurements are listed; attention comes last."""
        held = {self.routing, *self.properties}
        parts = (SOME_LAYERS, str(self.routing), FUSED, TIED, SCALED, SHARED)
        return (*(part for part in parts if part in held), attention_part(self.attention))


ENGINES = ("transformers 4", "vLLM", "llama.cpp", "MLX")
"""In the order in which they are listed, after transformers 5."""
OTHERS = ("vLLM by transformers", "lm-eval", "mergekit")
"""Software without an engine of its own: listed only if it computes something else."""
_OWN_CLASSES = ("torchtitan", "OLMo-core", "Megatron-Bridge")
"""Trainers without transformers' classes: listed only for targets that they have code for."""
TRAINERS = ("transformers", "TRL", "peft", "NeMo AutoModel", *_OWN_CLASSES)
SAME, DIFFERS, FAILS = "same", "differs", "refuses"
"""Verdicts: the software computed what the dense model computes, something else, or nothing."""
DIFFERS_ON_CPU, CHANGED = "differs on a CPU", "changed"
FUSED, TIED, SOME_LAYERS = "fused", "tied", "some layers"
SCALED, SHARED = "scaled", "shared"
_CAUSES: Mapping[str, str] = {
    FUSED: "experts in one tensor",
    TIED: "a tied head",
    SOME_LAYERS: "some layers dense",
    SCALED: "a gate factor in the config",
    SHARED: "a shared expert",
}
"""Properties that software may not support, in words."""
_ATTENTION = "attention: "
TOGETHER = " + "
"""Joins properties that only fail together."""
ALL_SHIPPED = UPCYCLED_PREFIX.rstrip("_")
"""Stands for every model type with shipped code."""
_SUPPORT: Mapping[tuple[str, str], Support] = {
    (FUSED, FAILS): Support.PER_EXPERT_ONLY,
    (FUSED, DIFFERS): Support.PER_EXPERT_OR_WRONG,
    (TIED, FAILS): Support.UNTIED_ONLY,
    (TIED, DIFFERS): Support.UNTIED_OR_WRONG,
    (SCALED, DIFFERS): Support.BALANCED_OR_WRONG,
}
_OTHER_SUPPORT: Mapping[str, Support] = {
    SAME: Support.RUNS,
    DIFFERS: Support.WRONG,
    DIFFERS_ON_CPU: Support.WRONG_ON_CPU,
    CHANGED: Support.CHANGES,
    FAILS: Support.REFUSES,
}


def attention_part(attention: str) -> str:
    """Return the property that an attention class is in the table."""
    return _ATTENTION + attention


def traits_of(
    target: Target,
    config: Mapping[str, Any],
    routing: Routing,
    *,
    fused: bool,
    layers: Sequence[int],
    shared: bool,
) -> Traits:
    """Return the traits of an MoE; `config` and `layers` are the MoE's."""
    config = text_config_of(config)
    kinds = target.layers.kinds(config)
    mlps = sum(kind in ("mlp", "moe") for kind in kinds) or target.num_layers(config)
    applies = {
        TIED: config.get("tie_word_embeddings", False),
        FUSED: fused,
        SOME_LAYERS: len(layers) < mlps,
        SCALED: config.get(target.keys.scale or "", 1.0) != 1.0,
        SHARED: shared,
    }
    properties = frozenset(name for name, holds in applies.items() if holds)
    return Traits(routing, properties, attention_class(config))


def engines(target: str, traits: Traits) -> tuple[Engine, ...]:
    """Return the support of each engine; `target` is the title of its row.

    "transformers" is version 5, in which `verify` runs every model; "transformers 4" is listed only
    if it differs.
    """
    version = table("engines")["software"]["transformers 5"]
    found = [Engine("transformers", Support.RUNS, version=version)]
    for name in (*ENGINES, *OTHERS):
        if (known := _known(target, name)) != {}:
            each = Engine(name, *_judged(name, known, traits))
            if known is None and target.startswith(ALL_SHIPPED):
                each = replace(each, cause="every dense model type")
            is_usual = each.support is Support.RUNS and name not in ENGINES[1:]
            if not is_usual and (name in ENGINES or each.support in SILENTLY_WRONG):
                found.append(each)
    return tuple(found)


def usual_attention(target: Target) -> str:
    """Return the attention class that stands for a target: what most software computes."""
    kinds = table("engines")["targets"].get(ALL_SHIPPED if target.ships_code else target.title, {})
    same = (part for found in kinds.values() for part, verdict in found.items() if verdict == SAME)
    counts = Counter[str](part for part in same if part.startswith(_ATTENTION))
    most = max((attention_part(PLAIN), *counts), key=lambda part: counts[part])
    return most.removeprefix(_ATTENTION)


def _known(target: str, name: str) -> Mapping[str, str] | None:
    """Return the verdicts on a target by property, or None if the software was not tried."""
    measured, ships_code = table("engines")["targets"], target.startswith(ALL_SHIPPED)
    found: dict[str, str] | None = measured.get(target, {}).get(name)
    if found is None and ships_code:
        found = measured[ALL_SHIPPED].get(name)
    return {**found, FUSED: SAME} if found and ships_code else found  # it has one layout


def _judged(
    name: str, known: Mapping[str, str] | None, traits: Traits
) -> tuple[Support, str, str | None]:
    """Return the support of a software for a model, its cause and the version."""
    if not known:
        return Support.NOT_TRIED, "", None
    version: str = table("engines")["software"][name]
    parts, held = traits.parts, {*traits.attention.split(", ")}
    several = [part for part in known if TOGETHER in part and {*part.split(TOGETHER)} <= {*parts}]
    # Where a model with some of these properties fails, this one does, unless it was measured.
    fewer = [p for p in known if {*p.removeprefix(_ATTENTION).split(", ")} < held]
    tried = (*several, *parts, *(() if parts[-1] in known else sorted(fewer, key=len)))
    failed = [(part, known[part]) for part in tried if known.get(part, SAME) != SAME]
    if failed:
        part, verdict = min(failed, key=lambda each: each in _SUPPORT)  # one that no option helps
        if (remedy := _SUPPORT.get((part, verdict))) is not None:
            return remedy, "", version
        return _OTHER_SUPPORT[verdict], _cause(part, known), version
    missing = " and ".join(_cause(part, known) for part in parts if part not in known)
    return Support.NOT_TRIED if missing else Support.RUNS, missing, version


def _cause(part: str, known: Mapping[str, str]) -> str:
    """Return a property in words; "" for a routing where no other runs: it is the target's."""
    if part.startswith(_ATTENTION):
        name = part.removeprefix(_ATTENTION)
        return "plain attention" if name == PLAIN else name.replace(", ", " and ")
    if TOGETHER in part:
        return " and ".join(filter(None, (_cause(each, known) for each in part.split(TOGETHER))))
    if part in _CAUSES:
        return _CAUSES[part]
    is_one_of_several = any(known.get(str(r)) == SAME for r in Routing if r != part)
    return f"{part} routing" if is_one_of_several else ""


@dataclass(frozen=True)
class Trainer(Engine):
    """A trainer, and its support for one model."""

    settings: str = ""
    """What to set, in words that follow the trainer's name."""
    precision: str = ""
    """Whether it keeps float32 master weights, and what to set for them."""


def trainers(
    target: Target, traits: Traits, *, num_experts: int | None = None
) -> tuple[Trainer, ...]:
    """Return the support of each trainer."""
    kind, known = ALL_SHIPPED if target.ships_code else target.title, table("trainers")
    balanced = "loss" if target.has_balancing_loss else "no loss"
    matrices = (f'"{weight.name}"' for weight in target.in_memory.experts if not weight.is_bias)
    values = {
        "num_experts": "N" if num_experts is None else num_experts,
        "parameters": ", ".join(matrices),
        "reached": known["all_linear"].get(kind, "attention, but no expert"),
    }
    found = []
    for name in TRAINERS:
        verdicts, source = _known(kind, name), known["by_source"].get(name, {})
        read = source.get("targets", {}).get(kind)
        if verdicts == {} or (verdicts is read is None and name in _OWN_CLASSES):
            continue
        support, cause, version = _judged(name, verdicts, traits)
        if read is not None and not verdicts:
            ignored = sorted({*traits.attention.split(", ")} - {PLAIN, *read})
            support = Support.WRONG_BY_SOURCE if ignored else Support.LOADS_BY_SOURCE
            cause, version = " and ".join(ignored), source["version"]
        if support is Support.PER_EXPERT_ONLY and ExpertLayout.PER_EXPERT not in target.layouts:
            support = Support.REFUSES
        settings = known["settings"][name]
        more = known["by_routing"].get(name, {}).get(traits.routing)
        tied = known["where_tied"].get(name) if TIED in traits.properties else None
        words = filter(None, (settings.get(kind) or settings[balanced], more, tied))
        text = Template("; ".join(words)).substitute(values)
        found.append(Trainer(name, support, cause, version, text, known["precision"][name]))
    return tuple(found)


def support_lines(found: Iterable[Engine]) -> list[str]:
    """Return names of engines or trainers, a line for each kind of support."""
    names: dict[str, list[str]] = {}
    for each in found:
        names.setdefault(each.words, []).append(each.name)
    lines = []
    for support, alike in names.items():
        words = "" if support == Support.RUNS else f": {support}"
        if len(alike) > 1:
            words = re.sub(r"\b(do|need|load|compute|give)e?s\b", r"\1", words)
        lines.append(", ".join(alike) + words)
    return lines
