"""Executes a plan: writes its shards and its index into a directory.

Each unique part of a file is written at its first place; its other places share the extents of the
first where the file system can (`FICLONERANGE`), and are written where it cannot. Bytes that are
the dense model's go from its pages to the file; everything else is computed, once. A few threads do
this side by side, each in a file of its own while there are enough, so that reading, arithmetic,
writing and waiting for the disk overlap; each holds one part at a time. A file is written under a
temporary name, made durable, and renamed, so a file that has its name is complete.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass, field
from functools import partial
from threading import Event, Lock

from xxhash import xxh3_128

from upcycle_cli.checkpoint.checkpoint import Reader
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.platform import make_durable, num_processors, share, start_writeback
from upcycle_cli.plan.expressions import Expr, gather_input, source_names
from upcycle_cli.plan.merge import MergedReader
from upcycle_cli.plan.output import Role, Shard
from upcycle_cli.plan.plan import Plan
from upcycle_cli.write.file_layout import Layout, Part, file_digest, lay_out, read_back, repetitions
from upcycle_cli.write.running_stats import Moments, noted_moments
from upcycle_cli.write.staging import TEMPORARY_SUFFIX, Workspace
from upcycle_cli.write.transpose import in_pieces

# Much less than a huge page: docs/decisions.md says why.
_PIECE_BYTES = 1 << 19
_FLUSH_SECONDS = 0.02
_STOP_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How to write; the bytes that are read back are the same for all of them."""

    workers: int = 0
    """Threads; 0 for one more than the process may use processors, at most 4."""
    reflink: bool = True
    """Share extents between equal parts where the file system can."""
    fsync: bool = True
    """Make every file durable before it gets its name."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise UpcycleError(f"the number of workers must be positive, not {self.workers}.")

    @property
    def num_threads(self) -> int:
        """The number of threads to use: one more, as one of them usually waits for the disk."""
        return self.workers or min(4, num_processors() + 1)


@dataclass
class Written:
    """What there is now, and how the bytes came about."""

    routers: dict[str, str] = field(default_factory=dict)
    """Each router's SHA-256 by tensor name."""
    vanished: dict[Expr, int] = field(default_factory=dict)
    """Of the parts in which values became zero that were not: how many did."""
    moments: dict[str, Moments] = field(default_factory=dict)
    """What the draws of experts went by, by their stream."""
    shared_bytes: int = 0
    """Bytes that share extents with equal ones, and take no space."""
    reused_bytes: int = 0
    """Bytes that an earlier, unfinished run had written."""

    def add(self, other: Written) -> None:
        """Add what was written elsewhere."""
        self.routers |= other.routers
        self.vanished |= other.vanished
        self.moments |= other.moments
        self.shared_bytes += other.shared_bytes
        self.reused_bytes += other.reused_bytes


class _StoppedError(Exception):
    """Another part failed, or a signal came: this one need not be finished."""


def write_weights(
    plan: Plan,
    shards: Sequence[Shard],
    workspace: Workspace,
    *,
    progress: Callable[[int], None],
    options: WriteOptions,
) -> Written:
    """Write the shards that no earlier run has finished; UpcycleError when a value overflows."""
    with plan.reader() as reader:
        shares = options.reflink and workspace.folder.can_share()
        crew = _Crew(reader, workspace, options, progress, shares)
        tasks = [_Task(shard.name, lay_out(shard), crew) for shard in shards]
        for task in tasks:
            for part in task.layout.parts:
                crew.first.setdefault(part.expr, (task, part.offsets[0]))
        crew.run([task.take_over for task in tasks if workspace.noted(task.name)])
        missing = [task for task in tasks if not task.complete.is_set()]
        crew.threads_per_file = options.num_threads // min(options.num_threads, len(missing) or 1)
        crew.run([task.write for task in missing])
    written = Written()
    for task in tasks:
        written.add(task.written)
    return written


@dataclass
class _Crew:
    """The threads that write, and what they have in common."""

    reader: Reader | MergedReader
    workspace: Workspace
    options: WriteOptions
    progress: Callable[[int], None]
    shares: bool
    """Whether equal parts are to share extents, and can."""
    first: dict[Expr, tuple[_Task, int]] = field(default_factory=dict)
    """The first file that holds a part, and where; also when it is not complete yet."""
    digests: dict[Expr, bytes] = field(default_factory=dict)
    """Of the bytes of each part, once they have been written or read."""
    threads_per_file: int = 1
    stopping: Event = field(default_factory=Event)
    lock: Lock = field(default_factory=Lock)

    def run(self, work: Sequence[Callable[[], None]]) -> None:
        """Do this for several files at once: while the disk has one, the next is filled."""
        if work:
            self.run_in(min(self.options.num_threads, len(work)), "upcycle-file", work)

    def run_in(self, threads: int, name: str, work: Sequence[Callable[[], None]]) -> None:
        """Do this in threads of their own; raise the first failure, once all have ended."""
        with ThreadPoolExecutor(threads, name) as pool:
            try:
                jobs = [pool.submit(each) for each in work]
                if wait(jobs, return_when=FIRST_EXCEPTION).not_done:
                    self.stopping.set()  # after a failure nobody waits for the rest of a large part
            except BaseException:
                self.stopping.set()
                raise
            finally:
                pool.shutdown(cancel_futures=True)
        errors = filter(None, (job.exception() for job in jobs if not job.cancelled()))
        # What made the others stop says more than that they stopped.
        for error in sorted(errors, key=lambda error: isinstance(error, _StoppedError)):
            raise error

    def advance(self, nbytes: int) -> None:
        """Tell of bytes that have found their place; _StoppedError when no more are wanted."""
        if self.stopping.is_set():
            raise _StoppedError
        if nbytes:
            with self.lock:
                self.progress(nbytes)


