"""Executes a plan: writes its shards and its index into a directory.

Each unique part of a file is written at its first place; its other places share the extents of the
first where the file system can (`FICLONERANGE`), and are written where it cannot. Bytes that are
the dense model's go from its pages to the file; everything else is computed, once. A few threads do
this side by side, so that reading, arithmetic and writing overlap; each holds one part at a time. A
file is written under a temporary name, made durable, and renamed, so a file that has its name is
complete. Nothing is decided here.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING

from upcycle_cli.checkpoint import INDEX_NAME, Reader, raw_bytes
from upcycle_cli.errors import UpcycleError
from upcycle_cli.expr import Expr, OverflowInCastError, evaluate, stretch_of
from upcycle_cli.layout import Layout, Part, lay_out
from upcycle_cli.outputs import OutputTensor, Role
from upcycle_cli.plan import Plan, Shard
from upcycle_cli.publish import Workspace
from upcycle_cli.reflink import can_share, share

if TYPE_CHECKING:
    import torch

TEMPORARY_SUFFIX = ".writing"
# Less than a huge page: docs/decisions.md says why.
_WRITE_BYTES = (1 << 21) - 4096
_FLUSH_SECONDS = 0.1
_SWITCH_SECONDS = 5e-5

Progress = Callable[[int], None]
"""Called with the number of bytes that have just found their place."""


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How to write; the bytes that are read back are the same for all of them."""

    workers: int = 0
    """Threads; 0 for as many as the process may use processors, at most 4."""
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
        return self.workers or min(4, len(os.sched_getaffinity(0)))


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


@dataclass
class _Copies:
    """Where each part was first written, in whatever file, and whether extents can be shared."""

    enabled: bool
    first: dict[Expr, tuple[Path, int]] = field(default_factory=dict)


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
    copies = _Copies(enabled=options.reflink and can_share(workspace.path))
    with plan.source.reader() as reader:
        for shard in shards:
            task = _Task(lay_out(shard), reader, copies, progress)
            noted = workspace.reusable(shard.name, task.layout.nbytes)
            if noted is None:
                task.write(workspace.path / shard.name, options)
                noted = {"routers": task.routers, "shared_bytes": task.shared_bytes}
                workspace.note(shard.name, noted)
            else:
                progress(shard.nbytes)
                written.reused_bytes += shard.nbytes
            written.add(noted["routers"], noted["shared_bytes"])
            for part in task.layout.parts:
                place = (workspace.path / shard.name, part.offsets[0])
                copies.first.setdefault(part.expr, place)
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


@contextmanager
def _single_threaded_torch() -> Iterator[None]:
    with _hurried_import():
        import torch
    # The parts run side by side already; threads inside each would only get in each other's way.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _hurried_import() -> Iterator[None]:
    """Import something large while other threads copy."""
    # They want the interpreter for a moment after every piece; and an import leaves no garbage.
    interval, collects = sys.getswitchinterval(), gc.isenabled()
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.disable()
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        if collects:
            gc.enable()


@dataclass
class _Task:
    """The writing of one file."""

    layout: Layout
    reader: Reader
    copies: _Copies
    progress: Progress
    routers: dict[str, str] = field(default_factory=dict)
    shared_bytes: int = 0
    lock: Lock = field(default_factory=Lock)
    stopping: Event = field(default_factory=Event)
    turn: Lock = field(default_factory=Lock)
    """Two threads that write one file at once spin on its lock in the kernel."""

    def write(self, path: Path, options: WriteOptions) -> None:
        temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
        try:
            with temporary.open("w+b") as file:
                os.ftruncate(file.fileno(), self.layout.nbytes)
                _write_at(file.fileno(), memoryview(self.layout.header), 0)
                with _flushed(file.fileno()) if options.fsync else nullcontext():
                    self._write_parts(file.fileno(), options.num_threads)
                if options.fsync:
                    os.fsync(file.fileno())
        except OSError as error:
            if error.errno == errno.EFAULT:
                self.reader.check_unchanged()  # its pages are gone where it was cut off
            # Writing through a descriptor does not say to which file.
            raise OSError(error.errno, error.strerror, str(path)) from error
        temporary.rename(path)

    def _write_parts(self, descriptor: int, num_threads: int) -> None:
        copied: list[Part] = []
        computed: list[Part] = []
        for part in self.layout.parts:
            (computed if stretch_of(part.expr) is None else copied).append(part)
        with ThreadPoolExecutor(num_threads, "upcycle-writer") as pool:
            try:
                jobs = [pool.submit(self._write_part, part, descriptor) for part in copied]
                # Importing torch takes as long as copying gigabytes, so that goes on meanwhile.
                with _single_threaded_torch() if computed else nullcontext():
                    jobs += [pool.submit(self._write_part, part, descriptor) for part in computed]
                    for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
                        job.result()
            finally:
                # After a failure or a signal nobody waits for the rest of a large part.
                self.stopping.set()
                pool.shutdown(cancel_futures=True)

    def _write_part(self, part: Part, descriptor: int) -> None:
        router = part.tensor.role is Role.ROUTER
        # The values of a router are wanted in any case, for its digest.
        data = self._data(part) if router else None
        if data is not None:
            self.routers[part.tensor.name] = hashlib.sha256(data).hexdigest()
        with self._earlier(part) as earlier:
            origin = earlier
            for offset in part.offsets:
                if origin is not None and self._share(origin, descriptor, offset, part.nbytes):
                    continue
                data = self._data(part) if data is None else data
                with self.turn:
                    _write_at(descriptor, data, offset, self._advance)
                origin = origin or (descriptor, offset)

    def _data(self, part: Part) -> memoryview:
        stretch = stretch_of(part.expr)
        if stretch is None:
            return raw_bytes(_compute(part.expr, part.tensor, self.reader))
        end = stretch.start + stretch.nbytes
        return self.reader.mapped(stretch.name)[stretch.start : end]

    @contextmanager
    def _earlier(self, part: Part) -> Iterator[tuple[int, int] | None]:
        """Yield a descriptor and offset of the part in a file that is complete, if there is one."""
        place = self.copies.first.get(part.expr) if self.copies.enabled else None
        if place is None:
            yield None
            return
        with place[0].open("rb") as file:
            yield file.fileno(), place[1]

    def _share(self, origin: tuple[int, int], descriptor: int, offset: int, nbytes: int) -> bool:
        """Let bytes share the extents of equal ones; False where that cannot be done."""
        if not self.copies.enabled or not share(*origin, descriptor, offset, nbytes):
            return False
        with self.lock:
            self.shared_bytes += nbytes
        self._advance(nbytes)
        return True

    def _advance(self, nbytes: int) -> None:
        if self.stopping.is_set():
            raise _StoppedError
        with self.lock:
            self.progress(nbytes)


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


def _compute(expr: Expr, tensor: OutputTensor, reader: Reader) -> torch.Tensor:
    try:
        return evaluate(expr, reader.tensor).contiguous()
    except OverflowInCastError as error:
        raise UpcycleError(
            f"{tensor.name}: a finite value of the dense model becomes infinite "
            f"in {tensor.dtype.lower()}.",
            "Use --dtype bfloat16 or float32.",
        ) from error


def _write_at(
    descriptor: int,
    data: memoryview,
    offset: int,
    progress: Progress | None = None,
) -> None:
    done = 0
    while done < len(data):
        # A signal or a limit can cut a write short.
        written = os.pwrite(descriptor, data[done : done + _WRITE_BYTES], offset + done)
        done += written
        if progress is not None:
            progress(written)
