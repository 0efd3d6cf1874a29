"""A tiny model shows what the row of its type states."""

from __future__ import annotations

import sys

import find_families
import pytest
from proposed_rows import UntoldError, proposed

from upcycle_cli.models import dense_rows
from upcycle_cli.models.dense_rows import DENSE

MEASURED = (
    *("mlp", "norm", "norm_offset", "layer", "embedding", "head", "activation", "keys"),
    *("layers_differ", "classes"),
)
NOT_SHOWN = {
    ("falcon", "keys"): "transformers maps num_kv_heads to nothing but its own name",
    ("falcon", "norm"): "its config states which of three norms there is",
    ("gpt_neo", "keys"): "it has the usual key, for which null means 4·H",
    ("stablelm", "norm"): "its config states whether there are one or two norms",
}
"""What a row states and one model cannot show."""


@pytest.mark.parametrize("model_type", [name for name, row in DENSE.items() if row.classes])
def test_a_deleted_row_is_proposed_again(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = DENSE[model_type]
    monkeypatch.delitem(DENSE, model_type)
    found = proposed(model_type)
    others = {name for name in MEASURED if getattr(found.row, name) != getattr(row, name)}
    assert others == {name for held, name in NOT_SHOWN if held == model_type}
    assert eval(str(found), vars(dense_rows)) == found.row  # noqa: S307 - it can be pasted


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("zamba", "no tiny model can be made: ValueError: `num_hidden_layers`"),
        ("dory", "a tiny model does not run: The size of tensor"),
        ("opt", "its layers hold the MLP's matrices themselves"),
        ("bloom", "no key of its config is the width of MLPs alone"),
        ("mamba", "its MLP has 5 matrices"),
        ("rwkv", "its MLP puts out more than a tensor"),
    ],
)
def test_types_without_a_proposal(model_type: str, reason: str) -> None:
    with pytest.raises(UntoldError, match=reason):
        proposed(model_type)


def test_the_output_fits_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["find_families.py", "olmo3", "gpt2", "lfm2", "zamba"])
    find_families.main()
    printed = capsys.readouterr().out
    assert '    DenseFamily("olmo3", "Olmo3", norm=None)\n    look at: ' in printed
    assert "width (48, where intermediate_size is 72)" in printed
    assert "zamba: this layer type is untested\n    no row to propose: " in printed
    assert max(map(len, printed.splitlines())) <= 80
