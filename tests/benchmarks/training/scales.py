"""How large the experiment is: the dense model, the text, and the steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes are in tokens unless they say otherwise."""

    name: str
    dense: Mapping[str, Any] | None
    """The config of a dense qwen3 that is pretrained here; None for SmolLM2-135M."""
    context: int
    rows: int
    """Sequences of a step."""
    pretraining: int
    pretraining_peak: float
    """The learning rate that a cosine descends from, to a tenth."""
    continued: int
    peak: float
    """The same of what goes on: that of pretraining, where it is known."""
    held_out: int
    evaluations: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0)
    """After which shares of the steps the held-out text is looked at."""

    @property
    def step(self) -> int:
        """The tokens of a step."""
        return self.context * self.rows


SCALES: Mapping[str, Scale] = {
    scale.name: scale
    for scale in (
        Scale(
            name="tiny",
            dense={
                "vocab_size": 512,
                "hidden_size": 64,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 16,
                "max_position_embeddings": 2048,
                "tie_word_embeddings": True,
            },
            context=128,
            rows=8,
            pretraining=1_000_000,
            pretraining_peak=2e-3,
            continued=131_072,
            peak=2e-3,
            held_out=12_288,
        ),
        Scale(
            name="smollm2",
            dense=None,
            context=512,
            rows=16,
            pretraining=0,
            pretraining_peak=0.0,
            continued=1_000_000,
            peak=3e-4,
            held_out=65_536,
        ),
    )
}
