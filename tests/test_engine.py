"""What a conversion takes of the machine while it runs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from engine_fixtures import convert_command, make_dense, start

LAYERS = (4, 11, 22)


def assert_equal_peaks(measures: Sequence[Callable[[], int]]) -> None:
    """Each of these takes as many bytes as the others, to 10 %.

    Who looks on a busy machine may miss a peak, but not in three runs of one.
    """
    peaks = [0] * len(measures)
    for _ in range(3):
        peaks = [max(peak, measure()) for peak, measure in zip(peaks, measures, strict=True)]
        if max(peaks) <= 1.10 * min(peaks):
            return
    pytest.fail(" and ".join(f"{peak / 1e6:.1f} MB" for peak in peaks))


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
    measures = []
    for layers in LAYERS:
        dense = make_dense(
            tmp_path / f"dense{layers}", hidden=512, inner=4096, layers=layers, hollow=True
        )
        output = tmp_path / f"moe{layers}"
        # Slices of columns and factors: everything that needs a buffer. Many layers in one file.
        command = convert_command(dense, output, "--no-fsync", "--workers", "2", *options,
                                  recipe="E2G2T2")  # fmt: skip
        measures.append(partial(peak_of_a_new, output, command))
    assert_equal_peaks(measures)


def peak_of_a_new(output: Path, command: list[str]) -> int:
    shutil.rmtree(output, ignore_errors=True)
    return peak_anonymous_bytes(command)
