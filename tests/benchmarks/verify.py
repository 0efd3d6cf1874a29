"""What `upcycle verify` costs: three measurements, each a command.

    python tests/benchmarks/verify.py busy [--model SMOLLM2-135M] [--recipe E8G8T16]
    python tests/benchmarks/verify.py weights [--size 2.4] [--rounds 3]
    sudo python tests/benchmarks/verify.py large [--layers 32] [--tokens 1024]

`--directory` says where they write; the default is the temporary directory.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from file_systems import file_system
from large_models import MISTRAL_7B, nbytes_of, tinyllama_of, write_random
from measure import Run, drop_from_cache, measure, read_into_cache

from upcycle_cli import Recipe, convert, open_checkpoint

app = typer.Typer(help=__doc__, rich_markup_mode=None, pretty_exceptions_enable=False)

PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = torch.randint(2000, (4, 512), generator=torch.Generator().manual_seed(0))
for path in sys.argv[1:]:
    with torch.no_grad():
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids, use_cache=False)
"""
SPIN = "import torch\nmatrix = torch.ones(512, 512)\nwhile True: matrix @ matrix"
NUM_SPINNING = 4
PLAIN_LAYERS = 8  # 7 GB in float32
MOST_CATS = 1.5


def measure_verify(dense: Path, moe: Path, *options: str) -> Run:
    """Measure the command in a process of its own."""
    tool = (sys.executable, "-m", "upcycle_cli")
    return measure([*tool, "verify", dense, moe, "--quiet", *options])


# busy ---------------------------------------------------------------------------------------------


@app.command()
def busy(
    model: Path | None = None,
    recipe: str = "E8G8T16",
    rounds: int = 2,
    directory: Path | None = None,
) -> None:
    """Compare verify to a plain transformers script, and on a busy machine to an idle one.

    First the whole verify of MODEL's mixture of experts against a script that loads both models in
    float32 and runs them on 2,048 tokens, in turn. Then the demo's verify beside four processes
    that multiply matrices. MODEL is the demo's dense model unless given.
    """
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        demo = Path(folder) / "demo"
        whole = measure([sys.executable, "-m", "upcycle_cli", "demo", demo, "--json"])
        show("the whole demo", whole)
        dense, moe = model or demo / "dense", Path(folder) / "moe"
        convert(dense, moe, Recipe(recipe))
        walls, processor = [], []
        for _ in range(rounds):
            plain = measure([sys.executable, "-c", PLAIN, dense, moe])
            ours = measure_verify(dense, moe)
            show("plain transformers", plain)
            show("verify", ours)
            walls.append(ours.wall_seconds / plain.wall_seconds)
            processor.append(ours.cpu_seconds / plain.cpu_seconds)
        print(
            f"verify / plain: {statistics.median(walls):.2f} of its wall time, "
            f"{statistics.median(processor):.2f} of its processor time"
        )
        models = demo / "dense", demo / "moe"
        alone = measure_verify(*models)
        show("the demo's verify, alone", alone)
        with spinning_processes():
            beside = measure_verify(*models)
        show("beside four", beside)
        print(f"busy / alone: {beside.cpu_seconds / alone.cpu_seconds:.2f} of the processor time")


def show(what: str, run: Run) -> None:
    """Print what a run took."""
    times = f"{run.wall_seconds:6.1f} s wall, {run.cpu_seconds:6.1f} s of processor time"
    print(f"{what:<28} {times}", flush=True)


@contextmanager
def spinning_processes() -> Iterator[None]:
    """Keep every processor busy."""
    with ExitStack() as stack:
        for _ in range(NUM_SPINNING):
            process = subprocess.Popen([sys.executable, "-c", SPIN])
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


# weights ------------------------------------------------------------------------------------------


