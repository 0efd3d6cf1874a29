"""What the routers of an MoE choose, and whether each token gets whole virtual groups.

All experts of a group have the same logit for every token. Where the logits of two groups tie, a
token may get parts of both groups.

Legend: S tokens, N experts, T top-k, E groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from upcycle_cli.run.lazy_models import LazyModel
from upcycle_cli.run.models import Model


@dataclass(frozen=True)
class LayerRouting:
    """What the router of one layer chose."""

    whole: torch.Tensor
    """Which tokens got whole groups only (S,)."""
    load: torch.Tensor
    """How many tokens chose each expert (N,)."""
    entropy: float
    """The entropy of the softmax over the groups' logits in nats, mean over tokens."""
    margin: float
    """The difference between the two largest of those probabilities, mean over tokens."""


@dataclass
class Routing:
    """What the routers of all layers chose."""

    layers: dict[int, LayerRouting] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def whole_everywhere(self) -> torch.Tensor:
        """Which tokens got whole groups in every layer (S,)."""
        return torch.stack([layer.whole for layer in self.layers.values()]).all(0)


@contextmanager
def watched_routers(moe: LazyModel, tokens: int, group_size: int) -> Iterator[Routing]:
    """Note what the routers choose for the first `tokens` they see while the model runs.

    Tokens after those were added to measure experts.
    """
    found, experts = Routing(), moe.experts
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
        found.layers[layer] = LayerRouting(
            whole=((per_group_SE == 0) | (per_group_SE == group_size)).all(-1),
            load=torch.bincount(experts_ST.flatten(), minlength=experts.num_experts),
            entropy=float(torch.special.entr(groups_SE).sum(-1).mean()),
            margin=float((best_S2[:, 0] - best_S2[:, 1:].sum(-1)).mean()),
        )

    with ExitStack() as stack:
        for layer in experts.layers:
            router = moe.router(layer)
            linear = router.get_submodule(rows)
            stack.callback(router.register_forward_hook(partial(note_choice, layer)).remove)
            stack.callback(linear.register_forward_hook(partial(note_logits, layer)).remove)
        yield found
