"""Which MoE architectures can be grown, and what keeps a model of theirs from being the same then.

Growing takes the places of experts and routers and a few keys of the config, which are the row of
an architecture; all else of a model stays as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models import is_moe, target_of
from upcycle_cli.models.moe import Target
from upcycle_cli.models.wrappers import wrapper_of

GROWABLE = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "glm4_moe", "olmoe", "flex_olmo"),
    *("deepseek_v3", "dots1", "solar_open"),
)


def growable(config: Mapping[str, Any], names: Collection[str]) -> Target:
    """Return the row of an MoE that can be grown; `names` are those of its tensors.

    Raises UpcycleError for a dense model, for an MoE of another architecture, for a quantised one,
    and for one that would not compute the same.
    """
    model_type = config.get("model_type")
    if not is_moe(config):
        raise UpcycleError(
            f"--expand grows a mixture of experts, and this is none (model_type {model_type}).",
            "Make one of a dense model with --recipe E8G1T2.",
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
        # A group is judged by the sum of its best two experts: they would be the best one, twice.
        raise UpcycleError(
            f"tokens choose {chosen} of {groups} groups of experts first (n_group, topk_group), "
            "by the best two experts of each: with copies, those are one expert and its copy, so "
            "other groups would be chosen.",
            "Only models with one group, or with all groups chosen, can be grown.",
        )
    return target
