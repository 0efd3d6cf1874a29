"""A Hugging Face checkpoint: its config, its tensors' headers, and their values on demand.

Opening reads `config.json`, the index and the safetensors headers, and checks them against the
file sizes; no weight is touched. `Checkpoint.reader` maps the files and hands out tensors that
alias them. Where the files are is the storage's business: a directory, or (hub/sources.py)
a repo of which only headers are read until `Checkpoint.bring` is called. No policy lives here: what
a model may contain is the families' business.

Format: 8-byte little-endian header length, JSON header, data; offsets are relative to the data,
and the tensors lie end to end without holes.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from upcycle_cli.errors import UpcycleError, shown
from upcycle_cli.files import (
    MOST_COMPANION_BYTES,
    MOST_JSON_BYTES,
    MOST_LISTING_BYTES,
    is_inner_name,
    locate,
    open_regular,
    read_small,
)
from upcycle_cli.printable import printable, shell_line

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
"""Bytes per element of each safetensors dtype."""

TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The dtypes that a convertible weight can have, and torch's names for them."""

LARGEST = {"F32": 3.4e38, "BF16": 3.4e38, "F16": 65504.0}
"""The largest finite value of each of them."""

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
RECORD_NAME = "upcycle.json"
CARD_NAME = "README.md"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
GENERATION_NAME = "generation_config.json"

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
    "additional_chat_templates/*.jinja",
    "LICEN[CS]E*",
    "NOTICE*",
    "USE_POLICY*",
)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz")
"""Files that engines take for weights, whatever their name says before that."""

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_MAX_DIMENSIONS = 64  # torch's own limit
_MAX_SIZE = 2**63 - 1


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `offset` is in bytes from the start of the file `shard`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    offset: int

    @property
    def num_elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self.num_elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class FileStamp:
    """A file as it was when the checkpoint was opened: enough to tell whether it changed since.

    `digest` is the SHA-256 of a weight file's header; other files have none.
    """

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
        return (status.st_size, status.st_mtime_ns, status.st_ctime_ns) == (
            self.size,
            self.mtime_ns,
            self.ctime_ns,
        )


class Storage(Protocol):
    """Where the files of a checkpoint are. Each method raises UpcycleError when it cannot."""

    @property
    def path(self) -> Path:
        """The directory in which the files are, or will be."""

    def has(self, name: str) -> bool:
        """Whether there is something of this name."""

    def matching(self, patterns: Sequence[str]) -> list[str]:
        """Return the names that match any of these patterns but for directories, sorted."""

    def names(self) -> list[str]:
        """Return the names of all files, whatever they are, sorted.

        A directory that is a link is not looked into; its name ends in a slash.
        """

    def prepare(self, shards: Sequence[str]) -> None:
        """Hear whose headers will be asked for next."""

    def stamp(self, name: str) -> FileStamp:
        """Return the size of a file, and when it was changed."""

    def read(self, shard: str, begin: int, end: int) -> bytes:
        """Return a part of a weight file's beginning, less when the file is shorter."""

    def local(self, name: str) -> Path:
        """Return the path of a small file, brought here if need be."""

    def bring(self, names: Sequence[str]) -> None:
        """See that these files are here."""

    def missing_bytes(self, names: Sequence[str]) -> int:
        """Return the size of those of these files that are not here."""


