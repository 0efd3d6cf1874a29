"""Which trainers take a target and routing as it is meant, and what to set in each.

Facts about other software, each found by training upcycled models in it for a step:
tests/interoperability/trainers.py, docs/training.md. A trainer that is not listed was not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Template

from upcycle_cli.families.engines import Support
from upcycle_cli.families.moe import Target
from upcycle_cli.families.shipped import UPCYCLED_PREFIX
from upcycle_cli.families.values import defaults_of
from upcycle_cli.recipe import ExpertLayout, Routing

_SHIPPED = UPCYCLED_PREFIX.rstrip("_")
"""Stands for every model type whose code comes with the model."""
_EVERYWHERE = ("transformers", "TRL", "peft", "NeMo AutoModel")
_TRIED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("mixtral", "qwen2_moe", "glm4_moe", "dots1", "solar_open"), _EVERYWHERE),
    **dict.fromkeys(("granitemoe", "granitemoehybrid", "granitemoe_swa"), _EVERYWHERE),
    **dict.fromkeys(("hunyuan_v1_moe", "lfm2_moe", _SHIPPED), _EVERYWHERE),
    **dict.fromkeys(("ernie4_5_moe", "hy_v3", "deepseek_v3", "nemotron_h"), _EVERYWHERE[:-1]),
    "qwen3_moe": (*_EVERYWHERE, "torchtitan"),
    "flex_olmo": (*_EVERYWHERE, "OLMo-core"),
}
"""By target, the trainers whose first loss was the dense model's and that gave its tensors back."""
_OWN_CODE = (
    ("qwen3_moe", "torchtitan"),
    ("qwen3_moe", "NeMo AutoModel"),
    ("glm4_moe", "NeMo AutoModel"),
    ("flex_olmo", "OLMo-core"),
)
"""Targets and trainers that do not run transformers' classes: they read per-expert names only."""
_OWN_HEAD = (("qwen3_moe", "NeMo AutoModel"), ("glm4_moe", "NeMo AutoModel"))
"""Targets and trainers that refuse a head that shares the embedding."""

