"""Compares an output with its record: which files upcycle wrote, and which have changed since.

`--overwrite` removes only unchanged files: a model that was trained further, an edited card and a
user's own files must survive. A push publishes only unchanged files: a working directory may also
hold tokens, drafts and half-trained weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from upcycle_cli.checkpoint.card_metadata import is_edited
from upcycle_cli.checkpoint.header import parse_header
from upcycle_cli.checkpoint.storage import CARD_NAME, RECORD_NAME, REPORT_NAME
from upcycle_cli.core import safe_files
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.safe_files import read_small

_HINT = "Move or remove it yourself if it is not needed."


@dataclass(frozen=True)
class Inventory:
    """The files of an output, by their names."""

    record_digest: str
    """Identifies the output."""
    listed: Mapping[str, object]
    """The files that its record lists; the record, the card and the checksums are not listed."""
    own: tuple[str, ...]
    """The files that belong to the output."""
    changed: Mapping[str, str]
    """How own files differ from what upcycle wrote; the card may be edited."""
    foreign: tuple[str, ...]
    """All other files, and empty directories."""

    @property
    def failures(self) -> list[str]:
        """Say what is missing or changed."""
        missing = sorted({*self.listed, CARD_NAME} - {*self.own})
        changed = [f"{name}: {how}" for name, how in self.changed.items()]
        return [f"{name} is missing" for name in missing] + changed


def take_inventory(output: Path) -> Inventory:
    """Compare the files of an output with its record; UpcycleError if the record is damaged."""
    record = read_small(output / RECORD_NAME)
    listed, routers = _listed(output, record)
    digest = hashlib.sha256(record).hexdigest()
    known = {*listed, RECORD_NAME, CARD_NAME, safe_files.CHECKSUMS_NAME}
    parents = {str(parent) for name in listed for parent in PurePosixPath(name).parents}
    own, foreign = list[str](), list[str]()
    changed: dict[str, str] = {}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        try:
            if safe_files.is_directory(path):
                if name not in parents and not any(path.iterdir()):
                    foreign.append(name)
            elif name in known or (name == REPORT_NAME and digest.encode() in read_small(path)):
                own.append(name)
                safe_files.locate(output, name)
                if how := _change(path, name, listed, routers):
                    changed[name] = how
            else:
                foreign.append(name)
        except UpcycleError as error:
            changed[name] = error.message.rstrip(".")
        except OSError as error:
            changed[name] = f"cannot be read: {error.strerror}"
    return Inventory(digest, listed, tuple(own), changed, tuple(foreign))


def check_ownership(output: Path) -> str:
    """Return the digest of an output's record; UpcycleError for a file upcycle did not write."""
    if not os.path.lexists(output / RECORD_NAME):
        words = f"{output} was not made by upcycle (no {RECORD_NAME}); it is not replaced."
        raise UpcycleError(words, _HINT)
    found = take_inventory(output)
    reasons = {**dict.fromkeys(found.foreign, "upcycle did not write it"), **found.changed}
    if CARD_NAME in {*found.own} - {*found.changed}:
        card = read_small(output / CARD_NAME).decode(errors="replace")
        # is_edited accepts a card of metadata only, which the Hub makes; here a user made it.
        if "Made by upcycle" not in card or is_edited(card):
            reasons[CARD_NAME] = "somebody has edited it"
    for name, reason in reasons.items():
        raise UpcycleError(f"{output} is not replaced, because of {name}: {reason}.", _HINT)
    return found.record_digest


def checksum_failures(output: Path) -> Iterator[str]:
    """Compare the files with SHA256SUMS, as `sha256sum --check` does."""
    if not os.path.lexists(output / safe_files.CHECKSUMS_NAME):
        return
    try:
        sums = safe_files.locate(output, safe_files.CHECKSUMS_NAME)
        for name, wanted in safe_files.read_checksums(sums).items():
            if not os.path.lexists(output / name):
                yield f"{name} is missing"
            elif wanted != safe_files.sha256_of(safe_files.locate(output, name)):
                yield f"{name} is not the file that {safe_files.CHECKSUMS_NAME} describes"
    except UpcycleError as error:
        yield error.message


def remove_output(output: Path) -> None:
    """Remove an output, the record last; UpcycleError or OSError if it has other files."""
    check_ownership(output)
    for path in output.iterdir():
        if path.name != RECORD_NAME:
            safe_files.remove(path)
    (output / RECORD_NAME).unlink()
    output.rmdir()


def record_digest(output: Path) -> str | None:
    """Return the digest of an output's record, which identifies the output; None without one."""
    try:
        return hashlib.sha256(read_small(output / RECORD_NAME)).hexdigest()
    except UpcycleError:
        return None


def entry_of(path: Path, name: str) -> dict[str, Any]:
    """Return a file's entry in the record, with the digest of a weight file's header only."""
    with safe_files.open_regular(path) as file:
        entry = {"name": name, "size": os.fstat(file.fileno()).st_size}
        if name.endswith(".safetensors"):
            header = safe_files.read_header(file)
            return entry | {"header_sha256": hashlib.sha256(header).hexdigest()}
        return entry | {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _listed(output: Path, record: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the files that a record lists, and the digests of the routers."""
    try:
        value = json.loads(record)
        files = {str(entry["name"]): entry for entry in value["files"]}
        return files, dict(value["routers"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        words = f"{output / RECORD_NAME} does not say which files upcycle wrote"
        raise UpcycleError(f"{words}, so {output} is not replaced.", _HINT) from error


def _change(
    path: Path, name: str, listed: Mapping[str, object], routers: Mapping[str, object]
) -> str:
    """Return how a file of an output differs from what upcycle wrote; empty if it does not."""
    if name == safe_files.CHECKSUMS_NAME:
        same = safe_files.read_checksums(path).keys() == {*listed, RECORD_NAME}
        return "" if same else "it lists other files"
    if name not in listed:
        return ""
    if listed[name] != entry_of(path, name):
        return f"it is not the file that {RECORD_NAME} lists"
    if not name.endswith(".safetensors"):
        return ""
    with safe_files.open_regular(path) as file:
        # Any training changes the routers; experts are not read.
        for entry in parse_header(safe_files.read_header(file), path, name)[0]:
            if entry.name in routers:
                file.seek(entry.offset)
                found = hashlib.sha256(file.read(entry.nbytes)).hexdigest()
                if found != routers[entry.name]:
                    return f"its router {entry.name} was changed"
    return ""
