"""Recipe files: what is read as one, and that nothing but one is ever written over."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from conftest import RunCli, clone, contents

from upcycle_cli import UpcycleError
from upcycle_cli.recipe.recipe_file import Kind, Value, load_config, save_config

HANG_SECONDS = 60
KNOWN = ["source", "output", "recipe", "target", "routing", "seed"]
VALUES: dict[str, Value] = {
    "source": "dense",
    "output": "moe",
    "recipe": "E2G1T1",
    "target": "mixtral",
    "routing": "topk-softmax",
    "seed": 7,
}


def save(path: Path) -> None:
    save_config(path, VALUES, KNOWN, keep_out_of=())


# Reading -----------------------------------------------------------------------------------------


def large(path: Path) -> None:
    path.write_text("# " + "x" * 1_000_000)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def binary(path: Path) -> None:
    path.write_bytes(b"\xff\xfe")


UNREADABLE: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo,
    "a device without an end": lambda path: path.symlink_to("/dev/zero"),
    "a directory": Path.mkdir,
    "a terabyte of nothing": sparse,
    "a megabyte": large,
    "not text": binary,
}


@pytest.mark.parametrize("suffix", ["toml", "json"])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_no_recipe_file_is_said_at_once(
    llama: Path, tmp_path: Path, kind: str, suffix: str
) -> None:
    name = f"u.{suffix}"
    UNREADABLE[kind](tmp_path / name)
    command = ("convert", llama, "moe", "--config", name)
    done = forked.run(command, cwd=tmp_path, seconds=HANG_SECONDS)
    assert done.returncode == 2
    assert name in done.stderr
    assert "Traceback" not in done.stderr


# Writing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["u.toml", "u.json", "u.TOML", "no suffix"])
def test_a_recipe_file_takes_the_place_of_one(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save(path)
    first = path.read_text()
    save_config(path, VALUES | {"seed": 8}, KNOWN, keep_out_of=())
    assert path.read_text() == first.replace("7", "8")
    assert load_config(path, dict.fromkeys(KNOWN, Kind.VALUE))["seed"] == "8"
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_one_that_was_edited_since_is_one_still(tmp_path: Path) -> None:
    path = tmp_path / "u.toml"
    save(path)
    path.write_text(path.read_text().replace("seed = 7", "# as in the paper\nseed = 0"))
    save(path)
    assert tomllib.loads(path.read_text())["seed"] == 7


OTHERS: dict[str, str] = {
    "weights.safetensors": "\x08\0\0\0\0\0\0\0{}",
    "thesis.tex": "\\documentclass{article}",
    "empty.toml": "",
    "own.toml": 'source = "dense"\noutput = "moe"\nrecipe = "E2G1T1"\n',
    "pyproject.toml": "# upcycle convert\n",
    "empty.json": "",
    "config.json": '{"model_type": "llama"}',
    "no options.json": "{}",
    "few.json": '{"source": "dense", "seed": 3}',
    "more.json": json.dumps(VALUES | {"model_type": "llama"}),
    "list.json": "[]",
    "broken.json": '{"source": "dense"',
}


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_else_is_written_over(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(OTHERS[name])
    with pytest.raises(UpcycleError, match="is not what --save-config has written"):
        save(path)
    assert path.read_text() == OTHERS[name]
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("target", ["recipe", "thesis", "nothing", "device"])
def test_a_link_is_not_followed(tmp_path: Path, target: str) -> None:
    save(tmp_path / "recipe")
    (tmp_path / "thesis").write_text("years of work")
    (tmp_path / "device").symlink_to("/dev/null")
    before = contents(tmp_path)
    (tmp_path / "u.toml").symlink_to(tmp_path / target)
    with pytest.raises(UpcycleError, match="is not what --save-config has written"):
        save(tmp_path / "u.toml")
    (tmp_path / "u.toml").unlink()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["a pipe", "a directory"])
def test_what_is_no_file_is_left_alone(tmp_path: Path, kind: str) -> None:
    UNREADABLE[kind](tmp_path / "u.toml")
    with pytest.raises(UpcycleError, match="is not what --save-config has written"):
        save(tmp_path / "u.toml")
    for device in ("/dev/null", "/dev/stdout"):
        with pytest.raises(UpcycleError, match="is not what --save-config has written"):
            save(Path(device))


@pytest.mark.parametrize("name", [".u.toml.new", "u.toml.new"])
def test_a_planted_temporary_is_not_written_through(tmp_path: Path, name: str) -> None:
    (tmp_path / "thesis").write_text("years of work")
    (tmp_path / name).symlink_to(tmp_path / "thesis")
    save(tmp_path / "u.toml")
    assert (tmp_path / "thesis").read_text() == "years of work"
    assert tomllib.loads((tmp_path / "u.toml").read_text()) == VALUES
    assert not (tmp_path / "u.toml").is_symlink()


@pytest.mark.parametrize("dry", [("--dry-run",), ()])
@pytest.mark.parametrize(
    "place",
    [
        "dense/model.safetensors",
        "dense/u.toml",
        "dense/deeper/u.toml",
        "link/u.toml",
        "moe/u.toml",
        "moe.partial/u.toml",
    ],
)
def test_nothing_is_saved_in_the_source_or_the_output(
    run_cli: RunCli, llama: Path, tmp_path: Path, place: str, dry: tuple[str, ...]
) -> None:
    dense = clone(llama, tmp_path / "dense")
    (dense / "deeper").mkdir()
    (tmp_path / "link").symlink_to(dense)
    before = contents(dense)
    command = ("convert", "dense", "moe", "--recipe", "E2G1T1", "--save-config", place, *dry)
    done = run_cli(*command, cwd=tmp_path)
    assert done.returncode == 2
    assert "where nothing else may be written" in done.stderr
    assert contents(dense) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "link"]


def test_a_place_that_leads_nowhere_is_said(run_cli: RunCli, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    command = ("convert", llama, "moe", "--recipe", "E2G1T1", "--dry-run", "--save-config")
    done = run_cli(*command, "loop/u.toml", cwd=tmp_path)
    assert done.returncode == 2
    assert "Too many levels of symbolic links" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_weights_beside_are_not_written_over(
    run_cli: RunCli, llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "adapter.safetensors").write_bytes(b"weeks of work")
    command = ("convert", llama, "moe", "--recipe", "E2G1T1", "--dry-run", "--save-config")
    done = run_cli(*command, "adapter.safetensors", cwd=tmp_path)
    assert done.returncode == 2
    assert "is not what --save-config has written" in done.stderr
    assert (tmp_path / "adapter.safetensors").read_bytes() == b"weeks of work"
