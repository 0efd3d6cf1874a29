"""Which files of an output are published, and which damage stops a push."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import clone, read_json
from safetensors.torch import load_file, save_file

from upcycle_cli import Destination, Recipe, UpcycleError, convert
from upcycle_cli.checkpoint.checkpoint import open_checkpoint
from upcycle_cli.checkpoint.storage import RECORD_NAME
from upcycle_cli.publish.manifest import read_manifest
from upcycle_cli.publish.push import push

ROUTER = "model.layers.0.block_sparse_moe.gate.weight"
Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def moe(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished conversion with checksums. Read only."""
    path = tmp_path_factory.mktemp("moe") / "moe"
    return convert(llama, path, Recipe(expansion=2, granularity=1, top_k=1), checksums=True).output


def append(name: str) -> Spoil:
    def spoil(path: Path) -> None:
        with (path / name).open("ab") as file:
            file.write(b" ")

    return spoil


def link(name: str) -> Spoil:
    def spoil(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to("/etc/passwd")

    return spoil


def flip(path: Path) -> None:
    """Change a weight that is in no header and no router."""
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)


def train(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors[ROUTER] = torch.ones_like(tensors[ROUTER])
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def record(**changes: object) -> Spoil:
    def spoil(path: Path) -> None:
        (path / RECORD_NAME).write_text(json.dumps(read_json(path / RECORD_NAME) | changes))

    return spoil


def sums(change: Callable[[str], str]) -> Spoil:
    def spoil(path: Path) -> None:
        file = path / "SHA256SUMS"
        file.write_text(change(file.read_text()))

    return spoil


def remove(name: str) -> Spoil:
    return lambda path: (path / name).unlink()


SPOILED: dict[str, tuple[Spoil, str]] = {
    "missing file": (remove("tokenizer.json"), "tokenizer.json is missing"),
    "missing weights": (remove("model.safetensors"), "model.safetensors"),
    "missing card": (remove("README.md"), "README.md"),
    "missing record": (remove(RECORD_NAME), "was not made by upcycle"),
    "short weights": (lambda path: (path / "model.safetensors").write_bytes(b"abc"), "truncated"),
    "longer file": (append("tokenizer.json"), "tokenizer.json is not the file that"),
    "edited config": (append("config.json"), "config.json is not the file that"),
    "linked file": (link("tokenizer.json"), "not followed"),
    "linked card": (link("README.md"), "not followed"),
    "changed weight": (flip, "does not match its checksum in SHA256SUMS"),
    "trained router": (train, f"{ROUTER} changed since the conversion"),
    "unfinished": (lambda path: (path / ".upcycle-partial").write_text("{}"), "unfinished"),
    "checksum missing": (sums(lambda text: text.partition("\n")[2]), "does not list"),
    "checksum of a stranger": (sums(lambda t: f"{t}{'0' * 64}  x\n"), "SHA256SUMS lists x"),
    "checksum of the card": (
        sums(lambda t: f"{t}{'0' * 64}  README.md\n"),
        "lists README.md",
    ),
    "checksum of another form": (sums(lambda t: f"{t}nonsense\n"), "SHA256SUMS"),
    "no list of files": (record(files=None), "does not say which files belong to it"),
    "listed path": (record(files=[{"name": "../x", "size": 1}]), "upcycle.json lists"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_refuse_what_is_not_complete_and_unchanged(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("upcycle_cli.publish.push.check_destination", lambda _: None)
    directory = clone(moe, tmp_path / "moe")
    spoil, words = SPOILED[name]
    spoil(directory)
    with pytest.raises(UpcycleError) as caught:
        push(directory, Destination(repo="acme/moe"))
    assert words in f"{caught.value}"
    assert "\n" not in caught.value.message


def test_publish_the_listed_files_the_card_and_the_checksums(moe: Path, tmp_path: Path) -> None:
    directory = clone(moe, tmp_path / "moe")
    append("README.md")(directory)  # which may be edited
    strangers = {"LICENSE.md", "Notice", "chat_template.bak", ".env", "notes/LICENSE"}
    (directory / "notes").mkdir()
    for name in strangers:
        (directory / name).write_text("words")
    manifest = read_manifest(open_checkpoint(directory))
    assert set(manifest.files) == {path.name for path in moe.iterdir()}
    assert set(manifest.left_out) == strangers
    assert not manifest.failures
