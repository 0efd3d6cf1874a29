"""Writes the shards of a plan into the staging directory.

Each unique part of a file is written once. Its copies share the extents of the first one where the
file system can do that (FICLONERANGE), and are written elsewhere. Unchanged weights go straight
from the mapped source to the file; everything else is computed, once. A few threads work side by
side, each on its own file while there are enough, so that reading, arithmetic and writing overlap;
each holds one part at a time. A file is written under a temporary name, made durable, and renamed,
so a file under its final name is complete.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from threading import Event, Lock

from xxhash import xxh3_128

from upcycle_cli.checkpoint.checkpoint import Reader
from upcycle_cli.checkpoint.header import OverflowInCastError
from upcycle_cli.core import platform
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.plan.expressions import Expr, source_names
from upcycle_cli.plan.output import Role, Shard
from upcycle_cli.plan.plan import Plan
from upcycle_cli.recipe.options import check_types
from upcycle_cli.write import file_layout
from upcycle_cli.write.file_layout import Part
from upcycle_cli.write.staging import NOTE_SUFFIX, TEMPORARY_SUFFIX, Staging

# Much less than a huge page: docs/evidence/decisions.md says why.
_PIECE_BYTES = 1 << 19
_FLUSH_SECONDS = 0.02
_STOP_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How to write the output, which is the same for all values.

    `workers` are threads; 0 means one more than there are processors, at most 4. `fsync` makes each
    file durable before it gets its final name.
    """

    workers: int = 0
    fsync: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        if self.workers < 0:
            raise UpcycleError(f"`workers` must be 0 or more, not {self.workers}.")


@dataclass
class Written:
    """Facts that only writing the shards shows."""

    routers: dict[str, str] = field(default_factory=dict)
    """The SHA-256 of each router, by tensor name."""
    vanished: dict[Expr, int] = field(default_factory=dict)
    """How many nonzero values of an expression became zero."""
    shared_bytes: int = 0
    """Bytes that share extents with equal bytes, so they take no space."""
    reused_bytes: int = 0
    """Bytes that an earlier, unfinished run had written."""

    def add(self, other: Written) -> None:
        """Add the facts of other shards."""
        self.routers |= other.routers
        self.vanished |= other.vanished
        self.shared_bytes += other.shared_bytes
        self.reused_bytes += other.reused_bytes


class _StoppedError(Exception):
    """Another thread failed, or a signal came: stop writing."""


def write_weights(
    plan: Plan,
    shards: Sequence[Shard],
    staging: Staging,
    *,
    progress: Callable[[int], None],
    options: WriteOptions,
) -> Written:
    """Write the shards that no earlier run has finished; UpcycleError when a value overflows."""
    with plan.reader() as reader:
        crew = _Crew(reader, staging, options, progress, platform.can_share(staging.path))
        tasks = [_Task(shard.name, file_layout.lay_out(shard), crew) for shard in shards]
        for task in tasks:
            for part in task.layout.parts:
                crew.first.setdefault(part.expr, (task, part.offsets[0]))
        # One usually waits for the disk.
        threads = options.workers or min(4, platform.num_processors() + 1)
        crew.run([task.take_over for task in tasks if staging.noted(task.name)], threads)
        missing = [task for task in tasks if not task.complete.is_set()]
        # Several files at once: while the disk has one, the next is filled.
        crew.threads_per_file = threads // min(threads, len(missing) or 1)
        crew.run([task.write for task in missing], threads)
    written = Written()
    for task in tasks:
        written.add(task.written)
    return written