@dataclass(frozen=True)
class Directory:
    """A checkpoint's files in a directory, all of them."""

    path: Path

    def has(self, name: str) -> bool:
        """Whether there is something of this name."""
        return os.path.lexists(self.path / name)

    def matching(self, patterns: Sequence[str]) -> list[str]:
        """Return the names that match any of these patterns but for directories, sorted."""
        found = {file for pattern in patterns for file in self.path.glob(pattern)}
        return sorted(file.relative_to(self.path).as_posix() for file in found if not file.is_dir())

    def names(self) -> list[str]:
        """Return the names of all files, links among them, but for what git and hf keep."""
        found = []
        for folder, folders, files in os.walk(self.path):
            folders[:] = sorted({*folders} - {".git", ".cache"})
            here = Path(folder)
            links = [name for name in folders if (here / name).is_symlink()]
            found += [(here / name).relative_to(self.path).as_posix() for name in files]
            found += [(here / name).relative_to(self.path).as_posix() + "/" for name in links]
        return sorted(found)

    def prepare(self, shards: Sequence[str]) -> None:
        """Nothing is to be prepared."""

    def stamp(self, name: str) -> FileStamp:
        """Return the size of a file, and when it was changed; UpcycleError when it is missing."""
        status = locate(self.path, name).stat()
        return FileStamp(name, status.st_size, status.st_mtime_ns, ctime_ns=status.st_ctime_ns)

    def read(self, shard: str, begin: int, end: int) -> bytes:
        """Return a part of a file; UpcycleError when it cannot be read."""
        try:
            with open_regular(locate(self.path, shard)) as file:
                file.seek(begin)
                return file.read(end - begin)
        except OSError as error:
            raise UpcycleError(f"cannot read {self.path / shard}: {error.strerror}.") from error

    def local(self, name: str) -> Path:
        """Return the path of a file; UpcycleError when it is none, or that of another place."""
        locate(self.path, name)
        return self.path / name

    def bring(self, names: Sequence[str]) -> None:
        """All files are here."""

    def missing_bytes(self, names: Sequence[str]) -> int:  # noqa: ARG002 - a Storage
        """Return 0: all files are here."""
        return 0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers have been read and found consistent."""

    storage: Storage
    config: Mapping[str, Any]
    config_digest: str
    tensors: Mapping[str, TensorEntry]
    shards: tuple[FileStamp, ...]
    companions: tuple[FileStamp, ...]
    """Tokenizer, chat template, generation config and licence files."""

    @property
    def path(self) -> Path:
        """The directory in which the files are, or will be."""
        return self.storage.path

    @property
    def name(self) -> str:
        """The repo id when the directory is a snapshot in the Hub cache, else its own name."""
        # It ends up in the record and the card, which hold no half of a character.
        return self.repo or printable(self.path.resolve().name)

    @property
    def revision(self) -> str | None:
        """The commit when the directory is a snapshot in the Hub cache."""
        return None if self.repo is None else self.path.resolve().name

    @property
    def repo(self) -> str | None:
        """The repo id when the directory is a snapshot in the Hub cache."""
        # The cache keeps a repo as models--ORG--NAME/snapshots/COMMIT.
        resolved = self.path.resolve()
        folder = resolved.parent.parent.name
        if resolved.parent.name != "snapshots" or not folder.startswith("models--"):
            return None
        if not all(re.fullmatch(r"[\w.-]+", name, re.ASCII) for name in (folder, resolved.name)):
            return None
        return folder.removeprefix("models--").replace("--", "/")

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def num_parameters(self) -> int:
        """The elements of all tensors."""
        return sum(entry.num_elements for entry in self.tensors.values())

    @property
    def files(self) -> list[str]:
        """The names of the files that were read, or will be."""
        return [CONFIG_NAME, *(file.name for file in self.shards + self.companions)]

    def tensor_digest(self, name: str) -> str:
        """Return the SHA-256 of a tensor's bytes; OSError or UpcycleError when unreadable."""
        entry = self.tensors[name]
        with open_regular(self.storage.local(entry.shard)) as file:
            file.seek(entry.offset)
            return hashlib.sha256(file.read(entry.nbytes)).hexdigest()

    def tokenizer_config(self) -> dict[str, Any]:
        """Return what tokenizer_config.json says, nothing when there is none; UpcycleError."""
        if not self.storage.has(TOKENIZER_CONFIG_NAME):
            return {}
        return read_json(self.storage.local(TOKENIZER_CONFIG_NAME))

    @property
    def missing_bytes(self) -> int:
        """The size of the files that are still to be brought here."""
        return self.storage.missing_bytes(self.files)

    def bring(self) -> Checkpoint:
        """Return the same checkpoint with all its files here.

        Raises UpcycleError when they cannot be brought, or are not those whose headers were read.
        """
        if isinstance(self.storage, Directory):
            return self
        self.storage.bring([*self.files, *self.storage.matching([CARD_NAME])])
        here = open_checkpoint(self.path)
        if here.tensors != self.tensors or here.config_digest != self.config_digest:
            raise UpcycleError(f"{self.path} is not what was announced.", "Run the command again.")
        return here

    def check_unchanged(self) -> None:
        """Raise UpcycleError when a file is not the one that was opened."""
        self.check_files(self.shards + self.companions)
        config = read_small(self.storage.local(CONFIG_NAME), MOST_JSON_BYTES)
        if hashlib.sha256(config).hexdigest() != self.config_digest:
            raise _changed(self.path / CONFIG_NAME)

    def check_files(self, files: Iterable[FileStamp]) -> None:
        """Raise UpcycleError when one of these files is not the one that was opened."""
        for file in files:
            if not file.fits(locate(self.path, file.name).stat()):
                raise _changed(self.path / file.name)

    def check_readable(self) -> None:
        """Raise UpcycleError when a file that is here may not be read."""
        for file in self.companions:
            path = self.path / file.name
            if not path.exists():
                continue  # still on the Hub
            try:
                open_regular(locate(self.path, file.name)).close()
            except OSError as error:
                raise UpcycleError(f"cannot read {path}: {error.strerror}.") from error

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """Map the weight files as they are asked for; let go of them when the context ends."""
        reader = Reader(self)
        try:
            yield reader
        finally:
            # A map goes once no tensor aliases it; closing it by force would crash a reader.
            reader.release()


