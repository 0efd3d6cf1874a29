"""What the routers choose: whole groups or not, in float32 and in the precision models run in.

Whole groups depend on logits that are equal inside a group and different between groups. In 16 bits
even good rows tie for some tokens, so what a router of the MoE splits is held against what honest
rows of its shape and size split on the same hidden states.

Legend: S positions, H hidden size, E groups, G shards, N = E·G experts, T top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from upcycle_cli.checkpoint import TORCH_DTYPES
from upcycle_cli.verification.facts import Facts

if TYPE_CHECKING:
    import torch

_SMALLEST_DISTANCE = 0.1
"""Relative: random rows are √2 apart, and bfloat16 rounds each of their values by up to 0.004."""
_HONEST_DRAWS = 4
_MOST_TIMES_HONEST = 3.0
_MARGIN = 5e-3


@dataclass
class Routing:
    """What was chosen over all layers: lists have an entry per layer."""

    whole: list[torch.Tensor] = field(default_factory=list)
    """(S,): which tokens got whole groups."""
    load_cvs: list[float] = field(default_factory=list)
    stored_split: list[float] = field(default_factory=list)
    """The share of tokens without whole groups in the dtype that the router is stored in."""
    honest_split: list[float] = field(default_factory=list)
    """The same of honest rows, where it is worth knowing; 0 elsewhere."""
    not_finite: int = 0
    """Router logits that are not finite in the dtype that the router is stored in."""

    @property
    def whole_everywhere(self) -> torch.Tensor:
        """(S,): which tokens got whole groups in every layer."""
        import torch

        return torch.stack(self.whole).all(0)

    @property
    def metrics(self) -> dict[str, float]:
        """Shares and means over all layers."""
        import torch

        return {
            "split_token_layers": 1 - float(torch.stack(self.whole).double().mean()),
            "split_token_layers_stored": _mean(self.stored_split),
            "expert_load_cv": _mean(self.load_cvs),
        }

    def stored_failures(self, facts: Facts) -> Iterator[str]:
        """Say where the routers do not work in the dtype that they are stored in."""
        if self.not_finite:
            yield (
                f"{self.not_finite} router logits are not finite in the dtype that the routers are "
                "stored in: their weights are too large for it"
            )
        for layer, pair in enumerate(zip(self.stored_split, self.honest_split, strict=True)):
            split, honest = pair
            if split > _MOST_TIMES_HONEST * honest + _MARGIN:
                yield (
                    f"{facts.router_name(layer)}: in the dtype that it is stored in, {split:.1%} "
                    f"of the tokens get parts of groups, where an honest router of its shape and "
                    f"size splits {honest:.1%}"
                )


@contextmanager
def watched_routers(facts: Facts, model: Any) -> Iterator[Routing]:  # noqa: ANN401
    """Note what the routers of a running model choose, ties in its own arithmetic included."""
    found = Routing()
    handles = []
    for layer in range(facts.num_layers):
        name = facts.target.names.fused_router.format(layer=layer).removesuffix(".weight")
        watch = _Watch(facts, layer, found)
        handles.append(model.get_submodule(name).register_forward_hook(watch))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def close_rows(router_EH: torch.Tensor) -> Iterator[tuple[int, int, float]]:
    """Yield pairs of rows that are too close, and how far apart they are, relative to their size.

    Each row is named once, with the first of the rows before it that it is close to.
    """
    import torch

    rows = router_EH.double()
    norms = rows.norm(dim=1)
    squares = norms.square()
    distances = (squares[:, None] + squares[None] - 2 * rows @ rows.T).clamp(min=0).sqrt()
    relative = distances / torch.minimum(norms[:, None], norms[None])
    close = (relative < _SMALLEST_DISTANCE).tril(-1)
    for row in close.any(dim=1).nonzero().flatten().tolist():
        first = int(close[row].nonzero()[0])
        # The difference of large squares is no measure of a small distance.
        exact = float((rows[row] - rows[first]).norm() / norms[[row, first]].min())
        yield first, row, exact


@dataclass
class _Watch:
    """A hook on one router."""

    facts: Facts
    layer: int
    found: Routing

    def __call__(self, router: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:  # noqa: ANN401
        import torch

        facts, found = self.facts, self.found
        _, gates_ST, experts_ST = output
        picked_SN = self._picked(gates_ST, experts_ST)
        load = torch.zeros(facts.num_experts).scatter_add_(
            0, experts_ST.flatten(), torch.ones(experts_ST.numel())
        )
        found.whole.append(self._whole(picked_SN))
        found.load_cvs.append(float(load.std(correction=0) / load.mean()))
        self._note_stored(router, inputs[0].detach().reshape(-1, facts.hidden_size))

    def _note_stored(self, router: Any, states_SH: torch.Tensor) -> None:  # noqa: ANN401
        import torch

        facts, found = self.facts, self.found
        entry = facts.moe.tensors[facts.router_name(self.layer)]
        dtype: torch.dtype = getattr(torch, TORCH_DTYPES[entry.dtype])
        weight_NH = router.weight.detach()
        own, not_finite = self._split(router, weight_NH.to(dtype), states_SH.to(dtype))
        honest = 0.0
        if own > _MARGIN:
            size = weight_NH.float().square().mean().sqrt()
            shares = [
                self._split(router, (size * self._rows(seed)).to(dtype), states_SH.to(dtype))[0]
                for seed in range(_HONEST_DRAWS)
            ]
            honest = _mean(shares)
        found.stored_split.append(own)
        found.honest_split.append(honest)
        found.not_finite += not_finite

    def _rows(self, seed: int) -> torch.Tensor:
        """Return random rows (N, H), equal inside each group."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        rows_EH = torch.randn(self.facts.expansion, self.facts.hidden_size, generator=generator)
        return rows_EH.repeat_interleave(self.facts.granularity, 0)

    def _split(
        self,
        router: Any,  # noqa: ANN401
        weight_NH: torch.Tensor,
        states_SH: torch.Tensor,
    ) -> tuple[float, int]:
        """Return the share of tokens that get parts of groups, and the logits beyond the dtype."""
        import torch

        held = router.weight.data
        try:
            router.weight.data = weight_NH
            with torch.no_grad():
                # Not by calling it, which would call this hook again.
                logits_SN, gates_ST, experts_ST = router.forward(states_SH)
        finally:
            router.weight.data = held
        not_finite = int((~logits_SN.isfinite()).sum())
        whole_S = self._whole(self._picked(gates_ST, experts_ST))
        return 1 - float(whole_S.double().mean()), not_finite

    def _picked(self, gates_ST: torch.Tensor, experts_ST: torch.Tensor) -> torch.Tensor:
        """Return which experts take part (S, N): a gate of 0 is as good as no choice."""
        import torch

        taking_part = (gates_ST != 0).float()
        picked = torch.zeros(len(experts_ST), self.facts.num_experts)
        return picked.scatter_(1, experts_ST, taking_part)

    def _whole(self, picked_SN: torch.Tensor) -> torch.Tensor:
        facts = self.facts
        per_group = picked_SN.reshape(len(picked_SN), facts.expansion, facts.granularity).sum(-1)
        return ((per_group == 0) | (per_group == facts.granularity)).all(-1)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
