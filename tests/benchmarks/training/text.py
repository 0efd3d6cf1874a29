"""Public text that a Debian package installs, as tokens: some to train on, some held out.

    apt-get install python3-doc

The sources of Python's documentation: English with code, 11 MB in 500 files, under the licence of
the PSF. A file is held out as a whole, or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "python3-doc"
PLACES, FILES = "python3.[0-9]*/html/_sources", "*.rst.txt"
HELD_OUT = 20  # one file of so many
END = "<|endoftext|>"
_CALIBRATION_BYTES = 40_000

Tokens = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Text:
    """The files' text, in an order that has nothing to do with what they are about."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def calibration(self) -> str:
        """What routers are fitted to: some of what is trained on."""
        return "\n\n".join(self.training)[-_CALIBRATION_BYTES:]

    def facts(self) -> Mapping[str, Any]:
        """Return what identifies it."""
        digest = hashlib.sha256("\0".join((*self.training, *self.held_out)).encode())
        return {
            "package": PACKAGE,
            "files": len(self.training) + len(self.held_out),
            "held_out_files": len(self.held_out),
            "bytes": sum(len(text.encode()) for text in (*self.training, *self.held_out)),
            "sha256": digest.hexdigest(),
        }


def read_text(folder: Path | None = None) -> Text:
    """Read the package's files, or those of a folder; SystemExit when there are none."""
    folders = [folder] if folder else sorted(Path("/usr/share/doc").glob(PLACES))
    # One version of Python may be there under several names.
    files = sorted(folders[0].rglob(FILES)) if folders else []
    if not files:
        raise SystemExit(f"There is no text. Run: apt-get install {PACKAGE}")
    texts = {file.relative_to(folders[0]).as_posix(): file for file in files}
    names = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
    read = [texts[name].read_text(encoding="utf-8") for name in names]
    return Text(
        training=tuple(text for i, text in enumerate(read) if i % HELD_OUT),
        held_out=tuple(text for i, text in enumerate(read) if not i % HELD_OUT),
    )


def train_tokenizer(text: Text, vocabulary: int) -> Any:  # noqa: ANN401 - transformers has no types
    """Return a byte-level BPE of the training text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        text.training,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def tokens_of(tokenizer: Any, texts: tuple[str, ...]) -> Tokens:  # noqa: ANN401
    """Return the tokens of texts, each with an end."""
    backend = tokenizer.backend_tokenizer
    encoded = backend.encode_batch(list(texts), add_special_tokens=False)
    return np.concatenate([np.array([*each.ids, tokenizer.eos_token_id]) for each in encoded])


def rows_of(tokens: Tokens, context: int, *, seed: int, count: int) -> Tokens:
    """Return `count` rows of `context` tokens (count, context) in an order drawn from the seed."""
    whole = tokens[: len(tokens) // context * context].reshape(-1, context)
    if count > len(whole):
        raise SystemExit(f"The text has {len(whole)} rows of {context} tokens, not {count}.")
    return whole[np.random.default_rng(seed).permutation(len(whole))[:count]]