class Reader:
    """Hands out tensors that alias the mapped files; made by `Checkpoint.reader`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._maps: dict[str, mmap.mmap] = {}

    def release(self) -> None:
        """Let go of the maps."""
        self._maps.clear()

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Raise UpcycleError when the file of one of these tensors is not the one that was opened.

        A map shows what was written to its file since.
        """
        shards = {self._checkpoint.tensors[name].shard for name in names}
        self._checkpoint.check_files(
            file for file in self._checkpoint.shards if file.name in shards
        )

    def mapped(self, name: str) -> memoryview:
        """Return a tensor's bytes, backed by the file: nothing is read until its pages are.

        They must not be written to, nor used after the reader is closed. Raises UpcycleError for a
        dtype that no model is trained in.
        """
        entry = self._entry(name)
        return memoryview(self._map(entry.shard))[entry.offset : entry.offset + entry.nbytes]

    def tensor(self, name: str) -> torch.Tensor:
        """Return `mapped` as a tensor."""
        import torch

        entry = self._entry(name)
        dtype = getattr(torch, TORCH_DTYPES[entry.dtype])
        if entry.num_elements == 0:
            return torch.empty(entry.shape, dtype=dtype)
        data: memoryview | bytearray = self.mapped(name)
        if entry.offset % ITEM_BYTES[entry.dtype]:
            # The format does not promise alignment, and torch needs it.
            data = bytearray(data)
        return torch.frombuffer(data, dtype=dtype).reshape(entry.shape)

    def _entry(self, name: str) -> TensorEntry:
        entry = self._checkpoint.tensors[name]
        if entry.dtype not in TORCH_DTYPES:
            raise UpcycleError(
                f"{self._checkpoint.path}: {name} is stored as {entry.dtype}.",
                f"Only {', '.join(TORCH_DTYPES)} can be read.",
            )
        return entry

    def _map(self, shard: str) -> mmap.mmap:
        if shard not in self._maps:
            path = self._checkpoint.path / shard
            with open_regular(locate(self._checkpoint.path, shard)) as file:
                status = os.fstat(file.fileno())
                stamp = next(file for file in self._checkpoint.shards if file.name == shard)
                if not stamp.fits(status):
                    raise _changed(path)
                # A private mapping: torch wants a writable buffer, the file stays untouched.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._maps[shard] = mapped
        return self._maps[shard]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint in a directory.

    Raises UpcycleError when there is none, or when its files contradict one another.
    """
    try:
        found = path.exists()
    except OSError as error:  # a name that is too long, a directory that may not be entered
        raise UpcycleError(f"cannot read {path}: {error.strerror}.") from error
    if not found:
        raise UpcycleError(
            f"{path} does not exist.", "Give the directory of a Hugging Face checkpoint."
        )
    if not path.is_dir():
        raise UpcycleError(
            f"{path} is not a directory.", "Give the directory that holds config.json."
        )
    return open_storage(Directory(path))


def open_storage(storage: Storage) -> Checkpoint:
    """Open a checkpoint wherever its files are.

    Raises UpcycleError when there is none, or when its files contradict one another.
    """
    path = storage.path
    config, config_digest = _read_config(storage)
    weight_map = _weight_map(storage, config)
    shard_names = sorted(set(weight_map.values())) if weight_map else [WEIGHTS_NAME]
    storage.prepare(shard_names)
    tensors: dict[str, TensorEntry] = {}
    shards = []
    for shard_name in shard_names:
        shard, entries = _read_header(storage, shard_name)
        shards.append(shard)
        for entry in entries:
            if entry.name in tensors:
                raise UpcycleError(
                    f"{path}: tensor {entry.name} is in both {tensors[entry.name].shard} "
                    f"and {shard_name}."
                )
            tensors[entry.name] = entry
    if weight_map:
        _check_index(path, weight_map, tensors)
    names = [name for name in storage.matching(COMPANIONS) if not is_weight_file(name)]
    for name in names:
        if not is_inner_name(name):
            raise UpcycleError(f"{path} holds a file named {shown(name)}.", "Rename or remove it.")
    companions = tuple(map(storage.stamp, names))
    for file in companions:
        if file.size > MOST_COMPANION_BYTES:
            raise UpcycleError(
                f"{path / file.name} has {file.size:,} bytes, and no such file has more than "
                f"{MOST_COMPANION_BYTES:,}.",
                "Remove it, or put the right one there.",
            )
    _opened.update({path / shard.name: shard.size for shard in shards})
    return Checkpoint(storage, config, config_digest, tensors, tuple(shards), companions)


_opened: dict[Path, int] = {}
"""The weight files that were opened, with their sizes: somebody may have them mapped."""


def shortened_file() -> Path | None:
    """Return a weight file that is shorter than it was when it was opened, if there is one."""
    for path, size in _opened.items():
        try:
            if path.stat().st_size < size:
                return path
        except OSError:
            continue
    return None


def is_weight_file(name: str) -> bool:
    """Whether an engine that looks for weights takes a file for some."""
    return name.casefold().endswith(WEIGHT_SUFFIXES)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes as they are stored, without a copy when it is contiguous."""
    import torch

    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy 1's stubs lack Buffer


