"""`inspect`: what a checkpoint is, or what converting it would give.

Reads headers only, unless asked for the weights; then it says which experts are identical, which
are whole groups, and, against the dense model, what they were multiplied by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle_cli.checkpoint import RECORD_NAME, Checkpoint, read_json
from upcycle_cli.errors import UpcycleError
from upcycle_cli.families import PAIRS, TARGETS, dense_family
from upcycle_cli.families.engines import Engine, engines
from upcycle_cli.families.target import ExpertLayout, Target, config_routing, has_plain_attention
from upcycle_cli.hub.sources import bring_model, find_model, open_source
from upcycle_cli.outputs import Options
from upcycle_cli.plan import Plan, build_plan
from upcycle_cli.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class WeightFacts:
    """What the expert weights themselves say."""

    distinct_experts: int
    """How many different experts the layer with the most has."""
    granularity: int
    """Experts per group, by their router rows; 1 when the rows all differ."""
    whole_groups: bool
    """Whether the groups of every layer hold the same experts in the same order."""
    differing: tuple[str, ...] = ()
    """Experts that are not a copy of their place in the first group."""
    factors: Mapping[str, float] | None = None
    """Measured against the dense model: what gate, up and down were multiplied by."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect` found; `plan` is there when a recipe was given for a dense model."""

    checkpoint: Checkpoint
    kind: str
    """dense or moe"""
    model_type: str
    targets: tuple[str, ...] = ()
    num_experts: int | None = None
    top_k: int | None = None
    routing: str | None = None
    expert_layout: str | None = None
    total_parameters: int
    active_parameters: int
    dense_parameters: int | None
    engines: tuple[Engine, ...] = ()
    record: Mapping[str, Any] | None = None
    plan: Plan | None = None
    weights: WeightFacts | None = None


def inspect(
    path: Path | str,
    recipe: Recipe | None = None,
    *,
    revision: str | None = None,
    target: str = "auto",
    options: Options | None = None,
    weights: bool = False,
    dense: Path | str | None = None,
) -> Inspection:
    """Describe a checkpoint; with a recipe, describe what converting a dense one would give.

    `path` is a directory, or a repo on the Hub at `revision`, of which only headers are read unless
    `weights` are asked for.

    Raises UpcycleError when there is no readable checkpoint, or when it is not of the kind that
    was asked about.
    """
    checkpoint = open_source(path, revision)
    if weights:
        checkpoint = checkpoint.bring()
    if str(checkpoint.config.get("model_type")) in TARGETS:
        if recipe is not None:
            dense_family(checkpoint.config)  # raises: an MoE cannot be upcycled
        return _inspect_moe(checkpoint, weights=weights, dense=dense)
    family = dense_family(checkpoint.config)
    if weights:
        raise UpcycleError(
            f"{path} is a dense model: there are no experts to look at.",
            "Leave out --weights.",
        )
    plan = None
    if recipe is not None:
        plan = build_plan(recipe, checkpoint, target=target, options=options)
    total = checkpoint.num_parameters if plan is None else plan.dense_parameters
    return Inspection(
        checkpoint=checkpoint,
        kind="dense",
        model_type=family.model_type,
        targets=PAIRS[family.model_type],
        total_parameters=total,
        active_parameters=total,
        dense_parameters=total,
        plan=plan,
    )


def _inspect_moe(checkpoint: Checkpoint, *, weights: bool, dense: Path | str | None) -> Inspection:
    target = TARGETS[checkpoint.config["model_type"]]
    num_experts, top_k = (
        checked_count(checkpoint, target.keys.num_experts),
        checked_count(checkpoint, target.keys.top_k),
    )
    if top_k > num_experts:
        raise UpcycleError(
            f"{checkpoint.path / 'config.json'}: {target.keys.top_k} is {top_k}, "
            f"more than the {num_experts} experts."
        )
    layout = _layout(checkpoint, target)
    routing = config_routing(checkpoint.config, target)
    total = checkpoint.num_parameters
    expert_parameters = sum(
        entry.num_elements for name, entry in checkpoint.tensors.items() if ".experts." in name
    )
    record = None
    if checkpoint.storage.has(RECORD_NAME):
        record = read_json(checkpoint.storage.local(RECORD_NAME))
    facts = None
    if weights:
        from upcycle_cli.experts import examine

        facts = examine(
            checkpoint, target, layout, None if dense is None else bring_model(find_model(dense))
        )
    tied = bool(checkpoint.config.get("tie_word_embeddings", False))
    return Inspection(
        checkpoint=checkpoint,
        kind="moe",
        model_type=target.model_type,
        num_experts=num_experts,
        top_k=top_k,
        routing=routing,
        expert_layout=layout,
        total_parameters=total,
        active_parameters=total - expert_parameters // num_experts * (num_experts - top_k),
        dense_parameters=_recorded_dense_parameters(record),
        engines=engines(
            target.model_type,
            routing,
            tied=tied,
            fused=layout is ExpertLayout.FUSED,
            plain_attention=has_plain_attention(checkpoint.config),
        ),
        record=record,
        weights=facts,
    )


def checked_count(checkpoint: Checkpoint, key: str) -> int:
    """Return a positive integer of a config; raises UpcycleError when it is something else."""
    value = checkpoint.config.get(key)
    if type(value) is not int or value < 1:
        raise UpcycleError(
            f"{checkpoint.path / 'config.json'}: {key} must be a positive integer, not {value!r}."
        )
    return value


def _layout(checkpoint: Checkpoint, target: Target) -> ExpertLayout:
    fused = target.names.fused_down.format(layer=0) in checkpoint.tensors
    return ExpertLayout.FUSED if fused else ExpertLayout.PER_EXPERT


def _recorded_dense_parameters(record: Mapping[str, Any] | None) -> int | None:
    """Return what the conversion wrote down: an MoE alone does not tell its expansion."""
    parameters = (record or {}).get("parameters")
    count = parameters.get("dense") if isinstance(parameters, dict) else None
    return count if type(count) is int else None
