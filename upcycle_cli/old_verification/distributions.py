"""Next-token distributions compared, a block of the vocabulary at a time.

Neither model's logits are ever held: what is summed over the vocabulary is summed block by block,
with each position's largest logit so far taken out, as in online softmax (Milakov & Gimelshein,
arXiv 1805.02867).

Legend: P positions, V vocabulary, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from upcycle_cli.run.models import Model

_BLOCK_LOGITS = 1 << 22
"""Logits of one model that are in memory at once: 16 MB in float32."""
_NEAR = 1.0


@dataclass(frozen=True)
class Ending:
    """What a model's layers made of the text, from which its head makes logits."""

    model: Model
    output: Any
    """What transformers' base model returned; its last hidden state is (1, P, H)."""

    def logits(self, *, size: int) -> Iterator[torch.Tensor]:
        """Yield the logits (P, at most `size`) of one block of the vocabulary after the other."""
        model, output = self.model, self.output
        head, base = model.get_output_embeddings(), model.base_model
        weight, bias = head.weight, getattr(head, "bias", None)
        ids = torch.zeros(output.last_hidden_state.shape[:2], dtype=torch.long)
        own = base.forward
        # What the causal LM does around its head, such as capping or scaling, stays its own.
        base.forward = lambda *_, **__: output
        try:
            for begin in range(0, weight.shape[0], size):
                end = begin + size
                slots = head._parameters  # noqa: SLF001 - a block is no parameter
                slots["weight"] = weight.block(begin, end)
                if bias is not None:
                    slots["bias"] = bias[begin:end]
                with torch.no_grad():
                    made = model(input_ids=ids, use_cache=False).logits[0].float()
                yield made
        finally:
            base.forward = own
            slots["weight"] = weight
            if bias is not None:
                slots["bias"] = bias


class Softmax:
    """The softmax of a model at each position, as far as its logits were shown.

    `normalizer` (P,) is the sum of exponentials, each less the largest logit.
    """

    def __init__(self, targets_P: torch.Tensor) -> None:
        P = len(targets_P)
        self._targets_P = targets_P
        self.largest = torch.full((P,), -torch.inf)
        self.best = torch.zeros(P, dtype=torch.long)
        self.normalizer = torch.zeros(P, dtype=torch.double)
        self._target_logit_P = torch.full((P,), torch.nan, dtype=torch.double)
        self.not_finite = self.shown = 0

    def show(self, logits_PV: torch.Tensor, begin: int) -> torch.Tensor:
        """Take the logits from `begin` on; return what earlier sums are to be multiplied by."""
        self.shown += logits_PV.numel()
        if not math.isfinite(float(logits_PV.sum())):  # counting takes longer, and is seldom needed
            self.not_finite += int((~logits_PV.isfinite()).sum())
        largest_P, best_P = logits_PV.max(-1)
        better_P = largest_P > self.largest
        self.best = torch.where(better_P, best_P + begin, self.best)
        new_P = torch.maximum(largest_P, self.largest)
        fade_P = (self.largest - new_P).double().exp()
        self.largest = new_P
        self.weights = (logits_PV - new_P[:, None]).exp()
        self.normalizer = self.normalizer * fade_P + self.weights.sum(-1, dtype=torch.double)
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
        """Return the negative log-likelihood of the targets, nan where there is none."""
        return self.log_sum - self._target_logit_P


class Divergence:
    """KL(p ‖ q) in nats at each position, as far as the logits of both were shown."""

    def __init__(self, positions: int) -> None:
        self._gap_P = torch.zeros(positions, dtype=torch.double)
        self._curve_P = torch.zeros(positions, dtype=torch.double)
        self.most = torch.zeros(positions)

    def show(
        self, p: Softmax, p_PV: torch.Tensor, q_PV: torch.Tensor, fade_P: torch.Tensor
    ) -> None:
        """Take the logits of a block, and how `p` faded when it was shown them."""
        gap_PV = p_PV - q_PV
        low_P, high_P = gap_PV.aminmax(dim=-1)
        self.most = torch.maximum(self.most, torch.maximum(-low_P, high_P))
        curve_PV = torch.expm1(-gap_PV.clamp(min=-_NEAR)).add_(gap_PV)
        for total_P, held_PV in ((self._gap_P, gap_PV), (self._curve_P, curve_PV)):
            added_P = held_PV.mul_(p.weights).sum(-1, dtype=torch.double)
            total_P.mul_(fade_P).add_(added_P)

    def kl(self, p: Softmax, q: Softmax) -> torch.Tensor:
        """Return KL(p ‖ q) from what both were shown."""
        # With d the difference of the logits: log E[exp(-d)] + E[d]. Where d is small both terms
        # are, and nearly cancel: E[exp(-d) - 1 + d] is what is left, and loses nothing.
        gap_P, curve_P = (held / p.normalizer for held in (self._gap_P, self._curve_P))
        change_P = curve_P - gap_P
        near_P = torch.log1p(change_P) - change_P + curve_P
        far_P = gap_P - p.log_sum + q.log_sum
        return torch.where(self.most < _NEAR, near_P, far_P).clamp(min=0)


@dataclass(frozen=True)
class Comparison:
    """Both models' predictions at each position (P,), and how far they are from each other."""

    published: Softmax
    rounded: Softmax
    moe: Softmax
    kl: torch.Tensor
    rounding: torch.Tensor
    conversion: torch.Tensor
    max_abs_logit_diff: float


def compare(
    published: Ending, rounded: Ending | None, moe: Ending, targets_P: torch.Tensor
) -> Comparison:
    """Compare three models; `rounded` is None where rounding changed nothing.

    `targets_P` are the tokens that really follow, -1 where none does.
    """
    P = len(targets_P)
    size = max(1, _BLOCK_LOGITS // P)
    p, r, q = (Softmax(targets_P) for _ in range(3))
    whole, rounding, conversion = (Divergence(P) for _ in range(3))
    begin = 0
    endings = [published, moe] if rounded is None else [published, moe, rounded]
    for logits in zip(*(ending.logits(size=size) for ending in endings), strict=True):
        p_PV, q_PV = logits[:2]
        fade_P = p.show(p_PV, begin)
        whole.show(p, p_PV, q_PV, fade_P)
        q.show(q_PV, begin)
        if rounded is not None:
            r_PV = logits[2]
            rounding.show(p, p_PV, r_PV, fade_P)
            conversion.show(r, r_PV, q_PV, r.show(r_PV, begin))
        begin += p_PV.shape[1]
    kl_P = whole.kl(p, q)
    if rounded is None:
        r, rounding_P, conversion_P = p, torch.zeros(P, dtype=torch.double), kl_P
    else:
        rounding_P, conversion_P = rounding.kl(p, r), conversion.kl(r, q)
    return Comparison(p, r, q, kl_P, rounding_P, conversion_P, float(whole.most.max()))
