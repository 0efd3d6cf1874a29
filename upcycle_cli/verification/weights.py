"""The check `weights`: compare every tensor of the MoE with its expression in the plan.

Equal expressions are evaluated once and compared with all their places. Memory is bounded by the
largest value: files are mapped, and their pages are released on the way. Copies that share extents
on the disk are read once.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache

import numpy as np

from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader
from upcycle_cli.checkpoint.mapped_files import DiskRanges
from upcycle_cli.core.callbacks import Progress
from upcycle_cli.plan.calibration import Calibration
from upcycle_cli.plan.expressions import Expr, num_bytes
from upcycle_cli.plan.output import OutputTensor, Role
from upcycle_cli.plan.plan import Plan
from upcycle_cli.verification.explain import Explainer, Place, stored_leaves
from upcycle_cli.verification.rebuild import is_fitted, why_unproven
from upcycle_cli.verification.result import TRAINED, CheckResult, Findings
from upcycle_cli.verification.unbound import Unbound, is_unbound
from upcycle_cli.write.evaluate import evaluate_together
from upcycle_cli.write.file_layout import bundles

NAME = "weights"
_THREADS = 4  # a disk serves several reads at once
_STEP_BYTES = 8 << 20
_RELEASE_BYTES = 1 << 30
_MADV_POPULATE_READ = 22 if sys.platform == "linux" else mmap.MADV_WILLNEED  # since Linux 5.14


def check_weights(
    plan: Plan,
    moe: Checkpoint,
    watch: Progress,
    fitted: Calibration | None = None,
    recorded: Mapping[str, str] | None = None,
) -> CheckResult:
    """Compare every tensor with the plan; the sources' files must be local.

    Router rows that were fitted to a text must equal the rows of `fitted`, or of another fit if the
    text is at hand. Machines fit slightly different rows, so unbound rows must also have the
    `recorded` SHA-256 of their tensor.
    """
    findings, notes, strange = Findings(), list[str](), list[str]()
    tensors, dtypes = _matched(plan, moe, findings), {k: e.dtype for k, e in moe.tensors.items()}
    unproven = why_unproven(plan) if fitted is None else None
    if unproven is None and is_fitted(plan) and fitted is None:
        from upcycle_cli.calibrate.collect import calibrate

        fitted = calibrate(plan, watch)
    with plan.reader() as source, moe.reader() as held:
        unbound = Unbound(source, {} if fitted is None else fitted.layers, recorded or {})
        for tensor in (tensor for tensor in tensors if is_unbound(tensor.expr)):
            stored = held.mapped(tensor.name), dtypes[tensor.name]
            if tensor.role is Role.ROUTER:
                strange += unbound.read_rows(tensor, *stored)
            else:
                unbound.look_at(tensor, *stored)
                held.release()
        strange += unbound.find_orders()
        exprs = {tensor.name: unbound.bind(tensor.expr) for tensor in tensors}
        compared = {name: expr for name, expr in exprs.items() if not is_unbound(expr)}
        differing = _Scan(source, held, watch).run(
            {name: [*stored_leaves(expr, dtypes[name])] for name, expr in compared.items()}
        )
        words = Explainer(plan, moe, exprs, source, held).explain(differing)
        if not any(each.startswith(TRAINED) for each in words):  # training explains them as well
            findings += strange
        findings += words
    if widened := sum(tensor.dtype != dtypes[tensor.name] for tensor in tensors):
        notes.append(f"{widened} tensors have a wider dtype than planned, without loss.")
    if unbound.orders:
        notes.append(f"{len(unbound.orders)} neuron orders were found from the weights.")
    if skipped := len(tensors) - len(compared):
        notes.append(f"{skipped} tensors could not be compared.")
        unproven = unproven or "noise or new neurons hide the order of the neurons"
    metrics = {
        "tensors": len(compared),
        "bytes": sum(moe.tensors[name].nbytes for name in compared),
    }
    if fitted is not None and is_fitted(plan):
        notes.append("Values that were fitted to the text equal another calibration's.")
    passed = f"All {len(compared):,} tensors are, bit for bit, what convert writes."
    if unproven is not None:
        passed = f"No tensor differs, but not everything is proven: {unproven}."
    is_measured = unproven is not None
    return findings.result(NAME, passed, metrics, " ".join(notes), is_measured=is_measured)


def _matched(plan: Plan, moe: Checkpoint, findings: Findings) -> list[OutputTensor]:
    """Return the tensors to compare; they have the planned dtype or float32."""
    wanted, found = {tensor.name: tensor for tensor in plan.tensors}, list[OutputTensor]()
    findings += (f"{name} is missing" for name in wanted if name not in moe.tensors)
    findings += (f"{name} should not be there" for name in moe.tensors if name not in wanted)
    for name in (name for name in wanted if name in moe.tensors):
        tensor, entry = wanted[name], moe.tensors[name]
        if entry.shape != tensor.shape:
            findings.append(f"{name} has shape {list(entry.shape)} instead of {list(tensor.shape)}")
        elif entry.dtype not in (tensor.dtype, "F32"):
            findings.append(f"{name} is {entry.dtype} instead of {tensor.dtype}")
        else:
            found.append(tensor)
    found.sort(key=lambda tensor: (moe.tensors[tensor.name].shard, moe.tensors[tensor.name].offset))
    return found


@dataclass
class _Scan:
    """Evaluates expressions and compares them with their places in the MoE."""

    source: Reader
    held: Reader
    watch: Progress
    _read: int = 0

    def run(self, tensors: Mapping[str, Sequence[Expr]]) -> list[Place]:
        """Return the leaves that differ, in the order of the files."""
        places: dict[Expr, list[Place]] = {}
        total = done = 0
        for name, exprs in tensors.items():
            start = 0
            for leaf in exprs:
                if num_bytes(leaf):
                    places.setdefault(leaf, []).append(Place(name, start, leaf))
                start += num_bytes(leaf)
            total += start
        differing: list[Place] = []
        self.watch.checked(0, total, "bytes")
        pool = ThreadPoolExecutor(_THREADS, "upcycle-weights")
        try:
            jobs = [
                pool.submit(self._compare, {leaf: places[leaf] for leaf in bundle})
                for bundle in bundles([*places])
            ]
            for job in as_completed(jobs):
                nbytes, wrong = job.result()
                differing += wrong
                done += nbytes
                self.watch.checked(done, total, "bytes")
        finally:
            pool.shutdown(cancel_futures=True)
        order = {name: number for number, name in enumerate(tensors)}
        return sorted(differing, key=lambda each: (order[each.name], each.start))

    def _compare(self, leaves_: Mapping[Expr, Sequence[Place]]) -> tuple[int, set[Place]]:
        """Compare some leaves with all their places; return how many bytes, and what differs."""
        exprs, wrong = [*leaves_], set[Place]()
        positions = [0] * len(exprs)
        for number, value in evaluate_together(exprs, self.source.mapped):
            start, expr = positions[number], exprs[number]
            positions[number] += len(value)
            for step in range(0, len(value), _STEP_BYTES):
                piece = value[step : step + _STEP_BYTES]
                same = set[DiskRanges]()
                for place in leaves_[expr]:
                    begin = place.start + start + step
                    data = self.held.mapped(place.name)[begin : begin + len(piece)]
                    ranges = self.held.on_disk(data)
                    if place in wrong or ranges in same:
                        continue
                    if not self._equal(data, piece):
                        wrong.add(place)
                    elif ranges:
                        same.add(ranges)
        return sum(num_bytes(expr) * len(found) for expr, found in leaves_.items()), wrong

    def _equal(self, data: memoryview, value: memoryview) -> bool:
        self._read += len(value)  # without a lock: a lost count only delays the release
        if self._read >= _RELEASE_BYTES:
            self._read = 0
            self.source.release()
            self.held.release()
        one, other = (np.frombuffer(each, np.uint8) for each in (data, value))
        _populate(one.ctypes.data, len(one))
        return bool(_libc().memcmp(one.ctypes.data, other.ctypes.data, len(one)) == 0)


def _populate(address: int, nbytes: int) -> None:
    """Read the pages of a mapped range in one step instead of one by one."""
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    _libc().madvise(start, address + nbytes - start, _MADV_POPULATE_READ)


@cache
def _libc() -> ctypes.CDLL:
    """Return the C library; ctypes calls it without the interpreter's lock."""
    libc = ctypes.CDLL(None)
    libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
