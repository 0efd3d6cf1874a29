"""Compare next-token distributions, one block of the vocabulary at a time.

Sums over the vocabulary are made block by block, relative to the largest logit so far, as in online
softmax (Milakov & Gimelshein, arXiv 1805.02867).

Legend: P positions, V vocabulary, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from upcycle_cli.run.models import Model

_BLOCK_LOGITS = 1 << 20
"""Logits of one model in memory at once: 4 MB in float32, about the size of a cache."""
_NEAR = 1.0
_TINY = 1e-3
"""Below this difference of logits d, exp(-d) - 1 + d is d²/2 - d³/6 to six digits."""


def logits(model: Model, output: Any, *, size: int) -> Iterator[torch.Tensor]:  # noqa: ANN401
    """Yield the logits (P, at most `size`) of each block of the vocabulary in turn.

    `output` is what transformers' base model returns; its last hidden state is (1, P, H).
    """
    head, base = model.get_output_embeddings(), model.base_model
    base = getattr(base, "decoder", base)  # which the causal LM of opt calls itself
    weight, bias = head.weight, getattr(head, "bias", None)
    ids = torch.zeros(output.last_hidden_state.shape[:2], dtype=torch.long)
    own, slots = base.forward, head._parameters  # noqa: SLF001 - a block is not a Parameter
    whole = dict(slots)
    # Call the causal LM itself, since it may cap or scale the logits.
    base.forward = lambda *_, **__: output
    try:
        for begin in range(0, weight.shape[0], size):
            slots["weight"] = weight.block(begin, begin + size)
            if bias is not None:
                slots["bias"] = bias[begin : begin + size]
            with torch.no_grad():
                made = model(input_ids=ids, use_cache=False).logits[0].float()
            yield made
    finally:
        base.forward = own
        slots.update(whole)


class Softmax:
    """The softmax of a model's logits at each position (P,), over the blocks added so far."""

    def __init__(self, targets_P: torch.Tensor) -> None:
        P = len(targets_P)
        self._targets_P = targets_P
        self.largest = torch.full((P,), -torch.inf)
        self.best = torch.zeros(P, dtype=torch.long)
        self.normalizer = torch.zeros(P, dtype=torch.double)
        self._target_logit_P = torch.full((P,), torch.nan, dtype=torch.double)
        self.not_finite = 0

    def add(self, logits_PV: torch.Tensor, begin: int) -> torch.Tensor:
        """Add the logits from `begin` on; return the factor for earlier sums."""
        if not math.isfinite(float(logits_PV.sum())):  # counting is slower and rarely needed
            self.not_finite += int((~logits_PV.isfinite()).sum())
        largest_P, best_P = logits_PV.max(-1)
        better_P = largest_P > self.largest
        self.best = torch.where(better_P, best_P + begin, self.best)
        new_P = torch.maximum(largest_P, self.largest)
        fade_P = (self.largest - new_P).double().exp()
        self.largest = new_P
        self.weights = torch.sub(logits_PV, new_P[:, None]).exp_()
        self.normalizer = self.normalizer * fade_P + self.weights.sum(-1).double()
        place_P = self._targets_P - begin
        here_P = (place_P >= 0) & (place_P < logits_PV.shape[1])
        logit_P = logits_PV.gather(1, place_P.clamp(0, logits_PV.shape[1] - 1)[:, None])[:, 0]
        self._target_logit_P = torch.where(here_P, logit_P.double(), self._target_logit_P)
        return fade_P

    @property
    def log_sum(self) -> torch.Tensor:
        """Return the logarithm of the sum of exponentials."""
        return self.largest.double() + self.normalizer.log()

    @property
    def nll(self) -> torch.Tensor:
        """Return the negative log-likelihood of the targets; nan at positions without a target."""
        return self.log_sum - self._target_logit_P


class Divergence:
    """How far two predictions are apart at each position, over the blocks added so far."""

    def __init__(self, p: Softmax, q: Softmax) -> None:
        self.p, self.q = p, q
        self._gap_P, self._curve_P = (torch.zeros_like(p.normalizer) for _ in range(2))
        self.most = torch.zeros_like(p.largest)

    def add(self, p_PV: torch.Tensor, q_PV: torch.Tensor, fade_P: torch.Tensor) -> None:
        """Add a block of logits; `fade_P` is what `p.add` returned for it."""
        gap_PV, w_PV = p_PV - q_PV, self.p.weights
        most_P = torch.maximum(gap_PV.amax(-1), -gap_PV.amin(-1))
        self.most = torch.maximum(self.most, most_P)
        gap_P = torch.linalg.vecdot(w_PV, gap_PV)
        if float(most_P.max()) < _TINY:  # two terms of the series: faster, and as exact
            square_PV = gap_PV.square().mul_(w_PV)
            curve_P = square_PV.sum(-1) / 2 - torch.linalg.vecdot(square_PV, gap_PV) / 6
        else:
            curve_PV = torch.expm1(-gap_PV.clamp(min=-_NEAR)).add_(gap_PV)
            curve_P = torch.linalg.vecdot(w_PV, curve_PV)
        for total_P, added_P in ((self._gap_P, gap_P), (self._curve_P, curve_P)):
            total_P.mul_(fade_P).add_(added_P)

    @property
    def kl(self) -> torch.Tensor:
        """Return KL(p ‖ q) in nats."""
        # With d the difference of the logits, KL is log E[exp(-d)] + E[d]. For small d both terms
        # nearly cancel; E[exp(-d) - 1 + d] loses no digits.
        gap_P, curve_P = (held / self.p.normalizer for held in (self._gap_P, self._curve_P))
        change_P = curve_P - gap_P
        near_P = torch.log1p(change_P) - change_P + curve_P
        far_P = gap_P - self.p.log_sum + self.q.log_sum
        return torch.where(self.most < _NEAR, near_P, far_P).clamp(min=0)


def compare(endings: Sequence[tuple[Model, Any]], targets_P: torch.Tensor) -> list[Divergence]:
    """Compare the dense model, the same with rounded weights (if it matters), and the MoE.

    Each is a model and the output of its base model; see `logits`. Returns how far the dense model
    and the MoE, the dense model and its rounded weights, and these and the MoE are apart.
    """
    begin, moe, found = 0, len(endings) - 1, [Softmax(targets_P) for _ in endings]
    pairs = (0, moe), (0, moe - 1), (moe - 1, moe)
    divergences = {(p, q): Divergence(found[p], found[q]) for p, q in pairs}
    size = max(1, _BLOCK_LOGITS // len(targets_P))
    for blocks in zip(*(logits(*ending, size=size) for ending in endings), strict=True):
        fades = [each.add(block, begin) for each, block in zip(found, blocks, strict=True)]
        for (p, q), divergence in divergences.items():
            if p != q:
                divergence.add(blocks[p], blocks[q], fades[p])
        begin += blocks[0].shape[1]
    return [divergences[pair] for pair in pairs]
