"""Recipe and factors: as they are in the weights, and as `upcycle.json` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle_cli.checkpoint.storage import CONFIG_NAME, RECORD_NAME
from upcycle_cli.core.errors import shown
from upcycle_cli.report.page import Section, Table, number


def recipe_section(record: Mapping[str, Any], found: Mapping[str, object]) -> Section:
    """Return what a record, which can hold anything, claims beside what the weights show.

    `found` goes by the names of the metrics of the check `weights`.
    """
    recipe, factors = _part(record, "recipe"), _part(record, "factors")
    growth = _part(record, "growth")
    rows = []
    for label, metric, claimed in (
        ("recipe", "", recipe.get("name")),
        ("expansion (copies of the MLP)", "expansion", recipe.get("expansion")),
        ("granularity (experts per copy)", "granularity", recipe.get("granularity")),
        ("shards that every token meets", "shared_experts", recipe.get("shared_experts")),
        ("copies of each expert of the source", "copies", growth.get("expand")),
        ("experts per token", "top_k", recipe.get("top_k", growth.get("top_k"))),
        ("routing", "", recipe.get("routing", growth.get("routing"))),
        ("virtual groups", "", recipe.get("virtual_groups")),
        ("order of the neurons", "", recipe.get("neuron_order")),
        ("groups with an order of their own, of all layers", "reordered_groups", None),
        ("noise on experts, of each matrix' deviation", "noise", recipe.get("noise")),
        ("neurons of experts drawn anew", "redrawn_share", recipe.get("reinit")),
        ("router rows", "", recipe.get("router_init", "normal") if recipe else None),
        ("router logits, standard deviation", "", recipe.get("router_logit_std")),
        ("scaling", "", recipe.get("scaling")),
        ("what the gates lack (c)", "c", factors.get("c")),
        ("factor of gate", "gate_factor", factors.get("gate")),
        ("factor of up", "up_factor", factors.get("up")),
        ("factor of down", "down_factor", factors.get("down")),
        (f"factor of the gates, in {CONFIG_NAME}", "gates_factor", factors.get("config")),
        ("dense weights can be recovered bit for bit", "lossless", None),
        ("promise", "", record.get("promise")),
        ("seed", "", recipe.get("seed")),
    ):
        shown_there = found.get(metric)
        if shown_there is not None or claimed is not None:
            rows.append((label, number(shown_there), _plain(claimed)))
    if not rows:
        words = f"Neither the weights nor a {RECORD_NAME} say how this MoE was made."
        return Section(key="recipe", title="Recipe and factors", words=[words])
    table = Table(
        caption=f"What the weights show, and what {RECORD_NAME} says",
        columns=("what", "found in the weights", RECORD_NAME),
        rows=rows,
    )
    return Section(key="recipe", title="Recipe and factors", tables=[table])


def _part(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = record.get(key)
    return part if isinstance(part, dict) else {}


def _plain(value: object) -> str:
    return number(value if isinstance(value, str | int | float | None) else shown(value))
