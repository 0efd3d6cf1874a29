"""What the runs against other software conclude from what they found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "interoperability"), str(HERE / "interoperability" / "engines")]

from interop.conversions import EXACT, PLAIN, SIGMOID, UPCYCLED, Case, cases  # noqa: E402
from interop.results import (  # noqa: E402
    NOT_TRIED,
    Cell,
    compare,
    contradiction,
    measured,
    parts_of,
    table,
    target_of,
)
from interop.software import SOFTWARE  # noqa: E402
from measured import TARGET, documented, text, verdicts  # noqa: E402
from worker import Job, in_a_fork, reason  # noqa: E402

from upcycle_cli.models.dense_rows import DENSE  # noqa: E402
from upcycle_cli.models.engines import (  # noqa: E402
    CHANGED,
    DIFFERS,
    DIFFERS_ON_CPU,
    FAILS,
    FUSED,
    OTHERS,
    SAME,
    SCALED,
    SHARED,
    SOME_LAYERS,
    TIED,
    Engine,
    Support,
    engines,
)
from upcycle_cli.plan.warnings import ENGINE_WARNINGS  # noqa: E402
from upcycle_cli.recipe.recipe import Routing  # noqa: E402

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
        (Support.BALANCED_OR_WRONG, {DIFFERS, FAILS}),
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
    said = "KeyError: 'a'\nValueError: no file: /scratch/upcycle-x/moe/config.json\nDone.\n"
    assert reason(said) == "ValueError: no file"
    assert reason("one\n\ntwo\n") == "two"


TIED_CASE = Case("llama", "mixtral", "E2G2T2", EXACT)
PLAIN_CASE = Case("mistral", "mixtral", "E4G2T4", EXACT)
FUSED_CASE = Case("mistral", "mixtral", "E4G2T4", EXACT, ("--expert-layout fused",))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ({PLAIN_CASE: SAME, TIED_CASE: SAME}, {EXACT: SAME, TIED: SAME}),
        # What a model without it does tells what is at fault.
        ({TIED_CASE: FAILS, PLAIN_CASE: SAME}, {EXACT: SAME, TIED: FAILS}),
        ({TIED_CASE: DIFFERS}, {EXACT: DIFFERS}),
        ({PLAIN_CASE: DIFFERS, FUSED_CASE: FAILS}, {EXACT: DIFFERS}),
        ({PLAIN_CASE: SAME, FUSED_CASE: DIFFERS}, {EXACT: SAME, FUSED: DIFFERS}),
        ({CONTROL: DIFFERS}, {}),
    ],
)
def test_the_table_tells_what_an_engine_does_not_understand(
    rows: dict[Case, str], says: dict[str, str]
) -> None:
    found = measured({case: {"MLX": verdict} for case, verdict in rows.items()})
    assert found == ({"mixtral": {"MLX": says}} if says else {})


BALANCED_CASE = Case("lfm2", "lfm2_moe", "E4G2T4", SIGMOID, ("--scale-split balanced",))
UNSHARED_CASE = Case("mistral", "qwen2_moe", "E4G2T4", PLAIN)
SHARED_CASE = replace(UNSHARED_CASE, recipe="E4G4T6", options=("--shared-experts 1",))
DEEPSEEK_CASE = Case("youtu", "deepseek_v3", "E4G2T4", SIGMOID)
LLAVA_CASE = Case("llava (mistral)", "mixtral", "E4G2T4", EXACT)


@pytest.mark.parametrize(
    ("rows", "target", "says"),
    [
        (
            {BALANCED_CASE: SAME, replace(BALANCED_CASE, options=()): DIFFERS},
            "lfm2_moe",
            {SIGMOID: SAME, TIED: SAME, SCALED: DIFFERS},
        ),
        (
            {SHARED_CASE: DIFFERS, UNSHARED_CASE: SAME},
            "qwen2_moe",
            {PLAIN: SAME, SHARED: DIFFERS},
        ),
        # Inside of another, an engine's code is not that for the text model alone.
        ({LLAVA_CASE: FAILS}, "llava around mixtral", {EXACT: FAILS}),
        ({replace(LLAVA_CASE, target=UPCYCLED): FAILS}, "upcycled", {EXACT: FAILS}),
    ],
)
def test_the_table_tells_what_it_is_in_a_model(
    rows: dict[Case, str], target: str, says: dict[str, str]
) -> None:
    found = measured({case: {"MLX": verdict} for case, verdict in rows.items()})
    assert {name: dict(engines) for name, engines in found.items() if engines} == {
        target: {"MLX": says}
    }


def test_what_goes_wrong_elsewhere_or_with_any_such_model_is_told_apart() -> None:
    rows = {
        DEEPSEEK_CASE: {"vLLM": DIFFERS, "mergekit": DIFFERS, "lm-eval": SAME},
        PLAIN_CASE: {"mergekit": FAILS, "vLLM by transformers": DIFFERS},
    }
    assert measured(rows) == {
        "deepseek_v3": {
            "vLLM": {SIGMOID: DIFFERS_ON_CPU},
            "mergekit": {SIGMOID: CHANGED},
        },
        "mixtral": {"vLLM by transformers": {EXACT: DIFFERS}},
    }


def test_rows_of_one_target_that_disagree_are_not_put_together() -> None:
    other = Case("iquestcoder", "mixtral", "E4G2T4", EXACT)
    with pytest.raises(ValueError, match="MLX, mixtral, topk-softmax: fails, against other rows"):
        measured({PLAIN_CASE: {"MLX": SAME}, other: {"MLX": FAILS}})


def test_what_refuses_all_shipped_code_refuses_that_of_any_family() -> None:
    rows = {
        Case(dense, UPCYCLED, "E4G2T4", EXACT): {"MLX": FAILS, "vLLM": verdict}
        for dense, verdict in (("olmo2", SAME), ("gpt2", FAILS))
    }
    assert measured(rows) == {
        "upcycled": {"MLX": {EXACT: FAILS}},
        "upcycled_olmo2": {"vLLM": {EXACT: SAME, SCALED: SAME}},
        "upcycled_gpt2": {"vLLM": {EXACT: FAILS}},
    }


def said_of(case: Case) -> tuple[Engine, ...]:
    return engines(
        target_of(case),
        Routing(case.routing),
        tied=TIED in parts_of(case),
        fused=FUSED in parts_of(case),
        plain_attention=True,
        every_layer=SOME_LAYERS not in parts_of(case),
        scaled=SCALED in parts_of(case),
        shared=SHARED in parts_of(case),
    )


TABLE = verdicts()


def test_the_documentation_has_every_conversion() -> None:
    assert set(documented()) == {case.name for case in cases()}


def test_every_pair_and_many_families_were_run_in_everything() -> None:
    pairs = {(name, target) for name, row in DENSE.items() for target in row.targets}
    assert pairs <= {(case.dense, case.target) for case in TABLE}
    assert len({case.dense for case in TABLE if case.target == UPCYCLED and not case.wrapper}) > 6
    for case, row in TABLE.items():
        tried = {name for name, verdict in row.items() if verdict != NOT_TRIED}
        assert tried == {each.name for each in SOFTWARE if each.tries(case)}, case.name


def test_what_upcycle_says_of_engines_is_made_of_the_table() -> None:
    """`python tests/interoperability/measured.py --write` makes it anew."""
    assert TARGET.read_text(encoding="utf-8") == text()


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_the_documentation_agrees_with_what_upcycle_says(case: Case) -> None:
    for software, verdict in TABLE[case].items():
        assert contradiction(case, software, Cell(verdict), said_of(case)) is None


@pytest.mark.parametrize("case", [case for case in TABLE if not case.control], ids=str)
def test_nothing_is_said_of_an_engine_that_was_not_measured(case: Case) -> None:
    # A head of its own is what every engine has a place for: it may have been run with a tied one.
    options = tuple(option for option in case.options if option != "--untie-embeddings")
    rows = [TABLE[case], TABLE.get(replace(case, options=options), {})]
    # What is run once for each pair goes wrong with whatever else a model of it has.
    pair = [row for each, row in TABLE.items() if target_of(each) == target_of(case)]
    for engine in said_of(case):
        column = "transformers 5" if engine.name == "transformers" else engine.name
        tried = {row.get(column, NOT_TRIED) for row in (pair if column in OTHERS else rows)}
        assert tried != {NOT_TRIED}, engine.name


def test_who_computes_something_else_is_warned_of() -> None:
    wrong = {
        (case, software)
        for case, row in TABLE.items()
        for software, verdict in row.items()
        if verdict == DIFFERS and not case.control
    }
    assert {(case.target, software) for case, software in wrong} >= {
        ("deepseek_v3", "vLLM"),
        ("nemotron_h", "mergekit"),
        ("glm4_moe", "vLLM"),
    }
    for case, software in wrong:
        said = {engine.name: engine.support for engine in said_of(case)}
        assert said[software] in ENGINE_WARNINGS, f"{software}, {case.name}"


def test_what_goes_wrong_without_a_word_is_said_in_words() -> None:
    silent = {each for each in Support if each.name.endswith("WRONG") or "_ON_CPU" in each.name}
    assert ENGINE_WARNINGS.keys() == {*silent, Support.CHANGES}
