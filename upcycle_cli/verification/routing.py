"""Observe what the routers of an MoE choose, and whether tokens get whole virtual groups.

All experts of a group have the same logit for a token. If two groups tie, the token may get parts
of both.

Legend: S tokens, N experts, T top-k, E groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from upcycle_cli.run.lazy_models import LazyModel
from upcycle_cli.run.models import Model


@dataclass
class ObservedRouting:
    """The choices of the routers."""

    whole: list[torch.Tensor] = field(default_factory=list)
    """Which tokens got whole groups only (S,), for each layer that has run."""
    measures: dict[int, dict[str, Any]] = field(default_factory=dict)
    """The router's fields of `LayerMeasure`, by layer."""
    failures: list[str] = field(default_factory=list)


@contextmanager
def observed_routers(moe: LazyModel, tokens: int, group_size: int) -> Iterator[ObservedRouting]:
    """Note what the routers choose for the first `tokens`; later ones only measure experts."""
    found, experts = ObservedRouting(), moe.experts
    assert experts is not None
    layout = experts.target.in_memory
    rows = layout.router.removeprefix(layout.gate).removesuffix("weight").strip(".")
    noted: dict[int, torch.Tensor] = {}

    def note_logits(layer: int, _linear: Model, _inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            noted[layer] = output

    def note_choice(
        layer: int, _router: Model, _inputs: object, output: tuple[torch.Tensor, ...]
    ) -> None:
        scores_SN, gates_ST, experts_ST = (held[:tokens] for held in output)
        if experts_ST.shape[-1] != experts.top_k:
            found.failures.append(
                f"{experts.router_name(layer)}: transformers chooses {experts_ST.shape[-1]} "
                f"experts, but config.json has a top-k of {experts.top_k}"
            )
        # Some routers return probabilities instead of logits.
        logits_SN = noted.pop(layer, scores_SN)[:tokens]
        groups_SE = logits_SN[:, ::group_size].float().softmax(-1)
        best_S2 = groups_SE.topk(min(2, groups_SE.shape[1])).values
        # A gate of 0 counts as not chosen.
        picked_SN = torch.zeros(len(experts_ST), experts.num_experts)
        picked_SN.scatter_(1, experts_ST, (gates_ST != 0).float())
        per_group_SE = picked_SN.reshape(len(picked_SN), -1, group_size).sum(-1)
        whole_S = ((per_group_SE == 0) | (per_group_SE == group_size)).all(-1)
        load_N = torch.bincount(experts_ST.flatten(), minlength=experts.num_experts)
        found.whole.append(whole_S)
        found.measures[layer] = {
            "whole_share": float(whole_S.double().mean()),
            # In nats, over the groups' probabilities; and the gap between the two largest of them.
            "router_entropy": float(torch.special.entr(groups_SE).sum(-1).mean()),
            "router_margin": float((best_S2[:, 0] - best_S2[:, 1:].sum(-1)).mean()),
            "load_cv": float(load_N.double().std(correction=0) / load_N.double().mean()),
            "idle_experts": int((load_N == 0).sum()),
            "load": load_N.tolist(),
        }

    with ExitStack() as stack:
        for layer in experts.layers:
            router = moe.router(layer)
            linear = router.get_submodule(rows)
            stack.callback(router.register_forward_hook(partial(note_choice, layer)).remove)
            stack.callback(linear.register_forward_hook(partial(note_logits, layer)).remove)
        yield found
