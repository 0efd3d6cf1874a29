"""What `verify` costs: against a plain transformers script, and on a busy machine.

    python tests/benchmarks/verify_busy.py [--model DIR] [--recipe E8G8T16] [--directory DIR]

prints two ratios. The first: the whole `verify` of MODEL's mixture of experts against a script that
loads both models by transformers in float32 and runs them on 2,048 tokens, in turn. The second: the
processor time of the demo's `verify` beside four processes that multiply matrices, against its
processor time without them. MODEL is the demo's dense model unless given.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from shapes import make_recipe
from speed.measure import Run, measure

from upcycle_cli import convert

_PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = torch.randint(2000, (4, 512), generator=torch.Generator().manual_seed(0))
for path in sys.argv[1:]:
    with torch.no_grad():
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids, use_cache=False)
"""
_SPIN = "import torch\nmatrix = torch.ones(512, 512)\nwhile True: matrix @ matrix"
_BESIDE = 4


def _verify(dense: Path, moe: Path) -> Run:
    return measure([sys.executable, "-m", "upcycle_cli", "verify", str(dense), str(moe), "-q"])


def _busy(dense: Path, moe: Path) -> Run:
    with ExitStack() as stack:
        for _ in range(_BESIDE):
            process = subprocess.Popen([sys.executable, "-c", _SPIN])
            stack.callback(process.wait)
            stack.callback(process.kill)
        return _verify(dense, moe)


def _line(what: str, run: Run) -> str:
    return f"{what:<28} {run.wall_seconds:6.1f} s wall, {run.cpu_seconds:6.1f} s of processor time"


def main() -> None:
    """Make the demo's models and the mixture, run all in turn, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--recipe", default="E8G8T16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        demo = Path(folder) / "demo"
        whole = measure([sys.executable, "-m", "upcycle_cli", "demo", str(demo), "--json"])
        print(_line("the whole demo", whole), flush=True)
        dense, moe = options.model or demo / "dense", Path(folder) / "moe"
        convert(dense, moe, make_recipe(options.recipe))
        walls, processor = [], []
        for _ in range(options.rounds):
            plain = measure([sys.executable, "-c", _PLAIN, str(dense), str(moe)])
            ours = _verify(dense, moe)
            print(_line("plain transformers", plain), _line("verify", ours), sep="\n", flush=True)
            walls.append(ours.wall_seconds / plain.wall_seconds)
            processor.append(ours.cpu_seconds / plain.cpu_seconds)
        print(
            f"verify / plain: {statistics.median(walls):.2f} of its wall time, "
            f"{statistics.median(processor):.2f} of its processor time"
        )
        models = demo / "dense", demo / "moe-E8G8T8"
        alone, busy = _verify(*models), _busy(*models)
        print(_line("the demo's verify, alone", alone), _line("beside four", busy), sep="\n")
        print(f"busy / alone: {busy.cpu_seconds / alone.cpu_seconds:.2f} of the processor time")


if __name__ == "__main__":
    main()