@app.command()
def weights(size: float = 2.4, rounds: int = 3, directory: Path | None = None) -> None:
    """Compare the check `weights` to `cat` of the same files to /dev/null.

    Prints a Markdown table for a dense checkpoint of SIZE GB (TinyLlama's shape, bfloat16): medians
    of several rounds, with all files in the page cache and with none, `cat` and check alternating.
    The check's time is that of `check_weights` in a process that has started: Python, torch and the
    headers do not count. It needs seven times the dense size on the disk and in the page cache.
    """
    print("| recipe | cache | GB | cat, s | check, s | ratio | RssAnon, MB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        dense = write_random(Path(folder) / "dense", tinyllama_of(size))
        for name, order in (("E8G1T2", "sliced"), ("E8G8T16", "sliced"), ("E8G8T16", "shuffled")):
            recipe, moe = Recipe(name, neuron_order=order), Path(folder) / "moe"
            convert(dense, moe, recipe, target="mixtral", overwrite=True)
            files = sorted([*dense.glob("*.safetensors"), *moe.glob("*.safetensors")])
            for cache, prepare in (("warm", read_into_cache), ("cold", drop_from_cache)):
                cats, checks, peaks = [], [], []
                for _ in range(rounds):
                    prepare(files)
                    cats.append(measure(["cat", *files]).wall_seconds)
                    prepare(files)
                    result = Path(folder) / "result"
                    run = measure([sys.executable, __file__, "time-check", dense, moe, result])
                    peaks.append(run.peak_anon_bytes)
                    checks.append(float(result.read_text()))
                cat, check = statistics.median(cats), statistics.median(checks)
                gigabytes = sum(file.stat().st_size for file in files) / 1e9
                over = " **over**" if check > MOST_CATS * cat else ""
                print(
                    f"| {name}, {order} | {cache} | {gigabytes:.1f} | {cat:.2f} | {check:.2f} "
                    f"|{over} {check / cat:.2f} | {max(peaks) / 1e6:.0f} |",
                    flush=True,
                )


@app.command(hidden=True)
def time_check(dense: Path, moe: Path, result: Path) -> None:
    """Run the check alone, and write to a file how many seconds it took."""
    from upcycle_cli.core.callbacks import Progress
    from upcycle_cli.verification.rebuild import read_record, rebuild
    from upcycle_cli.verification.result import Status
    from upcycle_cli.verification.weights import check_weights

    source, converted = open_checkpoint(dense), open_checkpoint(moe)
    plan = rebuild(read_record(converted), source, converted)
    started = time.perf_counter()
    found = check_weights(plan, converted, Progress())
    result.write_text(json.dumps(time.perf_counter() - started))
    assert found.status is Status.PASSED, found


# large --------------------------------------------------------------------------------------------


@app.command()
def large(layers: int = 32, tokens: int = 1024, directory: Path | None = None) -> None:
    """Compare verify of a model that does not fit in memory to a run of the dense model.

    Writes a dense checkpoint of Mistral-7B's shape, converts it to E8G1T2 on an XFS of its own,
    where the copies of an expert share their extents, and runs `upcycle verify`. Then transformers
    runs the first layers of the dense model, as many as fit, whole and in float32 on as many
    tokens; its time is scaled to all layers. It takes root, and 18 GB in DIRECTORY for 32 layers.
    """
    config = {**MISTRAL_7B, "num_hidden_layers": layers}
    # The dense model, one copy of its MLPs at most, and what the file system needs for itself.
    size = int(2.2 * nbytes_of(config)) + (1 << 30)
    with (
        tempfile.TemporaryDirectory(dir=directory) as folder,
        file_system("XFS", Path(folder), size) as mount,
    ):
        dense, moe = write_random(mount / "dense", config, shard_bytes=500_000_000), mount / "moe"
        done = convert(dense, moe, Recipe("E8G1T2"))
        print(f"{done.plan.total_parameters / 1e9:.1f}B parameters, {layers} layers")
        print("\n| checks | wall, s | CPU, s | peak RssAnon, MB |\n|---|---|---|---|")
        for checks in ("directory", "weights", "directory,weights,outputs"):
            run = measure_verify(dense, moe, "--tokens", str(tokens), "--checks", checks)
            print(
                f"| {checks} | {run.wall_seconds:.1f} | {run.cpu_seconds:.1f} "
                f"| {run.peak_anon_bytes / 1e6:.0f} |",
                flush=True,
            )
        ends, layer = plain_seconds(dense, min(PLAIN_LAYERS, layers), tokens)
        plain = ends + layer * layers
        print(f"\nplain transformers, float32: {layer:.2f} s a layer, {plain:.1f} s for all")
        print(f"all checks: {run.wall_seconds / plain:.2f} forward passes of the dense model")


def plain_seconds(path: Path, layers: int, tokens: int) -> tuple[float, float]:
    """Return the seconds of a forward pass without layers, and those of a layer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # it would list the tensors of the other layers
    logging.disable_progress_bar()
    shape = max(1, tokens // 512), min(tokens, 512)
    ids = torch.randint(32000, shape, generator=torch.Generator().manual_seed(0))
    fastest = []
    for count in (1, layers):
        config = AutoConfig.from_pretrained(path, num_hidden_layers=count)
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32)
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            with torch.no_grad():
                model(ids, use_cache=False)
            seconds.append(time.perf_counter() - started)
        fastest.append(min(seconds))
        del model
    layer = (fastest[1] - fastest[0]) / max(1, layers - 1)
    return fastest[0] - layer, layer


if __name__ == "__main__":
    app()