_LOSS, _NO_LOSS = "loss", "no loss"
"""Whether transformers has a balancing loss for an architecture."""
_NOTHING = "nothing balances the experts: it has no loss for this architecture and moves no bias"
_BY_TRL = (
    "the balancing loss is applied, whatever `output_router_logits` says; its weight is "
    "`router_aux_loss_coef` of `SFTConfig`, 0.0 turns it off"
)
_SET: Mapping[tuple[str, str], str] = {
    ("transformers", _LOSS): (
        "pass `output_router_logits=True` and `router_aux_loss_coef` to `from_pretrained`, or "
        "nothing balances the experts; most models read the weight once, on loading; "
        "`gradient_accumulation_steps` multiplies it, so divide it by these"
    ),
    ("transformers", _NO_LOSS): _NOTHING,
    ("transformers", _SHIPPED): (
        "the balancing loss of each layer is applied; its weight is `config.router_aux_loss_coef`"
    ),
    ("TRL", _LOSS): _BY_TRL,
    ("TRL", _NO_LOSS): _NOTHING,
    ("TRL", _SHIPPED): _BY_TRL,
    **dict.fromkeys(
        (("TRL", "granitemoe"), ("TRL", "granitemoehybrid"), ("TRL", "granitemoe_swa")),
        "set `model.config.num_experts = $num_experts` first, or it stops; then the balancing loss "
        "is applied, its weight is `router_aux_loss_coef` of `SFTConfig`",
    ),
    ("torchtitan", _LOSS): (
        "`load_balance_coeff` (1e-3) moves a bias of its own, which its export leaves out; "
        "`expert_parallel_degree` divides $num_experts"
    ),
    ("NeMo AutoModel", _LOSS): (
        "nothing balances the experts: it runs transformers' class and takes the loss from its "
        "logits, without the balancing loss"
    ),
    ("NeMo AutoModel", _NO_LOSS): _NOTHING,
    ("NeMo AutoModel", _SHIPPED): (
        "`trust_remote_code=True`; nothing balances the experts: it takes the loss from the "
        "model's logits, without the balancing loss"
    ),
    ("NeMo AutoModel", "qwen3_moe"): (
        "the balancing loss is applied to the gradient and not to the loss that is logged; its "
        "weight is `router_aux_loss_coef` in config.json; `ep_size` divides $num_experts"
    ),
    ("NeMo AutoModel", "glm4_moe"): (
        "nothing balances the experts: it has a step of 1e-3 for the correction bias and never "
        "takes it; `moe_overrides={'aux_loss_coeff': 0.01}` applies a balancing loss; `ep_size` "
        "divides $num_experts"
    ),
    ("OLMo-core", _LOSS): (
        "`lb_loss_weight` of its config (0.01) balances; its export writes `norm_topk_prob` as "
        "false, whatever it was"
    ),
}
"""By trainer and target, or by trainer and how the target is balanced, what to set."""
_BY_ROUTING: Mapping[tuple[str, Routing], str] = {
    ("torchtitan", Routing.SOFTMAX_TOPK): (
        "its registry has `route_norm=True`: set it to False in each layer's router, or it "
        "computes something else"
    ),
    ("OLMo-core", Routing.TOPK_SOFTMAX): (
        "`normalize_expert_weights=1.0` in its router's config, or gates do not sum to 1; write "
        "`norm_topk_prob: true` into what it exports"
    ),
}
_WHERE_TIED = {"torchtitan": "`enable_weight_tying=True`, as the head shares the embedding"}
_ALL_LINEAR = {
    **dict.fromkeys(
        ("mixtral", "qwen3_moe", "glm4_moe", "flex_olmo", "ernie4_5_moe"),
        "experts and routers, too",
    ),
    **dict.fromkeys(
        ("hunyuan_v1_moe", "dots1", "solar_open", "deepseek_v3"), "experts and routers, too"
    ),
    **dict.fromkeys(
        ("qwen2_moe", "granitemoehybrid", "hy_v3"),
        "attention and the shared expert, and no other expert",
    ),
    "nemotron_h": "nothing: peft refuses it",
}
"""What `target_modules="all-linear"` reaches; attention alone where nothing is said."""


@dataclass(frozen=True)
class Trainer:
    """What is known of a trainer and one model."""

    name: str
    support: Support
    settings: str
    """What to set, in words; the end of the sentence that begins with the trainer's name."""


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
    kind = _SHIPPED if target.ships_code else target.model_type
    found = []
    # Of text models inside of others, none was tried.
    for name in () if target.inside else _TRIED.get(kind, ()):
        support = Support.RUNS
        if fused and (kind, name) in _OWN_CODE:
            support = Support.PER_EXPERT_ONLY
        elif tied and (kind, name) in _OWN_HEAD:
            support = Support.UNTIED_ONLY
        words = _lora(kind, target) if name == "peft" else _words(name, kind, routing)
        if tied and name in _WHERE_TIED:
            words += f"; {_WHERE_TIED[name]}"
        number = "N" if num_experts is None else str(num_experts)
        found.append(Trainer(name, support, Template(words).substitute(num_experts=number)))
    return tuple(found)


def expert_parallel_sizes(num_experts: int) -> tuple[int, ...]:
    """Return the numbers of ranks that experts divide among evenly."""
    return tuple(size for size in range(1, num_experts + 1) if num_experts % size == 0)


def _words(name: str, kind: str, routing: Routing) -> str:
    has_loss = "router_aux_loss_coef" in defaults_of(kind)
    words = _SET.get((name, kind)) or _SET[name, _LOSS if has_loss else _NO_LOSS]
    more = _BY_ROUTING.get((name, routing))
    return f"{words}; {more}" if more else words


def _lora(kind: str, target: Target) -> str:
    # The fused layout is that of memory.
    held = target.layouts[ExpertLayout.FUSED].experts
    parameters = ", ".join(f'"{weight.name}"' for weight in held if not weight.is_bias)
    reached = _ALL_LINEAR.get(kind, "attention, and no expert")
    return (
        f"`target_parameters=[{parameters}]` for the experts; "
        f'`target_modules="all-linear"` reaches {reached}'
    )