@dataclass
class _Crew:
    """The threads that write, and what they share."""

    reader: Reader
    staging: Staging
    options: WriteOptions
    progress: Callable[[int], None]
    shares: bool
    """Whether the file system can share extents."""
    first: dict[Expr, tuple[_Task, int]] = field(default_factory=dict)
    """The first file that holds a part, and the offset there."""
    digests: dict[Expr, bytes] = field(default_factory=dict)
    """The digest of each part that was written or read."""
    threads_per_file: int = 1
    stopping: Event = field(default_factory=Event)
    lock: Lock = field(default_factory=Lock)

    def run(self, work: Sequence[Callable[[], None]], threads: int) -> None:
        """Do this in new threads; raise the first failure, once all have ended."""
        with ThreadPoolExecutor(max(1, min(threads, len(work))), "upcycle-writer") as pool:
            try:
                jobs = [pool.submit(each) for each in work]
                if wait(jobs, return_when=FIRST_EXCEPTION).not_done:
                    self.stopping.set()  # a failure need not wait for the rest of a large part
            except BaseException:
                self.stopping.set()
                raise
            finally:
                pool.shutdown(cancel_futures=True)
        errors = filter(None, (job.exception() for job in jobs if not job.cancelled()))
        # Not _StoppedError, but the error that made the others stop.
        for error in sorted(errors, key=lambda error: isinstance(error, _StoppedError)):
            raise error

    def check_running(self) -> None:
        """Raise _StoppedError once another thread has failed."""
        if self.stopping.is_set():
            raise _StoppedError

    def advance(self, nbytes: int) -> None:
        """Report bytes that are in place."""
        self.check_running()
        if nbytes:
            with self.lock:
                self.progress(nbytes)


