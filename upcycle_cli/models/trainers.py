"""Which trainers take a target and routing as it is meant, and what to set in each.

Facts about other software, each found by training upcycled models in it for a step:
tests/interoperability/trainers.py, docs/training.md. A trainer that is not listed was not run.
`trainers.json` has them, by target, all shipped code being one:

- tried       the trainers whose first loss was the dense model's and that gave its tensors back
- own_code    those that do not run transformers' classes: they read per-expert names only
- own_head    those that refuse a head that shares the embedding
- settings    by trainer and target, or how the target is balanced (loss, no loss), what to set
- by_routing  by trainer and routing, what else; where_tied: by trainer, with a tied head
- precision   by trainer, where master weights in float32 come from
- all_linear  what peft's `target_modules="all-linear"` reaches; attention alone unless it is here
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Template

from upcycle_cli.models.defaults import table
from upcycle_cli.models.engines import ALL_SHIPPED, Support
from upcycle_cli.models.moe import Target
from upcycle_cli.recipe.recipe import ExpertLayout, Routing

_LOSS, _NO_LOSS = "loss", "no loss"
"""Whether transformers has a balancing loss for an architecture."""


@dataclass(frozen=True)
class Trainer:
    """What is known of a trainer and one model."""

    name: str
    support: Support
    settings: str
    """What to set, in words; the end of the sentence that begins with the trainer's name."""
    precision: str
    """Whether it keeps master weights in float32, and what to set for it, in words."""


def trainers(
    target: Target,
    routing: Routing,
    *,
    tied: bool,
    fused: bool,
    num_experts: int | None = None,
) -> tuple[Trainer, ...]:
    """Return what is known of each trainer; one that is not listed was not run.

    `tied` says whether the head shares the embedding, `fused` whether the experts of a layer are
    one tensor.
    """
    kind, known = ALL_SHIPPED if target.ships_code else target.title, table("trainers")
    found = []
    for name in known["tried"].get(kind, ()):
        support = Support.RUNS
        if fused and name in known["own_code"].get(kind, ()):
            per_expert = ExpertLayout.PER_EXPERT in target.layouts
            support = Support.PER_EXPERT_ONLY if per_expert else Support.REFUSES
        elif tied and name in known["own_head"].get(kind, ()):
            support = Support.UNTIED_ONLY
        words = _lora(kind, target) if name == "peft" else _words(name, kind, target, routing)
        if tied and name in known["where_tied"]:
            words += f"; {known['where_tied'][name]}"
        number = "N" if num_experts is None else str(num_experts)
        settings = Template(words).substitute(num_experts=number)
        found.append(Trainer(name, support, settings, known["precision"][name]))
    return tuple(found)


def expert_parallel_sizes(num_experts: int) -> tuple[int, ...]:
    """Return the numbers of ranks that experts divide among evenly."""
    return tuple(size for size in range(1, num_experts + 1) if num_experts % size == 0)


def _words(name: str, kind: str, target: Target, routing: Routing) -> str:
    known = table("trainers")
    settings = known["settings"][name]
    words: str = settings.get(kind) or settings[_LOSS if target.balances else _NO_LOSS]
    more = known["by_routing"].get(name, {}).get(routing)
    return f"{words}; {more}" if more else words


def _lora(kind: str, target: Target) -> str:
    # The fused layout is that of memory.
    held = target.layouts[ExpertLayout.FUSED].experts
    parameters = ", ".join(f'"{weight.name}"' for weight in held if not weight.is_bias)
    reached = table("trainers")["all_linear"].get(kind, "attention, and no expert")
    return (
        f"`target_parameters=[{parameters}]` for the experts; "
        f'`target_modules="all-linear"` reaches {reached}'
    )
