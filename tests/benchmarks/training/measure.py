"""What is looked at in a mixture of experts while it is trained.

Legend: T tokens, N experts, K experts per token, E groups, G experts of a group, I an expert's
intermediate size, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Routers:
    """What the routers of a model say in a forward pass, layer by layer."""

    is_sigmoid: bool
    records: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Logits (T, N) and the chosen experts (T, K)."""

    def balancing_loss(self, *, pooled: bool = False) -> Tensor:
        """Return N · Σ (share of tokens · mean probability), which is K when balanced.

        The mean over layers; `pooled` takes all layers as one, as transformers does.
        """
        records = self.records
        if pooled:
            logits, chosen = zip(*records, strict=True)
            records = [(torch.cat(logits), torch.cat(chosen))]
        losses = []
        for logits_TN, chosen_TK in records:
            scores_TN = logits_TN.sigmoid() if self.is_sigmoid else logits_TN.softmax(-1)
            probabilities_TN = scores_TN / scores_TN.sum(-1, keepdim=True)
            load_N = _load(logits_TN, chosen_TK) / len(logits_TN)
            losses.append(logits_TN.shape[-1] * (load_N * probabilities_TN.mean(0)).sum())
        return torch.stack(losses).mean()


@contextmanager
def watch_routers(model: nn.Module, *, is_sigmoid: bool) -> Iterator[Routers]:
    """Note what routers say: modules named `gate`, which return logits, gates and choices."""
    routers = Routers(is_sigmoid)
    handles = [
        module.register_forward_hook(
            lambda _, __, output: routers.records.append((output[0], output[2]))
        )
        for name, module in model.named_modules()
        if name.endswith(".mlp.gate")
    ]
    try:
        yield routers
    finally:
        for handle in handles:
            handle.remove()


def _load(logits_TN: Tensor, chosen_TK: Tensor) -> Tensor:
    return chosen_TK.flatten().bincount(minlength=logits_TN.shape[-1]).to(logits_TN.dtype)


@dataclass
class Load:
    """How experts are chosen on a text, added up over its batches."""

    granularity: int
    loads: list[Tensor] = field(default_factory=list)
    split: int = 0
    token_layers: int = 0

    def add(self, routers: Routers) -> None:
        """Add a batch, and forget it there."""
        loads = [_load(*record) for record in routers.records]
        before = self.loads or [torch.zeros_like(load) for load in loads]
        self.loads = [old + new for old, new in zip(before, loads, strict=True)]
        for logits_TN, chosen_TK in routers.records:
            groups = logits_TN.shape[-1] // self.granularity
            shares_TE = nn.functional.one_hot(chosen_TK // self.granularity, groups).sum(1)
            self.split += int((shares_TE % self.granularity).any(1).sum())
            self.token_layers += len(chosen_TK)
        routers.records.clear()

    def facts(self) -> dict[str, float]:
        """Return the load's coefficient of variation, mean over layers, and more."""
        variations = [float(load.std(correction=0) / load.mean()) for load in self.loads]
        return {
            "load_cv": sum(variations) / len(variations),
            "idle_experts": sum(int((load == 0).sum()) for load in self.loads),
            "experts": sum(len(load) for load in self.loads),
            "split_share": self.split / self.token_layers,
        }


class Distances:
    """How far experts come from their start and from one another, as cosine distances.

    Groups are compared, each as one MLP: neuron by neuron, where a group has them in an order of
    its own.
    """

    def __init__(self, model: nn.Module, granularity: int, *, ordered: bool) -> None:
        self.layers = [
            module
            for name, module in model.named_modules()
            if name.endswith((".mlp.experts", ".mlp.expert_mlps"))
        ]
        self.granularity = granularity
        starts = [self._groups(layer) for layer in self.layers]
        # Copies of a neuron have the same first weight, whatever place they are in.
        self.orders = [None if ordered else start[..., 0].argsort(-1) for start in starts]
        self.starts = [self._flat(i) for i in range(len(self.layers))]

    @torch.no_grad()
    def _groups(self, layer: Any) -> Tensor:  # noqa: ANN401 - as transformers has them
        """Return the neurons of each group, (E, G·I, 3H)."""
        gate_NIH, up_NIH = layer.gate_up_proj.chunk(2, 1)
        neurons = torch.cat([gate_NIH, up_NIH, layer.down_proj.transpose(1, 2)], -1)
        return neurons.reshape(-1, self.granularity * gate_NIH.shape[1], neurons.shape[-1])

    def _flat(self, index: int) -> Tensor:
        groups, order = self._groups(self.layers[index]), self.orders[index]
        if order is not None:
            groups = groups.gather(1, order[..., None].expand_as(groups))
        return groups.flatten(1).double()

    def facts(self) -> dict[str, float]:
        """Return the mean distance between groups, and of groups from their start."""
        apart, moved = [], []
        for index, start in enumerate(self.starts):
            now = self._flat(index)
            moved.append(float((1 - torch.cosine_similarity(now, start, -1)).mean()))
            unit = nn.functional.normalize(now, dim=-1)
            count = len(unit)
            others = (float(unit.sum(0).square().sum()) - count) / (count * (count - 1))
            apart.append(max(0.0, 1 - others))
        return {"apart": sum(apart) / len(apart), "moved": sum(moved) / len(moved)}
