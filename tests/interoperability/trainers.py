"""Which trainers train what upcycle writes from the dense model's loss, and save it unchanged.

    python tests/interoperability/trainers.py [--software NAME] [--only WORDS] [--missing]
        [--write]

converts tiny models of several dense types, hands each to each trainer on the CPU, in float32, and
prints Markdown: whether the first step has the dense model's loss on the same batch, and whether
the trainer saves the same tensors, also by `upcycle inspect`; below, what balancing adds to the
loss, which correction bias a step moves, and what adapters reach. Conversions with `--scaling none`
are wrong on purpose. Each trainer is installed into a virtual environment of its own under
~/.cache/upcycle-interoperability on first use.

`--write` puts each result into results.json at once; `--missing` leaves out what is there. The exit
code is 1 when something contradicts what `upcycle inspect` says.
"""

from __future__ import annotations

import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from interop import trained
from interop.conversions import cases
from interop.models import ROW_TOKENS, convert
from interop.results import Cell, contradiction
from interop.software import Session, Software

from upcycle_cli import inspect

if TYPE_CHECKING:
    from interop.conversions import Case

ROWS, SEED = 4, 0


class Trainers(Session):
    """Converts, trains, and keeps what was found."""

    answers: dict[Case, dict[str, dict[str, Any]]]
    """What each trainer measured besides."""

    def convert_and_try(self, case: Case) -> None:
        """Fill one row of the table."""
        trying = self.trying(case)
        if not trying:
            return
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder, ThreadPoolExecutor() as pool:
            with self.alone:
                dense, rows = trained.make_dense(case.dense, Path(folder)), random_rows()
                wanted = dense_loss(dense, rows)
            moe = Path(folder) / "moe"
            convert(dense, moe, case)
            said = inspect(moe).trainers

            def tried(software: Software) -> None:
                linked = Path(folder) / software.name.replace(" ", "-") / "moe"
                linked.parent.mkdir()
                linked.symlink_to(moe)
                cell = answer = self.workers[software].ask({"model": str(linked), "rows": rows})
                if not isinstance(answer, Cell):
                    cell = trained.judge(answer, wanted, case)
                    self.answers.setdefault(case, {})[software.name] = answer
                saved = linked.with_name("saved")
                if saved.exists() and has_moved(saved, dense):
                    found = "by upcycle inspect the experts have moved, in a step of no size"
                    self.contradictions.append(f"{software.name}: {found}")
                found = contradiction(case, software.name, cell, said)
                self.note(case, software.name, cell, found)

            list(pool.map(tried, trying))


def has_moved(saved: Path, dense: Path) -> bool:
    """Whether upcycle reads another model in what a trainer has saved."""
    weights = inspect(saved, weights=True, dense=dense).weights
    assert weights is not None
    return any(distance for layer in weights.movement or () for distance in layer.moved)


def random_rows() -> list[list[int]]:
    """Return a batch of random token ids, without those of pictures."""
    import torch

    generator, shape = torch.Generator().manual_seed(SEED), (ROWS, ROW_TOKENS)
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


def main(
    *,
    software: list[str] | None = None,
    only: list[str] | None = None,
    write: bool = False,
    missing: bool = False,
) -> None:
    """Run everything, print the tables, and exit with 1 on a contradiction."""
    wanted = software or [each.name for each in trained.TRAINERS]
    with tempfile.TemporaryDirectory(prefix="upcycle-trainers-") as name:
        chosen = [each for each in trained.TRAINERS if each.name in wanted]
        run = Trainers(Path(name), chosen, write=write, missing=missing)
        run.answers = {}
        run.not_installed |= trained.STOPPED
        trying = cases(trainers=True)
        asked = [c for c in trying if not only or any(words in c.name for words in only)]
        run.try_all(asked, run.convert_and_try)
        in_order = {case: run.answers[case] for case in trying if case in run.answers}
        sys.exit(run.report("trainers", *trained.measured_tables(in_order)))


if __name__ == "__main__":
    typer.run(main)
