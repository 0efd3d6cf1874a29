"""A Hugging Face checkpoint: its config, the headers of its tensors, and their values on demand.

Opening one reads `config.json`, the index and the safetensors headers, and checks them against the
file sizes; it reads no weights. `Checkpoint.reader` maps the files and returns tensors that alias
them. What a model may contain is decided elsewhere, in `models`.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle_cli.checkpoint.header import ITEM_BYTES, TORCH_DTYPES, TensorEntry, read_shard_header
from upcycle_cli.checkpoint.storage import (
    CARD_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    FileStamp,
    Storage,
    file_changed,
    find_adapter,
    json_object,
    read_json,
    refuse_missing,
)
from upcycle_cli.core import safe_files
from upcycle_cli.core.display import Compact
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.platform import shared_extents
from upcycle_cli.core.text import printable

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"model (\d+): (.*)", re.DOTALL)

DiskRanges = tuple[int | tuple[int, int], ...]
"""A device number; then, for each range, its offset and the distance from there to the disk's."""


@dataclass(frozen=True, repr=False)
class Checkpoint(Compact):
    """A checkpoint whose headers were read and are consistent."""

    storage: Storage
    config: Mapping[str, Any]
    config_digest: str
    tensors: Mapping[str, TensorEntry]
    shards: tuple[FileStamp, ...]
    companions: tuple[FileStamp, ...]
    """Tokenizer, chat template, generation config and licence files."""

    @property
    def path(self) -> Path:
        """The directory of the files, or where a download will put them."""
        return self.storage.path

    @property
    def name(self) -> str:
        """The repo id when the directory is a snapshot in the Hub cache, else its own name."""
        # The record and the card contain it, so it must be valid Unicode.
        return self.repo or printable(self.path.resolve().name)

    @property
    def repo(self) -> str | None:
        """The repo id when the directory is a snapshot in the Hub cache."""
        return None if self._snapshot is None else self._snapshot[1].replace("--", "/")

    @property
    def revision(self) -> str | None:
        """The commit when the directory is a snapshot in the Hub cache."""
        return None if self._snapshot is None else self._snapshot[2]

    @property
    def _snapshot(self) -> re.Match[str] | None:
        path = self.path.resolve().as_posix()
        return re.search(r"/models--([\w.-]+)/snapshots/([\w.-]+)$", path, re.ASCII)

    @property
    def location(self) -> str:
        """The directory, or REPO@COMMIT when the directory is a snapshot in the Hub cache."""
        return str(self.path) if self.repo is None else f"{self.repo}@{self.revision}"

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def num_parameters(self) -> int:
        """The number of elements of all tensors."""
        return sum(entry.num_elements for entry in self.tensors.values())

    @property
    def files(self) -> list[str]:
        """The names of config.json, the weight files and the companions."""
        return [CONFIG_NAME, *(file.name for file in self.shards + self.companions)]

    @property
    def origin(self) -> dict[str, Any]:
        """The source's entry in the record: its name, and digests of its config and headers."""
        return {
            "name": self.name,
            "revision": self.revision,
            "config_sha256": self.config_digest,
            "files": [
                {"name": shard.name, "size": shard.size, "header_sha256": shard.digest}
                for shard in self.shards
            ],
        }

    @property
    def identity(self) -> dict[str, Any]:
        """What distinguishes it from other checkpoints with the same shapes, as JSON."""
        files = self.shards + self.companions if self.revision is None else ()
        return self.origin | {"times": [[file.name, file.size, file.mtime_ns] for file in files]}

    def tensor_digest(self, name: str) -> str:
        """Return the SHA-256 of a tensor's bytes; OSError or UpcycleError when unreadable."""
        entry = self.tensors[name]
        with safe_files.open_regular(self.storage.local(entry.shard)) as file:
            file.seek(entry.offset)
            return hashlib.sha256(file.read(entry.nbytes)).hexdigest()

    @property
    def bytes_to_download(self) -> int:
        """The size of the files that are not downloaded yet."""
        return self.storage.bytes_to_download(self.files)

    def download(self) -> Checkpoint:
        """Download what is missing and return the local checkpoint; UpcycleError if it differs."""
        if self.storage.is_local:
            return self
        self.storage.download([*self.files, *self.storage.matching([CARD_NAME])])
        local = open_checkpoint(self.path)
        if local.tensors != self.tensors or local.config_digest != self.config_digest:
            words = f"{self.path} differs from what its headers said before the download."
            raise UpcycleError(words, "Run the command again.")
        return local

    def check_unchanged(self) -> None:
        """Raise UpcycleError when a file changed since the checkpoint was opened."""
        self.check_files(self.shards + self.companions)
        config = safe_files.read_small(self.storage.local(CONFIG_NAME), safe_files.MOST_JSON_BYTES)
        if hashlib.sha256(config).hexdigest() != self.config_digest:
            raise file_changed(self.path / CONFIG_NAME)

    def check_files(self, files: Iterable[FileStamp]) -> None:
        """Raise UpcycleError when one of these files changed since the checkpoint was opened."""
        for file in files:
            if not file.fits(self.storage.locate(file.name).stat()):
                raise file_changed(self.path / file.name)

    def reader(self) -> AbstractContextManager[Reader]:
        """Map weight files on first use; unmap them when the context ends."""
        return open_reader([self])


