"""The process that runs models in an engine: what it makes of logits, and what it may import."""

from __future__ import annotations

import os
import subprocess
import sys
from math import exp, log
from pathlib import Path
from typing import Any

import pytest

from upcycle_cli.run import engine_runner


def test_modules_beside_the_runner_are_not_an_engines(tmp_path: Path) -> None:
    """They are called models and texts, as those of an engine may be."""
    (tmp_path / "mlx_lm.py").write_text("import models")
    found = subprocess.run(
        [sys.executable, engine_runner.__file__, "mlx"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert engine_runner.reason(found.stderr) == "ModuleNotFoundError: No module named 'models'"


@pytest.fixture
def job() -> dict[str, Any]:
    rows = [[1, 2, 3, 4], [5, 6]]
    return {"rows": rows, "tokens": 3, "picture": None}


def test_logits_become_log_probabilities_and_margins(job: dict[str, Any]) -> None:
    """The next number is three nats more likely than others, and the last of all one nat."""

    def forward(row: list[int]) -> list[list[float]]:
        return [
            [3.0 * (token == (last + 1) % 8) + (token == 7) for token in range(8)] for last in row
        ]

    found = engine_runner.output_of(
        job, forward, lambda row: forward([row[-1], row[-1] + 1, row[-1] + 2])
    )
    assert found["texts"] == [[5, 6, 7], [7, 0, 1]]
    assert found["margins"] == [[2.0, 2.0, 4.0], [4.0, 2.0, 2.0]]
    expected = pytest.approx(3 - log(exp(3) + exp(1) + 6))
    assert found["logprobs"] == [[expected] * 3, [expected]]
    assert engine_runner.output_of(job, forward)["texts"] == []


def test_the_reason_is_the_last_line_with_an_error() -> None:
    said = "KeyError: 'a'\nValueError: no file\nDone.\n"
    assert engine_runner.reason(said) == "ValueError: no file"
    assert engine_runner.reason("one\n\ntwo\n") == "two"
    assert engine_runner.reason("") == "no message"
