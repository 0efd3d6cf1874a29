"""Which trainers take what upcycle writes, and what to set in each.

    python tests/interoperability/trainers.py [--software NAME ...] [--only TEXT]

converts tiny models of several dense types, hands each to each trainer on the CPU, in float32, and
prints Markdown: whether the loss of the first step is the dense model's on the same batch, and what
the trainer saves or exports again has the same tensors, which `upcycle inspect` reads as such; and
below, what balancing adds to the loss, which correction bias a step moves, and what adapters reach.
Conversions with `--scaling none` are wrong on purpose. Each trainer is installed into a virtual
environment of its own under ~/.cache/upcycle-interoperability on first use.

The exit code is 1 when something contradicts `upcycle_cli/models/knowledge/trainers.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from interop.models import convert
from interop.results import Cell
from interop.software import Session
from interop.trained import (
    STOPPED,
    TRAINERS,
    VOCABULARY,
    contradiction,
    judge,
    make_dense,
    measured_tables,
    settings_table,
    training_cases,
)

from upcycle_cli import inspect

if TYPE_CHECKING:
    from interop.conversions import Case

ROWS, TOKENS, SEED = 4, 64, 0


def main() -> None:
    """Run everything, print the tables, and exit with 1 on a contradiction."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="upcycle-trainers-") as name:
        run = _Run(Path(name), arguments.software)
        for case in training_cases():
            if arguments.only in case.name:
                run.convert_and_try(case)
        run.close()
    measured, settings = measured_tables(run.answers), settings_table()
    print(run.report("trainers", *measured, "", "What to set:", "", *settings, ""))
    if run.contradictions:
        sys.exit(1)


class _Run(Session):
    """Converts, trains, and keeps what was found."""

    def __init__(self, scratch: Path, wanted: Sequence[str]) -> None:
        super().__init__(scratch, TRAINERS, wanted, quick=False)
        self.not_installed |= STOPPED
        self.answers: dict[Case, dict[str, dict[str, Any]]] = {}

    def convert_and_try(self, case: Case) -> None:
        """Fill one row of the table."""
        dense = make_dense(case.dense, self.scratch)
        self.answers[case] = {}
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            moe = Path(folder) / "moe"
            convert(dense, moe, case)
            rows = _rows()
            wanted, said = _dense_loss(dense, rows), inspect(moe).trainers
            for software, worker in self.workers.items():
                if not software.tries(case):
                    continue
                answer = worker.ask({"model": str(moe), "rows": rows})
                self.contradictions += _misread(moe.with_name("saved"), dense, software.name)
                cell = answer if isinstance(answer, Cell) else judge(answer, wanted, case)
                if not isinstance(answer, Cell):
                    self.answers[case][software.name] = answer
                found = contradiction(case, software.name, cell, said)
                self.note(case, software.name, cell, found)


def _misread(saved: Path, dense: Path, name: str) -> Iterator[str]:
    """Say what upcycle reads in what a trainer has saved and not moved, if it does save models."""
    if not saved.exists():
        return
    weights = inspect(saved, weights=True, dense=dense).weights
    assert weights is not None
    if any(distance for layer in weights.movement or () for distance in layer.moved):
        yield f"{name}: by upcycle inspect the experts have moved, in a step of no size"
    shutil.rmtree(saved)


def _rows() -> list[list[int]]:
    """Return a batch of token ids, drawn at random; none stands for a picture."""
    import torch

    generator, shape = torch.Generator().manual_seed(SEED), (ROWS, TOKENS)
    rows: list[list[int]] = torch.randint(VOCABULARY, shape, generator=generator).tolist()
    return rows


def _dense_loss(dense: Path, rows: list[list[int]]) -> float:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    wraps = "text_config" in json.loads((dense / "config.json").read_text())
    auto = AutoModelForImageTextToText if wraps else AutoModelForCausalLM
    model = auto.from_pretrained(dense, dtype=torch.float32).eval()
    ids = torch.tensor(rows)
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [software.name for software in TRAINERS]
    parser.add_argument("--software", nargs="+", choices=names, default=names)
    parser.add_argument("--only", default="", help="conversions whose name contains this")
    return parser.parse_args()


if __name__ == "__main__":
    main()
