"""Which trainers take a target and routing correctly, and what to set in each.

`knowledge/trainers.json` holds what training upcycled models for a step showed; see
tests/interoperability/trainers.py and docs/training.md. Untested trainers are not listed. By target
(all shipped code is one) it has:

- tried       trainers with the dense model's first loss that returned the model's tensors
- own_code    trainers with model classes of their own, which read per-expert names only
- own_head    trainers that refuse a tied head
- settings    by trainer and target, or by how the target is balanced (loss, no loss): what to set
- by_routing  by trainer and routing: what else to set; where_tied: by trainer, for a tied head
- precision   by trainer: where float32 master weights come from
- all_linear  what peft's `target_modules="all-linear"` reaches; attention only if not listed
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Template

from upcycle_cli.models.defaults import table
from upcycle_cli.models.engines import ALL_SHIPPED, Engine, Support
from upcycle_cli.models.moe import Target
from upcycle_cli.recipe.recipe import ExpertLayout, Routing

_LOSS, _NO_LOSS = "loss", "no loss"


@dataclass(frozen=True)
class Trainer(Engine):
    """What is known of a trainer and one model."""

    settings: str
    """What to set: the rest of a sentence that begins with the trainer's name."""
    precision: str
    """Whether it keeps float32 master weights, and what to set for them."""


def trainers(
    target: Target, routing: Routing, *, tied: bool, fused: bool, num_experts: int | None = None
) -> tuple[Trainer, ...]:
    """Return what is known of each tested trainer.

    `tied` says whether the head is tied, `fused` whether the experts of a layer are one tensor.
    """
    kind, known = ALL_SHIPPED if target.ships_code else target.title, table("trainers")
    number = "N" if num_experts is None else str(num_experts)
    found = []
    for name in known["tried"].get(kind, ()):
        support = Support.RUNS
        if fused and name in known["own_code"].get(kind, ()):
            per_expert = ExpertLayout.PER_EXPERT in target.layouts
            support = Support.PER_EXPERT_ONLY if per_expert else Support.REFUSES
        elif tied and name in known["own_head"].get(kind, ()):
            support = Support.UNTIED_ONLY
        words = _lora(kind, target) if name == "peft" else _settings(name, kind, target, routing)
        if tied and name in known["where_tied"]:
            words += f"; {known['where_tied'][name]}"
        settings = Template(words).substitute(num_experts=number)
        found.append(Trainer(name, support, settings, known["precision"][name]))
    return tuple(found)


def _settings(name: str, kind: str, target: Target, routing: Routing) -> str:
    known = table("trainers")
    settings = known["settings"][name]
    words: str = settings.get(kind) or settings[_LOSS if target.has_balancing_loss else _NO_LOSS]
    more = known["by_routing"].get(name, {}).get(routing)
    return f"{words}; {more}" if more else words


def _lora(kind: str, target: Target) -> str:
    weights = [weight for weight in target.in_memory.experts if not weight.is_bias]
    parameters = ", ".join(f'"{weight.name}"' for weight in weights)
    reached = table("trainers")["all_linear"].get(kind, "attention, and no expert")
    return (
        f"`target_parameters=[{parameters}]` for the experts; "
        f'`target_modules="all-linear"` reaches {reached}'
    )