@dataclass(eq=False)
class _Task:
    """The writing of one file."""

    name: str
    layout: file_layout.ShardLayout
    crew: _Crew
    written: Written = field(default_factory=Written)
    complete: Event = field(default_factory=Event)
    turn: Lock = field(default_factory=Lock)
    """Two threads that write one file at once spin on its lock in the kernel."""

    def take_over(self) -> None:
        """Keep the file that an earlier run has written, if every byte is still the same."""
        noted = self.crew.staging.noted(self.name)
        try:
            with (self.crew.staging.path / self.name).open("rb") as file:
                found = file_layout.read_back(file, self.layout, self.crew.check_running)
        except OSError:
            return  # an unreadable file is written again
        if found is None or noted["xxh3_128"] != file_layout.file_digest(self.layout, found):
            return
        parts, weights = self.layout.parts, self.layout.nbytes - len(self.layout.header)
        self.written = Written(
            routers=noted["routers"],
            vanished={parts[int(i)].expr: count for i, count in noted["vanished"].items()},
            shared_bytes=noted["shared_bytes"],
            reused_bytes=weights,
        )
        self.crew.digests |= found
        self.crew.advance(weights)
        self.complete.set()

    def _facts(self) -> dict[str, object]:
        """Return the note with which `take_over` recognises the file in a later run."""
        counts = [self.written.vanished.get(part.expr) for part in self.layout.parts]
        return {
            "xxh3_128": file_layout.file_digest(self.layout, self.crew.digests),
            "routers": self.written.routers,
            "shared_bytes": self.written.shared_bytes,
            "vanished": {index: count for index, count in enumerate(counts) if count},
        }

    def write(self) -> None:
        """Write the file under a temporary name, make it durable, rename it, and write its note."""
        staging, durable = self.crew.staging, self.crew.options.fsync
        path = staging.path / self.name
        temporary = staging.path / (self.name + TEMPORARY_SUFFIX)
        try:
            with temporary.open("w+b", buffering=0) as file:
                descriptor = file.fileno()
                os.ftruncate(descriptor, self.layout.nbytes)
                _write_at(descriptor, memoryview(self.layout.header), 0)
                parts = {part.expr: part for part in self.layout.parts}
                work = [
                    partial(self._write_own, [parts[expr] for expr in bundle], descriptor)
                    for bundle in file_layout.bundles([*parts])
                ]
                with _flushed(descriptor) if durable else nullcontext():
                    self.crew.run(work, self.crew.threads_per_file)
                if self.crew.shares:
                    # Otherwise each sharing waits for the disk.
                    platform.start_writeback(descriptor)
                    self._share_parts(descriptor)
                if durable:
                    platform.make_durable(descriptor)
            self._check_source()
            temporary.rename(path)
            staging.save(self.name + NOTE_SUFFIX, self._facts())
        except OSError as error:
            if error.errno == errno.EFAULT:
                self._check_source()  # a truncated source has no pages there
            # pwrite does not say which file it failed on.
            raise OSError(error.errno, error.strerror, str(path)) from error
        self.complete.set()

    def _write_own(self, parts: Sequence[Part], descriptor: int) -> None:
        """Write parts to the places that do not share extents."""
        places = {part: part.offsets for part in parts}
        if self.crew.shares:
            origins = {part: self.crew.first[part.expr][0] for part in parts}
            places = {part: part.offsets[: origins[part] is self] for part in parts}
        # The digest of a router is recorded, even where all its places share extents.
        wanted = {p: at for p, at in places.items() if at or p.tensor.role is Role.ROUTER}
        if wanted:
            self._write_parts(wanted, descriptor)

    def _write_parts(self, places: Mapping[Part, Sequence[int]], descriptor: int) -> None:
        """Write parts to several places, piece by piece: memory is read once per piece."""
        parts, done = [*places], [0] * len(places)
        digests, routers = [xxh3_128() for _ in parts], [hashlib.sha256() for _ in parts]
        for i, data in self._values(parts):
            with self.turn:
                for start in range(0, len(data), _PIECE_BYTES):
                    self.crew.check_running()
                    piece = data[start : start + _PIECE_BYTES]
                    digests[i].update(piece)
                    if parts[i].tensor.role is Role.ROUTER:
                        routers[i].update(piece)
                    for offset in places[parts[i]]:
                        _write_at(descriptor, piece, offset + done[i] + start)
                        self.crew.advance(len(piece))
            done[i] += len(data)
        for part, digest, router in zip(parts, digests, routers, strict=True):
            self.crew.digests[part.expr] = digest.digest()
            if part.tensor.role is Role.ROUTER:
                self.written.routers[part.tensor.name] = router.hexdigest()

    def _share_parts(self, descriptor: int) -> None:
        """Share the extents of each part's first place, or write the part where that fails."""
        for part in self.layout.parts:
            origin, source = self.crew.first[part.expr]
            offsets = part.offsets[origin is self :]
            if not offsets:
                continue
            unshared = []
            with nullcontext(descriptor) if origin is self else origin.opened() as first:
                for offset in offsets:
                    if platform.share(first, source, descriptor, offset, part.nbytes):
                        self.written.shared_bytes += part.nbytes
                        self.crew.advance(part.nbytes)
                    else:
                        unshared.append(offset)
            if unshared:
                self._write_parts({part: unshared}, descriptor)

    def _values(self, parts: Sequence[Part]) -> Iterator[tuple[int, memoryview]]:
        """Yield pieces of parts with the part's index; vanished values count for the first part."""
        # Imported here, since it imports numpy.
        from upcycle_cli.write.evaluate import evaluate_together

        vanished = list[int]()
        exprs = [part.expr for part in parts]
        try:
            yield from evaluate_together(exprs, self.crew.reader.mapped, vanished.append)
        except OverflowInCastError as error:
            tensor = parts[0].tensor
            raise UpcycleError(
                f"{tensor.name}: a finite value of the dense model becomes infinite "
                f"in {tensor.dtype.lower()}.",
                "Use `dtype` bfloat16 or float32.",
            ) from error
        if vanished:
            self.written.vanished[parts[0].expr] = sum(vanished)

    def _check_source(self) -> None:
        exprs = (part.expr for part in self.layout.parts)
        self.crew.reader.check_unchanged(name for expr in exprs for name in source_names(expr))

    @contextmanager
    def opened(self) -> Iterator[int]:
        """Wait until the file is complete, and yield its descriptor."""
        while not self.complete.wait(_STOP_SECONDS):
            self.crew.check_running()
        with (self.crew.staging.path / self.name).open("rb") as file:
            yield file.fileno()


@contextmanager
def _flushed(descriptor: int) -> Iterator[None]:
    """Write data to the disk steadily, rather than most of it at the end."""
    stop = Event()

    def flush() -> None:
        while not stop.wait(_FLUSH_SECONDS):
            platform.start_writeback(descriptor)

    with ThreadPoolExecutor(1, "upcycle-flusher") as pool:
        flushing = pool.submit(flush)
        try:
            yield
        finally:
            stop.set()
        flushing.result()  # the system reports a failed write once, here or in fsync


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        # A signal or a limit can cut a write short.
        done += os.pwrite(descriptor, data[done:], offset + done)
