"""Which MoE architectures --expand supports, and which of their models.

Growing replaces experts, routers and a few config keys, and copies the rest of a model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models.families import is_moe, target_of
from upcycle_cli.models.moe import Target
from upcycle_cli.models.wrappers import wrapper_of

GROWABLE = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "glm4_moe", "olmoe", "flex_olmo"),
    *("deepseek_v3", "dots1", "solar_open"),
)


def growable(config: Mapping[str, Any], names: Collection[str]) -> Target:
    """Return the row of an MoE that can be grown; `names` are its tensors.

    Raises UpcycleError for a dense or quantised model, an unsupported architecture, and a model
    that would not compute the same with copied experts.
    """
    model_type = config.get("model_type")
    if not is_moe(config):
        raise UpcycleError(
            f"--expand needs a mixture of experts, and this is a dense {model_type} model.",
            "Upcycle it first with --recipe E8G1T2.",
        )
    if model_type not in GROWABLE or wrapper_of(config) is not None:
        raise UpcycleError(
            f"a mixture of experts of model type {model_type} cannot be grown yet.",
            f"These can: {', '.join(GROWABLE)}.",
        )
    if config.get("quantization_config") is not None:
        raise UpcycleError(
            "the weights are quantised (quantization_config in config.json).",
            "Grow the bf16 or fp16 release of the model, and quantise the result.",
        )
    target = target_of(config, names)
    groups, chosen = (target.value(config, key) for key in ("n_group", "topk_group"))
    if groups not in (None, 1) and groups != chosen:
        # The score of a group is the sum of its two best experts, which would be two copies.
        raise UpcycleError(
            f"tokens choose {chosen} of {groups} groups of experts (n_group, topk_group) by the "
            "two best experts of each group. With copied experts those are one expert and its "
            "copy, so tokens would choose other groups.",
            "Only models with one group, or with all groups chosen, can be grown.",
        )
    return target
