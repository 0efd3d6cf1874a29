"""Where the files of a checkpoint are, what they are called, and what the small ones say.

Here that is a directory; hub/sources.py has a repo, of which only headers are read until more is
brought.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.safe_files import (
    MOST_COMPANION_BYTES,
    MOST_JSON_BYTES,
    is_inner_name,
    locate,
    open_regular,
    read_small,
)
from upcycle_cli.core.text import shell_line

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
RECORD_NAME = "upcycle.json"
CARD_NAME = "README.md"
REPORT_NAME = "verification.html"
"""Of the page that `upcycle verify --report` writes, when it lies beside the model."""
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
GENERATION_NAME = "generation_config.json"
ADAPTER_NAME = "adapter_config.json"
"""Of what peft saves."""
_DYNAMIC_MODULES = "transformers_modules"
"""The package of transformers' that classes of shipped code are in."""

COMPANIONS = (
    GENERATION_NAME,
    "tokenizer*.json",
    "tokenizer.model*",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "*preprocessor_config.json",  # of pictures, and of videos
    "processor_config.json",
    "additional_chat_templates/*.jinja",
    "LICEN[CS]E*",
    "NOTICE*",
    "USE_POLICY*",
)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz")
"""Files that engines take for weights, whatever their name says before that."""


@dataclass(frozen=True, slots=True)
class FileStamp:
    """A file as it was when the checkpoint was opened; `digest` is of a weight file's header."""

    name: str
    size: int
    mtime_ns: int
    digest: str | None = None
    ctime_ns: int | None = None
    """When it was last changed or put there, which nobody can set; None for what is not here."""
    format: object = None
    """What a weight file's header says of its kind: loaders want `pt`."""

    def fits(self, status: os.stat_result) -> bool:
        """Whether a file that is here is still the same, and as it was."""
        found = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        return found == (self.size, self.mtime_ns, self.ctime_ns)


@dataclass(frozen=True)
class Storage:
    """Where the files of a checkpoint are: a directory that has all of them.

    A repo's, in hub/sources.py, come into it as they are asked for. Each method raises UpcycleError
    when it cannot do what it says.
    """

    path: Path
    is_local: ClassVar[bool] = True
    """Whether nothing has to be brought."""

    def has(self, name: str) -> bool:
        """Whether there is something of this name."""
        return os.path.lexists(self.path / name)

    def matching(self, patterns: Sequence[str]) -> list[str]:
        """Return the names that match any of these patterns but for directories, sorted."""
        found = {file for pattern in patterns for file in self.path.glob(pattern)}
        return sorted(file.relative_to(self.path).as_posix() for file in found if not file.is_dir())

    def names(self) -> list[str]:
        """Return the names of all files but for what git and hf keep, sorted.

        A directory that is a link is one, with a / behind its name.
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
        """Hear whose headers will be asked for next."""

    def stamp(self, name: str) -> FileStamp:
        """Return the size of a file, and when it was changed."""
        status = locate(self.path, name).stat()
        return FileStamp(name, status.st_size, status.st_mtime_ns, ctime_ns=status.st_ctime_ns)

    def read(self, shard: str, begin: int, end: int) -> bytes:
        """Return a part of a weight file's beginning, less when the file is shorter."""
        try:
            with open_regular(locate(self.path, shard)) as file:
                file.seek(begin)
                return file.read(end - begin)
        except OSError as error:
            raise UpcycleError(f"cannot read {self.path / shard}: {error.strerror}.") from error

    def local(self, name: str) -> Path:
        """Return the path of a small file, which must not be that of another place."""
        locate(self.path, name)
        return self.path / name

    def download(self, names: Sequence[str]) -> None:
        """See that these files are here."""

    def bytes_to_download(self, names: Sequence[str]) -> int:  # noqa: ARG002 - a repo's
        """Return the size of those of these files that are not here."""
        return 0


