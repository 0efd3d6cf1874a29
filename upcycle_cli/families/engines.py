"""Which inference engines run a target and routing as it is meant.

Facts about other software, each found by running upcycled models in it:
tests/interoperability/run.py, docs/interoperability.md. llama.cpp ignores `norm_topk_prob`: it
renormalises for qwen3moe and never for qwen2moe; MLX's qwen2_moe never does. llama.cpp's converter
wants the special tokens of GLM's own tokenizer for glm4_moe. vLLM runs shipped code by its
Transformers backend, with --trust-remote-code. vLLM has code for nemotron_h, but not on CPUs, where
all of this was run: nothing is said of the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from upcycle_cli.families.shipped import UPCYCLED_PREFIX
from upcycle_cli.recipe import Routing


class Support(StrEnum):
    """What happens when an engine loads the model."""

    RUNS = "runs"
    PER_EXPERT_ONLY = "needs --expert-layout per-expert"
    UNTIED_ONLY = "needs --untie-embeddings"
    UNTIED_OR_WRONG = "computes something else without --untie-embeddings"
    WRONG = "loads, computes something else"
    REFUSES = "does not load it"


@dataclass(frozen=True)
class Engine:
    """An engine's verdict on one model."""

    name: str
    support: Support


_SHIPPED = UPCYCLED_PREFIX.rstrip("_")
"""Stands for every model type whose code comes with the model."""
_ENGINES = ("transformers", "vLLM", "llama.cpp", "MLX")
_TRIED = {
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", _SHIPPED), _ENGINES),
    "nemotron_h": ("transformers", "llama.cpp", "MLX"),
    **dict.fromkeys(
        (
            "cohere2_moe",
            "deepseek_v3",
            "dots1",
            "ernie4_5_moe",
            "flex_olmo",
            "granitemoe",
            "granitemoe_swa",
            "granitemoehybrid",
            "hy_v3",
            "qwen3_5_moe_text",
            "solar_open",
            "hunyuan_v1_moe",
            "lfm2_moe",
            "qwen3_vl_moe_text",
        ),
        ("transformers",),
    ),
}
"""By target, the engines that it was run in. They run it, whatever the routing, but for these."""
_SHIPPED_IN_VLLM = ("nemotron", "olmo2")
"""Families whose shipped code vLLM was seen to run; of others, nothing is known."""
_REFUSE = (("glm4_moe", "llama.cpp"), (_SHIPPED, "llama.cpp"), (_SHIPPED, "MLX"))
_COMPUTE_ELSE = (
    ("qwen2_moe", "llama.cpp", Routing.TOPK_SOFTMAX),
    ("qwen2_moe", "MLX", Routing.TOPK_SOFTMAX),
    ("qwen3_moe", "llama.cpp", Routing.SOFTMAX_TOPK),
)
_READ_FUSED = {
    "transformers": tuple(_TRIED),
    "vLLM": ("qwen2_moe", "qwen3_moe", "glm4_moe", _SHIPPED),
    "llama.cpp": ("qwen2_moe", "qwen3_moe"),
}
"""By engine, the targets whose experts it also finds when those of a layer are one tensor."""
_WANT_A_HEAD = {
    ("qwen2_moe", "llama.cpp"): Support.UNTIED_ONLY,
    ("qwen2_moe", "MLX"): Support.UNTIED_ONLY,
    ("glm4_moe", "vLLM"): Support.UNTIED_OR_WRONG,
    ("glm4_moe", "MLX"): Support.UNTIED_ONLY,
}
"""Targets and engines where a head that shares the embedding is not understood."""
_SOME_LAYERS = {
    "transformers": (
        *(
            "qwen2_moe",
            "qwen3_moe",
            "glm4_moe",
            "cohere2_moe",
            "dots1",
            "deepseek_v3",
            "ernie4_5_moe",
            "hy_v3",
            "lfm2_moe",
            "nemotron_h",
            "qwen3_vl_moe_text",
            _SHIPPED,
        ),
    ),
    "vLLM": ("qwen3_moe", "glm4_moe", _SHIPPED),
    "MLX": ("qwen3_moe", "glm4_moe", "nemotron_h"),
}
"""By engine, the targets of which it was seen to run models that keep some dense MLPs."""
_NOT_SOME_LAYERS = (("qwen3_moe", "llama.cpp"), ("nemotron_h", "llama.cpp"))
"""Targets and engines that do not load these; of others, nothing is known."""
_NEVER_PER_EXPERT = (
    *(_SHIPPED, "granitemoe", "granitemoe_swa", "granitemoehybrid", "qwen3_vl_moe_text"),
)
"""Targets none of whose layouts has a tensor per expert."""
_NEWER_THAN_TRANSFORMERS_4 = (
    "cohere2_moe",
    "granitemoe_swa",
    "hy_v3",
    "lfm2_moe",
    "nemotron_h",
    "qwen3_5_moe_text",
    "qwen3_vl_moe_text",
    "solar_open",
)
"""Targets that it has no class for, or whose only layout that it reads is not written."""


def engines(
    target: str,
    routing: Routing,
    *,
    tied: bool,
    fused: bool,
    plain_attention: bool,
    every_layer: bool = True,
    wrapped: bool = False,
) -> tuple[Engine, ...]:
    """Return what is known of each engine; one that is not listed was not tried.

    `tied` says whether the head shares the embedding, `fused` whether the experts of a layer are
    one tensor. With `plain_attention` the heads make up the hidden size, no layer slides and rotary
    embeddings turn all of a head, not stretched: of anything else, only transformers was tried.
    `every_layer` says that no dense MLP is left. Of a text model inside of another (`wrapped`),
    too, only transformers was tried. "transformers 4" is listed where it differs.
    """
    untried = {"vLLM", "llama.cpp", "MLX"} if wrapped or not plain_attention else set[str]()
    if target.startswith(UPCYCLED_PREFIX):
        untried |= set() if target.endswith(_SHIPPED_IN_VLLM) else {"vLLM"}
        target = _SHIPPED
    found = []
    for name in _TRIED.get(target, ()):
        if name in untried:
            continue
        support = Support.RUNS
        if (target, name) in (_REFUSE if every_layer else _NOT_SOME_LAYERS):
            support = Support.REFUSES
        elif not every_layer and target not in _SOME_LAYERS.get(name, ()):
            continue
        elif (target, name, routing) in _COMPUTE_ELSE:
            support = Support.WRONG
        elif fused and target not in _READ_FUSED.get(name, ()):
            support = Support.PER_EXPERT_ONLY
        elif tied:
            support = _WANT_A_HEAD.get((target, name), support)
        found.append(Engine(name, support))
        newer = target in _NEWER_THAN_TRANSFORMERS_4
        split = target not in _NEVER_PER_EXPERT
        if name == "transformers" and (newer or (fused and split)):
            older = Support.REFUSES if newer else Support.PER_EXPERT_ONLY
            found.append(Engine("transformers 4", older))
    return tuple(found)
