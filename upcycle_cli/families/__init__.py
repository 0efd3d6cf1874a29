"""The model types that can be upcycled, and the choice between their targets.

`DENSE` and `TARGETS` hold one file's worth each; `PAIRS` says which go together, the target that
the most software can load first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from upcycle_cli.errors import UpcycleError
from upcycle_cli.families.dense import Decoder, DenseFamily
from upcycle_cli.families.llama import LLAMA
from upcycle_cli.families.mistral import MISTRAL
from upcycle_cli.families.mixtral import MIXTRAL
from upcycle_cli.families.qwen2 import QWEN2
from upcycle_cli.families.qwen2_moe import QWEN2_MOE
from upcycle_cli.families.qwen3 import QWEN3
from upcycle_cli.families.qwen3_moe import QWEN3_MOE
from upcycle_cli.families.target import Target
from upcycle_cli.recipe import Routing

DENSE: Mapping[str, DenseFamily] = {
    family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)
}
TARGETS: Mapping[str, Target] = {
    target.model_type: target for target in (MIXTRAL, QWEN2_MOE, QWEN3_MOE)
}
PAIRS: Mapping[str, tuple[str, ...]] = {
    "llama": ("mixtral", "qwen2_moe"),
    "mistral": ("mixtral", "qwen2_moe"),
    "qwen2": ("qwen2_moe",),
    "qwen3": ("qwen3_moe",),
}


@dataclass(frozen=True)
class Family:
    """A dense model type, what its config means, and the target it is to become."""

    dense: DenseFamily
    decoder: Decoder
    target: Target


def dense_family(config: Mapping[str, Any]) -> DenseFamily:
    """Return the family of a dense config.

    Raises UpcycleError for an MoE, a quantised model, or a model type that is not supported.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UpcycleError(
            "config.json has no model_type.",
            f"Supported: {', '.join(DENSE)}.",
        )
    if model_type in TARGETS or is_moe(config):
        raise UpcycleError(
            f"this is a mixture of experts already (model_type {model_type}).",
            "Only a dense model can be upcycled; see what this one holds with `upcycle inspect`.",
        )
    if model_type not in DENSE:
        raise UpcycleError(
            f"model type '{model_type}' cannot be upcycled yet.",
            f"Supported: {', '.join(DENSE)}.",
        )
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UpcycleError(
            f"the weights are quantised ({method or 'quantization_config'} in config.json).",
            "Convert the bf16 or fp16 release of the model, and quantise the result.",
        )
    return DENSE[model_type]


def is_moe(config: Mapping[str, Any]) -> bool:
    """Whether a config describes a mixture of experts, of whatever architecture."""
    keys = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")
    return any(config.get(key) for key in keys)


def choose(config: Mapping[str, Any], target: str, routing: Routing | None) -> Family:
    """Return the family for a source config; `target` may be "auto".

    Auto takes the first target that can express both the decoder and the routing asked for.

    Raises UpcycleError when none can, saying why of each.
    """
    dense = dense_family(config)
    decoder = dense.decoder(config)
    options = PAIRS[dense.model_type]
    if target != "auto" and target not in TARGETS:
        raise UpcycleError(
            f"'{target}' is not a target.", f"{dense.model_type} can become {' or '.join(options)}."
        )
    if target != "auto" and target not in options:
        raise UpcycleError(
            f"{dense.model_type} cannot become {target}.",
            f"It can become {' or '.join(options)}.",
        )
    reasons: dict[str, str] = {}
    for name in options:
        reason = _objection(TARGETS[name], decoder, routing)
        if reason is not None:
            reasons[name] = reason
        elif target in ("auto", name):
            return Family(dense, decoder, TARGETS[name])
    able = [name for name in options if name not in reasons]
    shown = reasons if target == "auto" else {target: reasons[target]}
    raise UpcycleError(
        " ".join(f"{name} cannot express this model: {why}." for name, why in shown.items()),
        f"{' or '.join(able)} can: pass --target {able[0]}." if able else "No target can yet.",
    )


def _objection(target: Target, decoder: Decoder, routing: Routing | None) -> str | None:
    if routing is not None and routing not in target.routings:
        return f"it has no {routing} routing"
    return target.refusal(decoder)
