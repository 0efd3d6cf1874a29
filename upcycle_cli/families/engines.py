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


_ANY = tuple(Routing)
_SHIPPED = UPCYCLED_PREFIX.rstrip("_")
"""Stands for every model type whose code comes with the model."""
_SUPPORT: tuple[tuple[str, str, tuple[Routing, ...], Support], ...] = (
    ("mixtral", "transformers", _ANY, Support.RUNS),
    ("mixtral", "vLLM", _ANY, Support.RUNS),
    ("mixtral", "llama.cpp", _ANY, Support.RUNS),
    ("mixtral", "MLX", _ANY, Support.RUNS),
    ("qwen2_moe", "transformers", _ANY, Support.RUNS),
    ("qwen2_moe", "vLLM", _ANY, Support.RUNS),
    ("qwen2_moe", "llama.cpp", (Routing.SOFTMAX_TOPK,), Support.RUNS),
    ("qwen2_moe", "llama.cpp", (Routing.TOPK_SOFTMAX,), Support.WRONG),
    ("qwen2_moe", "MLX", (Routing.SOFTMAX_TOPK,), Support.RUNS),
    ("qwen2_moe", "MLX", (Routing.TOPK_SOFTMAX,), Support.WRONG),
    ("qwen3_moe", "transformers", _ANY, Support.RUNS),
    ("qwen3_moe", "vLLM", _ANY, Support.RUNS),
    ("qwen3_moe", "llama.cpp", (Routing.TOPK_SOFTMAX,), Support.RUNS),
    ("qwen3_moe", "llama.cpp", (Routing.SOFTMAX_TOPK,), Support.WRONG),
    ("qwen3_moe", "MLX", _ANY, Support.RUNS),
    ("glm4_moe", "transformers", _ANY, Support.RUNS),
    ("glm4_moe", "vLLM", _ANY, Support.RUNS),
    ("glm4_moe", "llama.cpp", _ANY, Support.REFUSES),
    ("glm4_moe", "MLX", _ANY, Support.RUNS),
    ("nemotron_h", "transformers", _ANY, Support.RUNS),
    ("nemotron_h", "llama.cpp", _ANY, Support.RUNS),
    ("nemotron_h", "MLX", _ANY, Support.RUNS),
    (_SHIPPED, "transformers", _ANY, Support.RUNS),
    (_SHIPPED, "vLLM", _ANY, Support.RUNS),
    (_SHIPPED, "llama.cpp", _ANY, Support.REFUSES),
    (_SHIPPED, "MLX", _ANY, Support.REFUSES),
)
_READ_FUSED = {
    "transformers": ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "nemotron_h", _SHIPPED),
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
    "transformers": ("qwen2_moe", "qwen3_moe", "glm4_moe", "nemotron_h", _SHIPPED),
    "vLLM": ("qwen3_moe", "glm4_moe", _SHIPPED),
    "MLX": ("qwen3_moe", "glm4_moe", "nemotron_h"),
}
"""By engine, the targets of which it was seen to run models that keep some dense MLPs."""
_NOT_SOME_LAYERS = (("qwen3_moe", "llama.cpp"), ("nemotron_h", "llama.cpp"))
"""Targets and engines that do not load these."""
_NEWER_THAN_TRANSFORMERS_4 = ("nemotron_h",)
"""Targets that it has no class for."""


def engines(
    target: str,
    routing: Routing,
    *,
    tied: bool,
    fused: bool,
    plain_attention: bool,
    every_layer: bool = True,
) -> tuple[Engine, ...]:
    """Return what is known of each engine; one that is not listed was not tried.

    `tied` says whether the head shares the embedding, `fused` whether the experts of a layer are
    one tensor. With `plain_attention` the heads make up the hidden size, no layer slides and rotary
    embeddings are not stretched: of anything else, only transformers was tried. `every_layer` says
    that no dense MLP is left. "transformers 4" is listed where it differs.
    """
    if target.startswith(UPCYCLED_PREFIX):
        target = _SHIPPED
    found = []
    for model_type, name, routings, listed in _SUPPORT:
        if model_type != target or routing not in routings:
            continue
        if name != "transformers" and not plain_attention:
            continue
        support = listed if every_layer else _with_dense_layers(target, name, listed)
        if support is Support.RUNS and fused and target not in _READ_FUSED.get(name, ()):
            support = Support.PER_EXPERT_ONLY
        elif support is Support.RUNS and tied:
            support = _WANT_A_HEAD.get((target, name), support)
        found += [Engine(name, support)] if support is not None else []
        if name == "transformers" and target in _NEWER_THAN_TRANSFORMERS_4:
            found.append(Engine("transformers 4", Support.REFUSES))
        elif name == "transformers" and fused and target != _SHIPPED:
            found.append(Engine("transformers 4", Support.PER_EXPERT_ONLY))
    return tuple(found)


def _with_dense_layers(target: str, name: str, listed: Support) -> Support | None:
    """Return the support of a model that keeps some dense MLPs; None where that was not tried."""
    if (target, name) in _NOT_SOME_LAYERS:
        return Support.REFUSES
    return listed if target in _SOME_LAYERS.get(name, ()) else None
