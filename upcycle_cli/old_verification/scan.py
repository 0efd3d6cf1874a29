"""Which places of the MoE hold other bytes than they should, found at the speed of the disk.

A layer's shards are cast and scaled once; what is left is to compare bytes, which needs no more
than to read them. Several threads do so in the order of the files, without a copy of their own, and
skip what the disk holds only once. Where a group has its neurons in an order of its own, a few rows
at a time are gathered, cast and scaled as it has them. What differs is told by name alone:
`weights.py` says how, and whether it matters (one nan is as good as another).

Memory: the scaled MLP of one layer, or one other tensor that is cast; the rest are pages of files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from threading import Event, Lock
from typing import NamedTuple

import torch

from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader
from upcycle_cli.checkpoint.header import TORCH_DTYPES
from upcycle_cli.core.callbacks import Watch
from upcycle_cli.core.safe_files import locate, open_regular
from upcycle_cli.old_verification.bits import expect_bytes, same_bytes
from upcycle_cli.old_verification.copies import Copy
from upcycle_cli.old_verification.extents import Known, Layout, layout_of
from upcycle_cli.old_verification.factors import factor_of
from upcycle_cli.old_verification.facts import Facts
from upcycle_cli.old_verification.gathered import Gathered
from upcycle_cli.old_verification.merged import MeanReader
from upcycle_cli.old_verification.neurons import Neurons
from upcycle_cli.old_verification.places import Experts, Spot, spot_of
from upcycle_cli.old_verification.rounding import Rounding

Key = tuple[str, int] | str
"""What is judged as one: a part of all experts of a layer, or the name of a copied tensor."""

_THREADS = 4  # a disk answers several questions at once
_STEP_BYTES = 1 << 20  # fits a processor's cache, and is soon done when there is a reason to stop
_TASK_BYTES = 8 << 20
_SCALED_ELEMENTS = 1 << 20
_TALK_SECONDS = 0.1


class _Range(NamedTuple):
    """Bytes of the MoE, and those that they must equal, by address."""

    key: Key | None
    """None for what is to be there and is not compared."""
    held: int
    wanted: int
    nbytes: int


@dataclass
class _File:
    """A file that is mapped: the address of its first byte, and what it shares."""

    address: int
    layout: Layout


@dataclass
class _Wanted:
    """A contiguous value, and where on the disk its bytes are known to lie."""

    value: torch.Tensor
    known: Known = field(default_factory=Known)


@dataclass
class Scan:
    """Compares experts and copied tensors with the dense model's, and keeps what differs."""

    facts: Facts
    experts: Experts
    dense: Reader | MeanReader
    moe: Reader
    rounding: Rounding
    watch: Watch
    neurons: Neurons
    differing: set[Key] = field(default_factory=set)
    _files: dict[tuple[bool, str], _File] = field(default_factory=dict)
    _scaled: dict[tuple[str, str, int], torch.Tensor] = field(default_factory=dict)
    """By part, dtype and shard: memory that is used again from layer to layer."""
    _casts: dict[tuple[str, torch.dtype], torch.Tensor] = field(default_factory=dict)
    """Of one layer's MLP."""
    _alive: list[torch.Tensor] = field(default_factory=list)
    """What ranges have addresses of, until they have been compared."""
    _turns: dict[str, int] = field(default_factory=dict)
    """By shard of the MoE, when it is read; the smallest first."""
    _done: int = 0
    _total: int = 0
    _talked: float = 0.0
    _lock: Lock = field(default_factory=Lock)
    _stop: Event = field(default_factory=Event)

    def run(
        self, sound: set[str], copied: Mapping[str, Copy], factors: Mapping[str, float]
    ) -> set[Key]:
        """Return what differs of the tensors that are sound; `copied` are all copies, by name.

        Experts that were perturbed are not looked at: none holds the dense model's bytes.
        """
        tensors = self.facts.moe.tensors
        units: dict[int | str, list[str]] = {name: [name] for name in copied}
        for layer in () if self.facts.recipe.perturbed else self.facts.layers:
            units[layer] = [name for name in self.experts.names(layer) if name in sound]
        self._total = sum(tensors[name].nbytes for names in units.values() for name in names)

        # The last file first: where a conversion has just ended, that is the one still in memory.
        self._turns = {s: -i for i, s in enumerate(sorted({t.shard for t in tensors.values()}))}

        def order(unit: int | str) -> tuple[int, int]:
            return min((self._turns[tensors[n].shard], tensors[n].offset) for n in units[unit])

        def cast(unit: int | str) -> object:
            # Tensors that need no memory go together; what does goes alone.
            plain = isinstance(unit, str) and self._is_plain(copied[unit])
            return plain or unit

        self.watch.checked(0, self._total, "bytes")
        # Threads that torch divides every one of their tensors among would wait for one another.
        num_threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(_THREADS, initializer=torch.set_num_threads, initargs=(1,))
        try:
            for _, group in groupby(sorted(filter(units.get, units), key=order), key=cast):
                ranges: list[_Range] = []
                for unit in group:
                    if isinstance(unit, str):
                        ranges += self._copied_ranges(copied[unit])
                    else:
                        ranges += self._expert_ranges(pool, unit, sound, factors)
                self._do(pool, map(self._reading, _tasks(ranges)))
                self._alive.clear()
                self._casts.clear()
        finally:
            # What is raised here, a signal's error too, is not to wait for more than a step.
            self._stop.set()
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(num_threads)
        self.watch.checked(self._total, self._total, "bytes")
        for part, layer in [key for key in self.differing if not isinstance(key, str)]:
            self.differing |= {(each, layer) for each in self.facts.side_by_side(part)}
        return self.differing

    def _is_plain(self, copy: Copy) -> bool:
        """Whether a copy is the bytes of the dense tensor, in one piece of it."""
        dense, moe = self.facts.dense.tensors[copy.source], self.facts.moe.tensors[copy.name]
        mean = isinstance(self.dense, MeanReader)
        return copy.head is None and dense.dtype == moe.dtype and not mean

    def _file(self, name: str, *, dense: bool) -> _File:
        """Return the file of a tensor."""
        checkpoint, reader = (self.facts.dense, self.dense) if dense else (self.facts.moe, self.moe)
        entry = checkpoint.tensors[name]
        key = dense, entry.shard
        if key not in self._files:
            assert isinstance(reader, Reader)  # a mean is in no file
            start = torch.frombuffer(reader.mapped(name), dtype=torch.uint8).data_ptr()
            self._files[key] = _File(start - entry.offset, _layout(checkpoint, entry.shard))
        return self._files[key]

    def _copied_ranges(self, copy: Copy) -> Iterator[_Range]:
        name, entry = copy.name, self.facts.moe.tensors[copy.name]
        if not entry.nbytes:
            return
        value = copy.of(self.dense.tensor(copy.source))
        wanted = _Wanted(value)
        if self._is_plain(copy):
            self._know(wanted, copy.source)
        else:
            wanted.value = self.rounding.cast(copy.source, value, _torch_dtype(entry.dtype))
        self._alive.append(wanted.value)
        yield from self._ranges(name, name, Spot(entry.shard, entry.offset, entry.nbytes), wanted)

    def _expert_ranges(
        self, pool: ThreadPoolExecutor, layer: int, sound: set[str], factors: Mapping[str, float]
    ) -> list[_Range]:
        """Return what to compare of a layer's experts, in the order of the files."""
        facts, found = self.facts, list[tuple[Spot, str, str, str, int]]()
        prefix, cuts = facts.target.prefix(layer), self.neurons.cuts
        orders = self.neurons.orders(layer, lambda group: self._bring(pool, layer, group, sound))
        for part, expert, place in self.experts.places:
            name, beside = prefix + place.tensor, facts.side_by_side(part)
            if name not in sound or (part in cuts and expert // facts.group_size in orders):
                continue
            if part != beside[0]:
                continue  # what lies beside another is compared with it
            entry = facts.moe.tensors[name]
            spot = spot_of(entry, place, whole=len(beside) > 1)
            if spot is None or any(math.isnan(factor_of(facts, factors, p)) for p in beside):
                self.differing.add((part, layer))
            elif spot.nbytes:
                found.append((spot, name, part, entry.dtype, facts.shard_of(expert)))
        found.sort(key=lambda item: (self._turns[item[0].shard], item[0].start))
        wanted: dict[tuple[str, str, int], _Wanted] = {}
        scaling: list[Callable[[], object]] = []
        for part, dtype in sorted({(part, dtype) for _, _, part, dtype, _ in found}):
            made = self._make(part, layer, dtype, factors, scaling)
            for shard, value in enumerate(made, facts.shared_experts):
                wanted[part, dtype, shard] = value
        ranges = [
            piece
            for spot, name, part, dtype, shard in found
            for piece in self._ranges((part, layer), name, spot, wanted[part, dtype, shard])
        ]
        # Read by several threads first: one that touches page by page is slower than the disk.
        read = dict.fromkeys(key[0] for key, _, _, _ in ranges if key is not None)
        source = (self._dense_range(p, layer) for part in read for p in facts.side_by_side(part))
        self._do(pool, map(self._reading, _tasks(source)))
        self._do(pool, scaling)
        for group, order in orders.items():
            for part in cuts:
                gathered = self.neurons.gathered(part, layer, group, order, self._cast)
                self._do(pool, self._comparing((part, layer), gathered))
        return ranges

    def _bring(self, pool: ThreadPoolExecutor, layer: int, group: int, sound: set[str]) -> bool:
        """Have a group read by several threads before one looks at it; False if it is not whole."""
        facts, prefix, ranges = self.facts, self.facts.target.prefix(layer), list[_Range]()
        for _, expert, place in self.experts.places:
            if expert // facts.group_size != group:
                continue
            if prefix + place.tensor not in sound:
                return False
            entry = facts.moe.tensors[prefix + place.tensor]
            spot = spot_of(entry, place) or Spot(entry.shard, entry.offset, entry.nbytes)
            address = self._file(entry.name, dense=False).address + spot.start
            ranges.append(_Range(None, address, address, spot.nbytes))
        self._do(pool, map(self._reading, _tasks(ranges)))
        return True

    def _comparing(self, key: Key, gathered: Gathered) -> Iterator[Callable[[], None]]:
        """Yield what compares a part of a group that has an order of its own."""

        def compare(shard: int | None, rows: slice) -> None:
            if self._stop.is_set():
                return
            if key not in self.differing and not gathered.holds(shard, rows):
                self.differing.add(key)
            self._note(gathered.nbytes // len(pieces))

        pieces = list(gathered.pieces())
        return (partial(compare, shard, rows) for shard, rows in pieces)

    def _cast(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor of a dense MLP in a dtype; once for all that is made of it."""
        source = self.dense.tensor(name)
        if source.dtype == dtype:
            return source
        key = name, dtype
        if key not in self._casts:
            self._casts[key] = self.rounding.cast(name, source, dtype)
        return self._casts[key]

    def _dense_range(self, part: str, layer: int) -> _Range:
        name = self.facts.dense_place(part, layer).tensor
        entry = self.facts.dense.tensors[name]
        address = self._file(name, dense=True).address + entry.offset
        return _Range(None, address, address, entry.nbytes)

    def _make(
        self,
        part: str,
        layer: int,
        dtype: str,
        factors: Mapping[str, float],
        scaling: list[Callable[[], object]],
    ) -> Iterator[_Wanted]:
        """Yield each routed shard of a part of a dense MLP as an expert must hold it in a dtype.

        With those beside it. What is still to be multiplied for that is added to `scaling`.
        """
        facts, beside = self.facts, self.facts.side_by_side(part)
        cut = facts.locate(part, layer, 0).split_dim
        for shard in range(facts.shared_experts, facts.granularity):
            spots = [facts.dense_place(each, layer, shard) for each in beside]
            views = [s.select(self._cast(s.tensor, _torch_dtype(dtype)), cut) for s in spots]
            wanted, name = _Wanted(views[0]), spots[0].tensor
            own = [factor_of(facts, factors, each) for each in beside]
            if own != [1.0] or not views[0].is_contiguous():
                wanted.value = self._memory((part, dtype, shard), views)
                start = 0
                for view, factor in zip(views, own, strict=True):
                    stop = start + view.shape[-1]
                    scaling += _scaling(view, factor, wanted.value[..., start:stop])
                    start = stop
            else:
                self._alive.append(views[0])
                if facts.dense.tensors[name].dtype == dtype:
                    self._know(wanted, name)
            yield wanted

    def _memory(self, key: tuple[str, str, int], like: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return a contiguous tensor for some values side by side, of any contents."""
        shape = (*like[0].shape[:-1], sum(each.shape[-1] for each in like))
        found = self._scaled.get(key)
        if found is None or found.shape != shape:
            found = self._scaled[key] = torch.empty(shape, dtype=like[0].dtype)
        return found

    def _know(self, wanted: _Wanted, source: str) -> None:
        """Note where on the disk a value lies that is a range of a dense tensor."""
        entry, value = self.facts.dense.tensors[source], wanted.value
        start = entry.offset + int(value.storage_offset()) * value.element_size()
        wanted.known.new(self._file(source, dense=True).layout, start, value.nbytes)

    def _ranges(self, key: Key, name: str, spot: Spot, wanted: _Wanted) -> Iterator[_Range]:
        """Yield what is to be read of a place: all but what the disk has where it is known."""
        file, value = self._file(name, dense=False), wanted.value.data_ptr()
        parts = wanted.known.new(file.layout, spot.start, spot.nbytes)
        for start, stop in parts:
            yield _Range(key, file.address + spot.start + start, value + start, stop - start)
        self._note(spot.nbytes - sum(stop - start for start, stop in parts))

    def _reading(self, task: Iterable[_Range]) -> Callable[[], None]:
        return partial(self._read, task)

    def _do(self, pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], object]]) -> None:
        """Have everything done, and tell how far it is; raises what a thread raises."""
        waiting = {pool.submit(task) for task in tasks}
        while waiting:
            done, waiting = wait(waiting, _TALK_SECONDS, FIRST_EXCEPTION)
            for future in done:
                future.result()
            self._talk()

    def _read(self, task: Iterable[_Range]) -> None:
        for piece in task:
            expect_bytes(piece.held, piece.nbytes, soon=True)
        for key, held, wanted, nbytes in task:
            for start in range(0, nbytes, _STEP_BYTES):
                if self._stop.is_set():
                    return
                size = min(_STEP_BYTES, nbytes - start)
                expect_bytes(held + start, size)
                if key is None:
                    continue
                if key not in self.differing and not same_bytes(held + start, wanted + start, size):
                    self.differing.add(key)
                self._note(size)

    def _note(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes

    def _talk(self) -> None:
        now = time.monotonic()
        if self._done and now - self._talked >= _TALK_SECONDS:
            self._talked = now
            self.watch.checked(self._done, self._total, "bytes")


def _tasks(ranges: Iterable[_Range]) -> Iterator[list[_Range]]:
    """Yield the ranges in groups of about one size, the large ones in pieces."""
    task, room = list[_Range](), _TASK_BYTES
    for key, held, wanted, nbytes in ranges:
        start = 0
        while start < nbytes:
            size = min(room, nbytes - start)
            task.append(_Range(key, held + start, wanted + start, size))
            start, room = start + size, room - size
            if not room:
                yield task
                task, room = [], _TASK_BYTES
    yield task


def _scaling(
    source: torch.Tensor, factor: float, target: torch.Tensor
) -> Iterator[Callable[[], object]]:
    """Yield what multiplies a tensor into another, in pieces that are soon done."""
    rows = max(1, _SCALED_ELEMENTS // max(1, math.prod(source.shape[1:])))
    for start in range(0, len(source), rows):
        piece = slice(start, start + rows)
        yield partial(torch.mul, source[piece], factor, out=target[piece])


def _layout(checkpoint: Checkpoint, shard: str) -> Layout:
    with open_regular(locate(checkpoint.path, shard)) as file:
        return layout_of(file.fileno())


def _torch_dtype(dtype: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, TORCH_DTYPES[dtype])
    return found
