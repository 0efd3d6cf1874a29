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

import upcycle_cli as up

api: Any = up  # with arguments of wrong types, too

GUIDE = Path(__file__).parents[2] / "docs" / "reference" / "python.md"
HELP = """
import sys
import upcycle_cli
help(upcycle_cli)
print(*dir(upcycle_cli))
assert not {"torch", "transformers"} & {*sys.modules}
"""


def test_help_and_dir_show_every_public_name() -> None:
    *text, names = forked.run([], program=HELP).stdout.splitlines()
    assert {*names.split()} == {*up.__all__}
    shown = "\n".join(text)
    for name in up.__all__:
        assert re.search(rf"^    (class )?{name}\(|^VERSION$", shown, re.MULTILINE), name
    assert 'convert("dense", "moe", "E8G1T2", verify=True)' in shown


@pytest.fixture(scope="module")
def results(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    done = up.convert(llama, tmp_path_factory.mktemp("api") / "moe", "E2G2T2")
    return {
        "convert": done,
        "inspect": up.inspect(llama, "E2G2T2"),
        "inspect MOE": up.inspect(done.output, weights=True, dense=llama, load="builtin"),
        "verify": up.verify(llama, done.output),
        "families": up.families(),
    }


def held(value: object) -> Iterator[object]:
    """Yield the dataclasses in a result, except the expressions, whose digest is their repr."""
    if is_dataclass(value) and "expressions" not in type(value).__module__:
        yield value
        for field in fields(value):
            yield from held(getattr(value, field.name))
    elif isinstance(value, Mapping | list | tuple):
        for item in [*(value.values() if isinstance(value, Mapping) else value)][:3]:
            yield from held(item)


def test_results_fit_a_screen(results: Mapping[str, Any]) -> None:
    lengths = {type(each).__name__: len(repr(each)) for each in held([*results.values()])}
    lengths |= {type(each).__name__: len(repr(each)) for each in results.values()}
    assert {name: length for name, length in lengths.items() if length > 1500} == {}
    assert repr(results["verify"]).startswith("Report(status='passed', ")


def test_summaries_are_what_commands_print(results: Mapping[str, Any], llama: Path) -> None:
    verified = ("verify", llama, results["convert"].output)
    for arguments in (("inspect", llama, "-r", "E2G2T2"), verified, ("families",)):
        assert results[str(arguments[0])].summary() in run_forked(*arguments).stdout
    assert results["inspect"].summary() == results["convert"].summary()
    assert results["inspect"].warnings == results["convert"].warnings
    assert "no gradient" in "".join(results["convert"].warnings)


def test_notebooks_get_escaped_tables() -> None:
    html = up.families()._repr_html_().replace("<tr>", "")
    assert html.startswith("<table>")
    odd = type(up.families())(dense={"<b>\x1b": ()}, wrappers={}, targets=(), refused={})
    assert "&lt;b&gt;\\x1b" in odd._repr_html_()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda dense, out: api.convert(dense, out, ""), "'' is not a recipe"),
        (lambda dense, out: api.convert(dense, out, "E2G2T3"), "`allow_inexact=True`"),
        (lambda dense, out: api.convert(dense, out, "E2G2T2", target="mixtrl"), "mixtral"),
        (lambda dense, out: api.convert(dense, out, api.Growth(expand=2)), "dense"),
        (lambda dense, _: api.inspect(dense, weights=True), "`weights`"),
        (lambda dense, _: api.inspect(dense, dense=dense), "`dense` needs `weights` or `load`"),
        (lambda dense, _: api.verify(dense, dense), "not an MoE"),
        (lambda dense, out: api.verify(dense, out, checks="weight"), "weights"),
        (lambda dense, _: api.push(dense, "a/b", revision="v1", create_pr=True), "`create_pr`"),
        (lambda *_: api.Recipe(), "expansion"),
        (lambda *_: api.Recipe("E2G2T2", top_k=4), "`top_k`"),
        (lambda *_: api.Recipe("E2G2T2", routing="softmax"), "softmax-topk"),
        (lambda *_: api.Recipe("E2G2T2", seed="1"), "`seed` cannot be '1'"),
        (lambda dense, out: api.convert(dense, out, "E2G1T1", writing=2), "WriteOptions"),
        (lambda dense, out: api.convert(dense, out, "E2G1T1", push=3), "Destination"),
        (lambda dense, out: api.convert(dense, out, "E2G1T1", merge="x"), "MergeRequest"),
        (lambda dense, _: api.verify(dense, dense, texts={}), "TextOptions"),
        (lambda *_: api.Growth(expand=1), "`expand`"),
        (lambda *_: api.Options(max_shard_bytes="5GB"), "`max_shard_bytes`"),
        (lambda *_: api.WriteOptions(workers=-1), "`workers`"),
        (lambda *_: api.MergeRequest(experts_from="x", rest="men"), "mean"),
    ],
)
def test_errors_name_arguments(
    call: Callable[[Path, Path], object], words: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(up.UpcycleError) as refused:
        call(llama, tmp_path / "moe")
    assert words in str(refused.value)
    assert "--" not in str(refused.value)


def test_the_guide_runs(hub: Hub, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "dense").symlink_to(llama)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    program, variables = "".join(blocks), hub.environment(tmp_path / "home")
    done = forked.run(
        [], program=program.replace("my-org", "acme"), cwd=tmp_path, environment=variables
    )
    assert done.returncode == 0, done.stderr
