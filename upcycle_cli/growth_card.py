"""The model card of an MoE that was grown: `growth_card.md`, filled in."""

from __future__ import annotations

import json
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from upcycle_cli import card
from upcycle_cli.advice import no_promise
from upcycle_cli.families.layers import listed
from upcycle_cli.families.trainers import expert_parallel_sizes
from upcycle_cli.growth import GrowthPlan
from upcycle_cli.printable import shell_line
from upcycle_cli.recipe import Promise

if TYPE_CHECKING:
    from upcycle_cli.verification import Report


def growth_card(plan: GrowthPlan, report: Report | None, repo: str | None) -> str:
    """Return the card's text without its seal; `report` and `repo` are as for `model_card`."""
    suffix = f"-x{plan.growth.expand}"
    place = repo or f"my-org/{card.repo_name(plan.source.name, suffix)}"
    pinned = ("--dense-revision", plan.source.revision) if plan.source.revision else ()
    verify_again = ("upcycle", "verify", plan.source.repo or "SOURCE", place, *pinned)
    name = card.markdown(plan.source.name.split("/")[-1])
    text = (files("upcycle_cli") / "growth_card.md").read_text(encoding="utf-8")
    return Template(text).substitute(
        front_matter=card.front_matter(plan),
        title=f"{name}, each expert {plan.growth.expand} times",
        origin=card.origins(plan),
        expand=plan.growth.expand,
        facts="\n".join(f"| {key} | {value} |" for key, value in _facts(plan).items()),
        promise=_promise(plan),
        found=card.found_text(report),
        verify_again=shell_line(verify_again),
        place=json.dumps(place),
        parallel=card.any_of(expert_parallel_sizes(plan.num_experts)),
        engines=card.engines_text(plan, place),
    )


def _facts(plan: GrowthPlan) -> dict[str, str]:
    before = plan.experts
    every = len(plan.layers) == before.num_layers
    return {
        "architecture": plan.target.architecture,
        "MoE layers": "all" if every else f"{listed(plan.layers)} of {before.num_layers}",
        "experts": f"{plan.num_experts} per layer, {plan.top_k} active (source: "
        f"{before.num_experts}, {before.top_k} active), intermediate size {before.expert_size}",
        "routing": f"{plan.routing}",
        "parameters": f"{card.billions(plan.total_parameters)} in all, "
        f"{card.billions(plan.active_parameters)} active per token "
        f"(source: {card.billions(plan.dense_parameters)} in all)",
    }


def _promise(plan: GrowthPlan) -> str:
    if plan.promise is Promise.NONE:
        return f"It does not compute what the source computes: {no_promise(plan)}."
    rounding = f", its weights rounded to {plan.rounded_to}" if plan.rounded_to else ""
    return f"It computes what the source computes{rounding}, until it is trained further."
