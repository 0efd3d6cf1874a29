"""What a push publishes: what the record lists, as it lists it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import forked
import pytest
from conftest import RunOnHub, clone, read_json

from upcycle_cli import Recipe, UpcycleError, convert
from upcycle_cli.checkpoint.checkpoint import open_checkpoint
from upcycle_cli.checkpoint.storage import RECORD_NAME
from upcycle_cli.hub.client import download_bar
from upcycle_cli.publish.manifest import read_manifest
from upcycle_cli.publish.push import Destination, push

if TYPE_CHECKING:
    from hub.server import Hub

MOE = "acme/moe"


@pytest.fixture(scope="module")
def moe(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished conversion with checksums. Read only."""
    path = tmp_path_factory.mktemp("moe") / "moe"
    recipe = Recipe(expansion=2, granularity=1, top_k=1)
    convert(llama, path, recipe, checksums=True)
    return path


@pytest.fixture
def welcome(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever pushes may."""
    monkeypatch.setattr("upcycle_cli.publish.push.check_destination", lambda _: None)


def _append(name: str, data: bytes = b" ") -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        with (path / name).open("ab") as file:
            file.write(data)

    return spoil


def _flip(path: Path) -> None:
    """Change a weight that no router and no header holds."""
    shard = min(path.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def _record(**changes: object) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        record = read_json(path / RECORD_NAME) | changes
        (path / RECORD_NAME).write_text(json.dumps(record))

    return spoil


def _list(name: str) -> Callable[[Path], object]:
    """Let the record list one more file, rightly."""

    def spoil(path: Path) -> None:
        record = read_json(path / RECORD_NAME)
        data = b"secret"
        (path / name).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        record["files"].append({"name": name, "size": len(data), "sha256": digest})
        (path / RECORD_NAME).write_text(json.dumps(record))

    return spoil


def _link(name: str, target: str) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(target)

    return spoil


def _sums(change: Callable[[str], str]) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        sums = path / "SHA256SUMS"
        sums.write_text(change(sums.read_text()))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: (path / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (_append("tokenizer.json"), "tokenizer.json has"),
        (_append("README.md"), None),
        (_link("tokenizer.json", "/etc/passwd"), "not followed"),
        (_link("README.md", "/etc/passwd"), "not followed"),
        (_link("LICENSE", "/etc/passwd"), "not followed"),
        (_flip, "is not the file that SHA256SUMS describes"),
        (_list("thesis.tex"), "thesis.tex, which is no file of a model"),
        (_list("modeling.py"), "modeling.py, which is no file of a model"),
        (_sums(lambda text: "".join(text.splitlines(keepends=True)[1:])), "does not list"),
        (_sums(lambda text: text + f"{'0' * 64}  x\n"), "lists x, which is not published"),
        (_sums(lambda text: text + f"{'0' * 64}  README.md\n"), "a push names the repo"),
        (_sums(lambda text: text + "nonsense\n"), "names no file here"),
    ],
)
def test_what_is_not_as_the_record_has_it(
    moe: Path, tmp_path: Path, spoil: Callable[[Path], object], words: str | None
) -> None:
    directory = clone(moe, tmp_path / "moe")
    spoil(directory)
    try:
        failures = read_manifest(open_checkpoint(directory)).failures
    except UpcycleError as error:
        failures = (error.message,)
    assert bool(failures) == (words is not None)
    assert words is None or any(words in failure for failure in failures), failures


@pytest.mark.usefixtures("welcome")
def test_a_push_names_what_is_wrong(moe: Path, tmp_path: Path) -> None:
    directory = clone(moe, tmp_path / "moe")
    _append("tokenizer.json")(directory)
    with pytest.raises(UpcycleError, match="not a complete upcycled checkpoint") as caught:
        push(directory, Destination(repo=MOE))
    assert "tokenizer.json has" in (caught.value.hint or "")
    assert "\n" not in caught.value.message


@pytest.mark.usefixtures("welcome")
@pytest.mark.parametrize("files", [None, [], [7], [{"name": "../x", "size": 1}]])
def test_an_output_of_an_older_version(moe: Path, tmp_path: Path, files: object) -> None:
    directory = clone(moe, tmp_path / "moe")
    _record(files=files)(directory)
    with pytest.raises(UpcycleError) as caught:
        push(directory, Destination(repo=MOE))
    assert "Make it again" in (caught.value.hint or "")
    assert "hf upload" in (caught.value.hint or "")


def test_only_what_belongs_is_published(moe: Path, tmp_path: Path) -> None:
    directory = clone(moe, tmp_path / "moe")
    ours = set(read_manifest(open_checkpoint(moe)).files)
    assert ours == {path.name for path in moe.iterdir()}
    extra = ("LICENSE.md", "Notice", "USE_POLICY.md")
    others = ("chat_template.bak", "tokenizer_old.json", ".env", "LICENSE.bin", "notes/LICENSE")
    (directory / "notes").mkdir()
    for name in (*extra, *others):
        (directory / name).write_text("words")
    manifest = read_manifest(open_checkpoint(directory))
    assert set(manifest.files) == ours | set(extra)
    assert set(manifest.left_out) == set(others)
    assert not manifest.failures


def test_a_mirror_with_a_password(hub: Hub, run: RunOnHub, llama: Path, tmp_path: Path) -> None:
    """Neither what is said nor what is written, here or on the mirror, holds the password."""
    hub.store.upload("acme/dense", llama)
    hub.password = "user:pass/w0rd"  # noqa: S105 - opens nothing
    environment = hub.environment(tmp_path / "home")
    environment["HF_ENDPOINT"] = hub.url.replace("//", "//user:pass%2Fw0rd@")
    output, recipe = tmp_path / "out", tmp_path / "recipe.toml"
    convert_it = ("convert", "acme/dense", output, "--recipe", "E2G1T1")
    for command, code in (
        ((*convert_it, "--save-config", recipe), 0),
        (("push", output, MOE), 0),
        (("push", output, MOE, "--json"), 0),
        (("verify", "acme/dense", MOE, "--checks", "directory", "--json"), 0),
        (("inspect", "acme/nothing"), 2),
        (("push", output, "stranger/moe"), 2),
    ):
        done = run(*command, expect=code, **environment)
        assert "w0rd" not in done.stdout + done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {output / RECORD_NAME, output / "README.md", recipe} <= set(written)
    assert not [path for path in written if b"w0rd" in path.read_bytes()]


CLOSED = """
import sys
from huggingface_hub import _commit_api
lfs_upload, left = _commit_api.lfs_upload, [2]
def broken(*arguments, **options):
    if left[0]:
        left[0] -= 1
        raise RuntimeError("Cannot send a request, as the client has been closed.")
    return lfs_upload(*arguments, **options)
_commit_api.lfs_upload = broken
from upcycle_cli.__main__ import main
main()
"""


def test_a_connection_that_breaks_beside_others(hub: Hub, moe: Path, tmp_path: Path) -> None:
    variables = hub.environment(tmp_path / "home")
    done = forked.run(["push", moe, MOE], program=CLOSED, environment=variables)
    assert done.returncode == 0, done.stderr
    assert len(hub.store.repos[MOE].commits) == 2


def _seen(hub: Hub, tmp_path: Path, *arguments: str | Path) -> str:
    """Return what a command shows on a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    environment = hub.environment(tmp_path / "home")
    command = [*forked.command(environment), *map(str, arguments)]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        shown = bytearray()
        with contextlib.suppress(OSError):  # which Linux says at the end
            while data := os.read(ours, 1 << 16):
                shown += data
    os.close(ours)
    assert process.returncode == 0, shown.decode()
    return shown.decode()


@pytest.mark.parametrize("least", [0, 10**9])
def test_one_bar_of_a_download(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upcycle_cli.hub.client._MIN_BYTES_FOR_A_BAR", least)
    screen, bar = io.StringIO(), download_bar(4_000)
    library = sys.modules["huggingface_hub.utils.tqdm"]
    monkeypatch.setattr(library, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(library, "progress_bar_states", {})
    transfer = "huggingface_hub.snapshot_download.transfer"
    for options in ({"unit": "B", "name": transfer}, {"desc": "Fetching 2 files"}):
        bar(total=2, file=screen, **options).update(1)
    assert not screen.getvalue()
    with bar(total=4_000, file=screen, unit="B", unit_scale=True) as shown:
        shown.update(1_000)
        shown.refresh()
    found = screen.getvalue()
    assert ("25%" in found and "downloading" in found) == (least == 0), found


def test_no_bar_of_what_takes_no_time(hub: Hub, llama: Path, moe: Path, tmp_path: Path) -> None:
    hub.store.upload("acme/dense", llama)
    for command in (
        ("convert", "acme/dense", tmp_path / "out", "--recipe", "E2G1T1", "--dry-run"),
        ("convert", "acme/dense", tmp_path / "out", "--recipe", "E2G1T1"),
    ):
        shown = _seen(hub, tmp_path, *command)
        assert "%|" not in shown, shown
    assert "Upload" not in _seen(hub, tmp_path, "push", moe, MOE).replace("Uploaded", "")
    again = _seen(hub, tmp_path, "push", moe, MOE)
    assert "nothing: all" in again
    assert "%|" not in again


def test_checksums_hold_in_the_repo(hub: Hub, run: RunOnHub, moe: Path, llama: Path) -> None:
    done = json.loads(run("push", moe, MOE, "--json").stdout)
    assert done["left_out"] == []
    assert "SHA256SUMS" in hub.store.repos[MOE].commits[done["commit"]].tree
    run("verify", llama, MOE, "--checks", "directory")