@contextmanager
def open_reader(checkpoints: Sequence[Checkpoint]) -> Iterator[Reader]:
    """Read tensors of several checkpoints, by the names of `tensor_of`, as `Checkpoint.reader`."""
    maps: dict[Path, mmap.mmap] = {}
    try:
        yield Reader(checkpoints, maps)
    finally:
        # Python unmaps a file once no tensor aliases it; closing it by force would crash them.
        maps.clear()


def tensor_of(model: int, name: str) -> str:
    """Return the name by which a reader of several checkpoints has a tensor of one of them."""
    return f"model {model}: {name}" if model else name


def model_of(name: str) -> tuple[int, str]:
    """Return the checkpoint's number and the own name of a tensor, from a name of `tensor_of`."""
    match = _NAME.fullmatch(name)
    return (0, name) if match is None else (int(match[1]), match[2])


@dataclass(frozen=True, eq=False)
class Reader:
    """Returns tensors that alias the mapped files; made by `open_reader`."""

    _checkpoints: Sequence[Checkpoint]
    _maps: dict[Path, mmap.mmap]
    _extents: dict[Path, tuple[int, int, list[tuple[int, int, int]]]] = field(default_factory=dict)

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Raise UpcycleError when a tensor's file changed, since its map shows the change."""
        found = [self._find(name) for name in names]
        for checkpoint in self._checkpoints:
            shards = {entry.shard for model, entry in found if model is checkpoint}
            checkpoint.check_files(file for file in checkpoint.shards if file.name in shards)

    def mapped(self, name: str) -> memoryview:
        """Return a tensor's bytes in the mapped file; UpcycleError for an unsupported dtype.

        Do not write to them, or use them after the reader is closed.
        """
        checkpoint, entry = self._find(name)
        if entry.dtype not in TORCH_DTYPES:
            raise UpcycleError(
                f"{checkpoint.path}: {entry.name} is stored as {entry.dtype}.",
                f"Only {', '.join(TORCH_DTYPES)} can be read.",
            )
        whole = memoryview(self._map(checkpoint, entry.shard))
        return whole[entry.offset : entry.offset + entry.nbytes]

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor that aliases the mapped file."""
        import torch

        data: memoryview | bytearray = self.mapped(name)
        entry = self._find(name)[1]
        dtype = getattr(torch, TORCH_DTYPES[entry.dtype])
        if entry.num_elements == 0:
            return torch.empty(entry.shape, dtype=dtype)
        if entry.offset % ITEM_BYTES[entry.dtype]:
            # torch needs alignment, which the format does not guarantee.
            data = bytearray(data)
        return torch.frombuffer(data, dtype=dtype).reshape(entry.shape)

    def on_disk(self, data: memoryview) -> DiskRanges:
        """Return where mapped bytes lie on the disk; empty unless all are in shared extents.

        Bytes at the same place are equal, and need not be read to be compared.
        """
        address = _address(data)
        for path, mapped in [*self._maps.items()]:  # other threads add maps
            if path not in self._extents:
                self._extents[path] = _address(mapped), path.stat().st_dev, shared_extents(path)
            base, device, extents = self._extents[path]
            if extents and base <= address < base + len(mapped):
                ranges = _ranges(extents, address - base, len(data))
                return (device, *ranges) if ranges else ()
        return ()

    def release(self) -> None:
        """Free the pages that were read so far; a later access reads them again."""
        for mapped in [*self._maps.values()]:
            mapped.madvise(mmap.MADV_DONTNEED)

    def _find(self, name: str) -> tuple[Checkpoint, TensorEntry]:
        # A single checkpoint can have any names, even names like `tensor_of`'s.
        model, own = (0, name) if len(self._checkpoints) == 1 else model_of(name)
        checkpoint = self._checkpoints[model]
        return checkpoint, checkpoint.tensors[own]

    def _map(self, checkpoint: Checkpoint, shard: str) -> mmap.mmap:
        path = checkpoint.path / shard
        if path not in self._maps:
            stamp = next(file for file in checkpoint.shards if file.name == shard)
            with safe_files.open_regular(checkpoint.storage.locate(shard)) as file:
                if not stamp.fits(os.fstat(file.fileno())):
                    raise file_changed(path)
                # A private mapping: torch needs a writable buffer, and the file must not change.
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[path]


def _address(data: memoryview | mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data))


def _ranges(
    extents: Sequence[tuple[int, int, int]], begin: int, nbytes: int
) -> list[tuple[int, int]]:
    position, found = begin, list[tuple[int, int]]()
    first = bisect_right(extents, begin, key=lambda extent: extent[1])
    for low, high, physical in extents[first:]:
        if low > position or position >= begin + nbytes:
            break
        # The distance tells adjacent extents from one: files may cut one range differently.
        distance = physical - low + begin
        if not found or found[-1][1] != distance:
            found.append((position - begin, distance))
        position = high
    return found if position >= begin + nbytes else []


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open the checkpoint in a directory; UpcycleError when it is missing or damaged."""
    hint = "Give the directory of a checkpoint (with config.json), or ORG/NAME on the Hub."
    refuse_missing(path, hint)
    return open_storage(Storage(Path(path)))


