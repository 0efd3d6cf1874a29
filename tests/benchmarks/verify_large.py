"""What verifying a model takes that does not fit in memory, against the dense model's own run.

    sudo python tests/benchmarks/verify_large.py [--layers 32] [--tokens 1024] [--directory DIR]

writes a dense checkpoint of Mistral-7B's shape with random weights, converts it to E8G1T2 on an XFS
of its own, where the copies of an expert share their extents, and runs `upcycle verify`: once all
checks, and `outputs` alone. Then transformers runs the first layers of the dense model, as many as
fit, whole and in float32 on as many tokens; its time is scaled to all layers. It takes root, and
18 GB in DIR for 32 layers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from file_systems import file_system
from speed.dense import MISTRAL_7B, make_layers
from speed.measure import measure

from upcycle_cli import Recipe, convert

_PLAIN_LAYERS = 8
"""7 GB in float32."""


def plain_seconds(path: Path, layers: int, tokens: int) -> tuple[float, float]:
    """Return the seconds of a forward without layers, and of one with so many of the first."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # of layers that are left out
    logging.disable_progress_bar()
    ids = torch.randint(
        MISTRAL_7B.vocab, (1, min(tokens, 512)), generator=torch.Generator().manual_seed(0)
    )
    ids = ids.expand(max(1, tokens // 512), -1)
    found = []
    for count in (1, layers):
        config = AutoConfig.from_pretrained(path)
        config.num_hidden_layers = count
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32)
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            with torch.no_grad():
                model(ids, use_cache=False)
            seconds.append(time.perf_counter() - started)
        found.append(min(seconds))
        del model
    one = (found[1] - found[0]) / (layers - 1)
    return found[0] - one, one


def main() -> None:
    """Make, convert, verify and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    # The dense model, one copy of its MLPs at most, and what the file system needs for itself.
    ends = 4 * MISTRAL_7B.vocab * MISTRAL_7B.hidden
    size = int(2.2 * (options.layers * MISTRAL_7B.layer_bytes + ends)) + (1 << 30)
    with (
        tempfile.TemporaryDirectory(dir=options.directory) as folder,
        file_system("XFS", Path(folder), size) as mount,
    ):
        dense, moe = mount / "dense", mount / "moe"
        make_layers(dense, MISTRAL_7B, options.layers, shards=True)
        done = convert(dense, moe, Recipe(expansion=8, granularity=1, top_k=2))
        print(f"{done.plan.total_parameters / 1e9:.1f}B parameters, {options.layers} layers")
        command = [sys.executable, "-m", "upcycle_cli", "verify", str(dense), str(moe)]
        command += ["--tokens", str(options.tokens)]
        print("\n| checks | wall, s | CPU, s | peak RssAnon, MB |\n|---|---|---|---|")
        runs = {}
        for checks in ("directory", "weights", "directory,weights,outputs"):
            run = runs[checks] = measure([*command, "--checks", checks])
            row = (
                f"{run.wall_seconds:.1f} | {run.cpu_seconds:.1f} | {run.peak_anon_bytes / 1e6:.0f}"
            )
            print(f"| {checks} | {row} |", flush=True)
        rest, one = plain_seconds(dense, min(_PLAIN_LAYERS, options.layers), options.tokens)
        plain = rest + one * options.layers
        print(f"\nplain transformers, float32: {one:.2f} s a layer, {plain:.1f} s for all")
        print(f"all checks: {run.wall_seconds / plain:.2f} forward passes of the dense model")


if __name__ == "__main__":
    main()
