"""Recipe files: reading them, and writing over nothing but another."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import clone, contents
from refusals import assert_refused, invoke

from upcycle_cli import UpcycleError
from upcycle_cli.recipe.recipe_file import Value, load_config, save_config

VALUES: dict[str, Value] = {"source": "dense", "output": "moe", "recipe": "E2G1T1", "seed": 7}
KNOWN = dict.fromkeys(VALUES, str)


def save(path: Path) -> None:
    save_config(path, VALUES, KNOWN, keep_out_of=())


UNREADABLE: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a megabyte": lambda path: path.write_text("# " + "x" * 1_000_000),
    "binary data": lambda path: path.write_bytes(b"\xff\xfe"),
    "a list": lambda path: path.write_text("[1]"),
    "an unknown option": lambda path: path.write_text('{"sauce": "dense"}'),
    "a wrong type": lambda path: path.write_text('{"source": ["dense"]}'),
    "a truth value": lambda path: path.write_text('{"seed": true}'),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_refuse_to_read_what_is_no_recipe_file(tmp_path: Path, kind: str) -> None:
    for name in ("u.json", "u.toml"):
        UNREADABLE[kind](tmp_path / name)
        with pytest.raises(UpcycleError, match=name):
            load_config(tmp_path / name, KNOWN)


@pytest.mark.parametrize("name", ["u.toml", "u.json", "u.TOML", "no suffix"])
def test_a_saved_recipe_can_be_read_edited_and_saved_again(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save(path)
    path.write_text(path.read_text().replace("7", "9"))
    save_config(path, VALUES | {"seed": 8}, KNOWN, keep_out_of=())
    assert load_config(path, KNOWN)["seed"] == "8"
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def text(held: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(held)


OTHERS: dict[str, Callable[[Path], object]] = {
    "weights.safetensors": text("\x08\0\0\0\0\0\0\0{}"),
    "empty.toml": text(""),
    "other.toml": text('source = "dense"\n[tool.ruff]\n'),
    "config.json": text('{"model_type": "llama"}'),
    "few.json": text('{"seed": 3}'),
    "more.json": text(json.dumps(VALUES | {"model_type": "llama"})),
    "link.toml": lambda path: path.symlink_to("thesis"),
    "dangling.toml": lambda path: path.symlink_to("nothing"),
    "pipe.toml": os.mkfifo,
}


@pytest.mark.parametrize("name", OTHERS)
def test_write_over_nothing_else(tmp_path: Path, name: str) -> None:
    (tmp_path / "thesis").write_text("years of work")
    OTHERS[name](tmp_path / name)
    before = {entry.name: entry.lstat() for entry in tmp_path.iterdir()}
    with pytest.raises(UpcycleError, match="is not a recipe file"):
        save(tmp_path / name)
    assert {entry.name: entry.lstat() for entry in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "place",
    ["dense/model.safetensors", "dense/deeper/u.toml", "link/u.toml", "moe/u.toml", "loop/u.toml"],
)
def test_save_nothing_in_the_source_or_the_output(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    dense = clone(llama, tmp_path / "dense")
    (dense / "deeper").mkdir()
    (tmp_path / "link").symlink_to(dense)
    (tmp_path / "loop").symlink_to("loop")
    before = contents(dense)
    for dry in ((), ("--dry-run",)):
        result = invoke("convert", "dense", "moe", "-r", "E2G1T1", "--save-config", place, *dry)
        words = "symbolic links" if place.startswith("loop") else "where nothing else may be"
        assert_refused(result, words)
    assert contents(dense) == before
    assert not (tmp_path / "moe").exists()
