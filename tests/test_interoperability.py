"""What the runs against other software conclude from what they found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "interoperability"), str(HERE / "interoperability" / "engines")]

from interop.models import Case, cases  # noqa: E402
from interop.results import (  # noqa: E402
    DIFFERS,
    FAILS,
    NOT_TRIED,
    SAME,
    Cell,
    compare,
    contradiction,
    table,
)
from mergekit_merge import split  # noqa: E402
from worker import Job, in_a_fork, reason  # noqa: E402

from upcycle_cli.families.engines import Engine, Support, engines  # noqa: E402
from upcycle_cli.families.shipped import UPCYCLED_PREFIX  # noqa: E402
from upcycle_cli.recipe import Routing  # noqa: E402

CASE = Case("qwen3", "qwen3_moe", "E8G8T8", "topk-softmax")
CONTROL = Case("qwen3", "qwen3_moe", "E8G8T8", "topk-softmax", ("--scaling none",), control=True)


def test_text_is_the_same_to_the_last_token() -> None:
    assert compare([[1, 2], [3, 4]], [[1, 2], [3, 4]]) == Cell(SAME)
    assert compare([[1, 2], [3, 5]], [[1, 2], [3, 4]]).detail == "from item 1 of output 1: 5 for 4"
    assert compare([[1, 2], [3]], [[1, 2], [3, 4]]).verdict == DIFFERS


def test_scores_differ_by_no_more_than_rounding() -> None:
    assert compare([[0.5, -3.0001]], [[0.5, -3.0]]).verdict == SAME
    assert compare([[0.5, -3.01]], [[0.5, -3.0]]).verdict == DIFFERS


def certain(*_place: int) -> float:
    """A dense model that does not hesitate."""
    return 3.0


def test_approximate_texts_may_part_where_the_dense_model_hesitates() -> None:
    text, late, early = [*range(32)], [*range(31), 99], [*range(20), 99, *range(21, 32)]

    def hesitant(index: int, position: int) -> float:
        assert (index, position) in {(0, 31), (0, 20)}  # asked only where texts part
        return -0.01

    assert compare([late], [text]).verdict == DIFFERS
    assert compare([late], [text], certain).verdict == DIFFERS
    assert compare([late], [text], hesitant).verdict == SAME
    assert compare([early], [text], hesitant).detail == "only 20 items before the outputs part"
    assert compare([early, text], [text, text], hesitant).verdict == SAME
    assert compare([text[:-1]], [text], hesitant).verdict == DIFFERS


def test_approximate_scores_may_differ_by_what_softmax_topk_promises() -> None:
    scores = [-3.0] * 24
    assert compare([[0.5], scores], [[0.5], scores], certain).verdict == SAME
    assert compare([[0.5], [-2.95] * 24], [[0.5], scores], certain).verdict == SAME
    assert compare([[0.5], [*scores[1:], -3.5]], [[0.5], scores], certain).verdict == SAME
    assert compare([[0.5], [-2.8] * 24], [[0.5], scores], certain).verdict == DIFFERS
    assert compare([[0.5], [float("nan")] * 24], [[0.5], scores], certain).verdict == DIFFERS


@pytest.mark.parametrize(
    ("support", "agreeing"),
    [
        (Support.RUNS, {SAME}),
        (Support.WRONG, {DIFFERS, FAILS}),
        (Support.PER_EXPERT_ONLY, {DIFFERS, FAILS}),
        (Support.UNTIED_ONLY, {DIFFERS, FAILS}),
        (Support.UNTIED_OR_WRONG, {DIFFERS, FAILS}),
        (Support.REFUSES, {DIFFERS, FAILS}),
    ],
)
def test_what_is_found_is_held_against_what_is_said(support: Support, agreeing: set[str]) -> None:
    said = [Engine("vLLM", support)]
    for verdict in (SAME, DIFFERS, FAILS):
        found = contradiction(CASE, "vLLM", Cell(verdict), said)
        assert (found is None) == (verdict in agreeing)
    assert contradiction(CASE, "vLLM", Cell(NOT_TRIED), said) is None
    assert contradiction(CASE, "llama.cpp", Cell(FAILS), said) is None  # nothing is said of it


def test_a_version_of_transformers_stands_for_transformers_unless_it_is_listed() -> None:
    said = [Engine("transformers", Support.RUNS)]
    assert contradiction(CASE, "transformers 4", Cell(FAILS), said)
    said.append(Engine("transformers 4", Support.PER_EXPERT_ONLY))
    assert contradiction(CASE, "transformers 4", Cell(FAILS), said) is None
    assert contradiction(CASE, "transformers 5", Cell(FAILS), said)


def test_a_run_that_cannot_tell_a_wrong_model_shows_nothing() -> None:
    assert contradiction(CONTROL, "vLLM", Cell(SAME), [])
    assert contradiction(CONTROL, "vLLM", Cell(DIFFERS), []) is None


def test_the_table_gives_the_reasons_below() -> None:
    rows = {
        CASE: {"vLLM": Cell(FAILS, "KeyError: 'w1'"), "MLX": Cell(SAME)},
        CONTROL: {"vLLM": Cell(FAILS, "KeyError: 'w1'")},
    }
    assert table(rows, ["vLLM", "MLX"]).splitlines() == [
        "| conversion | vLLM | MLX |",
        "|---|---|---|",
        f"| {CASE.name} | fails | same |",
        f"| {CONTROL.name} | fails | – |",
        "",
        f"- vLLM: KeyError: 'w1' ({CASE.name}; {CONTROL.name})",
    ]


def test_fused_experts_are_told_apart_by_the_names_of_split_ones() -> None:
    layer = "model.layers.3"
    gate_up = torch.arange(2 * 6 * 4).reshape(2, 6, 4).float()
    down = torch.arange(2 * 4 * 3).reshape(2, 4, 3).float()
    found = split(f"{layer}.mlp.experts.gate_up_proj", gate_up)
    found |= split(f"{layer}.mlp.experts.down_proj", down)
    experts = f"{layer}.block_sparse_moe.experts"
    expected: dict[str, torch.Tensor] = {}
    for expert in range(2):
        expected |= split(f"{experts}.{expert}.w1.weight", gate_up[expert, :3])
        expected |= split(f"{experts}.{expert}.w3.weight", gate_up[expert, 3:])
        expected |= split(f"{experts}.{expert}.w2.weight", down[expert])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert f"{layer}.mlp.experts.1.down_proj.weight" in found
    router = split(f"{layer}.block_sparse_moe.gate.weight", down)
    assert list(router) == [f"{layer}.mlp.gate.weight"]


def die_of(number: int) -> list[list[int]]:
    os.kill(os.getpid(), number)
    return [[0]]


def test_a_process_answers_for_models_that_crash_it() -> None:
    answers: dict[str, Callable[[], list[list[int]]]] = {
        "runs": lambda: [[1, 2]],
        "raises": lambda: [[1 // 0]],
        "exits": lambda: sys.exit("not this one"),
        "crashes": lambda: die_of(signal.SIGKILL),
        "hangs": lambda: die_of(signal.SIGALRM),
    }

    def run(job: Job) -> list[list[int]]:
        return answers[job["model"]]()

    found = {name: in_a_fork(run, {"model": name, "limit_s": 60}) for name in answers}
    assert found == {
        "runs": {"output": [[1, 2]]},
        "raises": {"error": "ZeroDivisionError: integer division or modulo by zero"},
        "exits": {"error": "SystemExit: not this one"},
        "crashes": {"error": "exit code -9"},
        "hangs": {"error": "no answer in 60 s"},
    }


def test_nothing_that_a_model_started_is_left() -> None:
    ours, theirs = os.pipe()

    def run(_: Job) -> list[list[int]]:
        subprocess.Popen(["sleep", "600"], pass_fds=[theirs])
        return [[0]]

    assert in_a_fork(run, {"limit_s": 60}) == {"output": [[0]]}
    os.close(theirs)
    assert os.read(ours, 1) == b""  # when the last process that could write is gone
    os.close(ours)


def test_the_reason_is_the_last_line_that_names_an_error() -> None:
    said = "KeyError: 'a'\nValueError: no file: /tmp/upcycle-x/moe/config.json\nDone.\n"
    assert reason(said) == "ValueError: no file"
    assert reason("one\n\ntwo\n") == "two"


DOCS = Path(__file__).resolve().parents[1] / "docs" / "interoperability.md"
TIED = {"llama"}  # SmolLM2


def measured() -> dict[str, dict[str, str]]:
    """The table of the documentation: what each software made of each conversion."""
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("| conversion |") or (line.startswith("| ") and " → " in line)
    ]
    return {name: dict(zip(rows[0][1:], cells, strict=True)) for name, *cells in rows[1:]}


def said_of(case: Case) -> tuple[Engine, ...]:
    shipped = f"{UPCYCLED_PREFIX}{case.dense}" if case.target == "upcycled" else case.target
    return engines(
        shipped,
        Routing(case.routing),
        tied=case.dense in TIED and "--untie-embeddings" not in case.options,
        fused=shipped != case.target or "--expert-layout fused" in case.options,
        plain_attention=True,
    )


def test_the_documentation_has_every_conversion() -> None:
    assert set(measured()) == {case.name for case in cases()}


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_the_documentation_agrees_with_what_upcycle_says(case: Case) -> None:
    for software, verdict in measured()[case.name].items():
        assert contradiction(case, software, Cell(verdict), said_of(case)) is None


@pytest.mark.parametrize("case", [case for case in cases() if not case.control], ids=str)
def test_nothing_is_said_of_an_engine_that_was_not_measured(case: Case) -> None:
    row = measured()[case.name]
    for engine in said_of(case):
        columns = [name for name in row if name.startswith(engine.name)]
        assert any(row[name] != NOT_TRIED for name in columns), engine.name
