"""One function converts, for the command and for whoever calls it from Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import forked
import pytest
from conftest import snapshot

from upcycle_cli import Recipe, UpcycleError
from upcycle_cli.api import Conversion, Request, carry_out, preview
from upcycle_cli.core.callbacks import Hooks
from upcycle_cli.plan.plan import Plan
from upcycle_cli.write.writer import WriteOptions

if TYPE_CHECKING:
    from hub.server import Hub

RECIPE = Recipe(expansion=2, granularity=2, top_k=2)


class Listener(Hooks[Any, Any]):
    def __init__(self) -> None:
        self.heard: list[str] = []
        self.nbytes = 0

    def planned(self, plan: Plan) -> None:
        assert isinstance(plan, Plan)
        self.heard.append(f"planned {plan.recipe.name}")

    @contextmanager
    def writing(self, num_bytes: int) -> Iterator[None]:
        assert num_bytes
        self.heard.append("writing")
        yield
        self.heard.append("written")

    def advance(self, num_bytes: int) -> None:
        self.nbytes += num_bytes

    def begins(self, what: str) -> None:
        self.heard.append(what)

    def finished(self, result: Conversion) -> None:
        self.heard.append(f"finished {result.output.name}")


def test_who_listens_hears_all_of_it_in_its_order(llama: Path, tmp_path: Path) -> None:
    listener = Listener()
    request = Request(source=llama, output=tmp_path / "moe", recipe=RECIPE, verify=True)
    done = carry_out(request, hooks=listener)
    assert done.published
    assert listener.nbytes == done.plan.nbytes
    checks = [f"checking {name}" for name in ("directory", "weights", "outputs")]
    expected = ["planned E2G2T2", "writing", *checks, "written", "finished moe"]
    assert [word for word in listener.heard if word in expected] == expected


def test_what_a_listener_raises_ends_the_conversion(llama: Path, tmp_path: Path) -> None:
    class Refusing(Hooks[Any, Any]):
        def planned(self, plan: Plan) -> None:
            raise UpcycleError(f"not {plan.how['recipe']['name']}")

    request = Request(source=llama, output=tmp_path / "moe", recipe=RECIPE)
    with pytest.raises(UpcycleError, match="not E2G2T2"):
        carry_out(request, hooks=Refusing())
    assert list(tmp_path.iterdir()) == []


def test_what_is_previewn_is_not_done(llama: Path, tmp_path: Path) -> None:
    request = Request(source=llama, output=tmp_path / "moe", recipe=RECIPE)
    plan, warnings = preview(request)
    assert (plan.how["recipe"]["name"], warnings) == ("E2G2T2", [])
    assert list(tmp_path.iterdir()) == []
    carry_out(request)
    before = snapshot(tmp_path)
    assert "is already what this command makes" in preview(request)[1][0]
    other = Request(source=llama, output=tmp_path / "moe", recipe=RECIPE, target="qwen2_moe")
    assert "this is refused: " in preview(other)[1][0]
    assert snapshot(tmp_path) == before


def test_how_it_is_written_is_no_matter_to_what(llama: Path, tmp_path: Path) -> None:
    writing = WriteOptions(workers=1, fsync=False)
    for name, how in (("one", writing), ("other", WriteOptions())):
        carry_out(Request(source=llama, output=tmp_path / name, recipe=RECIPE, writing=how))
    one, other = ((tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()


PUSHES = """
import sys
from upcycle_cli import Destination, Recipe, WriteOptions, convert
done = convert(
    sys.argv[1],
    "out",
    Recipe(expansion=2, granularity=2, top_k=2),
    writing=WriteOptions(fsync=False),
    push=Destination(repo="acme/moe", private=True),
)
print(done.pushed.commit)
"""


def test_python_can_push(hub: Hub, llama: Path, tmp_path: Path) -> None:
    variables = hub.environment(tmp_path / "home")
    done = forked.run([llama], program=PUSHES, cwd=tmp_path, environment=variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == hub.store.repos["acme/moe"].refs["main"]
    assert hub.store.repos["acme/moe"].private
    assert 'path = "acme/moe"' in (tmp_path / "out" / "README.md").read_text()
