"""What both models are run on: texts, and tokens that nobody would write."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle_cli.errors import UpcycleError
from upcycle_cli.files import open_regular
from upcycle_cli.verification.facts import Facts
from upcycle_cli.verification.models import (
    TransformersError,
    load_config,
    load_tokenizer,
    tokenizer_files,
    transformers_says,
)

if TYPE_CHECKING:
    import torch

_ROW = 512
"""Tokens of a row, unless the model takes fewer."""
_TOKENS = 1792
"""Of text, unless more or fewer are asked for."""
_FEWEST_RANDOM = 256
_MOST_PROMPT_BYTES = 1_000_000

Text = str | list[dict[str, Any]]
"""A text, or the messages of a chat."""


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
            read_prompts(self.prompts)


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


def read_prompts(path: Path) -> list[Text]:
    """Return the texts of a file, a text or one a line as JSON; UpcycleError when it has none.

    A line of JSON Lines has a `text`, a `prompt` or the `messages` of a chat.
    """
    try:
        with open_regular(path) as file:
            data = file.read(_MOST_PROMPT_BYTES)
            whole = not file.read(1)
        text = codecs.getincrementaldecoder("utf-8")().decode(data, final=whole)
    except OSError as error:
        raise UpcycleError(f"cannot read the prompts {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UpcycleError(f"the prompts {path} are not UTF-8 text.") from error
    if path.suffix == ".jsonl":
        lines = text.splitlines() if whole else text.splitlines()[:-1]
        found = [_of_line(path, number, line) for number, line in enumerate(lines, 1) if line]
    else:
        found = [text] if text.strip() else []
    if not found:
        raise UpcycleError(f"the prompts {path} are empty.", "Give a file with some text in it.")
    return found


def _of_line(path: Path, number: int, line: str) -> Text:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UpcycleError(f"the prompts {path}: line {number} is not JSON.") from error
    held = item if isinstance(item, dict) else {}
    text = held.get("text", held.get("prompt"))
    messages = held.get("messages")
    if isinstance(text, str) and text.strip():
        return text
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        return messages
    raise UpcycleError(
        f"the prompts {path}: line {number} has neither text nor messages.",
        'A line is {"text": "…"}, {"prompt": "…"} or {"messages": [{"role": …, "content": …}]}.',
    )


def _builtin() -> list[Text]:
    texts = files("upcycle_cli.verification") / "texts"
    names = ("english", "scripts", "code", "mathematics")
    found: list[Text] = [(texts / f"{name}.txt").read_text(encoding="utf-8") for name in names]
    chats = (texts / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    return found + [json.loads(line)["messages"] for line in chats]


def make_prompt(facts: Facts, options: TextOptions) -> Prompt:
    """Return text, where there is a tokenizer for it, and random tokens of the whole vocabulary.

    Text shows little of what a model does: a router can be made to fit the built-in one alone.
    Which tokens are drawn depends on the routers, so that these cannot be made to fit them.

    Raises UpcycleError for prompts that cannot be used and a context that no row can have, and
    TransformersError for a config that cannot be read.
    """
    import torch

    config, context, prompts = load_config(facts.moe.path), options.context, options.prompts
    config = config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or _ROW
    if context is not None and context > longest:
        raise UpcycleError(
            f"a context of {context:,} tokens was asked for, and the model takes {longest:,}.",
            f"Give --context {longest} or less.",
        )
    length = context or min(_ROW, longest)
    texts, decode, reason = _tokenized(facts, prompts, config.vocab_size)
    if not texts and prompts is not None:
        raise UpcycleError(
            f"the prompts {prompts} cannot be used: {reason}.",
            "Without --prompts, random tokens are used.",
        )
    text = [token for share in _shares(texts, options.tokens or _TOKENS) for token in share]
    if context is not None and text:
        text = (text * (context // len(text) + 1))[:context]
    rows = [text[begin : begin + length] for begin in range(0, len(text), length)]
    if not rows:
        rows = [[] for _ in range(0, context or options.tokens or _ROW, length)]
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


def _tokenized(
    facts: Facts, prompts: Path | None, vocab_size: int
) -> tuple[list[list[int]], Callable[[list[int]], str], str]:
    """Return the texts as tokens, what makes text of tokens, and why there are no texts."""
    if not tokenizer_files(facts.dense):
        return [], str, "the dense model has no tokenizer"
    texts = _builtin() if prompts is None else read_prompts(prompts)
    try:
        tokenizer = load_tokenizer(facts.dense.path)
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


def _shares(texts: Sequence[list[int]], tokens: int) -> Iterator[list[int]]:
    """Yield a fair share of the tokens of each text; what short ones leave is for the others."""
    for left, text in zip(range(len(texts), 0, -1), sorted(texts, key=len), strict=True):
        share = text[: -(-tokens // left)]
        tokens -= len(share)
        yield share


def _generator(facts: Facts) -> torch.Generator:
    import torch

    digest = hashlib.sha256()
    with facts.moe.reader() as moe:
        for layer in facts.layers:
            digest.update(moe.mapped(facts.router_name(layer)))
    seed = int.from_bytes(digest.digest()[:8], "little") >> 1  # torch takes 63 bits
    return torch.Generator().manual_seed(seed)
