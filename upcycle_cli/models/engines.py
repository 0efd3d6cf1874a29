"""Which inference engines run a target and routing correctly, and which trainers train it.

`knowledge/engines.json` is generated from the table of docs/evidence/engines.md. Untested pairs are
not listed. Shipped code is listed by family; failures of all tested families hold for all.

`knowledge/trainers.json` has, by target (all shipped code is one), what docs/evidence/training.md
found:

- tried       trainers with the dense model's first loss that returned the model's tensors
- own_code    trainers with their own model classes, which read per-expert names only
- own_head    trainers that refuse a tied head
- settings    by trainer and target, or by how the target is balanced (loss, no loss): what to set
- by_routing  by trainer and routing: what else to set; where_tied: by trainer, for a tied head
- precision   by trainer: where float32 master weights come from
- all_linear  what peft's `target_modules="all-linear"` reaches; attention only if not listed

Settings may contain $num_experts, $parameters (the experts' weights) and $reached (all_linear).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from string import Template
from typing import Any

from upcycle_cli.models.defaults import defaults_of, table
from upcycle_cli.models.dense_rows import DENSE
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


UNTIED = (Support.UNTIED_ONLY, Support.UNTIED_OR_WRONG)


@dataclass(frozen=True)
class Engine:
    """An engine, and its support for one model."""

    name: str
    support: Support


ENGINES = ("transformers 4", "vLLM", "llama.cpp", "MLX")
"""In the order in which they are listed, after transformers 5."""
OTHERS = ("vLLM by transformers", "lm-eval", "mergekit")
"""Software without an engine of its own: listed only if it fails."""
TRAINERS = ("transformers", "TRL", "peft", "torchtitan", "NeMo AutoModel", "OLMo-core")
SAME, DIFFERS, FAILS = "same", "differs", "refuses"
"""Verdicts: the engine generated the dense model's text, another text, or none."""
DIFFERS_ON_CPU, CHANGED = "differs on a CPU", "changed"
FUSED, TIED, SOME_LAYERS = "fused", "tied", "some layers"
SCALED, SHARED = "scaled", "shared"
"""Properties that an engine may not support: experts in one tensor, a tied head, layers that stay
dense, a gate factor in the config, a shared expert in use."""
_LOSS, _NO_LOSS = "loss", "no loss"
ALL_SHIPPED = UPCYCLED_PREFIX.rstrip("_")
"""Stands for every model type with shipped code."""
_ATTENTION = "attention: "
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


def engines_of(
    target: Target,
    config: Mapping[str, Any],
    routing: Routing,
    *,
    fused: bool,
    layers: Sequence[int],
    shared: bool,
) -> tuple[Engine, ...]:
    """Return the support of each tested engine for an MoE; `config` and `layers` are the MoE's."""
    config = text_config_of(config)
    mlps = target.layers.mlps(config) or target.num_layers(config)
    applies = {
        TIED: config.get("tie_word_embeddings", False),
        FUSED: fused,
        SOME_LAYERS: len(layers) < mlps,
        SCALED: config.get(target.keys.scale or "", 1.0) != 1.0,
        SHARED: shared,
    }
    properties = {name for name, holds in applies.items() if holds}
    plain = has_plain_attention(config)
    return engines(target.title, routing, properties, plain_attention=plain)


def engines(
    target: str, routing: Routing, properties: Collection[str], *, plain_attention: bool = True
) -> tuple[Engine, ...]:
    """Return the support of each tested engine.

    `target` is the title of its row. Without `plain_attention` (see `has_plain_attention`) success
    is known only for "transformers", version 5, which runs everything; "transformers 4" is listed
    if it differs.
    """
    found = [Engine("transformers", Support.RUNS)]
    every = ALL_SHIPPED if target.startswith(UPCYCLED_PREFIX) else target
    for name in (*ENGINES, *OTHERS):
        own, usual = (
            table("engines")["targets"].get(each, {}).get(name) for each in (target, every)
        )
        known = {TIED: SAME, **(usual or {} if own is None else own)}
        if target.startswith(UPCYCLED_PREFIX):  # shipped code has one layout
            known[FUSED] = SAME
        parts = (SOME_LAYERS, str(routing), FUSED, TIED, SCALED, SHARED)
        applying = [part for part in parts if part in {routing, *properties}]
        verdicts = [(part, known.get(part)) for part in applying]
        failed = [
            _SUPPORT.get((part, verdict), _OTHER_SUPPORT[verdict])
            for part, verdict in verdicts
            if verdict not in (SAME, None)
        ]
        if failed:
            found.append(Engine(name, failed[0]))
        elif plain_attention and name in ENGINES[1:] and all(verdict for _, verdict in verdicts):
            found.append(Engine(name, Support.RUNS))
    return tuple(found)


