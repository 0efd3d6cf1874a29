"""How fast upcycle converts, against what the disk allows and against the other ways to do it.

    python tests/benchmarks/throughput.py [--sizes 0.6,1.2,2.4] [--rounds 3] [--peer-rounds 1]
    sudo python tests/benchmarks/throughput.py --filesystems also|only ...

prints Markdown tables: for each size of a dense checkpoint (TinyLlama's shape, bfloat16, in GB),
upcycle, a raw `pwrite` of as many bytes, mergekit-moe and a transformers script, alternating, in
one run, medians of several rounds. Then the limits that upcycle sets itself, and whether each held.
With `--filesystems` also upcycle with shared extents on XFS and Btrfs (the largest size), on loop
devices, which takes root. mergekit is installed as tests/interoperability does it.

All is on one file system (`--directory`, by default the temporary directory); it needs seven times
the largest dense size there, and the same in memory for the transformers script. The source is in
the page cache, warmed before each run, and what a run has left to be written is written before the
next one starts. Just before each run as many bytes are written to a file and thrown away: a virtual
machine gives free memory back to its host within seconds, and touching it again costs more than
writing to it, which would fall on whoever takes a second to start.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "interoperability"))

from file_systems import MAKE, UnavailableError, file_system, used_bytes
from interop import software
from large_models import ONE_SMALL_LAYER, tinyllama_of, write_random
from measure import Run, importing, measure, read_into_cache
from shapes import save_tokenizer

from upcycle_cli import Recipe, build_plan, open_checkpoint
from upcycle_cli.plan.plan import Plan

HERE = Path(__file__).resolve().parent
SMALL, FINE, SHUFFLED = "upcycle E8G1T2", "upcycle E8G8T8", "upcycle E8G8T8, shuffled"
PWRITE = "pwrite of the same bytes"
MERGEKIT, TRANSFORMERS = "mergekit-moe, 8 experts", "transformers script"
START_UP_COUNTS_FROM = 0.95 * 2.4e9  # bytes of the dense model
HEADER = """
| | fsync | rounds | wall (min to max), s | CPU, s | peak RssAnon, MB \
| beyond the interpreter, MB | on disk, GB |
|---|---|---|---|---|---|---|---|"""
LIMITS = "| limit | wanted | measured | held |\n|---|---|---|---|"


@dataclass(kw_only=True)
class Contestant:
    """A command that makes an output, and all its runs."""

    name: str
    command: Sequence[str | Path]
    fsync: bool = False
    interpreter_bytes: int = 0
    """Anonymous memory of its interpreter once it has imported what it needs anyway."""
    most_rounds: int | None = None
    runs: list[Run] = field(default_factory=list)
    disk_bytes: int = 0
    failure: str = ""

    def median(self, value: Callable[[Run], float]) -> float:
        """Return the median of its runs; NaN where it has none."""
        return statistics.median(map(value, self.runs)) if self.runs else math.nan

    @property
    def wall(self) -> float:
        """Median seconds."""
        return self.median(lambda run: run.wall_seconds)

    @property
    def beyond_bytes(self) -> float:
        """Median peak of anonymous memory beyond the interpreter's own."""
        return max(0, self.median(lambda run: run.peak_anon_bytes) - self.interpreter_bytes)

    def row(self) -> str:
        """Return its row of the table."""
        walls = [run.wall_seconds for run in self.runs] or [math.nan]
        return (
            f"| {self.name} | {'yes' if self.fsync else 'no'} | {len(self.runs)} "
            f"| {self.wall:.2f} ({min(walls):.2f} to {max(walls):.2f}) "
            f"| {self.median(lambda run: run.cpu_seconds):.2f} "
            f"| {self.median(lambda run: run.peak_anon_bytes) / 1e6:.0f} "
            f"| {self.beyond_bytes / 1e6:.0f} | {self.disk_bytes / 1e9:.2f} |"
        )


def limit(what: str, wanted: str, value: float, *, applies: bool = True) -> str:
    """Return a row of the table of limits; `wanted` is a sign and a number, or a dash."""
    if wanted == "–":
        held = "–"
    elif math.isnan(value):
        held = "not measured"
    elif not applies:
        held = "does not apply to this size"
    else:
        bound = float(wanted[1:])
        held = "yes" if (value <= bound if wanted[0] == "≤" else value >= bound) else "**no**"
    return f"| {what} | {wanted} | {value:.2f} | {held} |"


def pwrite(source: Path, output: Path, nbytes: int, *, fsync: bool) -> list[str | Path]:
    """Return the command of a plain Python program that writes `nbytes` of another file."""
    how = "fsync" if fsync else "no-fsync"
    return [sys.executable, "-S", HERE / "raw_pwrite.py", source, output, str(nbytes), how]


