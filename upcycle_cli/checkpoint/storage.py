"""The files of a checkpoint: their names, how to list and read them, and how to parse JSON.

`Storage` is a local directory; hub/remote_checkpoint.py has the one for a repo on the Hub.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from upcycle_cli.core import safe_files
from upcycle_cli.core.errors import UpcycleError, shown

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
RECORD_NAME = "upcycle.json"
CARD_NAME = "README.md"
REPORT_NAME = "verification.html"
"""The page that `upcycle verify --report` writes beside the model."""
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
GENERATION_NAME = "generation_config.json"
ADAPTER_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
MERGE_WITH_PEFT = (
    "Load its base model and it with peft, merge it (merge_and_unload()), save the result "
    "(save_pretrained(DIRECTORY)) and give that directory."
)

UNREAD = (
    *("*[Ll][Ii][Cc][Ee][Nn][CcSs][Ee]*", "[Nn][Oo][Tt][Ii][Cc][Ee]*", "USE_POLICY*"),
    "*SYSTEM_PROMPT.txt",  # of Mistral's models
)
"""Companions for people: no engine reads them."""
FREE_TEXTS = (*UNREAD, "chat_template*", "additional_chat_templates/*.jinja", "vocab.txt")
"""Companions that could be anything, so that a link must not lead them out of the directory."""
COMPANIONS = (
    *(GENERATION_NAME, "tokenizer*.json", "tokenizer.model*", "*.tiktoken", "tiktoken.model"),
    *("tekken.json", "sentencepiece.bpe.model"),  # of mistral-common and xglm
    *("vocab.json", "merges.txt", "emoji.json", "added_tokens.json", "special_tokens_map.json"),
    *("*preprocessor_config.json", "processor_config.json"),  # for images and videos
    *FREE_TEXTS,
)
_KEYS = (
    "(bos|eos|pad|unk)_token(_id)?|added_tokens|emoji|model_max_length|transformers_version|vocab"
    "|(processor|tokenizer)_class|(feature_extractor|image_processor|video_processor)_type|image_mean"
)
"""Each JSON companion has one of these keys, or all its values are numbers."""
_STARTS = rb"(?s)#version|\n..?\n..?[<\[]|([A-Za-z0-9+/]+=* \d+\r?\n){100}"
"""How merges, a SentencePiece model (its first token is <unk> or the like) and tiktoken begin."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz")
"""Suffixes of files that engines load as weights, whatever their names."""


@dataclass(frozen=True, slots=True)
class FileStamp:
    """A file when the checkpoint was opened; `digest` is the SHA-256 of a weight file's header."""

    name: str
    size: int
    mtime_ns: int
    digest: str | None = None
    ctime_ns: int | None = None
    """When the file was last changed or moved, which no program can fake; None if it is remote."""
    format: object = None
    """The format in a weight file's metadata; loaders expect `pt`."""

    def fits(self, status: os.stat_result) -> bool:
        """Whether a local file has not changed since."""
        found = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        return found == (self.size, self.mtime_ns, self.ctime_ns)


@dataclass(frozen=True)
class Storage:
    """A local directory with the files of a checkpoint. Each method can raise UpcycleError."""

    path: Path
    is_local: ClassVar[bool] = True
    """Whether all files are on this machine."""
    adapter: Storage | None = field(default=None, kw_only=True)
    """Where the adapter of the model is, if it has one."""

    def has(self, name: str) -> bool:
        """Whether a file of this name exists."""
        return os.path.lexists(self.path / name)

    def matching(self, patterns: Sequence[str]) -> list[str]:
        """Return the names of files that match a pattern, sorted."""
        return [name for name in self.names() if safe_files.matches(name, patterns)]

    def names(self) -> list[str]:
        """Return the names of all files outside .git and .cache, sorted.

        A link to a directory counts as a file and ends in a slash.
        """
        found = []
        for folder, folders, files in os.walk(self.path):
            folders[:] = sorted({*folders} - {".git", ".cache"})
            here = Path(folder)
            links = [name for name in folders if (here / name).is_symlink()]
            found += [(here / name).relative_to(self.path).as_posix() for name in files]
            found += [(here / name).relative_to(self.path).as_posix() + "/" for name in links]
        return sorted(found)

    def prefetch_headers(self, shards: Sequence[str]) -> None:
        """Prepare to read the headers of these weight files."""

    def stamp(self, name: str) -> FileStamp:
        """Return a file's size and times."""
        status = self.locate(name).stat()
        return FileStamp(name, status.st_size, status.st_mtime_ns, ctime_ns=status.st_ctime_ns)

    def read(self, shard: str, begin: int, end: int) -> bytes:
        """Return some of the first bytes of a weight file, fewer when the file is shorter."""
        try:
            with safe_files.open_regular(self.locate(shard)) as file:
                file.seek(begin)
                return file.read(end - begin) or b""  # None from a file of /proc
        except OSError as error:
            raise UpcycleError(f"cannot read {self.path / shard}: {error.strerror}.") from error

    def local(self, name: str) -> Path:
        """Return the path of a small file, which `locate` has accepted."""
        self.locate(name)
        return self.path / name

    def locate(self, name: str) -> Path:
        """Return where a file really is; a link may lead anywhere, except that of a free text."""
        anywhere = not safe_files.matches(name, FREE_TEXTS)
        return safe_files.locate(self.path, name, anywhere=anywhere)

    def download(self, names: Sequence[str]) -> None:
        """Make sure that these files are on this machine."""

    def bytes_to_download(self, names: Sequence[str]) -> int:  # noqa: ARG002 - for subclasses
        """Return the total size of the files that are not on this machine."""
        return 0

    def companions(self) -> tuple[FileStamp, ...]:
        """Return the tokenizer, licence and other companions; UpcycleError if one is no file."""
        for link in [name[:-1] for name in self.names() if name.endswith("/")]:
            if safe_files.matches(link, {*COMPANIONS} - {*FREE_TEXTS}):
                self.locate(link)  # raises for a directory
        wanted = {*self.matching(COMPANIONS)} - {*self.left_out()}
        companions = tuple(self.stamp(name) for name in sorted(wanted) if not is_weight_file(name))
        for file in companions:
            if file.size > (most := safe_files.MOST_COMPANION_BYTES):
                words = f"{self.path / file.name} has {file.size:,} bytes; {most:,} are allowed."
                raise UpcycleError(words, "Remove it, or replace it by the right file.")
            if self.is_local and not self._owns(file.name):
                self.companion(file)
        return companions

    def left_out(self) -> list[str]:
        """Return the free texts that are links to another place, which are not copied."""
        return [n for n in self.matching(FREE_TEXTS) if self.is_local and not self._owns(n)]

    def companion(self, file: FileStamp) -> bytes:
        """Return the bytes of a companion; a link out of the directory must lead to one, too."""
        data, path = self.read(file.name, 0, file.size + 1), self.path / file.name
        if len(data) != file.size or self.stamp(file.name) != file:
            raise file_changed(path)
        if self._owns(file.name) or re.match(_STARTS, data):
            return data
        held = json_object(data, str(path))
        if any(re.fullmatch(_KEYS, key) for key in held):
            return data
        if all(type(each) is int for each in held.values()):
            return data
        words = f"{path} is a link to a file that does not look like {path.name}."
        raise UpcycleError(words, "Put the file itself there, if it belongs there.")

    def _owns(self, name: str) -> bool:
        return safe_files.is_inside(self.path, safe_files.locate(self.path, name, anywhere=True))


