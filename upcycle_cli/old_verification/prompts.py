"""What both models are run on: texts, and tokens that nobody would write."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.old_verification.facts import Pair
from upcycle_cli.plan.texts import builtin_texts, read_texts
from upcycle_cli.run.models import load_config
from upcycle_cli.run.texts import ROW_TOKENS, shares, tokenized

if TYPE_CHECKING:
    import torch

PROMPTS = "the prompts"
"""What messages call the file."""
_TOKENS = 1792
"""Of text, unless more or fewer are asked for."""
_FEWEST_RANDOM = 256


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which text both models are run on: the built-in one unless something else is given."""

    prompts: Path | None = None
    """A file of text, or of JSON Lines."""
    tokens: int | None = None
    """At most so many tokens of text, all texts together."""
    context: int | None = None
    """One row of just so many tokens, instead of several short ones."""

    def check(self) -> None:
        """Raise UpcycleError for what no model needs to be asked about."""
        for option, value in (("--tokens", self.tokens), ("--context", self.context)):
            if value is not None and value < 1:
                raise UpcycleError(f"{option} must be 1 or more, not {value}.")
        if self.prompts is not None:
            read_texts(self.prompts, PROMPTS)


@dataclass(frozen=True)
class Prompt:
    """Rows of tokens, each text and then tokens that nobody would write; and words on them."""

    ids: torch.Tensor
    """(B, S)"""
    words: tuple[list[str], ...]
    """The tokens of each row that are text, as a person reads them; its beginning."""
    origin: str
    decode: Callable[[list[int]], str]
    """Makes text of tokens."""

    @cached_property
    def targets(self) -> torch.Tensor:
        """The token of the text that follows each position (B·S,), -1 where none does."""
        targets_BS = self.ids * 0 - 1
        for row, words in enumerate(self.words):
            targets_BS[row, : max(0, len(words) - 1)] = self.ids[row, 1 : len(words)]
        return targets_BS.flatten()


def make_prompt(facts: Pair, options: TextOptions) -> Prompt:
    """Return text, where there is a tokenizer for it, and random tokens of the whole vocabulary.

    Text shows little of what a model does: a router can be made to fit the built-in one alone.
    Which tokens are drawn depends on the routers, so that these cannot be made to fit them. Raises
    UpcycleError for prompts and contexts that cannot be used, TransformersError for a config.
    """
    import torch

    config, context, prompts = load_config(facts.moe.path), options.context, options.prompts
    config = config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or ROW_TOKENS
    if context is not None and context > longest:
        raise UpcycleError(
            f"a context of {context:,} tokens was asked for, and the model takes {longest:,}.",
            f"Give --context {longest} or less.",
        )
    length = context or min(ROW_TOKENS, longest)
    given = builtin_texts() if prompts is None else read_texts(prompts, PROMPTS)
    texts, decode, reason = tokenized(facts.dense, given, config.vocab_size)
    if not texts and prompts is not None:
        raise UpcycleError(
            f"the prompts {prompts} cannot be used: {reason}.",
            "Without --prompts, random tokens are used.",
        )
    text = [token for share in shares(texts, options.tokens or _TOKENS) for token in share]
    if context is not None and text:
        text = (text * (context // len(text) + 1))[:context]
    rows = [text[begin : begin + length] for begin in range(0, len(text), length)]
    if not rows:
        rows = [[] for _ in range(0, context or options.tokens or ROW_TOKENS, length)]
    generator = _generator(facts)
    if context is None and len(rows) * length - len(text) < min(_FEWEST_RANDOM, length):
        rows.append([])
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


def _generator(facts: Pair) -> torch.Generator:
    import torch

    digest = hashlib.sha256()
    with facts.moe.reader() as moe:
        for layer in facts.layers:
            digest.update(moe.mapped(facts.router_name(layer)))
    seed = int.from_bytes(digest.digest()[:8], "little") >> 1  # torch takes 63 bits
    return torch.Generator().manual_seed(seed)
