"""The tokens that both models run on: text and random tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.plan.texts import builtin_texts, read_texts
from upcycle_cli.run.models import load_config
from upcycle_cli.run.texts import ROW_TOKENS, longest_text, shares, tokenized
from upcycle_cli.verification.result import TEXT_TOKENS

if TYPE_CHECKING:
    import torch

    from upcycle_cli.checkpoint.checkpoint import Checkpoint

PROMPTS = "the prompts"
"""How messages call the file of prompts."""
_FEWEST_RANDOM = 256
_MAX_PIECES = 8
"""Tokens that can share one character; a character of UTF-8 has 4 bytes."""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """The text that both models run on: the built-in one, unless `prompts` names a file."""

    prompts: Path | None = None
    """A file of text or JSON Lines."""
    tokens: int = TEXT_TOKENS
    """The largest number of tokens of text."""
    context: int | None = None
    """Use one row of text of this length instead of several short rows."""

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
    """The text at the beginning of each row, token by token; see `_pieces`."""
    origin: str
    """How many tokens come from where, for messages."""

    @cached_property
    def targets(self) -> torch.Tensor:
        """The next token of the text at each position (B·S,); -1 where the text ends."""
        targets_BS = self.ids * 0 - 1
        for row, words in enumerate(self.words):
            targets_BS[row, : max(0, len(words) - 1)] = self.ids[row, 1 : len(words)]
        return targets_BS.flatten()


def make_prompt(dense: Checkpoint, options: TextOptions, seed_bytes: bytes) -> Prompt:
    """Return rows of text, if the dense model has a tokenizer, and of random tokens.

    Text alone is not enough: someone could fit a router to it. `seed_bytes` seed the random tokens;
    take them from the routers, so that no router can be fitted to these tokens either. Raises
    UpcycleError for unusable prompts and contexts, TransformersError for a damaged config.
    """
    import torch

    config = load_config(dense.path).get_text_config()
    context, prompts = options.context, options.prompts
    longest = longest_text(config)
    if context is not None and context > longest:
        problem = f"a context of {context:,} tokens was asked for, and the model takes {longest:,}."
        raise UpcycleError(problem, f"Use a `context` of at most {longest}.")
    length = context or min(ROW_TOKENS, longest)
    given = builtin_texts() if prompts is None else read_texts(prompts, PROMPTS)
    texts, decode, reason = tokenized(dense, given, config.vocab_size)
    if not texts and prompts is not None:
        problem = f"the prompts {prompts} cannot be used: {reason}."
        raise UpcycleError(problem, "Without `prompts`, random tokens are used.")
    text = [token for share in shares(texts, options.tokens) for token in share]
    if context is not None and text:
        text = (text * (context // len(text) + 1))[:context]
    rows = [text[begin : begin + length] for begin in range(0, len(text), length)]
    if not rows:
        rows = [[] for _ in range(max(1, (context or options.tokens) // length))]
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
    words = tuple([*_pieces(decode, row)] for row in rows)
    return Prompt(torch.tensor(filled), words, origin)


def _pieces(decode: Callable[[list[int]], str], tokens: Sequence[int]) -> Iterator[str]:
    """Yield the text that each token adds.

    A character can consist of several tokens: the last one yields it, the others nothing. Each
    token is decoded behind the one before it, since some tokenizers drop a space at the beginning.
    """
    before, held = list[int](), list[int]()
    for token in tokens:
        held.append(token)
        text = decode(before + held)
        if text.endswith("\ufffd") and len(held) < _MAX_PIECES:
            yield ""
            continue
        yield text[len(decode(before)) :]
        before, held = held, []