def file_changed(path: Path) -> UpcycleError:
    """Return the error for a file that changed since it was opened."""
    words = f"{path} changed while it was being read."
    return UpcycleError(words, "Run the command again once nothing writes to it.")


def is_weight_file(name: str) -> bool:
    """Whether engines load a file of this name as weights."""
    return name.casefold().endswith(WEIGHT_SUFFIXES)


def read_json(path: Path, most: int = safe_files.MOST_JSON_BYTES) -> dict[str, Any]:
    """Read a file of at most `most` bytes with a JSON object; raises UpcycleError."""
    return json_object(safe_files.read_small(path, most), str(path))


def json_object(raw: bytes, subject: str) -> dict[str, Any]:
    """Parse a JSON object that all parsers read the same way; raises UpcycleError."""
    try:
        # From bytes, Python would also accept other encodings and a byte order mark.
        value = json.loads(raw.decode(), object_pairs_hook=_without_duplicates)
        if b"\\u" in raw:  # a lone surrogate cannot be written again
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UpcycleError(f"{subject} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UpcycleError(f"{subject} is not a JSON object.")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{shown(twice)} appears twice")
    return result


def weight_map(storage: Storage) -> dict[str, str]:
    """Return the file of each tensor, from the index; empty for a single file. UpcycleError."""
    # transformers reads the single file if both exist.
    if storage.has(WEIGHTS_NAME):
        return {}
    if not storage.has(INDEX_NAME):
        words = f"{storage.path} has no {WEIGHTS_NAME} and no {INDEX_NAME}."
        hint = "Only safetensors checkpoints under these names can be read."
        raise find_others(storage) or UpcycleError(words, hint)
    index_path = storage.local(INDEX_NAME)
    listed = read_json(index_path, safe_files.MOST_LISTING_BYTES).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise UpcycleError(f"{index_path} has no weight_map.")
    for name, shard in listed.items():
        if not safe_files.is_inner_name(shard):
            words = f"{index_path} lists {name} in {shown(shard)}"
            raise UpcycleError(f"{words}, which is not a file of this directory.")
    return listed


def find_others(storage: Storage) -> UpcycleError | None:
    """Return the error for a directory with an adapter, pickles or GGUF; None for others."""
    if storage.has(ADAPTER_NAME):
        hint = f"Give it with its base model: BASE+{storage.path}"
        return UpcycleError(f"{storage.path} is an adapter, not a whole model.", hint)
    held = storage.matching(("*model*.bin", "*model*.pt", "consolidated*.pth", "*.gguf"))
    if not held:
        return None
    option = ", gguf_file='FILE'" * held[0].endswith(".gguf")
    kind = f"GGUF ({held[0]})" if option else f"pickle ({held[0]}), which can run code when opened"
    return UpcycleError(
        f"{storage.path} has its weights as {kind}.",
        'If you trust it, write safetensors and give NEW: python -c "from transformers import '
        f"AutoModelForCausalLM as M; M.from_pretrained('MODEL'{option}).save_pretrained('NEW')\" "
        "(AutoModelForImageTextToText if it takes pictures), and copy its tokenizer to NEW.",
    )


def refuse_missing(path: Path | str, hint: str | None = None) -> None:
    """Raise UpcycleError unless a path is a directory."""
    # The methods of Path raise OSError for some names.
    if os.path.isdir(path):  # noqa: PTH112
        return
    problem = "is not a directory" if os.path.exists(path) else "does not exist"  # noqa: PTH110
    if os.path.isdir(partial := f"{path}.partial"):  # noqa: PTH112
        problem += f"; {partial} holds an unfinished conversion"
        hint = "Run the same `upcycle convert` again."
    raise UpcycleError(f"{path} {problem}.", hint)
