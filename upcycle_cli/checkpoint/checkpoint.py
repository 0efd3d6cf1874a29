"""A Hugging Face checkpoint: its config, the headers of its tensors, and their values on demand.

Opening one reads `config.json`, the index and the safetensors headers, and checks them against the
file sizes; it reads no weights. `Checkpoint.reader` maps the files and returns tensors that alias
them, or that are computed from them. What a model may contain is decided elsewhere, in `models`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle_cli.checkpoint.header import (
    COUNTERS,
    ITEM_BYTES,
    TORCH_DTYPES,
    TensorEntry,
    read_shard_header,
)
from upcycle_cli.checkpoint.made import FP8_DTYPES, Made, Source, part, stored_parts
from upcycle_cli.checkpoint.mapped_files import MappedFiles
from upcycle_cli.checkpoint.quantized import dequantized
from upcycle_cli.checkpoint.storage import (
    CARD_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    FileStamp,
    Storage,
    file_changed,
    find_others,
    json_object,
    refuse_missing,
    weight_map,
)
from upcycle_cli.core import safe_files
from upcycle_cli.core.display import Compact
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.text import printable

if TYPE_CHECKING:
    import torch

    from upcycle_cli.checkpoint.made import Index

_NAME = re.compile(r"model (\d+): (.*)", re.DOTALL)
ADAPTER_PREFIX = "adapter: "
"""Begins the name by which a reader has a tensor of a checkpoint's adapter."""


