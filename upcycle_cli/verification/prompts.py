"""The tokens that both models are run on: text, and tokens drawn at random."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.plan.texts import builtin_texts, read_texts
from upcycle_cli.run.models import load_config
from upcycle_cli.run.texts import ROW_TOKENS, shares, tokenized

if TYPE_CHECKING:
    import torch

    from upcycle_cli.checkpoint.checkpoint import Checkpoint

PROMPTS = "the prompts"
"""What messages call the file of --prompts."""
_TOKENS = 768
"""Tokens of text by default."""
_FEWEST_RANDOM = 256


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which text both models are run on: the built-in one unless `prompts` names a file."""

    prompts: Path | None = None
    """A file of text, or of JSON Lines."""
    tokens: int | None = None
    """The number of tokens of text, at most, over all texts."""
    context: int | None = None
    """The length of one row of text, instead of several short rows."""
    continuation: bool = False
    """Whether to show how each model continues the text, for a report."""

    def check(self) -> None:
        """Raise UpcycleError for numbers below 1, and for prompts that cannot be read."""
        for option, value in (("tokens", self.tokens), ("context", self.context)):
            if value is not None and value < 1:
                raise UpcycleError(f"`{option}` must be 1 or more, not {value}.")
        if self.prompts is not None:
            read_texts(self.prompts, PROMPTS)


@dataclass(frozen=True)
class Prompt:
    """Rows of tokens: each begins with text and is filled up with random tokens."""

    ids: torch.Tensor
    """(B, S)"""
    words: tuple[list[str], ...]
    """The text at the beginning of each row, token by token."""
    origin: str
    """How many tokens come from where, in words."""
    decode: Callable[[list[int]], str]

    @cached_property
    def targets(self) -> torch.Tensor:
        """The next token of the text at each position (B·S,), -1 at its end."""
        targets_BS = self.ids * 0 - 1
        for row, words in enumerate(self.words):
            targets_BS[row, : max(0, len(words) - 1)] = self.ids[row, 1 : len(words)]
        return targets_BS.flatten()


def make_prompt(dense: Checkpoint, options: TextOptions, seed_bytes: bytes) -> Prompt:
    """Return text, if the dense model has a tokenizer, and random tokens of the whole vocabulary.

    Text alone is not enough: a router can be made to fit it. `seed_bytes` seed the random tokens;
    they should depend on the routers, so that no router can be made to fit those either. Raises
    UpcycleError for prompts and contexts that cannot be used, TransformersError for a config.
    """
    import torch

    config = load_config(dense.path).get_text_config()
    context, prompts = options.context, options.prompts
    longest = getattr(config, "max_position_embeddings", None) or ROW_TOKENS
    if context is not None and context > longest:
        raise UpcycleError(
            f"a context of {context:,} tokens was asked for, and the model takes {longest:,}.",
            f"Use a `context` of at most {longest}.",
        )
    length = context or min(ROW_TOKENS, longest)
    given = builtin_texts() if prompts is None else read_texts(prompts, PROMPTS)
    texts, decode, reason = tokenized(dense, given, config.vocab_size)
    if not texts and prompts is not None:
        raise UpcycleError(
            f"the prompts {prompts} cannot be used: {reason}.",
            "Without `prompts`, random tokens are used.",
        )
    text = [token for share in shares(texts, options.tokens or _TOKENS) for token in share]
    if context is not None and text:
        text = (text * (context // len(text) + 1))[:context]
    rows = [text[begin : begin + length] for begin in range(0, len(text), length)]
    if not rows:
        rows = [[] for _ in range(0, context or options.tokens or ROW_TOKENS, length)]
    if context is None and len(rows) * length - len(text) < min(_FEWEST_RANDOM, length):
        rows.append([])
    seed = int.from_bytes(hashlib.sha256(seed_bytes).digest()[:8], "little") >> 1  # torch takes 63
    generator = torch.Generator().manual_seed(seed)
    filled = [
        row + torch.randint(config.vocab_size, (length - len(row),), generator=generator).tolist()
        for row in rows
    ]
    drawn = len(rows) * length - len(text)
    source = "built-in text" if prompts is None else f"the text of {prompts.name}"
    origin = f"{len(text):,} tokens of {source} and {drawn:,} random ones"
    if not texts:
        origin = f"{drawn:,} random tokens, since {reason}"
    if context is not None:
        origin += f", in a context of {context:,}"
    words = tuple([decode([token]) for token in row] for row in rows)
    return Prompt(torch.tensor(filled), words, origin, decode)
