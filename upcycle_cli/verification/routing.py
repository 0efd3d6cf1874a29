"""What the routers of an MoE choose, and whether each token gets whole virtual groups.

All experts of a group have the same logit for every token. Where the logits of two groups tie, a
token may get parts of both groups.

Legend: S tokens, N experts, T top-k, E groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import fmean

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

    @property
    def load_cv(self) -> float:
        """The standard deviation of the experts' loads, relative to their mean."""
        load_N = self.load.double()
        return float(load_N.std(correction=0) / load_N.mean())


@dataclass
class Routing:
    """What the routers of all layers chose."""

    tokens: int
    """The number of tokens that count; those after them were added to measure experts."""
    group_size: int
    layers: dict[int, LayerRouting] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def whole_everywhere(self) -> torch.Tensor:
        """Which tokens got whole groups in every layer (S,)."""
        return torch.stack([layer.whole for layer in self.layers.values()]).all(0)

    @property
    def metrics(self) -> dict[str, float]:
        """Shares and means over all layers."""
        found = self.layers.values()
        return {
            "split_token_layers": 1 - fmean([float(x.whole.double().mean()) for x in found]),
            "expert_load_cv": fmean([x.load_cv for x in found]),
        }


@contextmanager
def watched_routers(moe: LazyModel, tokens: int, group_size: int) -> Iterator[Routing]:
    """Note what the routers choose for the first `tokens` they see while the model runs."""
    found, experts = Routing(tokens, group_size), moe.experts
    assert experts is not None
    layout = experts.target.in_memory
    rows = layout.router.removeprefix(layout.gate).removesuffix("weight").strip(".")
    with ExitStack() as stack:
        for layer in experts.layers:
            watch = _RouterWatch(moe, layer, rows, found)
            router = moe.router(layer)
            stack.callback(router.register_forward_hook(watch).remove)
            linear = router.get_submodule(rows)
            stack.callback(linear.register_forward_hook(watch.note_logits).remove)
        yield found


@dataclass
class _RouterWatch:
    """The hook on one router."""

    moe: LazyModel
    layer: int
    rows: str
    """The module within the router whose weight is the router's rows; "" for the router itself."""
    found: Routing
    logits: torch.Tensor | None = None
    """(S, N): some routers return probabilities instead."""

    def note_logits(self, _linear: Model, _inputs: object, output: object) -> None:
        self.logits = output if isinstance(output, torch.Tensor) else None

    def __call__(self, _router: Model, _inputs: object, output: tuple[torch.Tensor, ...]) -> None:
        found, experts = self.found, self.moe.experts
        assert experts is not None
        logits_SN, gates_ST, experts_ST = (held[: found.tokens] for held in output)
        if experts_ST.shape[-1] != experts.top_k:
            found.failures.append(
                f"{experts.router_name(self.layer)}: transformers chooses {experts_ST.shape[-1]} "
                f"experts, but config.json has a top-k of {experts.top_k}"
            )
        if self.logits is not None:
            logits_SN = self.logits[: found.tokens]
        groups_SE = logits_SN[:, :: found.group_size].float().softmax(-1)
        best_S2 = groups_SE.topk(min(2, groups_SE.shape[1])).values
        found.layers[self.layer] = LayerRouting(
            whole=self._whole(gates_ST, experts_ST),
            load=torch.bincount(experts_ST.flatten(), minlength=experts.num_experts),
            entropy=float(torch.special.entr(groups_SE).sum(-1).mean()),
            margin=float((best_S2[:, 0] - best_S2[:, 1:].sum(-1)).mean()),
        )

    def _whole(self, gates_ST: torch.Tensor, experts_ST: torch.Tensor) -> torch.Tensor:
        """Return which tokens got whole groups (S,); a gate of 0 counts as not chosen."""
        experts, size = self.moe.experts, self.found.group_size
        assert experts is not None
        picked_SN = torch.zeros(len(experts_ST), experts.num_experts)
        picked_SN.scatter_(1, experts_ST, (gates_ST != 0).float())
        per_group_SE = picked_SN.reshape(len(picked_SN), -1, size).sum(-1)
        return ((per_group_SE == 0) | (per_group_SE == size)).all(-1)