@dataclass(frozen=True, repr=False)
class Checkpoint(Compact):
    """A checkpoint whose headers were read and are consistent."""

    storage: Storage
    config: Mapping[str, Any]
    config_digest: str
    """Of the file: the config says nothing of a quantisation that `made` undoes."""
    stored: Mapping[str, TensorEntry]
    """The tensors in the files."""
    shards: tuple[FileStamp, ...]
    companions: tuple[FileStamp, ...]
    """Tokenizer, chat template, generation config and licence files."""
    made: Mapping[str, Made] = field(default_factory=dict)
    """How tensors are computed that are not stored as the model has them."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Stored tensors that the model does not need, each with the reason."""
    adapter: Checkpoint | None = None
    """The adapter that is added to the weights."""
    config_name: str = CONFIG_NAME

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """What the model has: computed tensors, too, in their computed dtype and shape."""
        parts = {part.name for made in self.made.values() for part in stored_parts(made)}
        unneeded = (parts - self.made.keys()) | self.left_out.keys()
        kept = {name: entry for name, entry in self.stored.items() if name not in unneeded}
        for name, made in self.made.items():
            kept[name] = replace(kept[name], dtype=made.dtype, shape=made.shape)
        return kept

    @property
    def path(self) -> Path:
        """The directory of the files, or where a download will put them."""
        return self.storage.path

    @property
    def name(self) -> str:
        """The repo id when the directory is a snapshot in the Hub cache, else its own name."""
        # The record and the card contain it, so it must be valid Unicode.
        own = self.repo or printable(self.path.resolve().name)
        return own if self.adapter is None else f"{own}+{self.adapter.name}"

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
        own = str(self.path) if self.repo is None else f"{self.repo}@{self.revision}"
        return own if self.adapter is None else f"{own}+{self.adapter.location}"

    @property
    def base_and_adapter(self) -> tuple[Checkpoint, ...]:
        """The checkpoint without its adapter, and the adapter, if any."""
        return (self,) if self.adapter is None else (replace(self, adapter=None), self.adapter)

    @property
    def changed(self) -> list[str]:
        """The tensors that the adapter changes."""
        parts = {name: stored_parts(made) for name, made in self.made.items()}
        return [n for n in parts if any(p.name.startswith(ADAPTER_PREFIX) for p in parts[n])]

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
        return [self.config_name, *(file.name for file in self.shards + self.companions)]

    @property
    def dequantized_to(self) -> str | None:
        """The dtype in which FP8 weights are computed; None if there are none."""
        found = (name for name in self.made if self.stored[name].dtype in FP8_DTYPES)
        return next((TORCH_DTYPES[self.made[name].dtype] for name in found), None)

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
            **({} if self.adapter is None else {"adapter": self.adapter.origin}),
            **({} if self.dequantized_to is None else {"dequantized_to": self.dequantized_to}),
        }

    @property
    def identity(self) -> dict[str, Any]:
        """What distinguishes it from other checkpoints with the same shapes, as JSON."""
        files = self.shards + self.companions if self.revision is None else ()
        times = [[file.name, file.size, file.mtime_ns] for file in files]
        adapter = {} if self.adapter is None else {"adapter": self.adapter.identity}
        return {**self.origin, "times": times, **adapter}

    @property
    def adapter_text(self) -> str:
        """A description of the adapter; empty without one."""
        if (lora := self.adapter) is None:
            return ""
        return f"{lora.name}, LoRA of rank {lora.config.get('r')}, {len(lora.tensors)} tensors"

    def tensor(self, name: str) -> Source | Made:
        """Return how a tensor of the model is stored or computed."""
        entry = self.tensors[name]
        return self.made.get(name) or Source(name, entry.dtype, entry.shape)

    def computed_in(self, dtype: str | None) -> Checkpoint:
        """Return the checkpoint with its computed tensors rounded to a dtype, if one is given."""
        if dtype is None or not self.made:
            return self
        made = {name: replace(each, dtype=dtype) for name, each in self.made.items()}
        return replace(self, made=made)

    def place(self, name: str) -> tuple[Checkpoint, TensorEntry]:
        """Return the checkpoint, itself or its adapter, and the entry of a stored tensor."""
        if name in self.stored or self.adapter is None:
            return self, self.stored[name]
        return self.adapter, self.adapter.stored[name.removeprefix(ADAPTER_PREFIX)]

    def tensor_digest(self, name: str) -> str:
        """Return the SHA-256 of the stored bytes that make a tensor; OSError or UpcycleError."""
        digest = hashlib.sha256()
        for source in stored_parts(self.tensor(name)):
            of, entry = self.place(source.name)
            with safe_files.open_regular(of.storage.local(entry.shard)) as file:
                file.seek(entry.offset)
                digest.update(file.read(entry.nbytes))
        return digest.hexdigest()

    @property
    def bytes_to_download(self) -> int:
        """The size of the files that are not downloaded yet."""
        own = self.storage.bytes_to_download(self.files)
        return own + (0 if self.adapter is None else self.adapter.bytes_to_download)

    def download(self) -> Checkpoint:
        """Download what is missing and return the local checkpoint; UpcycleError if it differs."""
        adapter = self.adapter and self.adapter.download()
        if self.storage.is_local:
            return replace(self, adapter=adapter)
        self.storage.download([*self.files, *self.storage.matching([CARD_NAME])])
        files = Storage(self.path)
        shards = tuple(read_shard_header(files, shard.name)[0] for shard in self.shards)
        if [shard.digest for shard in shards] != [shard.digest for shard in self.shards]:
            words = f"{self.path} differs from what its headers said before the download."
            raise UpcycleError(words, "Run the command again.")
        companions = tuple(files.stamp(file.name) for file in self.companions)
        local = replace(self, storage=files, shards=shards, companions=companions, adapter=adapter)
        local.check_unchanged()
        return local

    def check_unchanged(self) -> None:
        """Raise UpcycleError when a file changed since the checkpoint was opened."""
        self.check_files(self.shards + self.companions)
        path = self.storage.local(self.config_name)
        config = safe_files.read_small(path, safe_files.MOST_JSON_BYTES)
        if hashlib.sha256(config).hexdigest() != self.config_digest:
            raise file_changed(self.path / self.config_name)
        if self.adapter is not None:
            self.adapter.check_unchanged()

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
    reader = Reader(_checkpoints=checkpoints)
    try:
        yield reader
    finally:
        # Python unmaps a file once no tensor aliases it; closing it by force would crash them.
        reader.maps.clear()


def tensor_of(model: int, name: str) -> str:
    """Return the name by which a reader of several checkpoints has a tensor of one of them."""
    return f"model {model}: {name}" if model else name


def model_of(name: str) -> tuple[int, str]:
    """Return the checkpoint's number and the own name of a tensor, from a name of `tensor_of`."""
    match = _NAME.fullmatch(name)
    return (0, name) if match is None else (int(match[1]), match[2])


