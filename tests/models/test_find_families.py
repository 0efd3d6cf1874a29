"""The script that lists dense decoders without a row."""

from __future__ import annotations

import sys

import find_families
import pytest  # noqa: TC002

from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.families import REFUSED


def test_every_dense_decoder_has_a_row_or_a_reason() -> None:
    found = {*find_families.dense_decoders()}
    assert found > {"llama", "olmo3", "bloom"}
    assert not found & {"mixtral", "qwen3_moe", "bert", "t5"}
    assert found <= {*DENSE, *REFUSED}


def test_print_the_tensors_of_a_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["find_families.py", "olmo3"])
    find_families.main()
    printed = capsys.readouterr().out
    assert "Olmo3Config Olmo3Model Olmo3ForCausalLM" in printed
    assert "model.layers.0.mlp.gate_proj.weight (48, 32)" in printed