def is_weight_file(name: str) -> bool:
    """Whether an engine that looks for weights takes a file for some."""
    return name.casefold().endswith(WEIGHT_SUFFIXES)


def companions_of(storage: Storage) -> tuple[FileStamp, ...]:
    """Return what a model is used with besides its weights; UpcycleError when it cannot be."""
    names = [name for name in storage.matching(COMPANIONS) if not is_weight_file(name)]
    for name in names:
        if not is_inner_name(name):
            hint = "Rename or remove it."
            raise UpcycleError(f"{storage.path} holds a file named {shown(name)}.", hint)
    companions = tuple(map(storage.stamp, names))
    for file in companions:
        if file.size > MOST_COMPANION_BYTES:
            raise UpcycleError(
                f"{storage.path / file.name} has {file.size:,} bytes, and no such file has more "
                f"than {MOST_COMPANION_BYTES:,}.",
                "Remove it, or put the right one there.",
            )
    return companions


def read_json(path: Path, most: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object of at most `most` bytes; raises UpcycleError when the file is not one."""
    return json_object(read_small(path, most), path)


def json_object(raw: bytes, path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds; raises UpcycleError when it is none."""
    value = parse_json(raw, str(path))
    if not isinstance(value, dict):
        raise UpcycleError(f"{path} does not hold a JSON object.")
    return value


def parse_json(raw: bytes, subject: str) -> object:
    """Parse JSON that every reader takes for the same value; UpcycleError about `subject`."""
    try:
        # Of bytes Python takes other encodings and a byte order mark, which other readers do not.
        value: object = json.loads(raw.decode(), object_pairs_hook=_without_duplicates)
        if b"\\u" in raw:  # half a character, maybe, which cannot be written again
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UpcycleError(f"{subject} is not valid JSON: {error}.") from error
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{shown(twice)} appears twice")
    return result


def find_adapter(storage: Storage) -> UpcycleError | None:
    """Return what to raise where there is an adapter, and no model; None where there is none."""
    if not storage.has(ADAPTER_NAME):
        return None
    held = read_json(storage.local(ADAPTER_NAME))
    base = held.get("base_model_name_or_path")
    base = base if isinstance(base, str) and base else "MODEL"
    return adapter(str(storage.path), base, ships_code=_ships_code(base, held.get("auto_mapping")))


def _ships_code(base: str, mapping: object) -> bool | None:
    """Whether the base of an adapter is run by code of its own; None where nothing says it."""
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    if isinstance(library, str):  # of the class that was trained; there is none for known tasks
        return library.startswith(_DYNAMIC_MODULES)
    directory = Storage(Path(base))
    if not directory.path.is_dir() or not directory.has(CONFIG_NAME):
        return None
    return "auto_map" in read_json(directory.local(CONFIG_NAME))


def adapter(place: str, base: str = "MODEL", *, ships_code: bool | None = None) -> UpcycleError:
    """Return what to raise where an adapter is given for a model, that to the model `base`."""
    model, own, merged = map(json.dumps, (base, place, f"{place}-merged"))
    trust, words = "trust_remote_code=True", "Merge it into that, and give the result"
    if ships_code:
        words += f" (this runs the code that {base} ships)"
    elif ships_code is None:
        words += f" (where the model ships code of its own, add {trust} after dtype)"
    how = f'dtype="auto", {trust}' if ships_code else 'dtype="auto"'
    code = (
        "from transformers import AutoModelForCausalLM as M; from peft import PeftModel as P; "
        f"P.from_pretrained(M.from_pretrained({model}, {how}), {own})"
        f".merge_and_unload().save_pretrained({merged})"
    )
    return UpcycleError(
        f"{place} is an adapter, and no model without the one that it was trained on.",
        f"{words}:\n  {shell_line(['python', '-c', code])}",
    )


def changed(path: Path) -> UpcycleError:
    """Return what to raise when a file is not the one that was opened."""
    return UpcycleError(
        f"{path} changed while it was being read.",
        "Run the command again once nothing writes to it.",
    )
