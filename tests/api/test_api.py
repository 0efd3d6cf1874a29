"""The public functions from Python: their help, their results on screen, and their errors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import run_forked
from hub.server import Hub  # noqa: TC002 - pytest reads the annotations of a test

import upcycle_cli
from upcycle_cli import (
    convert,
    families,
    inspect,
    verify,
)

GUIDE = Path(__file__).parents[2] / "docs" / "reference" / "python.md"
HELP = """
import sys
import upcycle_cli
help(upcycle_cli)
print(*dir(upcycle_cli))
assert not {"torch", "transformers"} & {*sys.modules}
"""


def test_help_and_dir_show_every_public_name() -> None:
    done = forked.run([], program=HELP)
    *text, names = done.stdout.splitlines()
    assert {*names.split()} == {*upcycle_cli.__all__}
    shown = "\n".join(text)
    for name in upcycle_cli.__all__:
        assert re.search(rf"^    (class )?{name}\(|^VERSION$", shown, re.MULTILINE), name
        assert getattr(upcycle_cli, name).__doc__
    assert 'convert("dense", "moe", "E8G1T2", verify=True)' in shown


@pytest.fixture(scope="module")
def results(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    done = convert(llama, tmp_path_factory.mktemp("api") / "moe", "E2G2T2")
    return {
        "convert": done,
        "inspect": inspect(llama, "E2G2T2"),
        "inspect MOE": inspect(done.output, weights=True, dense=llama, load="builtin"),
        "verify": verify(llama, done.output),
        "families": families(),
    }


def held(value: object) -> Iterator[object]:
    """Yield the dataclasses in a result, except the expressions, whose digest is their repr."""
    if is_dataclass(value) and "expressions" not in type(value).__module__:
        yield value
        for field in fields(value):
            yield from held(getattr(value, field.name))
    elif isinstance(value, Mapping):
        yield from held([*value.values()])
    elif isinstance(value, list | tuple):
        for item in value[:3]:
            yield from held(item)


def test_results_fit_a_screen(results: Mapping[str, Any]) -> None:
    lengths = {type(each).__name__: len(repr(each)) for each in held([*results.values()])}
    assert {name: length for name, length in lengths.items() if length > 1500} == {}


def test_summaries_are_what_commands_print(results: Mapping[str, Any], llama: Path) -> None:
    for arguments in (
        ("inspect", llama, "-r", "E2G2T2"),
        ("verify", llama, results["convert"].output),
    ):
        printed = run_forked(*arguments).stdout
        for table in results[str(arguments[0])].summary().split("\n\n"):
            assert table in printed
    assert "E2G2T2, topk-softmax" in results["convert"].summary()


def test_notebooks_get_escaped_tables() -> None:
    found = families()
    html = type(found)(dense={"<b>": ("x\x1b",)}, wrappers={}, targets=(), refused={})._repr_html_()
    assert "&lt;b&gt;" in html
    assert "\x1b" not in html
    assert all(name in found._repr_html_() for name in found.dense)


def test_the_guide_runs(hub: Hub, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "dense").symlink_to(llama)
    program = "\n".join(re.findall(r"```python\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL))
    done = forked.run(
        [],
        program=program.replace("my-org", "acme"),
        cwd=tmp_path,
        environment=hub.environment(tmp_path / "home"),
    )
    assert done.returncode == 0, done.stderr
