"""Which conversions are tried: the rows of the tables in the documentation.

To try another one, add its row to the table, with dashes for the results, and run it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import dropwhile, takewhile
from pathlib import Path

from interop.wrapped import WRAPPED
from upcycle_cli.models.moe import Target
from upcycle_cli.models.moe_rows import NATIVE, WRAPPED_TARGETS
from upcycle_cli.recipe.options import ExpertLayout, Routing

DOCS = Path(__file__).resolve().parents[3] / "docs" / "evidence"
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
    def wrapper(self) -> str:
        """The type of the model around the text model, "" where there is none."""
        return self.dense.split(maxsplit=1)[0] if self.dense in WRAPPED else ""

    @property
    def name(self) -> str:
        """Identify it in the table."""
        parts = [f"{self.dense} → {self.target}", self.recipe, self.routing, *self.options]
        return ", ".join(parts)


def case_of(name: str) -> Case:
    """Return the conversion of that name."""
    pair, recipe, routing, *options = name.split(", ")
    dense, target = pair.split(" → ")
    return Case(dense, target, recipe, routing, tuple(options))


@cache
def documented(page: str) -> dict[Case, dict[str, str]]:
    """Return the first table of conversions of a page: what each software made of each."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    table = dropwhile(lambda line: not line.startswith("| conversion |"), lines)
    (_, *names), _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in takewhile(lambda line: line.startswith("|"), table)
    )
    return {case_of(name): dict(zip(names, cells, strict=True)) for name, *cells in rows}


def cases() -> list[Case]:
    """Return all that is tried in engines."""
    return [*documented("engines.md")]


@cache
def first_of_each() -> frozenset[Case]:
    """Return of each pair of a dense type and a target the first conversion."""
    first: dict[tuple[str, str], Case] = {}
    for case in cases():
        first.setdefault((case.dense, case.target), case)
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
