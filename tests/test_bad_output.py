"""Outputs that may not be written, or cannot."""

from __future__ import annotations

import os
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from conftest import clone, read_json
from refusals import Refuses, assert_refused, invoke
from typer.testing import CliRunner

from upcycle_cli.cli.app import app


def test_the_output_exists(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "config.json").write_text("{}")
    refuses(llama, "exists and is not empty", "--overwrite")


def test_overwriting_what_is_no_checkpoint(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "thesis.tex").write_text("years of work")
    arguments = ("--recipe", "E2G2T2", "--overwrite")
    refuses(llama, "was not made by upcycle", arguments=arguments)


def test_empty_paths(llama: Path, tmp_path: Path) -> None:
    for arguments in (("convert", str(llama), ""), ("convert", "", str(tmp_path / "moe"))):
        result = CliRunner().invoke(app, [*arguments, "--recipe", "E2G2T2"])
        assert result.exit_code == 2
        assert "it is empty" in result.stderr


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_outputs_that_would_harm_the_source(
    llama: Path, tmp_path: Path, refuses: Refuses, overwrite: tuple[str, ...]
) -> None:
    dense = clone(llama, tmp_path / "models" / "dense")
    (tmp_path / "models" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(dense)
    arguments = ("--recipe", "E2G2T2", *overwrite)
    for output, words in (
        (dense, "is the source itself"),
        (tmp_path / "link", "is the source itself"),
        (dense / "moe", "inside the source"),
        (dense / "a" / "b", "inside the source"),
        (tmp_path / "link" / "moe", "inside the source"),
        (tmp_path / "models" / "other" / ".." / "dense", "is the source itself"),
        (tmp_path / "models", "contains the source"),
        (tmp_path, "contains the source"),
        (Path("/"), "contains the source"),
    ):
        refuses(dense, words, output=output, arguments=arguments)


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_outputs_that_are_no_directory(
    llama: Path, tmp_path: Path, refuses: Refuses, overwrite: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("hello")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "somewhere").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "somewhere")
    arguments = ("--recipe", "E2G2T2", *overwrite)
    refuses(llama, "not a directory", output=tmp_path / "file", arguments=arguments)
    for name in ("dangling", "linked"):
        refuses(llama, "is a symbolic link", output=tmp_path / name, arguments=arguments)
    refuses(llama, "file", output=tmp_path / "file" / "moe", arguments=arguments)


def test_an_output_that_cannot_be_made(llama: Path, tmp_path: Path, refuses: Refuses) -> None:
    # Not even root can make a directory there.
    refuses(llama, "/proc/moe", output=Path("/proc/moe"))
    refuses(llama, "y" * 300, output=tmp_path / ("y" * 300))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refuses(llama, "loop", output=tmp_path / "loop")
    refuses(llama, "loop", output=tmp_path / "loop" / "moe")


@pytest.mark.parametrize("length", [250, 255, 256, 5000])
@pytest.mark.parametrize("extra", [(), ("--dry-run",), ("--overwrite",)])
def test_an_output_whose_name_is_too_long(
    llama: Path, tmp_path: Path, refuses: Refuses, length: int, extra: tuple[str, ...]
) -> None:
    """The name itself may fit; what it has behind it while it is made does not."""
    output = tmp_path / ("ö" + "z" * (length - 2))
    words = (output.name, "too long", "more than 255 bytes")
    refuses(llama, *words, output=output, arguments=("--recipe", "E2G2T2", *extra))


def test_an_output_whose_name_just_fits(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / ("z" * 246)
    for extra in ((), ("--overwrite", "--seed", "1")):
        done = invoke("convert", llama, output, "--recipe", "E2G2T2", "--quiet", *extra)
        assert done.exit_code == 0, done.stderr


NOT_UTF8 = "x\udcff"


def test_paths_that_are_not_utf8(llama: Path, tmp_path: Path) -> None:
    dense, moe = (tmp_path / f"{name}{NOT_UTF8}" for name in ("dense", "moe"))
    clone(llama, dense)
    prompts, config = tmp_path / f"p{NOT_UTF8}.txt", tmp_path / f"c{NOT_UTF8}.toml"
    prompts.write_text("One two three, said the owl to the moon.\n" * 9)
    config.write_text('recipe = "E2G2T2"\n')
    for arguments in (
        ("convert", dense, moe, "--config", config, "--json"),
        ("convert", llama, tmp_path / "moe", "--recipe", "E2G2T2"),
        ("inspect", dense, "--recipe", "E2G2T2"),
        ("inspect", moe, "--weights", "--dense", dense, "--json"),
        ("verify", llama, tmp_path / "moe", "--prompts", prompts),
    ):
        done = invoke(*arguments)
        assert done.exit_code == 0, done.output
        assert "Traceback" not in done.output
        done.output.encode()
    shown = r"densex\udcff"
    assert read_json(moe / "upcycle.json")["source"]["name"] == shown
    assert shown in (moe / "README.md").read_text().replace(r"\\", "\\")
    # What loads models reads no such path; that is no finding about the model.
    for refused in (
        ("convert", dense, tmp_path / "new", "--recipe", "E2G2T2", "--verify"),
        ("convert", llama, tmp_path / NOT_UTF8, "--recipe", "E2G2T2", "--verify"),
        ("verify", dense, tmp_path / "moe"),
        ("verify", llama, moe),
        ("demo", tmp_path / NOT_UTF8),
    ):
        assert_refused(invoke(*refused), "is not UTF-8", r"x\udcff", "Rename it")
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_that_may_not_be_read(
    llama: Path, tmp_path: Path, refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = clone(llama, tmp_path / "dense")
    real = os.open

    def refuse(path: str | Path, *options: Any, **more: Any) -> int:  # noqa: ANN401
        if str(path).endswith("dense/tokenizer.json"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *options, **more)

    monkeypatch.setattr(os, "open", refuse)
    refuses(dense, "tokenizer.json: Permission denied")
    result = invoke("convert", dense, tmp_path / "moe", "--recipe", "E2G2T2", "--dry-run")
    assert result.exit_code == 0
    assert "without --dry-run this is refused" in result.stderr
    assert "tokenizer.json: Permission denied" in result.stderr


def test_a_mount_point(llama: Path, refuses: Refuses) -> None:
    refuses(llama, "mount point", "/dev/shm/moe", output=Path("/dev/shm"))  # noqa: S108


def test_not_enough_disk_space(
    llama: Path, refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")  # noqa: PYI024
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 10**6, 10**6))
    message = refuses(llama, "not enough disk space", "1 MB free")
    assert re.search(r"\d MB needed", message)


def test_too_large_a_conversion_is_refused_by_its_size(
    llama: Path, refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")  # noqa: PYI024
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 8_000_000))
    # 4 MB are kept free for what is not weights; 8 MB of experts are too many then.
    refuses(llama, "not enough disk space", arguments=("--recipe", "E256G1T1"))


def test_errors_are_said_quietly_too(llama: Path, refuses: Refuses) -> None:
    refuses(llama, "is not a recipe", arguments=("--recipe", "x", "--quiet"))
