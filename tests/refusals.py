"""Bad input: one clear message, exit code 2, and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import snapshot
from typer.testing import CliRunner, Result

from upcycle_cli.cli.app import app

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_refused(result: Result, *words: str) -> str:
    """One message of the tool's own with all of `words` in it, and no traceback."""
    # Anything but SystemExit is an exception that a shell would show as a traceback.
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2
    # Some damage shows while weights are read, after the plan was printed.
    assert result.stdout == "" or result.stdout.startswith("model   ")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("error: ") == 1
    assert "\x1b" not in result.stderr
    for word in words:
        assert word in result.stderr
    return result.stderr


class Refuses:
    """Converts, and checks that this is refused and leaves no trace on disk."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(
        self,
        source: Path,
        *words: str,
        arguments: tuple[str | Path, ...] = ("-r", "E2G2T2"),
        output: Path | None = None,
    ) -> str:
        before, tree = snapshot(self.directory), sorted(self.directory.rglob("*"))
        result = invoke("convert", source, output or self.directory / "moe", *arguments)
        message = assert_refused(result, *words)
        assert snapshot(self.directory) == before
        assert sorted(self.directory.rglob("*")) == tree
        return message


@pytest.fixture
def refuses(tmp_path: Path) -> Refuses:
    return Refuses(tmp_path)
