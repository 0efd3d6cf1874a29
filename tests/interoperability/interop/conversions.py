"""Which conversions are tried, and what each software made of them: the rows of results.json.

To try another one, add its row to the file, with `"found": {}`, and run it with `--write`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from interop.wrapped import WRAPPED
from upcycle_cli.models.engines import TRAINERS
from upcycle_cli.models.moe import Target
from upcycle_cli.models.moe_rows import NATIVE, WRAPPED_TARGETS
from upcycle_cli.recipe.options import ExpertLayout, Routing

RESULTS = Path(__file__).resolve().parents[1] / "results.json"
EXACT, PLAIN, SIGMOID = (
    str(routing) for routing in (Routing.TOPK_SOFTMAX, Routing.SOFTMAX_TOPK, Routing.SIGMOID_TOPK)
)
UPCYCLED = "upcycled"
CONTROLS = ("--scaling none", "--allow-inexact")
QUICK = (
    "mistral → mixtral, E8G1T2, topk-softmax",
    "mistral → qwen2_moe, E8G8T8, topk-softmax",
    "qwen3 → qwen3_moe, E8G8T8, topk-softmax",
    "qwen3 → qwen3_moe, E4G2T4, topk-softmax, --scaling none",
    "qwen3 → glm4_moe, E4G2T4, sigmoid-topk",
    "nemotron → upcycled, E4G2T4, sigmoid-topk",
    "olmo2 → upcycled, E4G2T4, topk-softmax",
)
"""What CI has the time for: whole and split experts, and one that must differ."""


@dataclass(frozen=True)
class Case:
    """A conversion: one row of the table."""

    dense: str
    target: str
    recipe: str
    routing: str
    options: tuple[str, ...] = ()

    @property
    def control(self) -> bool:
        """Whether it computes something else on purpose, so that all who run it must disagree."""
        return any(option in CONTROLS for option in self.options)

    @property
    def is_usual(self) -> bool:
        """Whether it has no options, and the recipe that tiny models are converted by."""
        return self.recipe == "E4G2T4" and not self.options

    @property
    def wrapper(self) -> str:
        """The type of the model around the text model, "" where there is none."""
        return self.dense.split(maxsplit=1)[0] if self.dense in WRAPPED else ""

    @property
    def dense_type(self) -> str:
        """The model type of the dense model, or of the wrapper around it."""
        return self.dense.split(maxsplit=1)[0]

    @property
    def name(self) -> str:
        """Identify it in the table."""
        parts = [f"{self.dense} → {self.target}", self.recipe, self.routing, *self.options]
        return ", ".join(parts)


def case_of(name: str) -> Case:
    """Return the conversion of that name."""
    dense, rest = name.split(" → ")
    target, recipe, routing, *options = rest.split(", ")
    return Case(dense, target, recipe, routing, tuple(options))


def results() -> Mapping[str, Any]:
    """Return results.json: versions and dates by software, and the rows."""
    content: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return content


@cache
def documented() -> dict[Case, dict[str, str]]:
    """Return what each software made of each conversion; an absent one was not tried."""
    return {case_of(each["conversion"]): each["found"] for each in results()["rows"]}


def cases(*, trainers: bool = False) -> list[Case]:
    """Return all that is tried in engines, or in trainers: for the latter E4G2T4 is enough."""
    rows = documented().items()
    if not trainers:
        return [case for case, _ in rows]
    return [c for c, found in rows if c.is_usual or any(name in TRAINERS for name in found)]


@cache
def first_of_each() -> frozenset[Case]:
    """Return of each pair of a dense type and a target the first conversion."""
    first: dict[tuple[str, str], Case] = {}
    for case in cases():
        first.setdefault((case.dense_type, case.target), case)
    return frozenset(first.values())


def has_scale(target: str) -> bool:
    """Whether its config takes a factor on gates."""
    return target == UPCYCLED or target_row(target).keys.scale is not None


def is_fused(target: str) -> bool:
    """Whether the experts of a layer are one tensor, without being asked for."""
    return target != UPCYCLED and target_row(target).layout(None) is ExpertLayout.FUSED


def target_row(target: str) -> Target:
    """Return what is known of a target, also of one that is only made inside a wrapper."""
    return WRAPPED_TARGETS.get(target) or NATIVE[target]
