"""The files of an MoE's directory: those that belong there, and those that something else reads.

Loaders do not keep to config.json and the index: engines load every weight file that they find, an
adapter is put on top, a second tokenizer or a foreign config goes first.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.storage import (
    CARD_NAME,
    COMPANIONS,
    CONFIG_NAME,
    INDEX_NAME,
    RECORD_NAME,
    REPORT_NAME,
    WEIGHT_SUFFIXES,
    WEIGHTS_NAME,
    is_weight_file,
)
from upcycle_cli.checkpoint.unsafe_settings import unsafe_files
from upcycle_cli.core.errors import shown
from upcycle_cli.core.safe_files import CHECKSUMS_NAME, matches
from upcycle_cli.models.shipped import CODE_NAME, UPCYCLED_PREFIX
from upcycle_cli.write.staging import is_note

_OWN = (
    CONFIG_NAME,
    CARD_NAME,
    RECORD_NAME,
    REPORT_NAME,
    CHECKSUMS_NAME,
    ".gitattributes",
    ".gitignore",
)

_READ_BY: Mapping[str, str] = {
    " ".join(f"*{suffix}" for suffix in WEIGHT_SUFFIXES): (
        "is a weight file that holds no tensor of this model, and engines load what they find"
    ),
    "*.index.json *.h5 *.msgpack": (
        "is read by loaders that look for the weights of another framework or variant"
    ),
    "params.json tekken.json consolidated*": (
        "is of Mistral's own format, which vLLM and others read in place of this one"
    ),
    "hf_quant_config.json quant*_config.json quantization_config.json": (
        "says that the weights are quantised, and engines read it"
    ),
    "*processor_config.json processor*.json *.model *.tiktoken": (
        "is a processor or tokenizer, which the dense model does not have"
    ),
    "modules.json config_sentence_transformers.json sentence_*config.json": (
        "makes engines take the model for an embedding model"
    ),
    "config.*.json generation_config.*.json": (
        "is a config that transformers may read in place of the model's own"
    ),
    "*/ additional_chat_templates/*/": (
        "is a link to a directory, and what lies there is not part of the model"
    ),
}
"""Files of a directory itself, by patterns, that something reads, and what it takes them for."""


def belongs(name: str, moe: Checkpoint) -> bool:
    """Whether a file is part of an MoE: by its name, whatever it holds."""
    shards = [shard.name for shard in moe.shards]
    index = [INDEX_NAME] if shards != [WEIGHTS_NAME] else []
    if name in (*_OWN, *index, *shards) or is_note(name):
        return True
    if name == CODE_NAME:
        # Which is held to its text, letter by letter, before anything else is looked at.
        return str(moe.config.get("model_type")).startswith(UPCYCLED_PREFIX)
    odd = is_weight_file(name) or name.endswith((".py", "/"))
    return not odd and matches(name, COMPANIONS)


def foreign_files(names: Sequence[str], moe: Checkpoint) -> list[str]:
    """Return the names that are not part of an MoE."""
    return [name for name in names if not belongs(name, moe)]


def listing_failures(names: Sequence[str], moe: Checkpoint) -> Iterator[str]:
    """Name the foreign files that some loader or engine reads, or runs, and where it looks."""
    foreign = foreign_files(names, moe)
    yield from unsafe_files(foreign)
    for name in foreign:
        for patterns, effect in _READ_BY.items():
            if matches(_folded(name), patterns.split()) and name != INDEX_NAME:
                yield f"{name} {effect}"
                break
    for shard in moe.shards:
        if "/" in shard.name or not matches(shard.name, ("model*.safetensors",)):
            yield f"{shard.name} holds weights under a name that only the index knows"
        if shard.format != "pt":
            kind = shown(shard.format)
            yield f"{shard.name}: the format in its metadata is {kind}, and loaders want 'pt'"
    spelt: dict[str, str] = {}
    for name in (*_OWN, *(shard.name for shard in moe.shards), *names):
        other = spelt.setdefault(_folded(name), name)
        if other != name:
            yield f"{name} and {other} are one file where case does not count"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
