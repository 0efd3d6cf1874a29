"""How fast upcycle converts, against what the disk allows and against the other ways to do it.

    python tests/benchmarks/throughput.py [--sizes 0.6,1.2,2.4] [--rounds 3]
    sudo python tests/benchmarks/throughput.py --filesystems ...

prints Markdown tables: for each size of a dense checkpoint (TinyLlama's shape, bfloat16, in GB),
upcycle, a raw `pwrite` of as many bytes, mergekit-moe and a transformers script, alternating, in
one run, medians of several rounds. Then the limits that upcycle sets itself, and whether each held.
With `--filesystems` also upcycle with shared extents on XFS and Btrfs, on loop devices, which takes
root. mergekit is installed into a virtual environment of its own under ~/.cache/upcycle-benchmark.

All is on one file system (`--directory`, by default the temporary directory); it needs seven times
the largest dense size there, and the same in memory for the transformers script. The source is in
the page cache, warmed before each run, and what a run has left to be written is written before the
next one starts. Just before each run as many bytes are written to a file and thrown away: a virtual
machine gives free memory back to its host within seconds, and touching it again costs more than
writing to it, which would fall on whoever takes a second to start.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from file_systems import MAKE, UnavailableError, file_system, used_bytes
from speed.contestants import (
    MERGEKIT,
    TRANSFORMERS,
    UPCYCLE_SHUFFLED,
    Contestant,
    NotInstalledError,
    by_transformers,
    install_mergekit,
    mergekit,
    raw_pwrite,
    raw_pwrite_command,
    upcycle,
    versions,
)
from speed.dense import make_dense, make_small
from speed.measure import FailedError, disk_bytes, importing, measure
from speed.report import Limit, Result, limits_table, sharing_limits, table, writing_limits

from upcycle_cli import Recipe
from upcycle_cli.checkpoint.checkpoint import open_checkpoint
from upcycle_cli.plan.plan import Plan
from upcycle_cli.plan.upcycle import build_plan

SHORT = Recipe(expansion=8, granularity=1, top_k=2)
START_UP_COUNTS_FROM_GB = 2.4


def main() -> None:
    """Run everything and print it."""
    arguments = _arguments()
    directory = Path(tempfile.mkdtemp(prefix="upcycle-benchmark-", dir=arguments.directory))
    try:
        report = _Benchmark(directory, arguments.rounds, arguments.peer_rounds)
        for gigabytes in arguments.sizes if arguments.filesystems != "only" else ():
            report.writing(gigabytes)
        if arguments.filesystems:
            for kind in MAKE:
                report.sharing(kind, max(arguments.sizes))
    finally:
        shutil.rmtree(directory)


class _Benchmark:
    """Measures and prints."""

    def __init__(self, directory: Path, rounds: int, peer_rounds: int) -> None:
        self.directory = directory
        self.rounds = rounds
        self.peer_rounds = peer_rounds
        importing("torch")  # which may read it from the disk
        self.torch = importing("torch")
        self.numpy_anon_bytes = importing("numpy").peak_anon_bytes
        self.mergekit: Path | None = None
        self.mergekit_anon_bytes = 0
        self.no_mergekit = "not wanted"
        if peer_rounds:
            try:
                self.mergekit = install_mergekit()
                self.mergekit_anon_bytes = importing("torch", str(self.mergekit)).peak_anon_bytes
            except (NotInstalledError, FailedError) as error:
                self.no_mergekit = str(error)
        machine = _machine(directory) | {
            "import torch": f"{self.torch.wall_seconds:.2f} s, "
            f"{self.torch.peak_anon_bytes / 1e6:.0f} MB of RssAnon",
            "mergekit": versions(self.mergekit) if self.mergekit else self.no_mergekit,
        }
        print("\n".join(f"- {name}: {value}" for name, value in machine.items()), flush=True)

    def writing(self, gigabytes: float) -> None:
        """Compare everyone at one size."""
        dense = self.directory / "dense"
        dense_bytes = make_dense(dense, gigabytes)
        plan = _plan(dense)
        contestants = [
            part
            for fsync in (True, False)
            for part in (
                raw_pwrite(dense, plan.nbytes, fsync=fsync),
                upcycle(dense, "E8G1T2", fsync=fsync),
                upcycle(dense, "E8G8T8", fsync=fsync),
                upcycle(dense, "E8G8T8", fsync=fsync, name=UPCYCLE_SHUFFLED, order="shuffled"),
            )
        ]
        if self.mergekit:
            contestants.append(mergekit(dense, self.mergekit, self.peer_rounds))
        if self.peer_rounds:
            contestants.append(by_transformers(dense, self.peer_rounds))
        results = self._alternate(
            contestants,
            dense / "model.safetensors",
            self.directory / "output",
            disk_bytes,
            nbytes=plan.nbytes,
        )
        limits = writing_limits(
            results, start_up_counts=dense_bytes >= 0.95e9 * START_UP_COUNTS_FROM_GB
        )
        _show(
            f"{dense_bytes / 1e9:.2f} GB dense ({plan.family.dense.num_layers} layers), "
            f"{plan.nbytes / 1e9:.2f} GB of MoE",
            results,
            limits,
        )
        shutil.rmtree(dense)

    def sharing(self, kind: str, gigabytes: float) -> None:
        """Compare upcycle with extents shared to a pwrite of the bytes that are not."""
        dense = self.directory / "dense"
        dense_bytes = make_dense(dense, gigabytes)
        plan = _plan(dense)
        unique = dense_bytes + sum(t.nbytes for t in plan.tensors if t.role == "router")
        title = (
            f"{kind}, {dense_bytes / 1e9:.2f} GB dense, {plan.nbytes / 1e9:.2f} GB of MoE, "
            f"of which {unique / 1e9:.2f} GB are unique"
        )
        contestants = [
            raw_pwrite(dense, unique, fsync=True, name="pwrite of the unique bytes"),
            upcycle(dense, "E8G1T2", fsync=True),
            upcycle(dense, "E8G8T8", fsync=True),
        ]
        small = self.directory / "small"
        make_small(small)
        contestants += [
            upcycle(small, recipe, fsync=True, name=f"upcycle {recipe}, one small layer")
            for recipe in ("E8G1T2", "E8G8T8")
        ]
        try:
            with file_system(kind, self.directory, 3 * unique + 1_000_000_000) as mount:
                empty = used_bytes(mount)
                results = self._alternate(
                    contestants,
                    dense / "model.safetensors",
                    mount / "output",
                    lambda _: used_bytes(mount) - empty,
                    nbytes=2 * unique,  # in the cache of the file system, and of the loop device
                )
            limits = sharing_limits(results, dense_bytes=dense_bytes)
            _show(title, results, limits)
        except UnavailableError as error:
            print(f"\n### {title}\n\nSkipped: {error}.", flush=True)
        shutil.rmtree(dense)
        shutil.rmtree(small)

    def _alternate(
        self,
        contestants: Sequence[Contestant],
        source: Path,
        output: Path,
        disk_use: Callable[[Path], int],
        *,
        nbytes: int,
    ) -> list[Result]:
        """Let everyone have a turn, round by round, every other round in reverse order.

        `nbytes` is how much page cache a turn needs.
        """
        results = [Result(contestant, self._interpreter(contestant)) for contestant in contestants]
        for round_number in range(self.rounds):
            for result in results if round_number % 2 == 0 else reversed(results):
                most = result.contestant.max_rounds
                if result.failure or (most is not None and round_number >= most):
                    continue
                _warm(source)
                self._touch_memory(source, nbytes)
                os.sync()
                try:
                    command = result.contestant.command(output)
                    run = measure(command, result.contestant.environment)
                    run = replace(run, disk_bytes=disk_use(output))
                    result.runs.append(run)
                except FailedError as error:
                    result.failure = str(error)
                    run = None
                _talk(round_number, result, run)
                for leftover in output.parent.glob(f"{output.name}*"):
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        return results

    def _touch_memory(self, source: Path, nbytes: int) -> None:
        """Have the machine hold the memory that a turn needs, whoever's turn it is."""
        scratch = self.directory / "scratch"
        measure(raw_pwrite_command(source, scratch, nbytes, fsync=False))
        scratch.unlink()

    def _interpreter(self, contestant: Contestant) -> int:
        if contestant.name == MERGEKIT:
            return self.mergekit_anon_bytes
        if "pwrite" in contestant.name:
            return 0
        if contestant.name == TRANSFORMERS:
            return self.torch.peak_anon_bytes
        return self.numpy_anon_bytes


