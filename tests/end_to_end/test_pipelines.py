"""What programs rely on: JSON, variables, recipe files, and the examples of docs/."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import yaml  # type: ignore[import-untyped]
from conftest import RunCli, clone, validate_json
from hub.server import Hub
from jsonschema.exceptions import ValidationError

from upcycle_cli import Recipe, convert
from upcycle_cli.models.engines import Support

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "docs" / "examples"
RECIPE = ("--recipe", "E2G2T2")


@pytest.fixture(scope="module")
def moe(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe") / "moe"
    convert(llama, path, Recipe(expansion=2, granularity=2, top_k=2))
    return path


# JSON --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code", "status"),
    [
        ("convert DENSE OUT --recipe E2G2T2", 0, "converted"),
        ("convert DENSE OUT --recipe E2G2T2 --verify", 0, "converted"),
        ("convert DENSE MOE --recipe E2G2T2", 0, "already done"),
        ("convert DENSE OUT --recipe E2G2T2 --dry-run", 0, "planned"),
        ("convert DENSE OUT -r E2G1T1 --scaling 3 --expert-layout fused --dry-run", 0, "planned"),
        ("convert DENSE OUT --recipe E2G5T5", 2, "error"),
        ("convert ABSENT OUT --recipe E2G2T2", 2, "error"),
        ("inspect DENSE", 0, "inspected"),
        ("inspect DENSE --tensors", 0, "inspected"),
        ("inspect DENSE --max-params 1M --gpu-memory 1GB×2", 0, "inspected"),
        ("inspect DENSE --max-params 1K", 2, "error"),
        ("inspect DENSE --recipe E2G2T2 --tensors", 0, "inspected"),
        ("inspect MOE --tensors", 0, "inspected"),
        ("inspect MOE --weights --dense DENSE", 0, "inspected"),
        ("inspect ABSENT", 2, "error"),
        ("verify DENSE MOE", 0, "passed"),
        ("verify DENSE BROKEN --checks weights", 1, "failed"),
        ("verify DENSE DENSE", 2, "error"),
        ("push MOE acme/moe", 2, "error"),
        ("families", 0, "listed"),
        ("clean OUT", 2, "error"),
        ("clean KILLED", 0, "found"),
        ("clean KILLED --yes", 0, "removed"),
        ("demo NEW", 0, "passed"),
    ],
)
def test_json_is_what_the_schema_says(
    run_cli: RunCli, llama: Path, moe: Path, tmp_path: Path, command: str, code: int, status: str
) -> None:
    if "BROKEN" in command:
        broken = clone(moe, tmp_path / "BROKEN") / "model.safetensors"
        data = bytearray(broken.read_bytes())
        data[-9:] = b"\0" * 9
        broken.write_bytes(data)
    if "KILLED" in command:
        clone(llama, tmp_path / "KILLED.partial")
        (tmp_path / "KILLED.partial" / ".upcycle-partial").write_text('{"plan_sha256": "x"}')
    places = {"DENSE": str(llama), "MOE": str(moe)}
    arguments = [places.get(word, word) for word in command.split()]
    # A demo does what it says, whatever is set for real conversions. Here it says less.
    variables = {"UPCYCLE_CONVERT_PUSH_TO_HUB": "a/b", "UPCYCLE_DEMO_VERIFY_TOKENS": "64"}
    variables = variables if "demo" in command else {}
    done = run_cli(*arguments, "--json", cwd=tmp_path, **variables)
    assert done.returncode == code, done.stderr
    found = validate_json(arguments[0], done.stdout)
    assert found["status"] == status
    if status == "error":
        assert found["exit_code"] == code
        assert found["message"] in done.stderr


def test_the_schema_notices_what_it_should() -> None:
    error = {"status": "error", "exit_code": 2, "message": "x", "hint": None}
    validate_json("push", json.dumps(error))
    for wrong in (error | {"more": 1}, error | {"exit_code": "2"}, {"status": "error"}):
        with pytest.raises(ValidationError):
            validate_json("push", json.dumps(wrong))


def test_what_can_be_said_every_schema_has() -> None:
    schema = json.loads((ROOT / "docs" / "schema.json").read_text())
    assert sorted(schema["$defs"]["support"]["enum"]) == sorted(Support)
    for kind in ("plan", "growth_plan"):
        plan = schema["$defs"][kind]
        assert sorted(plan["required"]) == sorted(plan["properties"])


def test_talk_without_a_terminal_is_plain_lines(
    run_cli: RunCli, llama: Path, tmp_path: Path
) -> None:
    """Neither bars nor colours nor carriage returns in a log; nothing at all with --quiet."""
    done = run_cli("convert", llama, tmp_path / "moe", *RECIPE, "--verify")
    for text in (done.stdout, done.stderr):
        assert "\r" not in text
        assert "\x1b" not in text
    silent = run_cli("convert", llama, tmp_path / "again", *RECIPE, "--verify", "--quiet")
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")


# Variables ---------------------------------------------------------------------------------------


def planned(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return validate_json("convert", done.stdout)


def test_variables_set_options(run_cli: RunCli, llama: Path, tmp_path: Path) -> None:
    command = ("convert", llama, tmp_path / "moe", "--dry-run", "--json")
    variables = {"UPCYCLE_CONVERT_RECIPE": "E2G2T2", "UPCYCLE_CONVERT_SEED": "7"}
    found = planned(run_cli(*command, **variables))
    assert (found["recipe"], found["seed"]) == ("E2G2T2", 7)
    found = planned(run_cli(*command, "--seed", "8", **variables))
    assert found["seed"] == 8
    on = {"UPCYCLE_CONVERT_VIRTUAL_GROUPS": "0", "UPCYCLE_CONVERT_DRY_RUN": "true"}
    found = planned(run_cli(*command[:3], "--json", **variables, **on))
    assert (found["status"], found["virtual_groups"]) == ("planned", False)


def test_a_variable_with_a_wrong_value(run_cli: RunCli, llama: Path, tmp_path: Path) -> None:
    done = run_cli("convert", llama, tmp_path / "moe", *RECIPE, UPCYCLE_CONVERT_SEED="x")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "--seed" in done.stderr


def test_variables_of_others_mean_nothing(run_cli: RunCli, tmp_path: Path) -> None:
    plain = run_cli("clean", tmp_path / "moe")
    assert plain.returncode == 2
    with_others = run_cli("clean", tmp_path / "moe", UPCYCLE_VERSION="1.2.3", UPCYCLE_TOKEN="x")
    assert with_others.stderr == plain.stderr


# Recipe files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["upcycle.toml", "upcycle.json"])
def test_a_saved_recipe_file_gives_the_same_plan(
    run_cli: RunCli, make_dense: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    dense = make_dense("qwen2", tie_word_embeddings=True)
    options = ("--scale-split", "down", "--no-virtual-groups", "--seed", "3", "--dtype", "float32")
    files = ("--untie-embeddings", "--max-shard-size", "40KB", "--workers", "1", "--no-fsync")
    asked = ("-E", "2", "-G", "2", "-T", "2", *options, *files, "--router-logit-std", "0.5")
    save = ("--save-config", name, "--dry-run", "--json")
    first = planned(run_cli("convert", dense, "moe", *asked, *save, cwd=tmp_path))
    assert not (tmp_path / "moe").exists()
    again = planned(run_cli("convert", "--config", name, "--dry-run", "--json", cwd=tmp_path))
    assert again == first
    # What goes before it, and what goes behind.
    override = {"UPCYCLE_CONVERT_SEED": "5", "UPCYCLE_CONVERT_WORKERS": "2"}
    changed = ("--config", name, "--dry-run", "--json", "--dtype", "bfloat16")
    other = planned(run_cli("convert", *changed, cwd=tmp_path, **override))
    assert other["seed"] == 5
    assert other["bytes"] * 2 == first["bytes"]


def test_a_recipe_file_says_what_auto_stood_for(
    run_cli: RunCli, llama: Path, tmp_path: Path
) -> None:
    command = ("convert", llama, "moe", *RECIPE, "--save-config", "u.toml", "--dry-run", "--json")
    planned(run_cli(*command, cwd=tmp_path))
    saved = tomllib.loads((tmp_path / "u.toml").read_text())
    assert saved["target"] == "mixtral"
    assert saved["routing"] == "topk-softmax"
    assert saved["router-logit-std"] == 1.0
    assert (saved["recipe"], saved["source"]) == ("E2G2T2", str(llama))
    assert not {"json", "quiet", "dry-run", "save-config"} & saved.keys()
    reference = (ROOT / "docs" / "cli.md").read_text().split("## upcycle convert")[1]
    options = set(re.findall(r"--([a-z][a-z-]+)", reference.split("\n## ")[0]))
    assert {key for key in saved if key not in options and f"no-{key}" not in options} == {
        "source",
        "output",
    }


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("u.toml", "sed = 1", ["u.toml: 'sed' is not an option", "seed"]),
        ("u.toml", "dry-run = true", ["'dry-run' is not an option"]),
        ("u.toml", "seed = [1]", ["seed must be a string, a number, true or false"]),
        ("u.toml", "seed = ", ["u.toml is not valid TOML"]),
        ("u.json", "{", ["u.json is not valid JSON"]),
        ("u.json", "[]", ["does not hold a JSON object"]),
        ("absent.toml", None, ["cannot read absent.toml"]),
        ("u.toml", 'seed = "x"', ["--seed"]),
        ("u.toml", 'target = "gpt"', ["--target"]),
        ("u.toml", "seed = true", ["u.toml: seed is not an option that is true or false"]),
        ("u.toml", "push-to-hub = true", ["push-to-hub is not an option that is true or false"]),
        ("u.toml", "output = 5\nmax-shard-size = -1", ["max-shard-size"]),
    ],
)
def test_recipe_files_that_cannot_be_used(
    run_cli: RunCli, llama: Path, tmp_path: Path, name: str, text: str | None, words: list[str]
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    done = run_cli("convert", llama, "moe", *RECIPE, "--config", name, cwd=tmp_path)
    assert done.returncode == 2
    assert not (tmp_path / "moe").exists()
    assert "Traceback" not in done.stderr
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", done.stderr).split())
    for word in words:
        assert word in said


def test_numbers_in_a_recipe_file_are_what_they_are_on_the_command_line(
    run_cli: RunCli, llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "u.toml").write_text("source = 5\noutput = 6\nscaling = 2.0\nrecipe = 'E2G1T1'\n")
    (tmp_path / "5").symlink_to(llama)
    done = run_cli("convert", "--config", "u.toml", "--dry-run", "--json", cwd=tmp_path)
    found = planned(done)
    assert (found["output"], found["scaling"]) == ("6", 2.0)


@pytest.mark.parametrize(
    ("file", "variables", "options", "recipe"),
    [
        ("recipe = 'E8G1T2'", {}, "--top-k 4", "E8G1T4"),
        ("recipe = 'E8G1T2'", {}, "-E 2 -G 2 -T 4", "E2G2T4"),
        ("recipe = 'E8G1T2'", {"TOP_K": "1"}, "", "E8G1T1"),
        ("recipe = 'E8G1T2'", {"TOP_K": "1"}, "-T 3", "E8G1T3"),
        ("recipe = 'E8G1T2'", {"RECIPE": "E4G1T1"}, "-T 3", "E4G1T3"),
        ("expansion = 8\ngranularity = 1\ntop-k = 2", {}, "--recipe E2G2T2", "E2G2T2"),
        ("expansion = 8\ngranularity = 1\ntop-k = 2", {}, "-T 1", "E8G1T1"),
        ("expansion = 8", {"GRANULARITY": "1"}, "-T 2", "E8G1T2"),
        ("expansion = 8\nrecipe = 'E8G1T2'", {}, "", None),
        ("recipe = 'E8G1T2'", {}, "--recipe E2G2T2 -T 2", None),
        ("seed = 1", {"RECIPE": "E2G2T2", "TOP_K": "2"}, "", None),
    ],
)
def test_what_is_said_last_goes_first(
    run_cli: RunCli,
    llama: Path,
    tmp_path: Path,
    file: str,
    variables: dict[str, str],
    options: str,
    recipe: str | None,
) -> None:
    (tmp_path / "u.toml").write_text(file)
    said = {f"UPCYCLE_CONVERT_{name}": value for name, value in variables.items()}
    command = (
        "convert",
        llama,
        "moe",
        "--config",
        "u.toml",
        *options.split(),
        "--dry-run",
        "--json",
    )
    done = run_cli(*command, cwd=tmp_path, **said)
    if recipe is None:
        assert done.returncode == 2
        assert "Use one or the other" in done.stderr
    else:
        assert planned(done)["recipe"] == recipe


@pytest.mark.parametrize(
    ("file", "arguments", "places"),
    [
        ("source = 'DENSE'\noutput = 'one'", [], ("DENSE", "one")),
        ("source = 'DENSE'\noutput = 'one'", ["two"], ("DENSE", "two")),
        ("source = 'DENSE'", ["two"], ("DENSE", "two")),
        ("output = 'one'", ["DENSE"], ("DENSE", "one")),
        ("source = 'absent'\noutput = 'one'", ["DENSE", "two"], ("DENSE", "two")),
        ("seed = 1", ["DENSE", "two"], ("DENSE", "two")),
        ("source = 'DENSE'", [], "OUTPUT"),
        ("output = 'one'", [], "SOURCE"),
        ("seed = 1", ["DENSE"], "OUTPUT"),
        ("source = ''", ["two"], "it is empty"),
        ("source = 'DENSE'", ["two", "three", "four"], "four"),
    ],
)
def test_an_argument_alone_is_what_the_file_lacks(
    run_cli: RunCli,
    llama: Path,
    tmp_path: Path,
    file: str,
    arguments: list[str],
    places: tuple[str, str] | str,
) -> None:
    (tmp_path / "DENSE").symlink_to(llama)
    (tmp_path / "u.toml").write_text(file)
    options = (*RECIPE, "--config", "u.toml", "--save-config", "v.toml", "--dry-run", "--json")
    done = run_cli("convert", *arguments, *options, cwd=tmp_path)
    if isinstance(places, str):
        assert done.returncode == 2
        assert places in done.stderr
        return
    assert planned(done)["output"] == places[1]
    saved = tomllib.loads((tmp_path / "v.toml").read_text())
    assert (saved["source"], saved["output"]) == places


def test_a_recipe_file_holds_names_that_are_text(
    run_cli: RunCli, llama: Path, tmp_path: Path
) -> None:
    dense, strange = clone(llama, tmp_path / "a\udcff"), "a\n'b'\x1b.toml"
    options = (*RECIPE, "--dry-run", "--json", "--save-config")
    done = run_cli("convert", dense, "moe", *options, "u.toml", cwd=tmp_path)
    assert done.returncode == 2
    assert r"u.toml cannot hold '\udcff'" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"a\udcff"}
    planned(run_cli("convert", llama, "moe", *options, strange, cwd=tmp_path))
    planned(run_cli("convert", "--config", strange, "--dry-run", "--json", cwd=tmp_path))


# Whoever reads may stop reading ------------------------------------------------------------------


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("extra", [(), ("--json",)])
def test_the_exit_code_is_the_same_when_nobody_reads(
    llama: Path, moe: Path, tmp_path: Path, stream: str, extra: tuple[str, ...]
) -> None:
    broken = clone(moe, tmp_path / "broken") / "model.safetensors"
    data = bytearray(broken.read_bytes())
    data[-9:] = b"\0" * 9
    broken.write_bytes(data)

    def run_unread(*arguments: str | Path) -> int:
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(
            [*forked.command(), *map(str, arguments), *extra],
            stdout=writing if stream == "stdout" else subprocess.DEVNULL,
            stderr=writing if stream == "stderr" else subprocess.DEVNULL,
            check=False,
        )
        os.close(writing)
        return done.returncode

    assert run_unread("verify", llama, moe, "--checks", "weights") == 0
    assert run_unread("verify", llama, broken.parent, "--checks", "weights") == 1
    assert run_unread("verify", llama, tmp_path / "absent") == 2
    assert run_unread("convert", llama, tmp_path / "moe", *RECIPE) == 0
    assert (tmp_path / "moe" / "upcycle.json").exists()


def test_a_bug_has_an_exit_code_of_its_own(tmp_path: Path) -> None:
    program = "from upcycle_cli import cli, publish; publish.clean = None; cli.main()"
    done = forked.run(["clean", "x"], program=program, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (70, "")
    assert "TypeError" in done.stderr
    assert "This is a bug in upcycle" in done.stderr


def test_a_recipe_file_that_cannot_be_written(run_cli: RunCli, llama: Path, tmp_path: Path) -> None:
    place = tmp_path / "absent" / "u.toml"
    done = run_cli("convert", llama, tmp_path / "moe", *RECIPE, "--save-config", place)
    assert done.returncode == 2
    assert "absent" in done.stderr
    assert not (tmp_path / "moe").exists()


# The examples ------------------------------------------------------------------------------------

SOURCE, REPO = "my-org/my-model", "my-org/my-model-E8G1T2"


@pytest.fixture
def pipeline(tmp_path: Path, llama: Path) -> Iterator[tuple[Hub, dict[str, str]]]:
    """A Hub that has the examples' source, and the variables of a job that uses it."""
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    with Hub(tmp_path / "hub", organization="my-org") as hub:
        hub.store.upload(SOURCE, llama)
        path = f"{bin_directory}:{os.environ['PATH']}"
        variables = hub.environment(tmp_path / "home") | {"PATH": path}
        upcycle = bin_directory / "upcycle"
        upcycle.write_text(f'#!/bin/sh\nexec {shlex.join(forked.command(variables))} "$@"\n')
        upcycle.chmod(0o755)
        yield hub, variables


