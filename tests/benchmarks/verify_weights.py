"""How long the check `weights` takes, against `cat` of the same files to /dev/null.

    python tests/benchmarks/verify_weights.py [--size 2.4] [--rounds 3] [--directory DIRECTORY]

prints a Markdown table: for E8G1T2, E8G8T16 and that with shuffled neurons, of a dense checkpoint
(TinyLlama's shape, bfloat16, in GB), medians of several rounds, with all files in the page cache
and with none, `cat` and check alternating in one run. The check's time is that of `check_weights`
in a process that has started: Python, torch and the headers are not counted. It needs seven times
the dense size on the disk, and as much free memory for the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes import make_recipe
from speed.dense import make_dense
from speed.measure import Run, measure

from upcycle_cli import convert
from upcycle_cli.checkpoint.checkpoint import open_checkpoint

RECIPES = (("E8G1T2", "sliced"), ("E8G8T16", "sliced"), ("E8G8T16", "shuffled"))
LIMIT = 1.5


def main() -> None:
    """Measure, or be the process that is measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--size", type=float, default=2.4, help="of the dense checkpoint, in GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to write; default: the temporary one")
    parser.add_argument("--check", type=Path, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.check:
        _check(*arguments.check)
        return
    directory = Path(tempfile.mkdtemp(prefix="upcycle-benchmark-", dir=arguments.directory))
    try:
        dense, moe = directory / "dense", directory / "moe"
        make_dense(dense, arguments.size)
        print("| recipe | cache | GB | cat, s | check, s | ratio | RssAnon, MB |")
        print("|---|---|---|---|---|---|---|")
        for name, order in RECIPES:
            convert(dense, moe, make_recipe(name, neuron_order=order), target="mixtral")
            for cold in (False, True):
                title, result = f"{name}, {order}", directory / "result"
                _row(dense, moe, title, result, cold=cold, rounds=arguments.rounds)
            shutil.rmtree(moe)
    finally:
        shutil.rmtree(directory)


def _row(dense: Path, moe: Path, name: str, result: Path, *, cold: bool, rounds: int) -> None:
    files = sorted([*dense.glob("*.safetensors"), *moe.glob("*.safetensors")])
    cats, checks = [], []
    runs: list[Run] = []
    prepare = _drop if cold else _warm
    for _ in range(rounds):
        prepare(files)
        started = time.perf_counter()
        with Path(os.devnull).open("wb") as nowhere:
            subprocess.run(["cat", *map(str, files)], stdout=nowhere, check=True)
        cats.append(time.perf_counter() - started)
        prepare(files)
        command = [sys.executable, __file__, "--check", str(dense), str(moe), str(result)]
        runs.append(measure(command))
        checks.append(json.loads(result.read_text(encoding="utf-8")))
    cat, check = statistics.median(cats), statistics.median(checks)
    gigabytes = sum(file.stat().st_size for file in files) / 1e9
    kept = " " if check / cat <= LIMIT else " **over** "
    print(
        f"| {name} | {'cold' if cold else 'warm'} | {gigabytes:.1f} | {cat:.2f} | {check:.2f} |"
        f"{kept}{check / cat:.2f} | {max(run.peak_anon_bytes for run in runs) / 1e6:.0f} |",
        flush=True,
    )
    print(f"{name}: cat {cats}, check {checks}", file=sys.stderr, flush=True)


def _check(dense: Path, moe: Path, result: Path) -> None:
    """Run the check by itself, and write how many seconds it took."""
    from upcycle_cli.core.callbacks import Progress
    from upcycle_cli.verification.rebuild import read_record, rebuild
    from upcycle_cli.verification.result import Status
    from upcycle_cli.verification.weights import check_weights

    source, converted = open_checkpoint(dense), open_checkpoint(moe)
    plan = rebuild(read_record(converted), source, converted)
    started = time.perf_counter()
    found = check_weights(plan, converted, Progress())
    seconds = time.perf_counter() - started
    assert found.status is Status.PASSED, found
    result.write_text(json.dumps(seconds), encoding="utf-8")


def _warm(files: Iterable[Path]) -> None:
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def _drop(files: Iterable[Path]) -> None:
    """Have the page cache forget files; what is still to be written would stay."""
    os.sync()
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
