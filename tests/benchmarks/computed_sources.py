"""How fast FP8 sources and adapters convert, against the same weights in bfloat16.

    python tests/benchmarks/computed_sources.py [--size 0.4] [--rounds 3] [--recipe E4G4T4]

prints a Markdown table: for a dense checkpoint of TinyLlama's shape (in GB), its FP8 copy in blocks
of 128 x 128 and per channel, and the model with a LoRA adapter of rank 16 on every linear layer,
the wall time and the peak anonymous memory of `upcycle convert`, and the speed in bytes written,
relative to bfloat16. All alternate in one run; the figures are medians. It needs six times the
size on the disk of the temporary directory.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import torch
import typer
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import read_tensors, write_json
from large_models import tinyllama_of, write_random
from markdown_table import header, row
from measure import Run, measure
from quantised import save_fp8

RANK = 16


def save_adapter(base: Path, target: Path) -> Path:
    """Write a LoRA adapter for every linear layer of a model."""
    target.mkdir()
    held: dict[str, torch.Tensor] = {}
    names = {
        name for name, each in read_tensors(base).items() if ".layers." in name and each.dim() > 1
    }
    for name in sorted(names):
        outputs, inputs = read_tensors(base)[name].shape
        module = f"base_model.model.{name.removesuffix('.weight')}"
        held[f"{module}.lora_A.weight"] = torch.randn(RANK, inputs) / 64
        held[f"{module}.lora_B.weight"] = torch.randn(outputs, RANK) / 64
    save_file(held, target / "adapter_model.safetensors")
    modules = sorted({name.removesuffix(".weight").rsplit(".", 1)[-1] for name in names})
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules}
    write_json(target / "adapter_config.json", {**settings, "bias": "none"})
    return target


def main(size: float = 0.4, rounds: int = 3, recipe: str = "E4G4T4") -> None:
    """Measure, and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        plain = write_random(path / "bf16", tinyllama_of(size))
        adapter = save_adapter(plain, path / "adapter")
        sources: dict[str, Path | str] = {
            "bfloat16": plain,
            "FP8, blocks of 128 x 128": save_fp8(plain, path / "blocks", (128, 128)),
            "FP8, per channel": save_fp8(plain, path / "rows", "channel", "vllm"),
            f"bfloat16 + LoRA of rank {RANK}": f"{plain}+{adapter}",
        }
        runs: dict[str, list[Run]] = {name: [] for name in sources}
        for _ in range(rounds + 1):
            for name, source in sources.items():
                command = [sys.executable, "-m", "upcycle_cli", "convert", source, path / "moe"]
                run = measure([*command, "--recipe", recipe, "--overwrite", "--no-fsync"])
                runs[name].append(run)
        print(header("source", "wall, s", "speed", "peak RssAnon, MB"))
        usual = statistics.median(run.wall_seconds for run in runs["bfloat16"][1:])
        for name, each in runs.items():
            wall = statistics.median(run.wall_seconds for run in each[1:])
            memory = statistics.median(run.peak_anon_bytes for run in each[1:]) / 1e6
            print(row(name, f"{wall:.2f}", f"{usual / wall:.2f}", f"{memory:.0f}"))


if __name__ == "__main__":
    typer.run(main)
