"""The public functions from Python: their help, their results on screen, and their errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import run_forked
from hub.server import Hub  # noqa: TC002 - pytest reads the annotations of a test

import upcycle_cli
from upcycle_cli import (
    Growth,
    Options,
    Recipe,
    UpcycleError,
    WriteOptions,
    convert,
    families,
    inspect,
    push,
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


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda dense, out: convert(dense, out, "E8G1"), "'E8G1' is not a recipe"),
        (lambda dense, out: convert(dense, out, ""), "'' is not a recipe"),
        (lambda dense, out: convert(dense, out, "E2G5T5"), "not divisible by granularity 5"),
        (lambda dense, out: convert(dense, out, "E2G2T3"), "allow_inexact"),
        (lambda dense, out: convert(dense, out, "E2G2T2", target="mixtrl"), "mixtral"),
        (lambda dense, out: convert(dense, out, Growth(expand=2)), "dense"),
        (lambda dense, out: convert(out, dense, "E2G2T2"), "moe"),
        (lambda dense, _: convert(dense, dense, "E2G2T2"), "is the source"),
        (lambda dense, out: convert(dense, out, Recipe(expansion=2.5)), "expansion"),  # type: ignore[arg-type]
        (lambda dense, _: inspect(dense, weights=True), "weights"),
        (lambda dense, _: inspect(dense, "E2G2T2", revision="main"), "a revision needs a repo"),
        (lambda dense, _: verify(dense, dense), "dense"),
        (lambda dense, out: verify(dense, out, checks=["weight"]), "weights"),
        (lambda dense, _: push(dense, "acme/moe", revision="v1", create_pr=True), "create_pr"),
        (lambda *_: Recipe(), "expansion"),
        (lambda *_: Recipe("E2G2T2", top_k=4), "top_k"),
        (lambda *_: Recipe("E2G2T2", routing="softmax"), "softmax-topk"),  # type: ignore[arg-type]
        (lambda *_: Recipe("E2G2T2", noise=0.1, reinit=0.1), "noise"),
        (lambda *_: Growth(expand=1), "expand"),
        (lambda *_: Options(dtype="bf16"), "bfloat16"),
        (lambda *_: WriteOptions(workers=-1), "workers"),
    ],
)
def test_errors_name_arguments(
    call: Callable[[Path, Path], object], words: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(UpcycleError, match=words) as refused:
        call(llama, tmp_path / "moe")
    assert "--" not in str(refused.value)


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
