"""FP8 checkpoints: their weights are those of transformers' own dequantisation, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDense, read_json
from quantised import save_fp8

from upcycle_cli import Recipe, convert, verify
from upcycle_cli.verification.prompts import TextOptions

FEW = TextOptions(tokens=64)
SCHEMES: tuple[Any, ...] = ((16, 16), (128, 128), (5, 7), "tensor", "channel")


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_convert_and_verify(make_dense: MakeDense, tmp_path: Path, scheme: Any) -> None:  # noqa: ANN401
    dense = save_fp8(make_dense("qwen3"), tmp_path / "fp8", scheme)
    done = convert(dense, tmp_path / "moe", Recipe("E2G2T2"))
    report = verify(dense, done.output, texts=FEW)
    assert (report.status, report.promise) == ("passed", "exact"), report
    assert "quantization_config" not in read_json(done.output / "config.json")
