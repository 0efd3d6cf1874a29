"""Executes a plan: writes its shards and its index into a directory.

Each unique part of a file is written at its first place; its other places share the extents of the
first where the file system can (`FICLONERANGE`), and are written where it cannot. Bytes that are
the dense model's go from its pages to the file; everything else is computed, once. A few threads do
this side by side, each in a file of its own while there are enough, so that reading, arithmetic,
writing and waiting for the disk overlap; each holds one part at a time. A file is written under a
temporary name, made durable, and renamed, so a file that has its name is complete. Nothing is
decided here.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock

from upcycle_cli.checkpoint import INDEX_NAME, Reader
from upcycle_cli.errors import UpcycleError
from upcycle_cli.expr import Expr, OverflowInCastError, evaluate
from upcycle_cli.layout import Layout, Part, lay_out
from upcycle_cli.outputs import Role
from upcycle_cli.plan import Plan, Shard
from upcycle_cli.publish import Workspace
from upcycle_cli.reflink import BLOCK_BYTES, can_share, share

TEMPORARY_SUFFIX = ".writing"
# Much less than a huge page: docs/decisions.md says why.
_PIECE_BYTES = 1 << 19
_FLUSH_SECONDS = 0.02
_STOP_SECONDS = 0.1

Progress = Callable[[int], None]
"""Called with the number of bytes that have just found their place."""


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
        """The number of threads to use."""
        # One more, because one of them usually waits for the disk.
        return self.workers or min(4, len(os.sched_getaffinity(0)) + 1)


@dataclass
class Written:
    """What there is now: each router's SHA-256 by tensor name, and how the bytes came about."""

    routers: dict[str, str] = field(default_factory=dict)
    shared_bytes: int = 0
    """Bytes that share extents with equal ones, and take no space."""
    reused_bytes: int = 0
    """Bytes that an earlier, unfinished run had written."""

    def add(self, routers: Mapping[str, str], shared_bytes: int, reused_bytes: int = 0) -> None:
        """Add what was written elsewhere."""
        self.routers |= routers
        self.shared_bytes += shared_bytes
        self.reused_bytes += reused_bytes


class _StoppedError(Exception):
    """Another part failed, or a signal came: this one need not be finished."""


def write_weights(
    plan: Plan,
    shards: Sequence[Shard],
    workspace: Workspace,
    *,
    progress: Progress,
    options: WriteOptions,
) -> Written:
    """Write those of the plan's shards that an earlier run has not finished.

    Raises UpcycleError when a value overflows the output dtype, OSError when writing fails.
    """
    written = Written()
    with plan.source.reader() as reader:
        crew = _Crew(reader, workspace, options, progress)
        tasks = [_Task(shard.name, lay_out(shard), crew) for shard in shards]
        for task, shard in zip(tasks, shards, strict=True):
            if task.take_over():
                progress(shard.nbytes)
                written.reused_bytes += shard.nbytes
            for part in task.layout.parts:
                crew.first.setdefault(part.expr, (task, part.offsets[0]))
        crew.write([task for task in tasks if not task.complete.is_set()])
    for task in tasks:
        written.add(task.routers, task.shared_bytes)
    return written


def write_index(plan: Plan, directory: Path) -> None:
    """Write the index that says which file holds which tensor, when there are several."""
    if len(plan.shards) == 1:
        return
    index = {
        "metadata": {"total_size": plan.nbytes, "total_parameters": plan.total_parameters},
        "weight_map": {
            tensor.name: shard.name for shard in plan.shards for tensor in shard.tensors
        },
    }
    write_json(directory / INDEX_NAME, index)


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class _Crew:
    """The threads that write, and what they have in common."""

    def __init__(
        self, reader: Reader, workspace: Workspace, options: WriteOptions, progress: Progress
    ) -> None:
        self.reader = reader
        self.workspace = workspace
        self.options = options
        self.shares = options.reflink and can_share(workspace.path)
        self.first: dict[Expr, tuple[_Task, int]] = {}
        """The first file that holds a part, and where; also when it is not complete yet."""
        self.threads_per_file = 1
        self.stopping = Event()
        self.lock = Lock()
        self._progress = progress

    def write(self, tasks: Sequence[_Task]) -> None:
        """Write these files, several at once: while the disk has one, the next is filled."""
        if not tasks:
            return
        num_files = min(self.options.num_threads, len(tasks))
        self.threads_per_file = self.options.num_threads // num_files
        with ThreadPoolExecutor(num_files, "upcycle-file") as pool:
            try:
                jobs = [pool.submit(task.write) for task in tasks]
                wait(jobs, return_when=FIRST_EXCEPTION)
            finally:
                # After a failure or a signal nobody waits for the rest of a large part.
                self.stopping.set()
                pool.shutdown(cancel_futures=True)
        for job in jobs:
            error = None if job.cancelled() else job.exception()
            if error is not None and not isinstance(error, _StoppedError):
                raise error

    def advance(self, nbytes: int) -> None:
        """Tell of bytes that have found their place; _StoppedError when no more are wanted."""
        if self.stopping.is_set():
            raise _StoppedError
        with self.lock:
            self._progress(nbytes)