def has_plain_attention(config: Mapping[str, Any]) -> bool:
    """Whether attention is of the plain kind that engines were tested with.

    Heads make up the hidden size, no layer slides, rope is not scaled and rotates whole heads. In
    shipped code, any share of a head counts. Attention that is the same in all models of a type
    counts as plain if engines were tested with that type.
    """
    model_type = str(config.get("model_type"))
    family = DENSE.get(model_type.removeprefix(UPCYCLED_PREFIX))
    if family is not None and family.attention_was_tested:
        return True
    heads, head_dim = config.get("num_attention_heads"), config.get("head_dim")
    are_sizes = type(heads) is int and type(head_dim) is int
    whole = head_dim is None or (are_sizes and heads * head_dim == config.get("hidden_size"))
    slides = bool(config.get("sliding_window")) and config.get("use_sliding_window", True)
    ropes = [config.get(key) for key in ("rope_scaling", "rope_parameters")]
    ropes += [kind for rope in ropes if isinstance(rope, dict) for kind in rope.values()]
    stated = [rope for rope in ropes if isinstance(rope, dict)]
    kinds = {rope.get("rope_type", "default") for rope in stated}
    key, usual = "partial_rotary_factor", defaults_of(model_type)
    shares = {rope[key] for rope in stated if key in rope} or {config.get(key, usual.get(key, 1.0))}
    turns = key not in usual or shares == {1.0}
    return whole and not slides and kinds <= {"default"} and turns


@dataclass(frozen=True)
class Trainer(Engine):
    """A trainer, and its support for one model."""

    settings: str
    """What to set, in words that follow the trainer's name."""
    precision: str
    """Whether it keeps float32 master weights, and what to set for them."""


def trainers(
    target: Target, routing: Routing, *, tied: bool, fused: bool, num_experts: int | None = None
) -> tuple[Trainer, ...]:
    """Return the support of each tested trainer.

    `tied` says whether the head is tied, `fused` whether the experts of a layer are one tensor.
    """
    kind, known = ALL_SHIPPED if target.ships_code else target.title, table("trainers")
    balanced = _LOSS if target.has_balancing_loss else _NO_LOSS
    matrices = (f'"{weight.name}"' for weight in target.in_memory.experts if not weight.is_bias)
    values = {
        "num_experts": "N" if num_experts is None else num_experts,
        "parameters": ", ".join(matrices),
        "reached": known["all_linear"].get(kind, "attention, but no expert"),
    }
    found = []
    for name in known["tried"].get(kind, ()):
        support = Support.RUNS
        if fused and name in known["own_code"].get(kind, ()):
            per_expert = ExpertLayout.PER_EXPERT in target.layouts
            support = Support.PER_EXPERT_ONLY if per_expert else Support.REFUSES
        elif tied and name in known["own_head"].get(kind, ()):
            support = Support.UNTIED_ONLY
        settings = known["settings"][name]
        words = [settings.get(kind) or settings[balanced]]
        words += [text for key, text in known["by_routing"].get(name, {}).items() if key == routing]
        words += [known["where_tied"][name]] if tied and name in known["where_tied"] else []
        text = Template("; ".join(words)).substitute(values)
        found.append(Trainer(name, support, text, known["precision"][name]))
    return tuple(found)


def support_lines(found: Iterable[Engine]) -> list[str]:
    """Return names of engines or trainers, a line for each kind of support."""
    names: dict[Support, list[str]] = {}
    for each in found:
        names.setdefault(each.support, []).append(each.name)
    lines = []
    for support, alike in names.items():
        words = "" if support is Support.RUNS else f": {support}"
        if len(alike) > 1:
            words = re.sub(r"\b(do|need|load|compute|give)e?s\b", r"\1", words)
        lines.append(", ".join(alike) + words)
    return lines