class Benchmark:
    """Measures and prints."""

    def __init__(self, directory: Path, rounds: int, peer_rounds: int) -> None:
        self.directory, self.rounds, self.peer_rounds = directory, rounds, peer_rounds
        importing("torch")  # which may read it from the disk
        self.torch, self.numpy_bytes = importing("torch"), importing("numpy").peak_anon_bytes
        self.mergekit: Path | None = None
        about = "not wanted"
        if peer_rounds:
            try:
                wanted = next(each for each in software.SOFTWARE if each.name == "mergekit")
                self.mergekit = software.install(wanted)
                names = ("mergekit", "torch", "transformers")
                about = ", ".join(f"{n} {software.version(self.mergekit, n)}" for n in names)
            except software.NotInstalledError as error:
                about = str(error)
        print_machine(directory)
        memory = f"{self.torch.peak_anon_bytes / 1e6:.0f} MB of RssAnon"
        print(f"- import torch: {self.torch.wall_seconds:.2f} s, {memory}\n- mergekit: {about}")

    def upcycle(self, dense: Path, output: Path, name: str, *, fsync: bool) -> Contestant:
        """Return a conversion to Mixtral; its recipe is the second word of the name."""
        recipe = name.split()[1].rstrip(",")
        tool = (sys.executable, "-m", "upcycle_cli", "convert", "--quiet")
        command: list[str | Path] = [*tool, dense, output]
        command += ["--recipe", recipe, "--target", "mixtral"]
        command += ["--neuron-order", "shuffled"] if name == SHUFFLED else []
        command += [] if fsync else ["--no-fsync"]
        return Contestant(
            name=name, command=command, fsync=fsync, interpreter_bytes=self.numpy_bytes
        )

    def peers(self, dense: Path, output: Path) -> list[Contestant]:
        """Return mergekit-moe, all of whose experts are the dense model, and the script."""
        tool: tuple[str | Path, ...] = (sys.executable, HERE / "by_transformers.py", dense, output)
        peers = [(TRANSFORMERS, tool, self.torch.peak_anon_bytes)]
        if self.mergekit:
            save_tokenizer(dense)  # mergekit-moe does not start without one
            config = dense / "mergekit-moe.yml"
            expert = f"  - source_model: {dense}\n    positive_prompts: []\n"
            config.write_text(
                f"base_model: {dense}\ngate_mode: random\ndtype: bfloat16\nexperts_per_token: 2\n"
                f"experts:\n{expert * 8}"
            )
            tool = (self.mergekit.with_name("mergekit-moe"), "--quiet", config, output)
            anonymous = importing("torch", self.mergekit).peak_anon_bytes
            peers.insert(0, (MERGEKIT, tool, anonymous))
        return [
            Contestant(
                name=name, command=command, interpreter_bytes=nbytes, most_rounds=self.peer_rounds
            )
            for name, command, nbytes in peers
        ]

    def compare_writing(self, gigabytes: float) -> None:
        """Compare everyone at one size."""
        dense, plan = self._make_dense(gigabytes)
        source, output = dense / "model.safetensors", self.directory / "output"
        contestants = []
        for fsync in (True, False):
            command = pwrite(source, output, plan.nbytes, fsync=fsync)
            contestants.append(Contestant(name=PWRITE, command=command, fsync=fsync))
            names = (SMALL, FINE, SHUFFLED)
            contestants += [self.upcycle(dense, output, name, fsync=fsync) for name in names]
        contestants += self.peers(dense, output) if self.peer_rounds else []
        self._alternate(contestants, source, output, plan.nbytes, disk_bytes)

        nobody = Contestant(name="", command=())
        found = {(each.name, each.fsync): each for each in contestants}
        counts = plan.source.nbytes >= START_UP_COUNTS_FROM
        limits = []
        for name, most in ((SMALL, "≤ 1.25"), (FINE, "≤ 1.5"), (SHUFFLED, "≤ 2")):
            for fsync, how in ((True, "both with fsync"), (False, "both without fsync")):
                value = found[name, fsync].wall / found[PWRITE, fsync].wall
                limits.append(limit(f"time of {name} / pwrite, {how}", most, value, applies=counts))
        ours, by_hand = found[SMALL, False], found.get((TRANSFORMERS, False), nobody)
        peer = found.get((MERGEKIT, False), nobody)
        what = f"time of mergekit-moe / {SMALL}"
        possible = peer.wall / found[PWRITE, False].wall
        what += f" (/ pwrite, in one thread: {possible:.2f})" if possible < 4 else ""
        limits.append(limit(what, "≥ 4", peer.wall / ours.wall))
        what = f"time of a transformers script / {SMALL}"
        limits.append(limit(what, "–", by_hand.wall / ours.wall))
        what = f"memory beyond the interpreter, {SMALL} / mergekit-moe"
        limits.append(limit(what, "≤ 0.1", ours.beyond_bytes / (peer.beyond_bytes or math.nan)))
        layers, size = plan.family.dense.num_layers, plan.source.nbytes / 1e9
        title = f"{size:.2f} GB dense ({layers} layers), {plan.nbytes / 1e9:.2f} GB of MoE"
        show(title, contestants, limits)
        shutil.rmtree(dense)

    def compare_sharing(self, kind: str, gigabytes: float) -> None:
        """Compare upcycle with extents shared to a pwrite of the bytes that are not."""
        dense, plan = self._make_dense(gigabytes)
        unique = plan.source.nbytes + sum(t.nbytes for t in plan.tensors if t.role == "router")
        title = (
            f"{kind}, {plan.source.nbytes / 1e9:.2f} GB dense, {plan.nbytes / 1e9:.2f} GB of MoE, "
            f"of which {unique / 1e9:.2f} GB are unique"
        )
        small = write_random(self.directory / "small", ONE_SMALL_LAYER)
        try:
            with file_system(kind, self.directory, 3 * unique + 1_000_000_000) as mount:
                source, output = dense / "model.safetensors", mount / "output"
                empty = used_bytes(mount)
                command = pwrite(source, output, unique, fsync=True)
                raw = Contestant(name="pwrite of the unique bytes", command=command, fsync=True)
                ours = [self.upcycle(dense, output, name, fsync=True) for name in (SMALL, FINE)]
                starts = [
                    self.upcycle(small, output, f"{name}, one small layer", fsync=True)
                    for name in (SMALL, FINE)
                ]
                # The pages are in the cache of the file system, and of the loop device.
                everyone = [raw, *ours, *starts]
                self._alternate(
                    everyone, source, output, 2 * unique, lambda _: used_bytes(mount) - empty
                )
        except UnavailableError as error:
            print(f"\n### {title}\n\nSkipped: {error}.", flush=True)
        else:
            limits = []
            for each, start in zip(ours, starts, strict=True):
                what = f"(time of {each.name} − start-up) / pwrite of the unique bytes"
                limits.append(limit(what, "≤ 1.3", (each.wall - start.wall) / raw.wall))
                what = f"disk use of {each.name} / dense checkpoint"
                limits.append(limit(what, "≤ 1.15", each.disk_bytes / plan.source.nbytes))
            show(title, everyone, limits)
        shutil.rmtree(dense)
        shutil.rmtree(small)

    def _make_dense(self, gigabytes: float) -> tuple[Path, Plan]:
        dense = write_random(self.directory / "dense", tinyllama_of(gigabytes))
        recipe = Recipe("E8G1T2")
        return dense, build_plan(recipe, open_checkpoint(dense), target="mixtral")

    def _alternate(
        self,
        contestants: Sequence[Contestant],
        source: Path,
        output: Path,
        nbytes: int,
        disk_use: Callable[[Path], int],
    ) -> None:
        """Give everyone a turn, round by round, every other round in reverse order.

        `nbytes` is how much page cache a turn needs.
        """
        scratch = self.directory / "scratch"
        for number in range(self.rounds):
            for each in contestants if number % 2 == 0 else reversed(contestants):
                if each.failure or (each.most_rounds is not None and number >= each.most_rounds):
                    continue
                read_into_cache([source])
                measure(pwrite(source, scratch, nbytes, fsync=False))
                scratch.unlink()
                os.sync()
                try:
                    each.runs.append(measure(each.command, {"HF_HUB_OFFLINE": "1"}))
                    each.disk_bytes = disk_use(output)
                except subprocess.CalledProcessError as error:
                    each.failure = f"{error} {error.stderr.strip()[-200:]}"
                last = each.failure or each.runs[-1]
                print(f"round {number + 1}: {each.name}: {last}", file=sys.stderr, flush=True)
                for leftover in output.parent.glob(f"{output.name}*"):
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def disk_bytes(path: Path) -> int:
    """Return what a file or a directory takes on the disk, as du would, without shared extents."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.lstat().st_blocks * 512 for file in files)


def show(title: str, contestants: Iterable[Contestant], limits: Iterable[str]) -> None:
    """Print the tables, and why something is missing."""
    print(f"\n### {title}\n{HEADER}")
    for each in contestants:
        print(each.row())
    for each in contestants:
        if each.failure:
            print(f"\n{each.name}: {each.failure}")
    print("", LIMITS, *limits, sep="\n", flush=True)


def print_machine(directory: Path) -> None:
    """Print what the numbers depend on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpus = f"{os.cpu_count()} CPUs ({platform.machine()})"
    kind = subprocess.run(
        ["df", "--output=fstype", directory], capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    packages = [f"{name} {version(name)}" for name in ("torch", "safetensors", "transformers")]
    print(f"- date: {datetime.now(UTC).date()}")
    print(f"- machine: {cpus}, {memory:.0f} GiB, Linux {platform.release()}")
    print(f"- file system: {kind}")
    print(f"- Python: {', '.join([platform.python_version(), *packages])}", flush=True)


def main(
    sizes: str = "0.6,1.2,2.4",
    rounds: int = 3,
    peer_rounds: int = 1,
    filesystems: Literal["also", "only"] | None = None,
    directory: Path | None = None,
) -> None:
    """Measure how fast upcycle converts; sizes are in GB, at least 0.35, which is one layer."""
    gigabytes = [float(size) for size in sizes.split(",")]
    with tempfile.TemporaryDirectory(prefix="upcycle-benchmark-", dir=directory) as folder:
        benchmark = Benchmark(Path(folder), rounds, peer_rounds)
        for size in gigabytes if filesystems != "only" else ():
            benchmark.compare_writing(size)
        for kind in MAKE if filesystems else ():
            benchmark.compare_sharing(kind, max(gigabytes))


if __name__ == "__main__":
    typer.run(main)
