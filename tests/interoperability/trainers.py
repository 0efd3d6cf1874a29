"""Which trainers train what upcycle writes from the dense model's loss, and save it unchanged.

    python tests/interoperability/trainers.py [--software NAME] [--only TEXT] [--write]

converts tiny models of several dense types, hands each to each trainer on the CPU, in float32, and
prints Markdown: whether the first step has the dense model's loss on the same batch, and whether
the trainer saves the same tensors, also by `upcycle inspect`; below, what balancing adds to the
loss, which correction bias a step moves, and what adapters reach. Conversions with `--scaling none`
are wrong on purpose. Each trainer is installed into a virtual environment of its own under
~/.cache/upcycle-interoperability on first use.

`--write` puts the results into results.json. The exit code is 1 when something contradicts what
`upcycle inspect` says.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from interop import trained
from interop.models import convert
from interop.results import Cell, contradiction
from interop.software import Session, Software

from upcycle_cli import inspect

if TYPE_CHECKING:
    from interop.conversions import Case

ROWS, TOKENS, SEED = 4, 64, 0


def try_all(run: Session, case: Case) -> Iterator[tuple[Software, dict[str, Any]]]:
    """Fill one row of the table; yield the answer of each trainer."""
    dense = trained.make_dense(case.dense, run.scratch)
    with tempfile.TemporaryDirectory(dir=run.scratch) as folder:
        moe = Path(folder) / "moe"
        convert(dense, moe, case)
        rows = random_rows()
        wanted, said = dense_loss(dense, rows), inspect(moe).trainers
        for software, worker in run.workers.items():
            if not software.tries(case):
                continue
            cell = answer = worker.ask({"model": str(moe), "rows": rows})
            if not isinstance(answer, Cell):
                cell = trained.judge(answer, wanted, case)
                yield software, answer
            saved = moe.with_name("saved")
            if saved.exists() and has_moved(saved, dense):
                found = "by upcycle inspect the experts have moved, in a step of no size"
                run.contradictions.append(f"{software.name}: {found}")
            shutil.rmtree(saved, ignore_errors=True)
            found = contradiction(case, software.name, cell, said)
            run.note(case, software.name, cell, found)


def has_moved(saved: Path, dense: Path) -> bool:
    """Whether upcycle reads another model in what a trainer has saved."""
    weights = inspect(saved, weights=True, dense=dense).weights
    assert weights is not None
    return any(distance for layer in weights.movement or () for distance in layer.moved)


def random_rows() -> list[list[int]]:
    """Return a batch of random token ids, without those of pictures."""
    import torch

    generator, shape = torch.Generator().manual_seed(SEED), (ROWS, TOKENS)
    rows: list[list[int]] = torch.randint(trained.VOCABULARY, shape, generator=generator).tolist()
    return rows


def dense_loss(dense: Path, rows: list[list[int]]) -> float:
    """Return the mean loss of the next token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    wraps = "text_config" in json.loads((dense / "config.json").read_text())
    auto = AutoModelForImageTextToText if wraps else AutoModelForCausalLM
    model = auto.from_pretrained(dense, dtype=torch.float32).eval()
    ids = torch.tensor(rows)
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def main(software: list[str] | None = None, only: str = "", *, write: bool = False) -> None:
    """Run everything, print the tables, and exit with 1 on a contradiction."""
    wanted = software or [each.name for each in trained.TRAINERS]
    with tempfile.TemporaryDirectory(prefix="upcycle-trainers-") as name:
        run = Session(Path(name), [each for each in trained.TRAINERS if each.name in wanted])
        run.write = write
        run.not_installed |= trained.STOPPED
        answers = {
            case: {trainer.name: answer for trainer, answer in try_all(run, case)}
            for case in trained.training_cases()
            if only in case.name
        }
        sys.exit(run.report("trainers", *trained.measured_tables(answers)))


if __name__ == "__main__":
    typer.run(main)
