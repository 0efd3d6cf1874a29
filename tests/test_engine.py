"""What a conversion takes of the machine while it runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from engine_fixtures import convert_command, make_dense, start

LAYERS = (4, 11, 22)


def peak_anonymous_bytes(command: list[str]) -> int:
    """Run a command, and look at its anonymous memory every 10 ms until it ends."""
    process = start(command)
    status = Path(f"/proc/{process.pid}/status")
    peak = 0
    while True:
        try:
            process.wait(0.01)
        except subprocess.TimeoutExpired:
            for line in status.read_text().splitlines():
                if line.startswith("RssAnon:"):
                    peak = max(peak, int(line.split()[1]) * 1024)
        else:
            _, stderr = process.communicate()
            assert process.returncode == 0, stderr
            return peak


@pytest.mark.parametrize("options", [(), ("--expert-layout", "fused")], ids=["per expert", "fused"])
def test_memory_does_not_grow_with_the_layers(tmp_path: Path, options: tuple[str, ...]) -> None:
    peaks = []
    for layers in LAYERS:
        dense = make_dense(
            tmp_path / f"dense{layers}", hidden=512, inner=4096, layers=layers, hollow=True
        )
        output = tmp_path / f"moe{layers}"
        # Slices of columns and factors: everything that needs a buffer. Many layers in one file.
        command = convert_command(dense, output, "--no-fsync", "--workers", "2", *options,
                                  recipe="E2G2T2")  # fmt: skip
        peaks.append(peak_anonymous_bytes(command))
    assert max(peaks) <= 1.10 * min(peaks), [f"{peak / 1e6:.1f} MB" for peak in peaks]
