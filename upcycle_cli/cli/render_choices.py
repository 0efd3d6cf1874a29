"""What there is to choose from, as rich tables or as JSON: families, targets, recipes that fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from upcycle_cli.cli.render import picked, target_json
from upcycle_cli.core.text import parameter_text, size_text

if TYPE_CHECKING:
    from upcycle_cli.models.overview import Overview, TargetFacts
    from upcycle_cli.plan.budget import Fit

_SIZES_NOTE = (
    "FLOPs are those of matrix products forward, attention scores left out, and × says how many "
    "times the dense model's. Sizes are those of the parameters: in bfloat16, and in training with "
    "AdamW (bfloat16 weights and gradients, float32 master weights and moments, 16 bytes each). A "
    "KV cache and activations come on top."
)


def fits_table(fits: Iterable[Fit]) -> Table:
    """Return recipes that fit a budget, one a row."""
    table = _headed("recipe", "parameters", "active", "FLOPs per token", "weights", "training")
    table.columns[0].no_wrap = True  # somebody copies it
    for fit in fits:
        training = size_text(fit.training_bytes)
        table.add_row(
            fit.recipe.name,
            parameter_text(fit.total_parameters),
            parameter_text(fit.active_parameters),
            f"{parameter_text(fit.flops_per_token, 'G')} ({fit.flops_ratio:.2f} ×)",
            size_text(fit.weight_bytes),
            f"{training}, too large" if fit.trains is False else training,
        )
    return table


def fits_rows(fits: Sequence[Fit]) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield what the recipes in a table of those that fit are of, and what the paper says."""
    yield "sizes of", [fits[0].target]
    found: dict[str, list[str]] = {}
    for fit in fits:
        for words in fit.paper:
            found.setdefault(words, []).append(fit.recipe.name)
    if found:
        # What goes for many of them says for which.
        names = ("" if len(names) > 4 else f"{', '.join(names)}: " for names in found.values())
        yield "arXiv 2410.07524", [who + words for who, words in zip(names, found, strict=True)]


def fits_notes(fits: Sequence[Fit], shown: Sequence[Fit]) -> Iterator[str]:
    """Yield what is to be known of recipes that fit, of which some are shown."""
    yield _SIZES_NOTE
    if more := len(fits) - len(shown):
        yield f"{more} more fit, with a smaller E than of the same G and T here: --json lists all."


def fits_json(fits: Iterable[Fit]) -> list[dict[str, Any]]:
    """Return the recipes that fit a budget as JSON objects."""
    return [
        {"recipe": fit.recipe.name, "target": fit.target}
        | picked(fit, "total_parameters", "active_parameters", "flops_per_token", "flops_ratio")
        | picked(fit, "weight_bytes", "training_bytes", "trains", "paper")
        for fit in fits
    ]


def overview_tables(found: Overview) -> Iterator[Table]:
    """Yield what becomes what, the targets, who runs them, and what cannot be upcycled."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, targets in found.dense.items():
        groups.setdefault(targets, []).append(name)
    table = _headed("becomes (first by default)", "dense model types")
    for targets, names in sorted(groups.items(), key=lambda group: -len(group[0])):
        table.add_row("\n".join(targets), ", ".join(names))
    yield table
    table = _headed("text model inside", "of", "becomes (first by default)")
    for wrapper, texts in found.wrappers.items():
        for text_type, targets in texts.items():
            table.add_row(text_type, wrapper, ", ".join(targets))
    yield table
    yield from target_tables(found.targets)
    table = _headed("cannot be upcycled", "because")
    reasons: dict[str, list[str]] = {}
    for name, reason in found.refused.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        table.add_row(", ".join(names), reason)
    yield table


def target_tables(targets: Iterable[TargetFacts]) -> Iterator[Table]:
    """Yield what targets can express, and what runs and trains them; nothing of refused ones."""
    targets = [target for target in targets if target.refusal is None]
    if not targets:
        return
    table = _headed("target", "routings", "MoE layers", "shared\nexperts", "scaled by")
    table.columns[0].no_wrap = True  # somebody copies it
    for target in targets:
        lists = ("\n".join(target.routings), "\n".join(target.scaled_by))
        table.add_row(target.name, lists[0], target.layers, target.shared_experts, lists[1])
    yield table
    table = _headed("target", "runs in", "trains in", "balanced by")
    table.columns[0].no_wrap = True
    for target in targets:
        runs = "\n".join(_names(target.engines, target))
        trains = ", ".join(_names(target.trainers, target))
        table.add_row(target.name, runs, trains, target.balanced)
    yield table


def overview_json(found: Overview) -> dict[str, Any]:
    """Return what becomes what as a JSON object."""
    return {
        "status": "listed",
        "dense": {name: list(targets) for name, targets in found.dense.items()},
        "wrappers": {
            name: {text: list(targets) for text, targets in texts.items()}
            for name, texts in found.wrappers.items()
        },
        "targets": {target.name: target_json(target) for target in found.targets},
        "refused": dict(found.refused),
    }


def _headed(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in names:
        table.add_column(name, overflow="fold")
    return table


def _names(found: Mapping[str, Sequence[str]], target: TargetFacts) -> list[str]:
    """Return the software that takes a target, each with its routings where they are not all."""
    return [
        name if len(routings) == len(target.routings) else f"{name} ({', '.join(routings)})"
        for name, routings in found.items()
    ]