@dataclass(eq=False)
class _Task:
    """The writing of one file."""

    name: str
    layout: Layout
    crew: _Crew
    written: Written = field(default_factory=Written)
    complete: Event = field(default_factory=Event)
    turn: Lock = field(default_factory=Lock)
    """Two threads that write one file at once spin on its lock in the kernel."""
    told: int = 0
    """Bytes that were found in place and told of, and are now to be written again."""

    def take_over(self) -> None:
        """Take what an earlier run has written, if every byte is still what it was."""
        workspace = self.crew.workspace
        noted = workspace.noted(self.name)
        try:
            with workspace.folder.read_own(self.name) as file:
                found = read_back(file, self.layout, self._advance_checking)
        except (OSError, UpcycleError):
            return  # what cannot be read is written again
        held = noted_moments(noted.get("moments"), self.layout.drawn)
        if not found or held is None or noted.get("xxh3_128") != file_digest(self.layout, found[0]):
            return
        self.written.moments = held
        digests, self.written.routers = found
        shared, vanished = noted.get("shared_bytes"), noted.get("vanished")
        if type(shared) is int and 0 <= shared <= self.layout.nbytes:
            self.written.shared_bytes = shared
        for index, part in enumerate(self.layout.parts):
            count = vanished.get(str(index)) if isinstance(vanished, dict) else None
            if type(count) is int and count > 0:
                self.written.vanished[part.expr] = count
        self.written.reused_bytes = self.layout.nbytes - len(self.layout.header)
        self.crew.digests |= digests
        self.complete.set()

    def _facts(self) -> dict[str, object]:
        """Return what a later run has to know of the file, for `take_over`."""
        counts = [self.written.vanished.get(part.expr) for part in self.layout.parts]
        return {
            "xxh3_128": file_digest(self.layout, self.crew.digests),
            "shared_bytes": self.written.shared_bytes,
            "vanished": {str(index): count for index, count in enumerate(counts) if count},
            "moments": {name: astuple(each) for name, each in self.written.moments.items()},
        }

    def write(self) -> None:
        """Write the file under a temporary name, make it durable, rename it, and note that."""
        folder, durable = self.crew.workspace.folder, self.crew.options.fsync
        temporary = self.name + TEMPORARY_SUFFIX
        try:
            with os.fdopen(folder.create(temporary), "wb", buffering=0) as file:
                descriptor = file.fileno()
                os.ftruncate(descriptor, self.layout.nbytes)
                _write_at(descriptor, memoryview(self.layout.header), 0)
                work = [partial(self._write_parts, each, descriptor) for each in self._bundles()]
                with _flushed(descriptor) if durable else nullcontext():
                    self.crew.run_in(self.crew.threads_per_file, "upcycle-writer", work)
                if self.crew.shares:
                    start_writeback(descriptor)  # or each sharing would wait for the disk
                    self._share_parts(descriptor)
                if durable:
                    make_durable(descriptor)
            self._check_source()
            folder.rename(temporary, self.name)
            self.crew.workspace.note(self.name, self._facts())
        except OSError as error:
            if error.errno == errno.EFAULT:
                self._check_source()  # its pages are gone where it was cut off
            # A write that fails does not say in which file.
            raise OSError(error.errno, error.strerror, str(folder.path / self.name)) from error
        self.complete.set()

    def _bundles(self) -> list[list[Part]]:
        """Return the parts, those together that gather their columns from the same rows."""
        bundles: dict[tuple[Expr, bool], list[Part]] = {}
        for part in self.layout.parts:
            rows = gather_input(part.expr)
            # What is gathered from may be a part of its own.
            bundles.setdefault((rows or part.expr, rows is None), []).append(part)
        return [*bundles.values()]

    def _write_parts(self, parts: Sequence[Part], descriptor: int) -> None:
        """Write parts to all their places, or to those that the others will share."""
        if self.crew.stopping.is_set():
            raise _StoppedError
        if len(parts) == 1 and not in_pieces(parts[0].expr):
            self._write_part(parts[0], descriptor)
            return
        written = {part: offsets for part in parts if (offsets := self._own_offsets(part))}
        places, done = [*written.values()], [0] * len(written)
        digests = [xxh3_128() for _ in written]
        for i, piece in self._pieces([*written]) if written else ():
            digests[i].update(piece)
            with self.turn:
                for offset in places[i]:
                    _write_at(descriptor, piece, offset + done[i])
                    self._advance(len(piece))
            done[i] += len(piece)
        for part, digest in zip(written, digests, strict=True):
            self.crew.digests[part.expr] = digest.digest()

    def _own_offsets(self, part: Part) -> tuple[int, ...]:
        """Return where a part is to be written here, and not shared."""
        if not self.crew.shares:
            return part.offsets
        return part.offsets[:1] if self.crew.first[part.expr][0] is self else ()

    def _write_part(self, part: Part, descriptor: int) -> None:
        offsets, router = self._own_offsets(part), part.tensor.role is Role.ROUTER
        if not offsets and not router:
            return
        data = self._data(part)
        if router:
            self.written.routers[part.tensor.name] = hashlib.sha256(data).hexdigest()
        self._write_at(descriptor, part, data, offsets)

    def _share_parts(self, descriptor: int) -> None:
        """Let all other places share the extents of the first, or write them where that fails."""
        unshared: dict[Part, list[int]] = {}
        for run in repetitions(self.layout, self, self.crew.first):
            with nullcontext(descriptor) if run.origin is self else run.origin.opened() as origin:
                shared = share(origin, run.source, descriptor, run.target, run.nbytes)
            if shared:
                self.written.shared_bytes += run.nbytes
                self._advance(run.nbytes)
                continue
            for part, offset in run.places:
                unshared.setdefault(part, []).append(offset)
        for part, offsets in unshared.items():
            self._write_at(descriptor, part, self._data(part), offsets)

    def _data(self, part: Part) -> memoryview:
        # Not before something is to be computed: this imports numpy.
        from upcycle_cli.write.evaluate import evaluate

        vanished, drawn = list[int](), self.written.moments.__setitem__
        with _overflow_told(part):
            data = evaluate(part.expr, self.crew.reader.mapped, vanished.append, drawn)
        if vanished:
            self.written.vanished[part.expr] = sum(vanished)
        return data

    def _pieces(self, parts: Sequence[Part]) -> Iterator[tuple[int, memoryview]]:
        """Yield a few rows of a part, and which it is; what vanishes is noted of the first."""
        from upcycle_cli.write.evaluate import evaluate_together

        vanished, exprs = list[int](), [part.expr for part in parts]
        with _overflow_told(parts[0]):
            yield from evaluate_together(exprs, self.crew.reader.mapped, vanished.append)
        if vanished:
            self.written.vanished[parts[0].expr] = sum(vanished)

    def _check_source(self) -> None:
        """Raise UpcycleError when a file that was read is not what it was before."""
        exprs = (part.expr for part in self.layout.parts)
        self.crew.reader.check_unchanged(name for expr in exprs for name in source_names(expr))

    @contextmanager
    def opened(self) -> Iterator[int]:
        """Yield a descriptor of the file, once it is complete."""
        while not self.complete.wait(_STOP_SECONDS):
            if self.crew.stopping.is_set():
                raise _StoppedError
        with self.crew.workspace.folder.read_own(self.name) as file:
            yield file.fileno()

    def _write_at(
        self, descriptor: int, part: Part, data: memoryview, offsets: Sequence[int]
    ) -> None:
        """Write a part to several places, piece by piece: each is read from memory once."""
        digest = xxh3_128()
        with self.turn:
            for start in range(0, len(data), _PIECE_BYTES):
                piece = data[start : start + _PIECE_BYTES]
                digest.update(piece)
                for offset in offsets:
                    _write_at(descriptor, piece, offset + start)
                    self._advance(len(piece))
        self.crew.digests[part.expr] = digest.digest()

    def _advance_checking(self, nbytes: int) -> None:
        self.told += nbytes
        self.crew.advance(nbytes)

    def _advance(self, nbytes: int) -> None:
        """Tell of bytes that are in place, unless they were told of when they were checked."""
        known = min(self.told, nbytes)
        self.told -= known
        self.crew.advance(nbytes - known)


@contextmanager
def _overflow_told(part: Part) -> Iterator[None]:
    """Say in words that a part does not fit its dtype."""
    from upcycle_cli.write.evaluate import OverflowInCastError

    try:
        yield
    except OverflowInCastError as error:
        raise UpcycleError(
            f"{part.tensor.name}: a finite value of the dense model becomes infinite "
            f"in {part.tensor.dtype.lower()}.",
            "Use --dtype bfloat16 or float32.",
        ) from error


@contextmanager
def _flushed(descriptor: int) -> Iterator[None]:
    """Have the disk take what is written as it comes, rather than most of it at the end."""
    stop = Event()

    def flush() -> None:
        while not stop.wait(_FLUSH_SECONDS):
            start_writeback(descriptor)

    with ThreadPoolExecutor(1, "upcycle-flusher") as pool:
        flushing = pool.submit(flush)
        try:
            yield
        finally:
            stop.set()
        # The system tells of a failed write once: whoever hears of it must say so.
        flushing.result()


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        # A signal or a limit can cut a write short.
        done += os.pwrite(descriptor, data[done:], offset + done)
