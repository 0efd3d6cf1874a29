"""What the runs of trainers conclude from what they found, and what is said of trainers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "interoperability"))

from interop.conversions import Case  # noqa: E402
from interop.results import NOT_TRIED, Cell  # noqa: E402
from interop.trained import (  # noqa: E402
    contradiction,
    judge,
    measured_tables,
    settings_table,
    training_cases,
)

from upcycle_cli.models.dense_rows import DENSE  # noqa: E402
from upcycle_cli.models.engines import DIFFERS, FAILS, SAME, Support  # noqa: E402
from upcycle_cli.models.families import native_target  # noqa: E402
from upcycle_cli.models.moe_rows import NATIVE  # noqa: E402
from upcycle_cli.models.shipped_row import shipped  # noqa: E402
from upcycle_cli.models.trainers import (  # noqa: E402
    Trainer,
    expert_parallel_sizes,
    trainers,
)
from upcycle_cli.models.wrapper import IN_MEMORY_PREFIXES, Inside  # noqa: E402
from upcycle_cli.models.wrappers import WRAPPERS  # noqa: E402
from upcycle_cli.recipe.recipe import Routing  # noqa: E402

CASE = Case("qwen3", "qwen3_moe", "E4G2T4", "topk-softmax")
PLAIN = Case("qwen3", "qwen3_moe", "E4G2T4", "softmax-topk")
CONTROL = Case("qwen3", "qwen3_moe", "E4G2T4", "topk-softmax", ("--scaling none",), control=True)
DOCS = HERE.parent / "docs" / "training.md"


def answer(loss: float = 7.0, *wrong: str) -> Mapping[str, Any]:
    return {"loss": loss, "wrong": list(wrong), "measured": {}}


def test_the_first_loss_and_the_tensors_have_to_be_the_same() -> None:
    assert judge(answer(), 7.0, CASE) == Cell(SAME)
    assert judge(answer(7.0009), 7.0, CASE).verdict == DIFFERS
    assert judge(answer(float("nan")), 7.0, CASE).verdict == DIFFERS
    assert judge(answer(7.0009), 7.0, PLAIN) == Cell(SAME)
    assert judge(answer(7.01), 7.0, PLAIN).verdict == DIFFERS
    assert judge(answer(7.0, "w", "v"), 7.0, CASE).detail == "2 tensors do not come back, as w"


@pytest.mark.parametrize(
    ("support", "agreeing"),
    [
        (Support.RUNS, {SAME}),
        (Support.PER_EXPERT_ONLY, {DIFFERS, FAILS}),
        (Support.UNTIED_ONLY, {DIFFERS, FAILS}),
    ],
)
def test_what_is_found_is_held_against_what_is_said(support: Support, agreeing: set[str]) -> None:
    said = [Trainer("TRL", support, "", "")]
    for verdict in (SAME, DIFFERS, FAILS):
        found = contradiction(CASE, "TRL", Cell(verdict), said)
        assert (found is None) == (verdict in agreeing)
    assert contradiction(CASE, "TRL", Cell(NOT_TRIED), said) is None
    assert contradiction(CASE, "peft", Cell(FAILS), said) is None  # nothing is said of it
    assert contradiction(CASE, "peft", Cell(SAME), said)  # and could be
    assert contradiction(CONTROL, "TRL", Cell(SAME), said)
    assert contradiction(CONTROL, "TRL", Cell(DIFFERS), said) is None


def test_the_tables_have_what_was_measured() -> None:
    added, reached = {"as written": 0.0404}, {"all-linear": {"router": [2, 1]}, "others": {}}
    row: dict[str, Mapping[str, Any]] = {
        "TRL": {"measured": {"added": added, "stops with": "it"}},
        "peft": {"measured": {"reached": reached}},
    }
    lines = measured_tables({CASE: row, CONTROL: row})
    assert f"| {CASE.name} | 0.040 |" in lines
    assert f"| {CASE.name} | router 1/2 | nothing |" in lines
    assert f"- TRL: stops with it ({CASE.name})" in lines
    assert not any(CONTROL.name in line for line in lines)


def test_what_is_said_of_a_model_is_not_said_of_it_inside_of_another() -> None:
    """Most around llava is as without it, but what balances is not, and mistral3 was not tried."""
    rows = [
        native_target("qwen2_moe", inside("llava")),
        native_target("qwen2_moe", inside("mistral3")),
    ]
    alone, in_llava, in_mistral3 = (
        {
            trainer.name: trainer.settings
            for trainer in trainers(row, Routing.SOFTMAX_TOPK, tied=False, fused=False)
        }
        for row in (NATIVE["qwen2_moe"], *rows)
    )
    assert "the balancing loss is applied" in alone["TRL"]
    assert "or it stops" in in_llava["TRL"]
    assert in_mistral3 == {}


def test_experts_in_one_tensor_that_have_no_other_layout() -> None:
    target = native_target("qwen3_vl_moe_text", inside("qwen3_vl"))
    for fused, support in ((False, Support.RUNS), (True, Support.REFUSES)):
        said = trainers(target, Routing.TOPK_SOFTMAX, tied=False, fused=fused)
        assert {trainer.name: trainer.support for trainer in said}["NeMo AutoModel"] is support


def inside(wrapper: str) -> Inside:
    return Inside(WRAPPERS[wrapper], IN_MEMORY_PREFIXES)


def test_experts_divide_among_ranks() -> None:
    assert expert_parallel_sizes(8) == (1, 2, 4, 8)
    assert expert_parallel_sizes(12) == (1, 2, 3, 4, 6, 12)


def measured() -> dict[str, dict[str, str]]:
    """The first table of the documentation: what each trainer made of each conversion."""
    lines = DOCS.read_text(encoding="utf-8").split("Added to the first loss")[0].splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("| conversion |") or (line.startswith("| ") and " → " in line)
    ]
    return {name: dict(zip(rows[0][1:], cells, strict=True)) for name, *cells in rows[1:]}


def said_of(case: Case) -> tuple[Trainer, ...]:
    if case.target == "upcycled":
        target = shipped(DENSE["nemotron"], "relu2", biased=False)
    else:
        target = native_target(case.target, inside(case.wrapper) if case.wrapper else None)
    fused = target.ships_code or "--expert-layout fused" in case.options
    return trainers(target, Routing(case.routing), tied="(tied)" in case.dense, fused=fused)


def test_the_documentation_has_every_conversion() -> None:
    assert set(measured()) == {case.name for case in training_cases()}


@pytest.mark.parametrize("case", training_cases(), ids=lambda case: case.name)
def test_the_documentation_agrees_with_what_upcycle_says(case: Case) -> None:
    row = measured()[case.name]
    for name, verdict in row.items():
        assert contradiction(case, name, Cell(verdict), said_of(case)) is None
    assert all(row[trainer.name] != NOT_TRIED for trainer in said_of(case))


def test_what_a_head_that_shares_the_embedding_changes_is_said() -> None:
    changed = {
        tuple(line.strip("| ").split(" | ")[:2])
        for line in settings_table()
        if "where the head shares the embedding" in line
    }
    assert changed == {
        ("torchtitan", "qwen3_moe with topk-softmax"),
        ("torchtitan", "qwen3_moe with softmax-topk"),
        ("NeMo AutoModel", "qwen3_moe"),
        ("NeMo AutoModel", "glm4_moe"),
    }


def test_the_documentation_says_what_is_to_be_set() -> None:
    assert "\n".join(settings_table()) in DOCS.read_text(encoding="utf-8")
