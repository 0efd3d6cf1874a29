"""Compare what two models answered in the same engine: log-probabilities and greedy text.

tests/interoperability does it, too. Differences are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import fmean
from typing import Any

Output = Mapping[str, Any]
"""What run/engine_runner.py answers: texts, margins and logprobs, each by row."""

ROUNDING = 1e-3
"""How far log-probabilities may differ by rounding in float32."""
HESITATION = 0.1
"""A hundred times the router's logits: how far softmax-topk may move log-probabilities."""
LOW_PRECISION = 0.25
"""How far bfloat16 may move log-probabilities on average; single ones move by four times that."""
_ENOUGH_TOKENS = 24


@dataclass(frozen=True)
class Agreement:
    """How far two outputs agree."""

    difference: str
    """What differs; empty if they are the same."""
    mean: float
    """The mean difference of log-probabilities; nan if the engine gives none."""
    largest: float
    text_tokens: int
    """How many greedy tokens are the same before the texts part."""


def compare(
    found: Output, expected: Output, tolerance: float = ROUNDING, *, on_average: bool = False
) -> Agreement:
    """Compare an output with the dense model's.

    Each log-probability may differ by `tolerance`, or those of a row `on_average`. Texts may part
    where the dense model prefers its token by less than the tolerance, and in low precision by less
    than four times that.
    """
    low_precision = tolerance >= LOW_PRECISION
    hesitation = 4 * tolerance if low_precision else tolerance
    differences: list[str] = []
    rows = [
        [abs(p - q) for p, q in zip(*pair, strict=True)]
        for pair in zip(found["logprobs"] or (), expected["logprobs"] or (), strict=False)
    ]
    for index, row in enumerate(rows):
        off, words = (fmean(row), " on average") if on_average else (_largest(row), "")
        if not off <= tolerance:
            differences.append(f"log-probabilities of row {index} differ by {off:.2g}{words}")
    texts = [*zip(found["texts"], expected["texts"], strict=False)]
    same = 0
    for index, (mine, wanted) in enumerate(texts):
        pairs = enumerate(zip_longest(mine, wanted))
        place = next((place for place, (a, b) in pairs if a != b), len(wanted))
        same += place
        hesitates = len(mine) == len(wanted) and place < len(wanted)
        hesitates = hesitates and expected["margins"][index][place] <= hesitation
        if mine != wanted and not hesitates:
            differences.append(f"the text after row {index} differs from token {place} on")
    total = sum(len(wanted) for _, wanted in texts)
    if same < min(_ENOUGH_TOKENS, total) and not low_precision:
        differences.append(f"only {same} of {total} tokens of text are the same")
    if not rows and not texts:
        differences.append("there is nothing to compare")
    every = [each for row in rows for each in row] or [math.nan]
    return Agreement("".join(differences[:1]), fmean(every), _largest(every), same)


def _largest(row: Sequence[float]) -> float:
    return max(row, key=lambda value: math.inf if math.isnan(value) else value)
