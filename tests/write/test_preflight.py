"""Outputs that may not be written, or do not fit, are refused before the first byte."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from conftest import clone, read_json, snapshot
from refusals import Refuses, invoke

from upcycle_cli import Recipe, UpcycleError, build_plan, convert, open_checkpoint
from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.write import preflight
from upcycle_cli.write.preflight import check_space
from upcycle_cli.write.staging import partial_of

RECIPE = Recipe("E2G2T2")
Usage = namedtuple("Usage", "total used free")  # noqa: PYI024 - what shutil returns


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_outputs_that_would_harm_the_source(
    llama: Path, tmp_path: Path, refuses: Refuses, overwrite: tuple[str, ...]
) -> None:
    dense = clone(llama, tmp_path / "models" / "dense")
    (tmp_path / "models" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(dense)
    arguments = ("--recipe", "E2G2T2", *overwrite)
    for output, words in (
        (dense, "is the source or inside it"),
        (tmp_path / "link", "is the source or inside it"),
        (dense / "a" / "b", "the source or inside it"),
        (tmp_path / "link" / "moe", "the source or inside it"),
        (tmp_path / "models" / "other" / ".." / "dense", "is the source or inside it"),
        (tmp_path / "models", "contains the source"),
        (Path("/"), "contains the source"),
    ):
        refuses(dense, words, output=output, arguments=arguments)


def test_overwrite_keeps_a_source_that_is_linked_from_elsewhere(
    llama: Path, tmp_path: Path
) -> None:
    """A snapshot in the Hub's cache is links to its blobs."""
    repo = tmp_path / "models--org--tiny"
    convert(llama, repo / "blobs", RECIPE)
    (repo / "snapshots" / "0").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(llama / name, repo / "blobs" / name)
        (repo / "snapshots" / "0" / name).symlink_to(repo / "blobs" / name)
    before = snapshot(tmp_path)
    with pytest.raises(UpcycleError, match="contains the source"):
        convert(repo / "snapshots" / "0", repo / "blobs", RECIPE, overwrite=True)
    assert snapshot(tmp_path) == before


def test_outputs_that_cannot_be_made(
    llama: Path, tmp_path: Path, refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, target in (("linked", "somewhere"), ("dangling", "nowhere"), ("loop", "loop")):
        (tmp_path / name).symlink_to(tmp_path / target)
    (tmp_path / "somewhere").mkdir()
    (tmp_path / "file").write_text("hello")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    long = "ö" + "z" * 248  # it fits itself, but not with .partial behind it
    for output, *words in (
        ("thesis", "exists and is not empty", "another name"),
        ("file", "not a directory"),
        ("file/moe", "file"),
        ("linked", "is a symbolic link"),
        ("dangling", "is a symbolic link"),
        ("loop", "loop"),
        ("loop/moe", "loop"),
        (long, long, "too long"),
        ("/proc/moe", "/proc/moe"),  # not even root can make a directory there
        ("/dev/shm", "mount point", "/dev/shm/moe"),  # noqa: S108
    ):
        refuses(llama, *words, output=tmp_path / output)
    overwrite = ("--recipe", "E2G2T2", "--overwrite")
    refuses(llama, "was not made by upcycle", output=tmp_path / "thesis", arguments=overwrite)
    convert(llama, tmp_path / "here", RECIPE)
    monkeypatch.chdir(tmp_path / "here")
    refuses(llama, "current directory", output=tmp_path / "here", arguments=overwrite)


def test_paths_that_are_not_utf8(llama: Path, tmp_path: Path) -> None:
    dense, moe = clone(llama, tmp_path / "densex\udcff"), tmp_path / "moex\udcff"
    config = tmp_path / "cx\udcff.toml"
    config.write_text('recipe = "E2G2T2"\n')
    done = invoke("convert", dense, moe, "--config", config, "--json")
    assert done.exit_code == 0, done.output
    done.output.encode()
    shown = r"densex\udcff"
    assert read_json(moe / "upcycle.json")["source"]["name"] == shown
    assert shown in (moe / "README.md").read_text().replace(r"\\", "\\")


# Space --------------------------------------------------------------------------------------------


def disk_with(monkeypatch: pytest.MonkeyPatch, free: int, *, shares: bool = False) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 60, 0, free))
    monkeypatch.setattr(preflight, "can_share", lambda _: shares)


def test_an_output_that_cannot_fit_is_refused_before_writing(
    llama: Path, tmp_path: Path, refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_with(monkeypatch, 8_000_000)
    # 4 MB are kept free for files beside the weights; 8 MB of experts are too many then.
    refuses(llama, "not enough disk space", "8.00 MB free", arguments=("--recipe", "E256G1T1"))
    assert list(tmp_path.glob("*.partial")) == []


def test_needed_space_counts_downloads_and_not_what_an_earlier_run_left(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, plan = tmp_path / "moe", build_plan(RECIPE, open_checkpoint(llama))
    partial_of(output).mkdir()
    disk_with(monkeypatch, plan.nbytes, shares=True)
    check_space(plan, output)  # nobody knows how much shared extents will take
    disk_with(monkeypatch, plan.nbytes)
    with pytest.raises(UpcycleError, match="not enough disk space"):
        check_space(plan, output)
    (partial_of(output) / "shard").write_bytes(bytes(5_000_000))
    check_space(plan, output)
    monkeypatch.setattr(Checkpoint, "bytes_to_download", 100_000_000)
    with pytest.raises(UpcycleError, match="not enough disk space"):
        check_space(plan, output)