@dataclass(eq=False)
class _Task:
    """The writing of one file."""

    name: str
    layout: Layout
    crew: _Crew
    routers: dict[str, str] = field(default_factory=dict)
    shared_bytes: int = 0
    complete: Event = field(default_factory=Event)
    turn: Lock = field(default_factory=Lock)
    """Two threads that write one file at once spin on its lock in the kernel."""

    def take_over(self) -> bool:
        """Whether an earlier run has written this file."""
        noted = self.crew.workspace.reusable(self.name, self.layout.nbytes)
        if noted is None:
            return False
        self.routers, self.shared_bytes = noted["routers"], noted["shared_bytes"]
        self.complete.set()
        return True

    def write(self) -> None:
        """Write the file under a temporary name, make it durable, rename it, and note that."""
        workspace, durable = self.crew.workspace, self.crew.options.fsync
        path = workspace.path / self.name
        temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
        try:
            with temporary.open("w+b") as file:
                os.ftruncate(file.fileno(), self.layout.nbytes)
                _write_at(file.fileno(), memoryview(self.layout.header), 0)
                with _flushed(file.fileno()) if durable else nullcontext():
                    self._write_parts(file.fileno())
                if self.crew.shares:
                    os.fdatasync(file.fileno())  # or each sharing would wait for the disk
                    self._share_parts(file.fileno())
                if durable:
                    os.fsync(file.fileno())
            temporary.rename(path)
            workspace.note(self.name, {"routers": self.routers, "shared_bytes": self.shared_bytes})
        except OSError as error:
            if error.errno == errno.EFAULT:
                self.crew.reader.check_unchanged()  # its pages are gone where it was cut off
            # A write that fails does not say in which file.
            raise OSError(error.errno, error.strerror, str(path)) from error
        self.complete.set()

    def _write_parts(self, descriptor: int) -> None:
        with ThreadPoolExecutor(self.crew.threads_per_file, "upcycle-writer") as pool:
            try:
                jobs = [
                    pool.submit(self._write_part, part, descriptor) for part in self.layout.parts
                ]
                for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
                    job.result()
            except BaseException:
                self.crew.stopping.set()
                raise
            finally:
                pool.shutdown(cancel_futures=True)

    def _write_part(self, part: Part, descriptor: int) -> None:
        """Write a part to all its places, or to the one that the others will share."""
        if self.crew.stopping.is_set():
            raise _StoppedError
        offsets = part.offsets
        if self.crew.shares:
            offsets = offsets[:1] if self.crew.first[part.expr][0] is self else ()
        router = part.tensor.role is Role.ROUTER
        if not offsets and not router:
            return
        data = self._data(part)
        if router:
            self.routers[part.tensor.name] = hashlib.sha256(data).hexdigest()
        self._write_at(descriptor, data, offsets)

    def _share_parts(self, descriptor: int) -> None:
        """Let all other places share the extents of the first, or write them where that fails."""
        unshared: dict[Part, list[int]] = {}
        for run in self._runs():
            with nullcontext(descriptor) if run.task is self else run.task.opened() as origin:
                shared = share(origin, run.source, descriptor, run.target, run.nbytes)
            if shared:
                self.shared_bytes += run.nbytes
                self.crew.advance(run.nbytes)
                continue
            for part, offset in run.places:
                unshared.setdefault(part, []).append(offset)
        for part, offsets in unshared.items():
            self._write_at(descriptor, self._data(part), offsets)

    def _runs(self) -> list[_Run]:
        """Return the places that are not the first of their bytes, neighbours together.

        The copies of an expert, or of all the experts of a group, repeat its parts in their order.
        """
        places: list[tuple[int, Part, _Task, int]] = []
        for part in self.layout.parts:
            task, first = self.crew.first[part.expr]
            offsets = part.offsets[1:] if task is self else part.offsets
            places += [(offset, part, task, first) for offset in offsets]
        runs: list[_Run] = []
        for offset, part, task, first in sorted(places, key=lambda place: place[0]):
            if not (runs and runs[-1].goes_on(task, first, offset, part.nbytes)):
                runs.append(_Run(task, first, offset))
            runs[-1].places.append((part, offset))
            runs[-1].nbytes += part.nbytes
        return runs

    def _data(self, part: Part) -> memoryview:
        try:
            return evaluate(part.expr, self.crew.reader.mapped)
        except OverflowInCastError as error:
            raise UpcycleError(
                f"{part.tensor.name}: a finite value of the dense model becomes infinite "
                f"in {part.tensor.dtype.lower()}.",
                "Use --dtype bfloat16 or float32.",
            ) from error

    @contextmanager
    def opened(self) -> Iterator[int]:
        """Yield a descriptor of the file, once it is complete."""
        while not self.complete.wait(_STOP_SECONDS):
            if self.crew.stopping.is_set():
                raise _StoppedError
        with (self.crew.workspace.path / self.name).open("rb") as file:
            yield file.fileno()

    def _write_at(self, descriptor: int, data: memoryview, offsets: Sequence[int]) -> None:
        """Write the same bytes to several places, piece by piece: each is read from memory once."""
        with self.turn:
            for start in range(0, len(data), _PIECE_BYTES):
                piece = data[start : start + _PIECE_BYTES]
                for offset in offsets:
                    _write_at(descriptor, piece, offset + start)
                    self.crew.advance(len(piece))


@dataclass(eq=False)
class _Run:
    """Consecutive places whose bytes are, one after the other, at `source` in a file."""

    task: _Task
    source: int
    target: int
    nbytes: int = 0
    places: list[tuple[Part, int]] = field(default_factory=list)

    def goes_on(self, task: _Task, source: int, target: int, nbytes: int) -> bool:
        """Whether a part continues this run; only whole blocks can be shared, or joined."""
        follows = (self.source + self.nbytes, self.target + self.nbytes) == (source, target)
        return task is self.task and follows and not (nbytes | self.nbytes) % BLOCK_BYTES


@contextmanager
def _flushed(descriptor: int) -> Iterator[None]:
    """Have the disk take what is written as it comes, rather than most of it at the end."""
    stop = Event()

    def flush() -> None:
        while not stop.wait(_FLUSH_SECONDS):
            os.fdatasync(descriptor)

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