def test_the_makefile(pipeline: tuple[Hub, dict[str, str]], tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    hub, environment = pipeline
    work = clone(EXAMPLES, tmp_path / "work")

    def make(target: str) -> str:
        done = subprocess.run(
            ["make", target], cwd=work, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    make("plan")
    assert not hub.store.repos.get(REPO)
    make("push")
    pushed = hub.store.files(REPO)
    output = work / "build" / "my-model-E8G1T2"
    for path in output.iterdir():
        assert pushed[path.name] == path.read_bytes()
    assert hub.store.repos[REPO].private
    assert json.loads((work / "build" / "my-model-E8G1T2.json").read_text())["status"] == "passed"
    again = make("push")
    assert "upcycle convert" not in again
    assert "were there already" in again


def test_the_github_actions_job(pipeline: tuple[Hub, dict[str, str]], tmp_path: Path) -> None:
    if shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    hub, environment = pipeline
    work = clone(EXAMPLES, tmp_path / "work")
    (job,) = yaml.safe_load((work / "release.yml").read_text())["jobs"].values()
    secrets = {"${{ secrets.HF_TOKEN }}": environment["HF_TOKEN"]}
    environment |= {name: secrets.get(value, value) for name, value in job["env"].items()}
    steps = [step for step in job["steps"] if "run" in step and step["name"] != "Install"]
    said = {}
    for step in steps:
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", step["run"]],  # as the runner does
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert environment["HF_TOKEN"] not in done.stdout + done.stderr
        said[step["name"]] = done.stdout
    commit = hub.store.repos[REPO].refs["main"]
    assert said["Convert, verify, push"] == f"converted, pushed: {hub.url}/{REPO} at {commit}\n"
    assert said["Verify what was pushed"].count(": passed") == 5
    for path in (work / "moe").iterdir():
        assert hub.store.files(REPO)[path.name] == path.read_bytes()
