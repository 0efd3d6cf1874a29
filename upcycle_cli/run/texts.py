"""Turn texts into tokens, and tokens into rows for a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.plan.texts import Text
from upcycle_cli.run.models import (
    Config,
    TransformersError,
    load_tokenizer,
    tokenizer_files,
    transformers_errors,
)

if TYPE_CHECKING:
    import torch

ROW_TOKENS = 512
"""Tokens per row, unless the model takes fewer."""


def tokenized(
    dense: Checkpoint, texts: Sequence[Text], vocab_size: int
) -> tuple[list[list[int]], Callable[[list[int]], str], str]:
    """Return the texts as tokens, a function that decodes tokens, and why there are no tokens."""
    if not tokenizer_files(dense):
        return [], str, "the dense model has no tokenizer"
    try:
        tokenizer = load_tokenizer(dense.path)
        with transformers_errors():
            found = [_ids(tokenizer, text) for text in texts]
    except TransformersError as error:
        return [], str, f"the dense model's tokenizer cannot be used ({error})"
    usable = [ids for ids in found if ids and max(ids) < vocab_size]
    reason = "the dense model's tokenizer makes no ids, or ids beyond its vocabulary"
    return usable, lambda tokens: str(tokenizer.decode(tokens)), reason


def _ids(tokenizer: Any, text: Text) -> list[int]:  # noqa: ANN401
    if isinstance(text, str):
        return list(tokenizer(text)["input_ids"])
    if tokenizer.chat_template is None:
        text = "\n\n".join(str(message.get("content")) for message in text)
        return list(tokenizer(text)["input_ids"])
    words = tokenizer.apply_chat_template(text, tokenize=False)
    return list(tokenizer(words, add_special_tokens=False)["input_ids"])


def shares(texts: Sequence[list[int]], tokens: int) -> Iterator[list[int]]:
    """Yield a fair share of tokens of each text; long texts get what short ones leave."""
    for left, text in zip(range(len(texts), 0, -1), sorted(texts, key=len), strict=True):
        share = text[: -(-tokens // left)]
        tokens -= len(share)
        yield share


def longest_text(config: Config) -> int:
    """Return how many tokens a model of this config takes at most; bloom sets no limit."""
    found = (getattr(config, key, None) for key in ("max_position_embeddings", "max_seq_len"))
    return min(filter(None, found), default=sys.maxsize)


def as_rows(tokens: Sequence[int], config: Config) -> torch.Tensor:
    """Return tokens in rows for a model of this config, with any tokens as padding at the end."""
    import torch

    length = min(ROW_TOKENS, longest_text(config))
    padding = [tokens[0]] * (-len(tokens) % length)
    return torch.tensor([*tokens, *padding]).reshape(-1, length)
