"""Texts to run a model on, as files hold them and as its tokenizer sees them."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.safe_files import open_regular
from upcycle_cli.run.models import (
    Config,
    TransformersError,
    load_tokenizer,
    tokenizer_files,
    transformers_says,
)

if TYPE_CHECKING:
    import torch

ROW_TOKENS = 512
"""Of a row, unless the model takes fewer."""
_MOST_BYTES = 1_000_000

Text = str | list[dict[str, Any]]
"""A text, or the messages of a chat."""


def read_texts(path: Path, what: str) -> list[Text]:
    """Return the texts of a file, a text or one a line as JSON; UpcycleError when it has none.

    A line of JSON Lines has a `text`, a `prompt` or the `messages` of a chat. Errors call the file
    by `what` it is, such as "the prompts". Of a large file only the beginning is read.
    """
    try:
        with open_regular(path) as file:
            data = file.read(_MOST_BYTES)
            whole = not file.read(1)
        text = codecs.getincrementaldecoder("utf-8")().decode(data, final=whole)
    except OSError as error:
        raise UpcycleError(f"cannot read {what} {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UpcycleError(f"{what} {path}: it is not UTF-8 text.") from error
    if path.suffix == ".jsonl":
        lines = text.splitlines() if whole else text.splitlines()[:-1]
        found = [
            _of_line(f"{what} {path}", number, line) for number, line in enumerate(lines, 1) if line
        ]
    else:
        found = [text] if text.strip() else []
    if not found:
        raise UpcycleError(f"{what} {path}: there is no text in it.", "Give a file with some.")
    return found


def _of_line(where: str, number: int, line: str) -> Text:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UpcycleError(f"{where}: line {number} is not JSON.") from error
    held = item if isinstance(item, dict) else {}
    text = held.get("text", held.get("prompt"))
    messages = held.get("messages")
    if isinstance(text, str) and text.strip():
        return text
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        return messages
    raise UpcycleError(
        f"{where}: line {number} has neither text nor messages.",
        'A line is {"text": "…"}, {"prompt": "…"} or {"messages": [{"role": …, "content": …}]}.',
    )


def builtin_texts() -> list[Text]:
    """Return English, other scripts, code, mathematics and two chats."""
    texts = files("upcycle_cli.run") / "texts"
    names = ("english", "scripts", "code", "mathematics")
    found: list[Text] = [(texts / f"{name}.txt").read_text(encoding="utf-8") for name in names]
    chats = (texts / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    return found + [json.loads(line)["messages"] for line in chats]


def tokenized(
    dense: Checkpoint, texts: Sequence[Text], vocab_size: int
) -> tuple[list[list[int]], Callable[[list[int]], str], str]:
    """Return the texts as tokens, what makes text of tokens, and why there are no tokens."""
    if not tokenizer_files(dense):
        return [], str, "the dense model has no tokenizer"
    try:
        tokenizer = load_tokenizer(dense.path)
        with transformers_says():
            found = [_ids(tokenizer, text) for text in texts]
    except TransformersError as error:
        return [], str, f"the dense model's tokenizer cannot be used ({error})"
    usable = [ids for ids in found if ids and max(ids) < vocab_size]
    reason = "the dense model's tokenizer makes no ids, or some beyond its vocabulary"
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
    """Yield a fair share of the tokens of each text; what short ones leave is for the others."""
    for left, text in zip(range(len(texts), 0, -1), sorted(texts, key=len), strict=True):
        share = text[: -(-tokens // left)]
        tokens -= len(share)
        yield share


def as_rows(tokens: Sequence[int], config: Config) -> torch.Tensor:
    """Return tokens in rows that a model of this config takes; padding, any tokens, comes last."""
    import torch

    longest = getattr(config, "max_position_embeddings", None) or ROW_TOKENS
    length = min(ROW_TOKENS, longest)
    padding = [tokens[0]] * (-len(tokens) % length)
    return torch.tensor([*tokens, *padding]).reshape(-1, length)
