"""What is known of trainers, against the table of the documentation that they were tested by."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "interoperability"), str(TESTS.parent / "docs")]

import generate_tables  # noqa: E402
from interop.conversions import Case, documented  # noqa: E402
from interop.results import Cell, cell_of, contradiction  # noqa: E402

from upcycle_cli.models.dense_rows import DENSE  # noqa: E402
from upcycle_cli.models.engines import TRAINERS, trainers  # noqa: E402
from upcycle_cli.models.lookup import native_target, shipped_target  # noqa: E402
from upcycle_cli.models.moe_rows import NATIVE  # noqa: E402
from upcycle_cli.models.wrappers import IN_MEMORY_PREFIXES, WRAPPERS, Inside  # noqa: E402
from upcycle_cli.recipe.recipe import Routing  # noqa: E402

DOCS = TESTS.parent / "docs"
REFERENCE = DOCS / "reference"


def inside(wrapper: str) -> Inside:
    return Inside(WRAPPERS[wrapper], IN_MEMORY_PREFIXES)


def test_a_wrapped_target_has_settings_of_its_own() -> None:
    rows = [NATIVE["qwen2_moe"]]
    rows += [native_target("qwen2_moe", inside(name)) for name in ("llava", "mistral3")]
    alone, in_llava, in_mistral3 = (
        {
            trainer.name: trainer.settings
            for trainer in trainers(row, Routing.SOFTMAX_TOPK, tied=False, fused=False)
        }
        for row in rows
    )
    assert "applies the balancing loss" in alone["TRL"]
    assert "training stops" in in_llava["TRL"]
    assert in_mistral3 == {}  # untested


MEASURED = {
    case: {name: cell_of(said).verdict for name, said in found.items() if name in TRAINERS}
    for case, found in documented().items()
    if found.keys() & {*TRAINERS}
}


def test_the_reference_has_every_target_and_setting() -> None:
    assert {*NATIVE, "upcycled"} <= {case.target for case in MEASURED}
    for name in generate_tables.PAGES:
        page = (DOCS / name).read_text(encoding="utf-8")
        assert page == generate_tables.page(name), "run `python docs/generate_tables.py`"
    assert f"{len(DENSE)} dense model types" in (REFERENCE / "families.md").read_text("utf-8")
    told = " ".join((REFERENCE / "compatibility.md").read_text("utf-8").split())
    for target in NATIVE.values():
        for trainer in trainers(target, target.routings[-1], tied=True, fused=False):
            for code in re.findall(r"`[^`]+`", f"{trainer.settings} {trainer.precision}"):
                prefixes = re.findall(r'"([\w.]*experts)[.]', code)
                assert all(words in told for words in prefixes or [code]), code


@pytest.mark.parametrize("case", MEASURED, ids=lambda case: case.name)
def test_the_documentation_agrees_with_the_table(case: Case) -> None:
    if case.target == "upcycled":
        target = shipped_target(DENSE["nemotron"], "relu2", biased=False)
    else:
        target = native_target(case.target, inside(case.wrapper) if case.wrapper else None)
    fused = target.ships_code or "--expert-layout fused" in case.options
    tied = "(tied)" in case.dense
    known = trainers(target, Routing(case.routing), tied=tied, fused=fused)
    row = MEASURED[case]
    for name, verdict in row.items():
        assert contradiction(case, name, Cell(verdict), known, lists_all=True) is None
    assert all(trainer.name in row for trainer in known)