@dataclass(frozen=True, eq=False, kw_only=True)
class Reader(MappedFiles):
    """Returns tensors that alias the mapped files; made by `open_reader`."""

    _checkpoints: Sequence[Checkpoint]

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Raise UpcycleError when a tensor's file changed, since its map shows the change."""
        found = {(id(model), entry.shard): model for model, entry in map(self._find, names)}
        for (_, shard), model in found.items():
            model.check_files(file for file in model.shards if file.name == shard)

    def mapped(self, name: str) -> memoryview:
        """Return a stored tensor's bytes in the mapped file; UpcycleError for an unknown dtype.

        Do not write to them, or use them after the reader is closed.
        """
        checkpoint, entry = self._find(name)
        if entry.dtype not in {**TORCH_DTYPES, **COUNTERS} and not checkpoint.made:
            words = f"{checkpoint.path}: {entry.name} is stored as {entry.dtype}."
            raise UpcycleError(words, f"Only {', '.join(TORCH_DTYPES)} can be read.")
        stamp = next(file for file in checkpoint.shards if file.name == entry.shard)
        whole = memoryview(self.map(checkpoint.storage, stamp))
        return whole[entry.offset : entry.offset + entry.nbytes]

    def tensor(self, name: str, entries: Index = slice(None)) -> torch.Tensor:
        """Return a tensor, which aliases the mapped file, or compute some entries of it.

        `entries` are along the first dimension. Raises UpcycleError for a value that is not finite.
        """
        number, own = self._model(name)
        made = self._checkpoints[number].made.get(own)
        if made is None:
            entry, data = self._find(name)[1], self.mapped(name)
            # torch needs alignment, which the format does not guarantee.
            is_aligned = entry.offset % ITEM_BYTES[entry.dtype] == 0
            return _as_torch(data if is_aligned else bytearray(data), entry.dtype, entry.shape)
        count, *rest = made.shape
        rows, height = entries, math.prod(rest[:-1])
        if height != 1:  # a stack of matrices, whose rows follow one another
            import numpy as np

            rows = np.arange(count * height).reshape(count, height)[entries].ravel()
        values = part(made, lambda stored: self.mapped(tensor_of(number, stored)), rows)
        shape = len(values) // max(1, height), *rest
        return _as_torch(bytearray(values.tobytes()), made.dtype, shape)

    def _model(self, name: str) -> tuple[int, str]:
        # A single checkpoint can have any names, even names like `tensor_of`'s.
        return (0, name) if len(self._checkpoints) == 1 else model_of(name)

    def _find(self, name: str) -> tuple[Checkpoint, TensorEntry]:
        number, own = self._model(name)
        return self._checkpoints[number].place(own)


def _as_torch(data: memoryview | bytearray, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    kind = getattr(torch, {**TORCH_DTYPES, **COUNTERS}[dtype])
    held = torch.frombuffer(data, dtype=kind) if len(data) else torch.empty(0, dtype=kind)
    return held.reshape(shape)


def open_checkpoint(path: Path | str, *, as_stored: bool = False) -> Checkpoint:
    """Open the checkpoint in a directory; see `open_storage`."""
    hint = "Give the directory of a checkpoint (with config.json), or ORG/NAME on the Hub."
    refuse_missing(path, hint)
    return open_storage(Storage(Path(path)), as_stored=as_stored)


def open_storage(storage: Storage, *, as_stored: bool = False) -> Checkpoint:
    """Open a checkpoint, its FP8 weights dequantised or `as_stored`; UpcycleError if damaged."""
    path = storage.path
    if not storage.has(CONFIG_NAME):
        hint = "Give the directory of a Hugging Face checkpoint."
        raise find_others(storage) or UpcycleError(f"{path} has no {CONFIG_NAME}.", hint)
    raw_config = safe_files.read_small(storage.local(CONFIG_NAME), safe_files.MOST_JSON_BYTES)
    config = json_object(raw_config, str(path / CONFIG_NAME))
    files = weight_map(storage)
    shard_names = sorted(set(files.values())) or [WEIGHTS_NAME]
    storage.prefetch_headers(shard_names)
    stored: dict[str, TensorEntry] = {}
    shards = []
    for shard_name in shard_names:
        shard, entries = read_shard_header(storage, shard_name)
        shards.append(shard)
        for entry in entries:
            if entry.name in stored:
                both = f"{stored[entry.name].shard} and {shard_name}"
                raise UpcycleError(f"{path}: tensor {entry.name} is in both {both}.")
            stored[entry.name] = entry
    for name in (*files, *stored) if files else ():
        listed, found = files.get(name), stored[name].shard if name in stored else None
        if found != listed:
            words = f"lists {name} in {listed or 'no file'}, and it is in {found or 'no file'}"
            raise UpcycleError(f"{path / INDEX_NAME} {words}.", "Download or copy it again.")
    digest, companions = hashlib.sha256(raw_config).hexdigest(), storage.companions()
    whole = Checkpoint(storage, config, digest, stored, tuple(shards), companions)
    if as_stored:
        return whole
    try:
        config, made, left_out = dequantized(config, stored)
    except UpcycleError as error:  # with several models, say which
        raise UpcycleError(f"{path}: {error.message}", error.hint) from error
    return replace(whole, config=config, made=made, left_out=left_out)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes as they are stored; a contiguous tensor is not copied."""
    import torch

    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy 1's stubs lack Buffer
