"""Which inference engines run a target and routing as it is meant.

Facts about other software, each found by running upcycled models in it:
tests/interoperability/run.py, docs/interoperability.md. llama.cpp ignores `norm_topk_prob`: it
renormalises for qwen3moe and never for qwen2moe; MLX's qwen2_moe never does.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from upcycle_cli.recipe import Routing


class Support(StrEnum):
    """What happens when an engine loads the model."""

    RUNS = "runs"
    PER_EXPERT_ONLY = "needs --expert-layout per-expert"
    UNTIED_ONLY = "needs --untie-embeddings"
    WRONG = "loads, computes something else"


@dataclass(frozen=True)
class Engine:
    """An engine's verdict on one model."""

    name: str
    support: Support


_ANY = tuple(Routing)
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
)
_READ_FUSED = {
    "transformers": ("mixtral", "qwen2_moe", "qwen3_moe"),
    "vLLM": ("qwen2_moe", "qwen3_moe"),
    "llama.cpp": ("qwen2_moe", "qwen3_moe"),
}
"""By engine, the targets whose experts it also finds when those of a layer are one tensor."""
_WANT_A_HEAD = (("qwen2_moe", "llama.cpp"), ("qwen2_moe", "MLX"))
"""Targets and engines where a head that shares the embedding is not understood."""


def engines(
    target: str, routing: Routing, *, tied: bool, fused: bool, plain_attention: bool
) -> tuple[Engine, ...]:
    """Return what is known of each engine; one that is not listed was not tried.

    `tied` says whether the head shares the embedding, `fused` whether the experts of a layer are
    one tensor. With `plain_attention` the heads make up the hidden size, no layer slides and rotary
    embeddings are not stretched: of anything else, only transformers was tried. "transformers 4" is
    listed where it differs.
    """
    found = []
    for model_type, name, routings, listed in _SUPPORT:
        if model_type != target or routing not in routings:
            continue
        if name != "transformers" and not plain_attention:
            continue
        support = listed
        if support is Support.RUNS and fused and target not in _READ_FUSED.get(name, ()):
            support = Support.PER_EXPERT_ONLY
        elif support is Support.RUNS and tied and (target, name) in _WANT_A_HEAD:
            support = Support.UNTIED_ONLY
        found.append(Engine(name, support))
        if name == "transformers" and fused:
            found.append(Engine("transformers 4", Support.PER_EXPERT_ONLY))
    return tuple(found)