def open_storage(storage: Storage) -> Checkpoint:
    """Open a local or remote checkpoint; UpcycleError when it is missing or damaged."""
    path = storage.path
    if not storage.has(CONFIG_NAME):
        hint = "Give the directory of a Hugging Face checkpoint."
        raise find_adapter(storage) or UpcycleError(f"{path} has no {CONFIG_NAME}.", hint)
    raw_config = safe_files.read_small(storage.local(CONFIG_NAME), safe_files.MOST_JSON_BYTES)
    config = json_object(raw_config, str(path / CONFIG_NAME))
    weight_map = _weight_map(storage)
    shard_names = sorted(set(weight_map.values())) or [WEIGHTS_NAME]
    storage.prefetch_headers(shard_names)
    tensors: dict[str, TensorEntry] = {}
    shards = []
    for shard_name in shard_names:
        shard, entries = read_shard_header(storage, shard_name)
        shards.append(shard)
        for entry in entries:
            if entry.name in tensors:
                both = f"{tensors[entry.name].shard} and {shard_name}"
                raise UpcycleError(f"{path}: tensor {entry.name} is in both {both}.")
            tensors[entry.name] = entry
    stored = {name: entry.shard for name, entry in tensors.items()}
    for name in (*weight_map, *stored) if weight_map else ():
        listed, found = weight_map.get(name), stored.get(name)
        if found != listed:
            words = f"lists {name} in {listed or 'no file'}, and it is in {found or 'no file'}"
            raise UpcycleError(f"{path / INDEX_NAME} {words}.", "Download or copy it again.")
    digest = hashlib.sha256(raw_config).hexdigest()
    return Checkpoint(storage, config, digest, tensors, tuple(shards), storage.companions())


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes as they are stored; a contiguous tensor is not copied."""
    import torch

    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy 1's stubs lack Buffer


def _weight_map(storage: Storage) -> dict[str, str]:
    """Return the file of each tensor, from the index; empty for a single file."""
    # transformers reads the single file if both exist.
    if storage.has(WEIGHTS_NAME):
        return {}
    if not storage.has(INDEX_NAME):
        pickles = storage.matching(("*.bin", "*.pt", "*.pth"))
        words = f"has no {WEIGHTS_NAME} and no {INDEX_NAME}."
        hint = "Only safetensors checkpoints under these names can be read."
        if pickles:
            words = f"has its weights as pickle ({pickles[0]}), which can run code when opened."
            hint = "If you trust it, load it with transformers' from_pretrained, save it with "
            hint += "save_pretrained, and give the new directory."
        raise find_adapter(storage) or UpcycleError(f"{storage.path} {words}", hint)
    index_path = storage.local(INDEX_NAME)
    weight_map = read_json(index_path, safe_files.MOST_LISTING_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UpcycleError(f"{index_path} has no weight_map.")
    for name, shard in weight_map.items():
        if not safe_files.is_inner_name(shard):
            words = f"{index_path} lists {name} in {shown(shard)}"
            raise UpcycleError(f"{words}, which is not a file of this directory.")
    return weight_map
