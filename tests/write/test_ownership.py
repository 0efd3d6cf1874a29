"""Changes to an output that stop --overwrite from removing it, or a push from publishing it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import engine_fixtures as engine
import pytest

from upcycle_cli import UpcycleError, push
from upcycle_cli.write.ownership import check_ownership, take_inventory

SHARD = "model-00001-of-00009.safetensors"
TEMPLATE = "additional_chat_templates/tool_use.jinja"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished output with checksums. Read only."""
    path = tmp_path_factory.mktemp("ownership")
    dense = engine.make_dense(path / "dense")
    (dense / TEMPLATE).parent.mkdir()
    (dense / TEMPLATE).write_text("{{ 1 }}")
    engine.execute(
        engine.plan_of(dense, "E2G1T2", max_shard_bytes=40_000), path / "moe", checksums=True
    )
    return path / "moe"


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "moe")


def edit(name: str, change: Callable[[bytes], bytes]) -> Change:
    return lambda output: (output / name).write_bytes(change((output / name).read_bytes()))


def add(name: str) -> Change:
    def act(output: Path) -> None:
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_bytes(b"weeks of work")

    return act


def link(name: str) -> Change:
    def act(output: Path) -> None:
        (output / name).unlink()
        (output / name).symlink_to("/etc/passwd")

    return act


def remove(name: str) -> Change:
    return lambda output: (output / name).unlink()


def train_in_place(output: Path) -> None:
    """Write another router where the old one is: no size and no header changes."""
    engine.set_value(output, "model.layers.0.block_sparse_moe.gate.weight", 0x3F00)


def set_files(value: object) -> Change:
    return edit(
        "upcycle.json", lambda data: json.dumps(json.loads(data) | {"files": value}).encode()
    )


FOREIGN, CHANGED = "upcycle did not write it", "is not the file that upcycle.json lists"
OK = None
CHANGES: dict[str, tuple[Change, str | None, str | None]] = {
    # The change, why --overwrite stops, and why a push stops.
    "a model beside it": (add("model-my-finetune.safetensors"), FOREIGN, OK),
    "checkpoints": (add("checkpoint-1000/optimizer.pt"), FOREIGN, OK),
    "an empty directory": (lambda output: (output / "runs").mkdir(), "runs", OK),
    "another template": (add("additional_chat_templates/my.jinja"), "my.jinja", OK),
    "a pipe": (lambda output: os.mkfifo(output / "pipe"), "pipe", OK),
    "an edited card": (edit("README.md", lambda data: data + b"Trained.\n"), "README.md", OK),
    "a card of no text": (edit("README.md", lambda _: b"\xff"), "README.md", "not UTF-8"),
    "a trained shard": (edit(SHARD, lambda data: data.replace(b'"pt"', b'"tp"')), CHANGED, CHANGED),
    "a router trained in place": (train_in_place, "gate.weight", "gate.weight was changed"),
    "a cut shard": (edit(SHARD, lambda data: data[:-1]), CHANGED, CHANGED),
    "a flipped expert": (edit(SHARD, lambda d: d[:-1] + bytes([d[-1] ^ 1])), OK, "SHA256SUMS desc"),
    "an edited config": (edit("config.json", lambda data: data + b" "), CHANGED, CHANGED),
    "a link": (link("LICENSE"), "not followed", "not followed"),
    "a linked card": (link("README.md"), "not followed", "not followed"),
    "more checksums": (
        edit("SHA256SUMS", lambda data: data + b"0" * 64 + b"  README.md\n"),
        "SHA256SUMS: it lists other files",
        "SHA256SUMS: it lists other files",
    ),
    "fewer checksums": (edit("SHA256SUMS", lambda d: d.partition(b"\n")[2]), "other", "other"),
    "no checksums": (edit("SHA256SUMS", lambda d: d + b"nonsense\n"), "bad line", "bad line"),
    "a missing file": (remove(TEMPLATE), OK, f"{TEMPLATE} is missing"),
    "missing weights": (remove(SHARD), OK, f"{SHARD} is missing"),
    "a missing card": (remove("README.md"), OK, "README.md is missing"),
    "no record": (remove("upcycle.json"), "was not made by upcycle", "not a finished output"),
    "half a record": (
        edit("upcycle.json", lambda data: data[:99]),
        "not say which",
        "not say which",
    ),
    "a record of no files": (set_files(None), "not say", "not say"),
    "a record of other places": (set_files([{"name": "../x"}]), FOREIGN, "x is missing"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_output_is_neither_removed_nor_published(
    output: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ReachedError(Exception):
        """The checks have passed."""

    def upload(*_: object, **__: object) -> None:
        raise ReachedError

    monkeypatch.setattr("upcycle_cli.publish.push.check_destination", lambda _: None)
    monkeypatch.setattr("upcycle_cli.publish.push.card_for_repo", upload)
    change, overwriting, pushing = CHANGES[what]
    change(output)
    before = engine.contents(output)
    if overwriting is None:
        check_ownership(output)
    else:
        with pytest.raises(UpcycleError) as refused:
            check_ownership(output)
        assert overwriting in refused.value.message
        assert "not replaced" in refused.value.message
    expected = ReachedError if pushing is None else UpcycleError
    with pytest.raises(expected, match=pushing):
        push(output, "acme/moe")
    assert engine.contents(output) == before


def test_other_files_are_left_out_of_a_push(output: Path, finished: Path) -> None:
    names = ["LICENSE.md", "Notice", "chat_template.bak", ".env", "notes/LICENSE"]
    for name in names:
        add(name)(output)
    found = take_inventory(output)
    assert {*found.own} == engine.contents(finished).keys()
    assert found.foreign == tuple(sorted(names))
    assert not found.changed
