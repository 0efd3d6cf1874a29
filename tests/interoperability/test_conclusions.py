"""What the runs in other software conclude, and that the tables of upcycle agree with them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import combinations, product
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from interop.conclusions import NOT_OF_THE_MODEL, Row, all_rows, measured  # noqa: E402
from interop.conversions import EXACT, UPCYCLED, Case, documented  # noqa: E402
from interop.recorded import merge, text_of  # noqa: E402
from interop.results import Cell, cell_of, contradiction, table  # noqa: E402
from interop.software import SOFTWARE  # noqa: E402
from interop.wrapped import WRAPPED  # noqa: E402
from measured import TARGET, text  # noqa: E402
from worker import Job, in_a_fork  # noqa: E402

from upcycle_cli.models import engines as known  # noqa: E402
from upcycle_cli.models.attention import PLAIN  # noqa: E402
from upcycle_cli.models.dense_rows import DENSE  # noqa: E402
from upcycle_cli.models.engines import (  # noqa: E402
    DIFFERS,
    FAILS,
    SAME,
    SILENTLY_WRONG,
    TRAINERS,
    Engine,
    Support,
    Traits,
)
from upcycle_cli.models.lookup import native_target, shipped_target  # noqa: E402
from upcycle_cli.models.moe_rows import NATIVE  # noqa: E402
from upcycle_cli.models.overview import families  # noqa: E402
from upcycle_cli.models.wrappers import WRAPPERS, Inside  # noqa: E402
from upcycle_cli.recipe.options import Routing  # noqa: E402

CASE = Case("qwen3", "qwen3_moe", "E8G8T8", "topk-softmax")
CONTROL = Case("qwen3", "qwen3_moe", "E8G8T8", "topk-softmax", ("--scaling none",))


SAYS = [
    *(Engine("vLLM", Support.RUNS), Engine("MLX", Support.PER_EXPERT_ONLY)),
    Engine("lm-eval", Support.NOT_TRIED),
]
OLDER = [Engine("transformers", Support.RUNS), Engine("transformers 4", Support.PER_EXPERT_ONLY)]


@pytest.mark.parametrize(
    ("case", "software", "verdict", "said", "contradicts"),
    [
        (CASE, "vLLM", SAME, SAYS, False),
        (CASE, "vLLM", DIFFERS, SAYS, True),
        (CASE, "vLLM", FAILS, SAYS, True),
        (CASE, "lm-eval", SAME, SAYS, False),  # it says that it was not tried
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
    with pytest.raises(
        ValueError, match=r"MLX, iquestcoder → mixtral.*: same, and refuses in another row"
    ):
        measured([Row(one, "MLX", FAILS), Row(other, "MLX", SAME)])


def test_properties_that_only_fail_together_are_kept_together() -> None:
    """One routing runs, and other layers run, but not both."""
    cases = [
        Case("mistral", "qwen2_moe", "E4G2T4", "topk-softmax"),
        Case("mistral", "qwen2_moe", "E4G2T4", "softmax-topk", ("--layers 1",)),
        Case("mistral", "qwen2_moe", "E4G2T4", "topk-softmax", ("--layers 1",)),
    ]
    verdicts = (SAME, SAME, DIFFERS)
    rows = [Row(case, "MLX", found) for case, found in zip(cases, verdicts, strict=True)]
    found = measured(rows)["qwen2_moe"]["MLX"]
    assert found[known.TOGETHER.join(rows[2].parts)] == DIFFERS
    assert sorted(found.values()) == [DIFFERS, *[SAME] * 4]


# results.json ------------------------------------------------------------------------------------


ROWS = [row for row in all_rows() if (row.target, row.software) not in NOT_OF_THE_MODEL]
SHIPPED_ROW = shipped_target(DENSE["nemotron"], "relu2", biased=False)
WRAPPED_ROWS = [
    native_target(name, Inside(wrapper))
    for wrapper in WRAPPERS.values()
    for name in wrapper.natives
]
TARGETS = {row.title: row for row in (*NATIVE.values(), *WRAPPED_ROWS)}
Claims = Mapping[str, Engine]


def claims(target: str, traits: Traits) -> tuple[Claims, Claims]:
    """Return what upcycle says of engines and of trainers, by their names in results.json."""
    runs = {each.name: each for each in known.engines(target, traits)}
    if runs["transformers"].support is Support.RUNS:  # an older one is listed if it differs
        runs.setdefault("transformers 4", runs["transformers"])
    del runs["transformers"]
    ships_code = target.startswith(known.ALL_SHIPPED)
    row = SHIPPED_ROW if ships_code else TARGETS[target]
    return runs, {each.name: each for each in known.trainers(row, traits)}


def traits_of(row: Row) -> Traits:
    routing, *properties, attention = row.parts
    return Traits(Routing(routing), properties, attention.removeprefix(known.attention_part("")))


def test_the_results_have_every_target_and_every_routing() -> None:
    table = {case: found for case, found in documented().items() if found.keys() - {*TRAINERS}}
    routings = {(name, str(each)) for name, row in NATIVE.items() for each in row.routings}
    routings |= {(UPCYCLED, str(each)) for each in Routing}
    assert routings <= {(case.target, case.routing) for case in table}
    wrapped = {name.split()[0] for name in WRAPPED}
    assert wrapped <= {case.wrapper for case in table if case.target == UPCYCLED}
    assert len({case.dense for case in table if case.target == UPCYCLED and not case.wrapper}) > 6
    for case, found in table.items():
        tries = {each.name for each in SOFTWARE if each.tries(case)}
        assert {*found} - {*TRAINERS} <= tries, case.name


def test_engines_json_is_made_from_the_results() -> None:
    """`python tests/interoperability/measured.py --write` makes it."""
    assert TARGET.read_text(encoding="utf-8") == text()


def test_a_conversion_that_is_wrong_on_purpose_is_never_the_same() -> None:
    for case, found in documented().items():
        assert not case.control or SAME not in found.values(), case.name


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_upcycle_says_of_each_row_what_was_measured(row: Row) -> None:
    said = {
        name: each for found in claims(row.target, traits_of(row)) for name, each in found.items()
    }
    support = said[row.software].support if row.software in said else None
    if row.software in known.OTHERS and row.verdict != DIFFERS:
        assert support is None
    elif row.verdict == SAME:
        assert support is Support.RUNS
    elif row.verdict == DIFFERS:
        assert support in SILENTLY_WRONG
    else:
        assert support not in {None, Support.RUNS, Support.NOT_TRIED}


def test_nothing_is_said_to_run_that_no_row_shows() -> None:
    """All targets, software, routings, attention classes and other properties."""
    shown = defaultdict[tuple[str, str], set[str]](set)
    for row in ROWS:
        shown[row.target, row.software] |= {*row.parts} if row.verdict == SAME else set()
    classes = {row.parts[-1] for row in ROWS} | {"attention: something new"}
    others = (known.FUSED, known.TIED, known.SCALED, known.SHARED, known.SOME_LAYERS)
    properties = [each for n in range(3) for each in combinations(others, n)]
    said = 0
    for target in {row.target for row in ROWS} | TARGETS.keys() | {"upcycled_llama"}:
        for routing, attention, held in product(Routing, classes, properties):
            traits = Traits(routing, held, attention.removeprefix(known.attention_part("")))
            runs, trains = claims(target, traits)
            for found, kind in ((runs, target), (trains, trainer_kind(target))):
                is_fused = {known.FUSED} if kind.startswith(known.ALL_SHIPPED) else set()
                for name, each in found.items():
                    if each.support is Support.RUNS and (found is trains or name in known.ENGINES):
                        assert {*traits.parts} - is_fused <= shown[kind, name], (kind, name, traits)
                        said += 1
    assert said > 1000


def trainer_kind(target: str) -> str:
    return known.ALL_SHIPPED if target.startswith(known.ALL_SHIPPED) else target


def test_families_and_the_reference_say_what_the_rows_show() -> None:
    verdicts = {(r.target, r.software, r.parts[-1], r.verdict) for r in ROWS}
    for target in families().targets:
        kind = next((t for t in TARGETS if t.split()[-1] == target.name), target.name)
        for name in {**target.engines, **target.trainers}.keys() - {"transformers"}:
            assert (kind, name, known.attention_part(target.attention), SAME) in verdicts
    page = (HERE.parents[1] / "docs" / "evidence" / "models.md").read_text("utf-8")
    header, _, *rows = (
        page.split("<!-- table: attention -->\n")[1].split("<!-- end -->")[0].splitlines()
    )
    _, _, *columns = header.strip("| ").split(" | ")
    said = set()
    for line in rows:
        title, attention, *cells = (cell.strip() for cell in line[1:-1].split("|"))
        for verdict, cell in zip(columns, cells, strict=True):
            for software in filter(None, cell.split(", ")):
                said.add((title, software, known.attention_part(attention), verdict))
    assert said - verdicts == set()
    assert len(said) > 100


def test_engines_that_compute_something_else_get_a_warning() -> None:
    silent = {each for each in Support if "WRONG" in each.name}
    assert {*silent, Support.CHANGES} == SILENTLY_WRONG
    assert {(row.target, row.software) for row in ROWS if row.verdict == DIFFERS} >= {
        ("deepseek_v3", "vLLM"),
        ("nemotron_h", "mergekit"),
        ("glm4_moe", "vLLM"),
    }
