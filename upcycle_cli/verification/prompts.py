"""What both models are run on: text, and tokens that nobody would write."""

from __future__ import annotations

import codecs
import hashlib
import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle_cli.errors import UpcycleError
from upcycle_cli.files import open_regular
from upcycle_cli.verification.facts import Facts
from upcycle_cli.verification.models import (
    MOST_TOKENS,
    Config,
    TransformersError,
    load_tokenizer,
    tokenizer_files,
    transformers_says,
)

if TYPE_CHECKING:
    import torch

_FEWEST_TOKENS = 512
_RANDOM_TOKENS = 256
_MOST_PROMPT_BYTES = 1_000_000


@dataclass(frozen=True)
class Prompt:
    """Token ids of shape (1, S), and where they come from, for a person."""

    ids: torch.Tensor
    origin: str
    text_tokens: int
    """The first so many are text; others follow, which nobody would write."""


def read_prompts(path: Path) -> str:
    """Return the beginning of a prompts file; raises UpcycleError when it has no text in it."""
    try:
        with open_regular(path) as file:
            data = file.read(_MOST_PROMPT_BYTES)
            whole = not file.read(1)
        text = codecs.getincrementaldecoder("utf-8")().decode(data, final=whole)
    except OSError as error:
        raise UpcycleError(f"cannot read the prompts {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UpcycleError(f"the prompts {path} are not UTF-8 text.") from error
    if not text.strip():
        raise UpcycleError(f"the prompts {path} are empty.", "Give a file with some text in it.")
    return text


def make_prompt(facts: Facts, config: Config, prompts: Path | None) -> Prompt:
    """Return text, where there is a tokenizer for it, and random tokens of the whole vocabulary.

    Text shows little of what a model does: a router can be made to fit the built-in one alone.
    Which tokens are drawn depends on the routers, so that these cannot be made to fit them.
    """
    import torch

    longest = min(MOST_TOKENS, getattr(config, "max_position_embeddings", None) or MOST_TOKENS)
    vocab_size: int = config.vocab_size
    reason = "the dense model has no tokenizer"
    text: list[int] = []
    if tokenizer_files(facts.dense):
        builtin = files("upcycle_cli.verification") / "prompts.txt"
        words = builtin.read_text(encoding="utf-8") if prompts is None else read_prompts(prompts)
        try:
            tokenizer = load_tokenizer(facts.dense.path)
            with transformers_says():
                text = list(tokenizer(words)["input_ids"])
        except TransformersError as error:
            reason = f"the dense model's tokenizer cannot be used ({error})"
        else:
            reason = "the dense model's tokenizer makes no ids, or some beyond its vocabulary"
            text = text if text and max(text) < vocab_size else []
    if not text and prompts is not None:
        raise UpcycleError(
            f"the prompts {prompts} cannot be used: {reason}.",
            "Without --prompts, random tokens are used.",
        )
    count = min(_RANDOM_TOKENS, max(1, longest // 4)) if text else min(_FEWEST_TOKENS, longest)
    drawn = torch.randint(vocab_size, (count,), generator=_generator(facts)).tolist()
    if not text:
        origin = f"{count} random tokens, since {reason}"
        return Prompt(torch.tensor([drawn]), origin, text_tokens=count)
    repeats = math.ceil(_FEWEST_TOKENS / len(text))
    text = (text * repeats)[: longest - count]
    source = "built-in English text" if prompts is None else f"the text of {prompts.name}"
    again = ", repeated" if repeats > 1 else ""
    origin = f"{len(text)} tokens of {source}{again}, and {count} random ones"
    return Prompt(torch.tensor([text + drawn]), origin, text_tokens=len(text))


def _generator(facts: Facts) -> torch.Generator:
    import torch

    digest = hashlib.sha256()
    with facts.moe.reader() as moe:
        for layer in facts.layers:
            digest.update(moe.mapped(facts.router_name(layer)))
    seed = int.from_bytes(digest.digest()[:8], "little") >> 1  # torch takes 63 bits
    return torch.Generator().manual_seed(seed)