def _changed(path: Path) -> UpcycleError:
    return UpcycleError(
        f"{path} changed while it was being read.",
        "Run the command again once nothing writes to it.",
    )


def read_json(path: Path, most: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object of at most `most` bytes; raises UpcycleError when the file is not one."""
    return _json_object(read_small(path, most), path)


def _json_object(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        # Of two values for one key another reader may take the other.
        value = _parse_json(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise UpcycleError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UpcycleError(f"{path} does not hold a JSON object.")
    return value


def _read_config(storage: Storage) -> tuple[dict[str, Any], str]:
    if not storage.has(CONFIG_NAME):
        raise UpcycleError(
            f"{storage.path} has no {CONFIG_NAME}.",
            "Give the directory of a Hugging Face checkpoint.",
        )
    config_path = storage.local(CONFIG_NAME)
    raw = read_small(config_path, MOST_JSON_BYTES)
    return _json_object(raw, config_path), hashlib.sha256(raw).hexdigest()


def _weight_map(storage: Storage, config: Mapping[str, Any]) -> dict[str, str] | None:
    # transformers looks for the single file first, so a directory with both means that one.
    if storage.has(WEIGHTS_NAME):
        return None
    if not storage.has(INDEX_NAME):
        _refuse_missing_weights(storage, config)
    index_path = storage.local(INDEX_NAME)
    weight_map = read_json(index_path, MOST_LISTING_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UpcycleError(f"{index_path} has no weight_map.")
    for name, shard in weight_map.items():
        if not is_inner_name(shard):
            raise UpcycleError(
                f"{index_path} places {name} in {shown(shard)}, which is not a file of this "
                "directory."
            )
    return weight_map


def _refuse_missing_weights(storage: Storage, config: Mapping[str, Any]) -> None:
    path = storage.path
    pickles = storage.matching(("*.bin", "*.pt", "*.pth"))
    if pickles:
        here, there = (json.dumps(f"{path}{suffix}") for suffix in ("", "-safetensors"))
        code = (
            "from transformers import AutoModelForCausalLM as M; "
            f'M.from_pretrained({here}, dtype="auto").save_pretrained({there})'
        )
        raise UpcycleError(
            f"{path} holds its weights as pickle ({pickles[0]}), which can run code when opened.",
            f"Convert it first, if you trust it:\n  {shell_line(['python', '-c', code])}",
        )
    if "model_type" not in config:
        raise UpcycleError(f"{path} has neither weights nor a model_type in {CONFIG_NAME}.")
    raise UpcycleError(
        f"{path} has no {WEIGHTS_NAME} and no {INDEX_NAME}.",
        "Only safetensors checkpoints under these names can be read.",
    )


def _read_header(storage: Storage, shard_name: str) -> tuple[FileStamp, list[TensorEntry]]:
    file_path = storage.path / shard_name
    stamp = storage.stamp(shard_name)
    prefix = storage.read(shard_name, 0, 8)
    header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
    if header_bytes is None or 8 + header_bytes > stamp.size:
        raise UpcycleError(
            f"{file_path} is truncated: it ends at byte {stamp.size}, inside its own header.",
            "Download or copy it again.",
        )
    if header_bytes > MAX_HEADER_BYTES:
        raise UpcycleError(
            f"{file_path} has a header of {header_bytes:,} bytes; more than {MAX_HEADER_BYTES:,} "
            "are not read."
        )
    raw = storage.read(shard_name, 8, 8 + header_bytes)
    entries, metadata = parse_header(raw, file_path, shard_name)
    _check_extents(entries, file_path, 8 + header_bytes, stamp.size)
    kind = metadata.get("format") if isinstance(metadata, dict) else None
    return replace(stamp, digest=hashlib.sha256(raw).hexdigest(), format=kind), entries


def parse_header(raw: bytes, file_path: Path, shard_name: str) -> tuple[list[TensorEntry], object]:
    """Return the tensors that a weight file's header describes, and its metadata.

    Raises UpcycleError when it is no header.
    """
    header = _header(raw, file_path)
    metadata = header.pop("__metadata__", None)
    return _entries(header, file_path, shard_name, 8 + len(raw)), metadata


def _header(raw: bytes, file_path: Path) -> dict[str, Any]:
    try:
        header = _parse_json(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise UpcycleError(f"{file_path} has a header that is not valid JSON: {error}.") from error
    if not isinstance(header, dict):
        raise UpcycleError(f"{file_path} has a header that is not a JSON object.")
    return header


def _entries(
    header: Mapping[str, Any], file_path: Path, shard_name: str, data_start: int
) -> list[TensorEntry]:
    entries = []
    for name, info in header.items():
        where = f"{file_path}: tensor {name}"
        if not isinstance(info, dict):
            raise UpcycleError(f"{where} is not described by a JSON object.")
        dtype: object = info.get("dtype")
        shape: object = info.get("shape")
        offsets: object = info.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise UpcycleError(f"{where} has an unknown dtype {shown(dtype)}.")
        if not _is_size_list(shape) or math.prod(shape) > _MAX_SIZE:
            raise UpcycleError(f"{where} has an invalid shape {shown(shape)}.")
        if not _is_size_list(offsets) or len(offsets) != 2:
            raise UpcycleError(f"{where} has invalid offsets {shown(offsets)}.")
        begin, end = offsets
        entry = TensorEntry(name, dtype, tuple(shape), shard_name, data_start + begin)
        if end - begin != entry.nbytes:
            raise UpcycleError(
                f"{where} lies: {dtype} of shape {list(entry.shape)} takes {entry.nbytes} bytes, "
                f"its offsets give it {end - begin}."
            )
        entries.append(entry)
    return entries


def _check_extents(
    entries: list[TensorEntry], file_path: Path, data_start: int, file_bytes: int
) -> None:
    position = data_start
    previous = "the header"
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != position:
            problem = "overlaps" if entry.offset < position else "leaves a hole after"
            raise UpcycleError(f"{file_path}: tensor {entry.name} {problem} {previous}.")
        position, previous = entry.offset + entry.nbytes, entry.name
        if position > file_bytes:
            raise UpcycleError(
                f"{file_path} is truncated: it ends at byte {file_bytes}, "
                f"tensor {entry.name} at byte {position}.",
                "Download or copy it again.",
            )
    if position != file_bytes:
        raise UpcycleError(
            f"{file_path} has {file_bytes - position} bytes that belong to no tensor."
        )


def _check_index(
    path: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]
) -> None:
    for name, shard in weight_map.items():
        if name not in tensors:
            raise UpcycleError(f"{path / INDEX_NAME} lists {name} in {shard}, which lacks it.")
        if tensors[name].shard != shard:
            raise UpcycleError(
                f"{path / INDEX_NAME} lists {name} in {shard}, but it is in {tensors[name].shard}."
            )
    for name, entry in tensors.items():
        if name not in weight_map:
            raise UpcycleError(f"{path / INDEX_NAME} does not list {name} of {entry.shard}.")


def _is_size_list(value: object) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= _MAX_DIMENSIONS
        and all(type(item) is int and 0 <= item <= _MAX_SIZE for item in value)
    )


def _parse_json(
    raw: bytes, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:  # noqa: ANN401 - a JSON value
    """Parse JSON; raises ValueError, also for half a character, which cannot be written again."""
    # Of bytes Python takes other encodings and a byte order mark, which other readers do not.
    value = json.loads(raw.decode(), object_pairs_hook=object_pairs_hook)
    if b"\\u" in raw:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{shown(twice)} appears twice")
    return result
