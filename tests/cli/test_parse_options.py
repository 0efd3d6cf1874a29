"""Options from the command line, variables and recipe files: what each sets, and which one wins."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import clone, validate_json
from refusals import assert_refused, invoke

ROOT = Path(__file__).parents[2]
RECIPE = ("--recipe", "E2G2T2")


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run commands in an empty directory that has a link to the dense model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DENSE").symlink_to(llama)


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Plan a conversion, with variables; return its JSON."""

    def run(*arguments: str | Path, **variables: str) -> dict[str, Any]:
        with monkeypatch.context() as patched:
            for name, value in variables.items():
                patched.setenv(f"UPCYCLE_CONVERT_{name}", value)
            done = invoke("convert", *arguments, "--dry-run", "--json")
        assert done.exit_code == 0, done.stderr
        return validate_json("convert", done.stdout)

    return run


Plan = Callable[..., dict[str, Any]]


def test_variables_set_options(plan: Plan) -> None:
    variables = {"RECIPE": "E2G2T2", "SEED": "7", "VIRTUAL_GROUPS": "0"}
    found = plan("DENSE", "moe", **variables)
    assert (found["recipe"], found["seed"], found["virtual_groups"]) == ("E2G2T2", 7, False)
    assert plan("DENSE", "moe", "--seed", "8", **variables)["seed"] == 8


@pytest.mark.parametrize("name", ["upcycle.toml", "upcycle.json"])
def test_a_saved_recipe_file_gives_the_same_plan(
    plan: Plan, make_dense: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    dense = make_dense("qwen2", tie_word_embeddings=True)
    options = ("--scale-split", "down", "--no-virtual-groups", "--seed", "3", "--dtype", "float32")
    files = ("--untie-embeddings", "--max-shard-size", "40KB", "--workers", "1", "--no-fsync")
    recipe = ("-E", "2", "-G", "2", "-T", "2", "--router-logit-std", "0.5")
    first = plan(dense, "moe", *recipe, *options, *files, "--save-config", name)
    assert not (tmp_path / "moe").exists()
    assert plan("--config", name) == first
    other = plan("--config", name, "--dtype", "bfloat16", SEED="5", WORKERS="2")
    assert other["seed"] == 5
    assert other["bytes"] * 2 == first["bytes"]


def test_a_recipe_file_says_what_auto_stands_for(plan: Plan, tmp_path: Path) -> None:
    plan("DENSE", "moe", *RECIPE, "--save-config", "u.toml")
    saved = tomllib.loads((tmp_path / "u.toml").read_text())
    assert saved["target"] == "mixtral"
    assert saved["routing"] == "topk-softmax"
    assert saved["router-logit-std"] == 1.0
    assert (saved["recipe"], saved["source"]) == ("E2G2T2", "DENSE")
    assert not {"json", "quiet", "dry-run", "save-config"} & saved.keys()
    reference = (ROOT / "docs" / "reference" / "cli.md").read_text().split("## upcycle convert")[1]
    options = set(re.findall(r"--(?:\[no-\])?([a-z][a-z-]+)", reference.split("\n## ")[0]))
    unknown = {key for key in saved if key not in options and f"no-{key}" not in options}
    assert unknown == {"source", "output"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sed = 1", "u.toml: 'sed' is not an option.\nDid you mean seed?"),
        ("dry-run = true", "u.toml: 'dry-run' is not an option"),
        ("seed = ", "u.toml is not valid TOML"),
        ('seed = "x"', "--seed"),
        ("max-shard-size = -1", "--max-shard-size"),
        (None, "cannot read u.toml"),
    ],
)
def test_refuse_recipe_files_with_mistakes(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "u.toml").write_text(text)
    done = invoke("convert", "DENSE", "moe", *RECIPE, "--config", "u.toml")
    assert_refused(done, words)
    assert not (tmp_path / "moe").exists()


def test_read_numbers_and_strange_names(plan: Plan, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "u.toml").write_text("source = 5\noutput = 6\nscaling = 2.0\nrecipe = 'E2G1T1'\n")
    (tmp_path / "5").symlink_to(llama)
    found = plan("--config", "u.toml")
    assert (found["output"], found["scaling"]) == ("6", 2.0)
    strange = "a\n'b'\x1b.toml"
    clone(llama, tmp_path / "a\udcff")  # not UTF-8
    assert plan("a\udcff", "moe", *RECIPE, "--save-config", strange) == plan("--config", strange)


def test_refuse_a_recipe_file_that_cannot_be_written(tmp_path: Path) -> None:
    done = invoke("convert", "DENSE", "moe", *RECIPE, "--save-config", "absent/u.toml")
    assert_refused(done, "absent")
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("file", "variables", "options", "recipe"),
    [
        ("recipe = 'E8G1T2'", {}, "--top-k 4", "E8G1T4"),
        ("recipe = 'E8G1T2'", {}, "-E 2 -G 2 -T 4", "E2G2T4"),
        ("recipe = 'E8G1T2'", {"TOP_K": "1"}, "-T 3", "E8G1T3"),
        ("recipe = 'E8G1T2'", {"RECIPE": "E4G1T1"}, "-T 3", "E4G1T3"),
        ("expansion = 8\ngranularity = 1\ntop-k = 2", {}, "--recipe E2G2T2", "E2G2T2"),
        ("expansion = 8", {"GRANULARITY": "1"}, "-T 2", "E8G1T2"),
        ("expansion = 8\nrecipe = 'E8G1T2'", {}, "", None),
        ("recipe = 'E8G1T2'", {}, "--recipe E2G2T2 -T 2", None),
        ("seed = 1", {"RECIPE": "E2G2T2", "TOP_K": "2"}, "", None),
    ],
)
def test_options_override_variables_and_variables_override_files(
    plan: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    variables: dict[str, str],
    options: str,
    recipe: str | None,
) -> None:
    (tmp_path / "u.toml").write_text(file)
    arguments = ("DENSE", "moe", "--config", "u.toml", *options.split())
    if recipe is not None:
        assert plan(*arguments, **variables)["recipe"] == recipe
        return
    for name, value in variables.items():
        monkeypatch.setenv(f"UPCYCLE_CONVERT_{name}", value)
    done = invoke("convert", *arguments)
    assert done.exit_code == 2
    assert "Use one or the other" in done.stderr


@pytest.mark.parametrize(
    ("file", "arguments", "places"),
    [
        ("source = 'DENSE'\noutput = 'one'", [], ("DENSE", "one")),
        ("source = 'DENSE'\noutput = 'one'", ["two"], ("DENSE", "two")),
        ("source = 'DENSE'", ["two"], ("DENSE", "two")),
        ("source = 'DENSE'", [], "OUTPUT"),
        ("seed = 1", ["DENSE"], "OUTPUT"),
        ("source = ''", ["two"], "it is empty"),
        ("source = 'DENSE'", ["two", "three", "four"], "four"),
    ],
)
def test_a_single_argument_is_what_the_file_lacks(
    plan: Plan, tmp_path: Path, file: str, arguments: list[str], places: tuple[str, str] | str
) -> None:
    (tmp_path / "u.toml").write_text(file)
    options = (*RECIPE, "--config", "u.toml", "--save-config", "v.toml")
    if isinstance(places, str):
        done = invoke("convert", *arguments, *options)
        assert done.exit_code == 2
        assert places in done.stderr
        return
    assert plan(*arguments, *options)["output"] == places[1]
    saved = tomllib.loads((tmp_path / "v.toml").read_text())
    assert (saved["source"], saved["output"]) == places
