"""Which conversions are tried: the rows of the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from interop.models import RANDOM, TWIN, is_real
from interop.wrapped import WRAPPED
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.moe import Target
from upcycle_cli.models.moe_rows import NATIVE, WRAPPED_TARGETS
from upcycle_cli.recipe.recipe import ExpertLayout, Routing

EXACT, PLAIN, SIGMOID = (
    str(routing) for routing in (Routing.TOPK_SOFTMAX, Routing.SOFTMAX_TOPK, Routing.SIGMOID_TOPK)
)
UPCYCLED = "upcycled"
TINY_RECIPE, REAL_RECIPE = "E4G2T4", "E2G2T2"
PAIRS = [(dense, target) for dense, row in DENSE.items() for target in row.targets]
"""Each with the routing that the released models of its target use."""
WITHIN: Sequence[tuple[str, str]] = (
    ("gemma3", UPCYCLED),
    ("llava (mistral)", "mixtral"),
    ("llava (qwen2)", "qwen2_moe"),
    ("llava (qwen3)", "qwen3_moe"),
    ("llava (mistral)", UPCYCLED),
    ("mistral3 (mistral)", "mixtral"),
    ("mistral3 (mistral)", UPCYCLED),
    ("qwen2_5_vl", UPCYCLED),
    ("qwen3_vl", "qwen3_vl_moe_text"),
    ("qwen3_vl", UPCYCLED),
    ("qwen3_5", "qwen3_5_moe_text"),
    ("qwen3_5", UPCYCLED),
    ("gemma4", "gemma4_text"),
    ("gemma4", UPCYCLED),
)
"""Text models inside of others, likewise."""
SHIPPED = (
    *("olmo2", "nemotron", "phi3", "gemma2", "gpt_neox"),
    *("starcoder2", "cohere2", "olmo3", "gpt2", "falcon", "gemma4_text", "lfm2"),
)
"""Families as shipped code."""


@dataclass(frozen=True)
class Case:
    """A conversion: one row of the table."""

    dense: str
    target: str
    recipe: str
    routing: str
    options: tuple[str, ...] = ()
    control: bool = False
    """Whether it is made to compute something else, so that all who run it must disagree."""

    @property
    def wrapper(self) -> str:
        """The type of the model around the text model, "" where there is none."""
        return self.dense.split(maxsplit=1)[0] if self.dense in WRAPPED else ""

    @property
    def name(self) -> str:
        """Identify it in the table."""
        parts = [f"{self.dense} → {self.target}", self.recipe, self.routing, *self.options]
        return ", ".join(parts)


def routings(target: str) -> tuple[str, ...]:
    """Return what a target can express; first what its released models use."""
    if target == UPCYCLED:
        return (EXACT, SIGMOID, PLAIN)
    return tuple(str(routing) for routing in _row(target).routings)


def has_scale(target: str) -> bool:
    """Whether its config takes a factor on gates."""
    return target == UPCYCLED or _row(target).keys.scale is not None


def is_fused(target: str) -> bool:
    """Whether the experts of a layer are one tensor, without being asked for."""
    return target != UPCYCLED and _row(target).layout(None) is ExpertLayout.FUSED


def _row(target: str) -> Target:
    return WRAPPED_TARGETS.get(target) or NATIVE[target]


def _plain() -> list[Case]:
    """Return every pair with its usual routing, and every routing of a target on a tiny model."""
    pairs = [*PAIRS, *((dense, UPCYCLED) for dense in SHIPPED), *WITHIN]
    tiny = {target: dense for dense, target in reversed(pairs) if dense in RANDOM}
    return [
        Case(dense, target, REAL_RECIPE if is_real(dense) else TINY_RECIPE, routing)
        for dense, target in pairs
        for index, routing in enumerate(routings(target))
        if index == 0 or tiny.get(target) == dense
    ]


def first_of_each(found: Sequence[Case]) -> set[Case]:
    """Return of each pair of a dense type and a target the first conversion."""
    first: dict[tuple[str, str], Case] = {}
    for case in found:
        first.setdefault((case.dense, case.target), case)
    return {*first.values()}


# What differs from the plain conversions of `PAIRS`: experts as wide as the MLP or an eighth of
# it, a head of its own, experts in one tensor, some layers only, and what has to be wrong.
_UNTIED, _FUSED = ("--untie-embeddings",), ("--expert-layout fused",)
_UNSCALED, _ONE_LAYER = ("--scaling none",), ("--layers 1",)
_SHARED, _TWO_SHARED = ("--shared-experts 1",), ("--shared-experts 2",)
_SPECIAL: Sequence[Case] = (
    Case("mistral", "mixtral", "E8G1T2", EXACT),
    Case("mistral", "qwen2_moe", "E8G8T8", PLAIN),
    Case("qwen3", "qwen3_moe", "E8G8T8", EXACT),
    Case("llama", "qwen2_moe", REAL_RECIPE, PLAIN, _UNTIED),
    *(Case("llama", name, REAL_RECIPE, SIGMOID, _UNTIED) for name in ("glm4_moe", "solar_open")),
    *(
        Case(dense, target, TINY_RECIPE, routing, _FUSED)
        for dense, target, routing in (
            ("mistral", "mixtral", EXACT),
            ("mistral", "qwen2_moe", PLAIN),
            ("qwen3", "qwen3_moe", EXACT),
            ("qwen3", "glm4_moe", SIGMOID),
            ("nemotron_h", "nemotron_h", SIGMOID),
        )
    ),
    *(
        Case(dense, target, TINY_RECIPE, routing, _ONE_LAYER)
        for dense, target, routing in (
            ("mistral", "qwen2_moe", PLAIN),
            ("qwen3", "qwen3_moe", EXACT),
            ("qwen3", "glm4_moe", SIGMOID),
            ("nemotron_h", "nemotron_h", SIGMOID),
            ("nemotron", UPCYCLED, EXACT),
        )
    ),
    *(
        Case(dense, target, TINY_RECIPE, routing, _UNSCALED, control=True)
        for dense, target, routing in (
            ("qwen3", "qwen3_moe", EXACT),
            ("nemotron_h", "nemotron_h", SIGMOID),
            ("nemotron", UPCYCLED, EXACT),
        )
    ),
    # A norm behind the MLP takes every factor out: only other experts make a difference.
    Case("olmo2", UPCYCLED, "E4G2T3", EXACT, ("--allow-inexact",), control=True),
    *(
        Case(dense, target, "E2G4T3" if is_real(dense) else "E4G4T6", routing, _SHARED)
        for dense, target, routing in (
            ("mistral", "qwen2_moe", PLAIN),
            ("qwen3", "glm4_moe", SIGMOID),
            ("youtu", "deepseek_v3", SIGMOID),
            ("granite", "granitemoehybrid", EXACT),
            ("granite_swa", "granitemoe_swa", EXACT),
            ("hunyuan_v1_dense", "hunyuan_v1_moe", EXACT),
            ("ernie4_5", "ernie4_5_moe", EXACT),
            ("cohere2", "cohere2_moe", EXACT),
            ("qwen3_5_text", "qwen3_5_moe_text", EXACT),
            ("qwen3", "dots1", SIGMOID),
            ("qwen3", "hy_v3", SIGMOID),
            ("nemotron_h", "nemotron_h", SIGMOID),
        )
    ),
    Case("llama", "solar_open", "E2G4T3", SIGMOID, (*_SHARED, *_UNTIED)),
    Case("mistral", "qwen2_moe", "E4G4T4", PLAIN, _TWO_SHARED),
    Case("qwen3", "glm4_moe", "E4G4T4", SIGMOID, _TWO_SHARED),
    Case("mistral", "mixtral", TINY_RECIPE, EXACT, ("--neuron-order shuffled",)),
    Case("mistral", "mixtral", TINY_RECIPE, EXACT, (f"--experts-from {TWIN}",)),
    Case("mistral", "mixtral", "E2G2T2", EXACT, ("--expand 2",)),
    Case("lfm2", "lfm2_moe", TINY_RECIPE, SIGMOID, ("--scale-split balanced",)),
)


def cases() -> list[Case]:
    """Return all that is tried."""
    return [*_plain(), *_SPECIAL]


def quick_cases() -> list[Case]:
    """Return what CI has the time for: whole and split experts, and one that must differ."""
    return [
        Case("mistral", "mixtral", "E8G1T2", EXACT),
        Case("mistral", "qwen2_moe", "E8G8T8", EXACT),
        Case("qwen3", "qwen3_moe", "E8G8T8", EXACT),
        Case("qwen3", "qwen3_moe", TINY_RECIPE, EXACT, _UNSCALED, control=True),
        Case("qwen3", "glm4_moe", TINY_RECIPE, SIGMOID),
        Case("nemotron", UPCYCLED, TINY_RECIPE, SIGMOID),
        Case("olmo2", UPCYCLED, TINY_RECIPE, EXACT),
    ]
