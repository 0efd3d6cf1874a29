"""What the runs in other software conclude, and that the tables of upcycle agree with them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from interop.conclusions import Row, measured, parts_of, target_of  # noqa: E402
from interop.conversions import EXACT, UPCYCLED, Case, documented  # noqa: E402
from interop.recorded import merge, text_of  # noqa: E402
from interop.results import NOT_TRIED, Cell, cell_of, contradiction, table  # noqa: E402
from interop.software import SOFTWARE  # noqa: E402
from measured import TARGET, text  # noqa: E402
from worker import Job, in_a_fork  # noqa: E402

from upcycle_cli.models import engines as known  # noqa: E402
from upcycle_cli.models.attention import PLAIN  # noqa: E402
from upcycle_cli.models.dense_rows import DENSE  # noqa: E402
from upcycle_cli.models.engines import (  # noqa: E402
    DIFFERS,
    FAILS,
    SAME,
    TRAINERS,
    Engine,
    Support,
)
from upcycle_cli.models.moe_rows import NATIVE  # noqa: E402
from upcycle_cli.models.wrappers import WRAPPERS  # noqa: E402
from upcycle_cli.plan.facts import SILENTLY_WRONG  # noqa: E402
from upcycle_cli.recipe.options import Routing  # noqa: E402

CASE = Case("qwen3", "qwen3_moe", "E8G8T8", "topk-softmax")
CONTROL = Case("qwen3", "qwen3_moe", "E8G8T8", "topk-softmax", ("--scaling none",))


SAYS = [Engine("vLLM", Support.RUNS), Engine("MLX", Support.PER_EXPERT_ONLY)]
OLDER = [Engine("transformers", Support.RUNS), Engine("transformers 4", Support.PER_EXPERT_ONLY)]


@pytest.mark.parametrize(
    ("case", "software", "verdict", "said", "contradicts"),
    [
        (CASE, "vLLM", SAME, SAYS, False),
        (CASE, "vLLM", DIFFERS, SAYS, True),
        (CASE, "vLLM", FAILS, SAYS, True),
        (CASE, "vLLM", NOT_TRIED, SAYS, False),
        (CASE, "MLX", SAME, SAYS, True),
        (CASE, "MLX", FAILS, SAYS, False),
        (CASE, "llama.cpp", FAILS, SAYS, False),  # it is not listed
        # Versions of transformers stand for transformers unless they are listed.
        (CASE, "transformers 4", FAILS, OLDER[:1], True),
        (CASE, "transformers 4", FAILS, OLDER, False),
        (CASE, "transformers 5", FAILS, OLDER, True),
        (CONTROL, "vLLM", SAME, [], True),
        (CONTROL, "vLLM", DIFFERS, [], False),
    ],
)
def test_a_result_that_contradicts_the_table_is_found(
    case: Case, software: str, verdict: str, said: list[Engine], *, contradicts: bool
) -> None:
    assert bool(contradiction(case, software, Cell(verdict), said)) is contradicts


def test_the_printed_table_lists_its_reasons() -> None:
    rows = {
        CASE: {"vLLM": Cell(FAILS, "KeyError: 'w1'"), "MLX": Cell(SAME)},
        CONTROL: {"vLLM": Cell(FAILS, "KeyError: 'w1'")},
    }
    assert table(rows, ["vLLM", "MLX"]).splitlines()[2:] == [
        f"| {CASE.name} | refuses | same |",
        f"| {CONTROL.name} | refuses | – |",
        "",
        f"- vLLM: KeyError: 'w1' ({CASE.name}; {CONTROL.name})",
    ]


# Running ------------------------------------------------------------------------------------------


def test_a_fork_reports_models_that_crash() -> None:
    answers: dict[str, Callable[[], object]] = {
        "runs": lambda: [[1, 2]],
        "raises": lambda: [[1 // 0]],
        "exits": lambda: sys.exit("not this one"),
        "crashes": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "hangs": lambda: os.kill(os.getpid(), signal.SIGALRM),
    }
    found = {
        name: in_a_fork(lambda job: answers[job["model"]](), {"model": name, "limit_s": 60})
        for name in answers
    }
    assert found == {
        "runs": {"output": [[1, 2]]},
        "raises": {"error": "ZeroDivisionError: integer division or modulo by zero"},
        "exits": {"error": "SystemExit: not this one"},
        "crashes": {"error": "exit code -9"},
        "hangs": {"error": "no answer in 60 s"},
    }


def test_a_fork_leaves_no_process_behind() -> None:
    ours, theirs = os.pipe()

    def run(_: Job) -> list[list[int]]:
        subprocess.Popen(["sleep", "600"], pass_fds=[theirs])
        return [[0]]

    assert in_a_fork(run, {"limit_s": 60}) == {"output": [[0]]}
    os.close(theirs)
    assert os.read(ours, 1) == b""  # when the last process that could write is gone
    os.close(ours)


# From runs to results.json, and from there to engines.json -------------------------------------


def test_results_of_another_version_replace_all_of_that_software() -> None:
    before = {
        "software": {
            "vLLM": {"version": "vllm 1", "date": "2026-01-01"},
            "MLX": {"version": "mlx 1", "date": "2026-01-01"},
        },
        "rows": [{"conversion": CASE.name, "found": {"vLLM": "same", "MLX": "same"}}],
    }
    found = {CONTROL: {"vLLM": Cell(FAILS, "no: memory"), "MLX": Cell(DIFFERS, "token 1")}}
    versions = {"vLLM": "vllm 2", "MLX": "mlx 1"}
    merged = merge(before, found, versions, "2026-01-02")
    assert merged["software"]["vLLM"] == {"version": "vllm 2", "date": "2026-01-02"}
    assert {each["conversion"]: each["found"] for each in merged["rows"]} == {
        CASE.name: {"MLX": "same"},
        CONTROL.name: {"vLLM": "refuses: no: memory", "MLX": "differs"},
    }
    assert cell_of("refuses: no: memory") == Cell(FAILS, "no: memory")
    assert json.loads(text_of(merged)) == merged


def test_verdicts_that_contradict_each_other_are_refused() -> None:
    one, other = (Case(dense, "mixtral", "E4G2T4", EXACT) for dense in ("mistral", "iquestcoder"))
    same = {EXACT: SAME, known.attention_part(PLAIN): SAME}
    assert measured([Row(one, "MLX", SAME)]) == {"mixtral": {"MLX": same}}
    with pytest.raises(ValueError, match=r"MLX, mixtral, topk-softmax.*: refuses, against other"):
        measured([Row(one, "MLX", SAME), Row(other, "MLX", FAILS)])


# results.json ------------------------------------------------------------------------------------


def said_of(case: Case) -> tuple[Engine, ...]:
    return known.engines(target_of(case), Routing(case.routing), parts_of(case))


TABLE = {
    case: {name: cell_of(said).verdict for name, said in found.items() if name not in TRAINERS}
    for case, found in documented().items()
    if found.keys() - {*TRAINERS}
}


def test_the_results_have_every_pair_and_every_routing() -> None:
    pairs = {(name, target) for name, row in DENSE.items() for target in row.targets}
    pairs |= {(wrapper, UPCYCLED) for wrapper in WRAPPERS}
    assert pairs <= {(case.wrapper or case.dense, case.target) for case in TABLE}
    routings = {(name, str(each)) for name, row in NATIVE.items() for each in row.routings}
    routings |= {(UPCYCLED, str(each)) for each in Routing}
    assert routings <= {(case.target, case.routing) for case in TABLE}
    assert len({case.dense for case in TABLE if case.target == UPCYCLED and not case.wrapper}) > 6
    for case, row in TABLE.items():
        assert {*row} == {each.name for each in SOFTWARE if each.tries(case)}, case.name


def test_engines_json_is_made_from_the_results() -> None:
    """`python tests/interoperability/measured.py --write` makes it."""
    assert TARGET.read_text(encoding="utf-8") == text()


def test_upcycle_says_what_was_measured_and_nothing_else() -> None:
    for case, row in TABLE.items():
        said = said_of(case)
        for software, verdict in row.items():
            assert contradiction(case, software, Cell(verdict), said) is None, case.name
        if case.control:
            continue
        # Every engine supports an untied head, so the tied model may have been run instead.
        options = tuple(option for option in case.options if option != "--untie-embeddings")
        rows = [row, TABLE.get(replace(case, options=options), {})]
        pair = [other for each, other in TABLE.items() if target_of(each) == target_of(case)]
        for engine in said:
            column = "transformers 5" if engine.name == "transformers" else engine.name
            among = pair if column in known.OTHERS else rows
            tried = {each.get(column, NOT_TRIED) for each in among}
            assert tried != {NOT_TRIED}, (case.name, engine.name)


def test_engines_that_compute_something_else_get_a_warning() -> None:
    silent = {each for each in Support if each.name.endswith("WRONG") or "_ON_CPU" in each.name}
    assert {*silent, Support.CHANGES} == SILENTLY_WRONG
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
        assert said[software] in SILENTLY_WRONG, f"{software}, {case.name}"