def _show(title: str, results: Sequence[Result], limits: Sequence[Limit]) -> None:
    print(f"\n### {title}\n\n{table(results)}\n\n{limits_table(limits)}", flush=True)


def _plan(dense: Path) -> Plan:
    return build_plan(SHORT, open_checkpoint(dense), target="mixtral")


def _warm(source: Path) -> None:
    with source.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def _talk(round_number: int, result: Result, run: object) -> None:
    print(
        f"round {round_number + 1}: {result.contestant.key}: {run or result.failure}",
        file=sys.stderr,
        flush=True,
    )


def _machine(directory: Path) -> dict[str, str]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    mounts = [line.split() for line in Path("/proc/mounts").read_text("utf-8").splitlines()]
    within = [mount for mount in mounts if directory.resolve().is_relative_to(mount[1])]
    file_system_type = max(within, key=lambda mount: len(mount[1]))[2]
    packages = ("torch", "safetensors", "transformers")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{len(os.sched_getaffinity(0))} CPUs ({platform.machine()}), "
        f"{memory / 2**30:.0f} GiB, Linux {platform.release()}",
        "file system": file_system_type,
        "Python": f"{platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in packages),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How fast upcycle converts.")
    parser.add_argument(
        "--sizes",
        type=lambda text: [float(size) for size in text.split(",")],
        default=[0.6, 1.2, 2.4],
        help="dense sizes in GB; at least 0.35, which is one layer",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--peer-rounds", type=int, default=1, help="of mergekit-moe and transformers; 0 for none"
    )
    parser.add_argument(
        "--filesystems",
        nargs="?",
        choices=["also", "only"],
        const="also",
        help="XFS and Btrfs with the largest size too, or only that; as root",
    )
    parser.add_argument("--directory", type=Path, help="where to write; default: the temporary one")
    return parser.parse_args()


if __name__ == "__main__":
    main()
