"""The model card: whatever a name holds, it stays where it was put."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from conftest import clone

from upcycle_cli import Recipe, build_plan, open_checkpoint
from upcycle_cli.checkpoint.card_metadata import is_edited
from upcycle_cli.models.engines import Traits, trainers
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.publish.card import model_card, repo_name
from upcycle_cli.recipe.recipe import Routing
from upcycle_cli.verification.result import CheckResult, Report, Status

NAMES = [
    "plain-1.5B_v2",
    "back`tick",
    "``` three",
    "fence\n```\nrm -rf ~\n```",
    "---\nlicense: other\n---",
    "<script>alert(1)</script>",
    "<!-- Made by upcycle",
    "$(id) ; `id` | id && 'id' \"id\"",
    "[x](http://example.com) ![y](z)",
    "pipe | table",
    "\x1b[31mred\x9b\u202eder",
    "no-UTF-8-\udcff",
    "\"quoted\" \\ and 'quoted'",
    "- -.. -",
    "x" * 200,
]


def card_of(llama: Path, tmp_path: Path, name: str) -> str:
    dense = clone(llama, tmp_path / name)
    plan = build_plan(Recipe("E2G2T4"), open_checkpoint(dense))
    check = CheckResult(name="outputs", status=Status.PASSED, detail="a | b\n`c` <d>")
    return model_card(plan, Report(checks=(check,)))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_does_not_leave_its_place(llama: Path, tmp_path: Path, name: str) -> None:
    plain = card_of(llama, tmp_path / "1", "plain")
    card = card_of(llama, tmp_path / "2", name)
    assert all(line.isprintable() for line in card.split("\n"))
    assert not is_edited(card)
    # Line for line what it is for a plain name: no block, row, heading or tag more.
    ours, theirs = (
        [re.match(r"#+ |[|`<>\s-]*", line)[0] for line in text.split("\n")]  # type: ignore[index]
        for text in (plain, card)
    )
    assert theirs == ours
    assert "<" not in re.sub(r"<!-- Made by .*|(`+) .*? \1", "", card)
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "apache-2.0"
    # What is to be pasted names a repo.
    blocks = re.findall(r"^```(\w+)\n(.*?)\n```$", card, re.DOTALL | re.MULTILINE)
    (line,) = (text for kind, text in blocks if kind == "sh" and text.startswith("upcycle"))
    _, _, _, place = shlex.split(line)
    assert re.fullmatch(r"my-org/[A-Za-z0-9][\w.-]{0,95}", place)
    code = next(text for kind, text in blocks if kind == "python")
    assert f'path = "{place}"' in code
    compile(code, "card", "exec")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Llama-3.1-8B", "Llama-3.1-8B"),
        ("my-org/my_model", "my_model"),
        ("a--b..c", "a-b.c"),
        ("..", "model"),
        ("ö ö", "model"),
        ("x" * 200, "x" * 96),
    ],
)
def test_names_that_a_repo_can_have(text: str, name: str) -> None:
    assert repo_name(text) == name
    assert len(repo_name(text, "-E8G8T8")) <= 96
    assert repo_name(text, "-E8G8T8").endswith("-E8G8T8")


def test_it_says_what_to_set_in_each_trainer(llama: Path, tmp_path: Path) -> None:
    """The settings for mixtral, and for four experts."""
    section = card_of(llama, tmp_path, "plain").split("## Training")[1].split("\n## ")[0]
    said = trainers(NATIVE["mixtral"], Traits(Routing.TOPK_SOFTMAX), num_experts=4)
    assert said
    for trainer in said:
        assert trainer.precision
        words = f"{trainer.settings}. Master weights: {trainer.precision}."
        assert f"- {trainer.name}: {words}\n" in section
    assert "use 1, 2 or 4 ranks" in section
