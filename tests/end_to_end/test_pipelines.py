"""What programs and readers rely on: JSON by its schema, the examples and commands of docs/."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from conftest import clone, spoil, validate_json
from hub.server import Hub
from jsonschema.exceptions import ValidationError
from refusals import invoke

from upcycle_cli.models.engines import Support

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
RECIPE = ("--recipe", "E2G2T2")


@pytest.fixture(scope="module")
def broken(e2g2t2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = clone(e2g2t2, tmp_path_factory.mktemp("broken") / "moe")
    spoil(path / "model.safetensors")
    return path


# JSON --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code", "status"),
    [
        ("convert DENSE OUT --recipe E2G2T2 --verify", 0, "converted"),
        ("convert DENSE OUT --recipe E2G2T2 --dry-run", 0, "planned"),
        ("convert DENSE OUT -r E2G1T1 --scaling 3 --expert-layout fused --dry-run", 0, "planned"),
        ("convert DENSE OUT --recipe E2G5T5", 2, "error"),
        ("inspect DENSE --max-params 1M --gpu-memory 1GB×2", 0, "inspected"),
        ("inspect MOE --tensors", 0, "inspected"),
        ("inspect MOE --weights --dense DENSE", 0, "inspected"),
        ("inspect ABSENT", 2, "error"),
        ("verify DENSE MOE", 0, "passed"),
        ("verify DENSE BROKEN --checks weights", 1, "failed"),
        ("verify DENSE DENSE", 2, "error"),
        ("push MOE acme/moe", 2, "error"),
        ("clean OUT", 2, "error"),
        ("clean KILLED", 0, "found"),
        ("clean KILLED --yes", 0, "removed"),
    ],
)
def test_json_follows_the_schema(
    llama: Path, e2g2t2: Path, broken: Path, tmp_path: Path, command: str, code: int, status: str
) -> None:
    if "KILLED" in command:
        clone(llama, tmp_path / "KILLED.partial")
        (tmp_path / "KILLED.partial" / ".upcycle-partial").write_text('{"plan_sha256": "x"}')
    places = {"DENSE": llama, "MOE": e2g2t2, "BROKEN": broken}
    places |= {name: tmp_path / name for name in ("OUT", "ABSENT", "KILLED")}
    name, *arguments = (places.get(word, word) for word in command.split())
    done = invoke(name, *arguments, "--json")
    assert done.exit_code == code, done.output
    found = validate_json(str(name), done.stdout)
    assert found["status"] == status
    if status == "error":
        assert found["exit_code"] == code
        assert found["message"] in done.stderr


def test_the_schema_rejects_other_answers() -> None:
    error = {"status": "error", "exit_code": 2, "message": "x", "hint": None}
    validate_json("push", json.dumps(error))
    for wrong in (error | {"more": 1}, error | {"exit_code": "2"}, {"status": "error"}):
        with pytest.raises(ValidationError):
            validate_json("push", json.dumps(wrong))


def test_the_schema_knows_every_support_and_property() -> None:
    schema = json.loads((ROOT / "docs" / "reference" / "schema.json").read_text())
    assert sorted(schema["$defs"]["support"]["enum"]) == sorted(Support)
    for kind in ("plan", "growth_plan"):
        plan = schema["$defs"][kind]
        assert sorted(plan["required"]) == sorted(plan["properties"])


# The examples ------------------------------------------------------------------------------------

SOURCE, REPO = "my-org/my-model", "my-org/my-model-E8G1T2"


@pytest.fixture
def pipeline(tmp_path: Path, llama: Path) -> Iterator[tuple[Hub, dict[str, str]]]:
    """A Hub with the source of the examples, and the variables of a job that uses it."""
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    with Hub(tmp_path / "hub", organization="my-org") as hub:
        hub.store.upload(SOURCE, llama)
        path = f"{bin_directory}:{os.environ['PATH']}"
        variables = hub.environment(tmp_path / "home") | {"PATH": path}
        upcycle = bin_directory / "upcycle"
        upcycle.write_text(f'#!/bin/sh\nexec {sys.executable} -m upcycle_cli "$@"\n')
        upcycle.chmod(0o755)
        yield hub, variables


def run_example(command: list[str], work: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=work, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert environment["HF_TOKEN"] not in done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_makefile(pipeline: tuple[Hub, dict[str, str]], tmp_path: Path) -> None:
    hub, environment = pipeline
    work = clone(EXAMPLES, tmp_path / "work")
    run_example(["make", "plan"], work, environment)
    assert not hub.store.repos.get(REPO)
    run_example(["make", "push"], work, environment)
    pushed = hub.store.files(REPO)
    for path in (work / "build" / "my-model-E8G1T2").iterdir():
        assert pushed[path.name] == path.read_bytes()
    assert hub.store.repos[REPO].private
    assert json.loads((work / "build" / "my-model-E8G1T2.json").read_text())["status"] == "passed"
    again = run_example(["make", "push"], work, environment)
    assert "upcycle convert" not in again
    assert "nothing: all" in again


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_the_github_actions_job(pipeline: tuple[Hub, dict[str, str]], tmp_path: Path) -> None:
    hub, environment = pipeline
    work = clone(EXAMPLES, tmp_path / "work")
    (job,) = yaml.safe_load((work / "release.yml").read_text())["jobs"].values()
    secrets = {"${{ secrets.HF_TOKEN }}": environment["HF_TOKEN"]}
    environment |= {name: secrets.get(value, value) for name, value in job["env"].items()}
    shell = ["bash", "-eo", "pipefail", "-c"]  # as the runner does
    said = {
        step["name"]: run_example([*shell, step["run"]], work, environment)
        for step in job["steps"]
        if "run" in step and step["name"] != "Install"
    }
    commit = hub.store.repos[REPO].refs["main"]
    assert said["Convert, verify, push"] == f"converted, pushed: {hub.url}/{REPO} at {commit}\n"
    assert said["Verify what was pushed"].count(": passed") == 3
    for path in (work / "moe").iterdir():
        assert hub.store.files(REPO)[path.name] == path.read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("name", ["README.md", "docs/start.md", "docs/guides/*.md"])
def test_commands_print_what_the_page_shows(
    pipeline: tuple[Hub, dict[str, str]], tmp_path: Path, name: str
) -> None:
    if name != "docs/start.md":
        if "SMOLLM2" not in os.environ:
            pytest.skip("needs SMOLLM2: tests/smollm2.py")
        (tmp_path / "SmolLM2-135M").symlink_to(os.environ["SMOLLM2"])
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    hub, environment = pipeline
    page = "".join(page.read_text(encoding="utf-8") for page in sorted(ROOT.glob(name)))
    blocks = "".join(re.findall(r"(?s)```console\n(.*?)```", page))
    for command, shown in re.findall(r"(?m)^\$ (.+)\n((?:(?!\$ ).*\n)*)", blocks):
        line = command.replace("python ", f"{sys.executable} ").replace("--steps 30", "--steps 2")
        printed = run_example(["bash", "-c", line], tmp_path, environment | {"COLUMNS": "80"})
        printed = stable(printed.replace(hub.url, "https://huggingface.co"))
        parts = [part.strip() for part in stable(shown).split("…")]
        assert all(part in printed for part in parts), printed
        assert len(parts) > 1 or parts == [printed]


def stable(output: str) -> str:
    """Mask what differs between machines and runs: rounding errors, line breaks, commits."""
    varies = r"\b\d(\.\d+)?e-\d+|layer \d+|\b[0-9a-f]{40}\b"
    return re.sub(varies, "#", " ".join(output.split()))
