"""Which files of a finished output upcycle has written, by the list in its `upcycle.json`.

`--overwrite` and `clean` remove these and nothing else: a model that was trained further, a card
that was edited and somebody's thesis look like the output's own files by their names only.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from upcycle_cli.checkpoint.card_metadata import is_edited
from upcycle_cli.checkpoint.header import parse_header
from upcycle_cli.checkpoint.storage import CARD_NAME, RECORD_NAME, REPORT_NAME
from upcycle_cli.core.dir_handle import Folder
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.safe_files import (
    CHECKSUMS_NAME,
    MOST_JSON_BYTES,
    ListedFile,
    listed_files,
    parse_checksums,
    read_header,
)
from upcycle_cli.write.staging import SEAL, read_state

_HINT = "Move or remove it yourself if it is not needed."
_FOREIGN = "which upcycle did not write"

_Identity = tuple[int, int, int, int]


@dataclass(frozen=True)
class Inventory:
    """The files of an output, all of them, as they were when they were looked at."""

    record_digest: str
    """The SHA-256 of `upcycle.json`, which tells one output from another."""
    files: Mapping[str, _Identity | None]
    directories: tuple[str, ...]


def take_inventory(folder: Folder) -> Inventory:
    """Return what is there of a finished output; UpcycleError for what upcycle did not write."""
    if folder.status(RECORD_NAME) is None:
        raise UpcycleError(
            f"{folder.path} was not made by upcycle (no {RECORD_NAME}); it is left as it is.", _HINT
        )
    raw = folder.read_small(RECORD_NAME, MOST_JSON_BYTES)
    listed, routers = _listed(folder, raw)
    parents = {str(parent) for name in listed for parent in PurePosixPath(name).parents}
    found: dict[str, _Identity | None] = {}
    directories = []
    for name, is_directory in folder.walk():
        if is_directory and name in parents:
            directories.append(name)
            continue
        # Before the contents, so that a change after that is seen.
        found[name] = _identity(folder, name)
        reason = _FOREIGN if is_directory else _objection(folder, name, listed, raw)
        if reason is None and name.endswith(".safetensors"):
            reason = _changed_router(folder, name, routers)
        if reason:
            raise UpcycleError(f"{folder.path} holds {name}, {reason}; it is left as it is.", _HINT)
    return Inventory(hashlib.sha256(raw).hexdigest(), found, tuple(directories))


def remove_all(folder: Folder, inventory: Inventory) -> None:
    """Remove the files of an inventory, the record last; UpcycleError for what came or changed."""

    def unchanged(name: str) -> bool:
        return _identity(folder, name) == inventory.files.get(name)

    for name in filter(unchanged, inventory.files):
        if name != RECORD_NAME:
            folder.remove(name)
    for name in inventory.directories:  # the inner ones first
        folder.remove_empty(name)
    for name in folder.names():
        if name != RECORD_NAME or not unchanged(name):
            raise UpcycleError(f"{name} is new there.")
    folder.remove(RECORD_NAME)


def record_digest(folder: Folder) -> str | None:
    """Return the digest that an inventory has, None when there is no record."""
    try:
        return hashlib.sha256(folder.read_small(RECORD_NAME, MOST_JSON_BYTES)).hexdigest()
    except (OSError, UpcycleError):
        return None


def _listed(folder: Folder, raw: bytes) -> tuple[dict[str, ListedFile], Mapping[str, object]]:
    """Return the files that a record lists, and the digests of the routers."""
    try:
        record = json.loads(raw)
        record = record if isinstance(record, dict) else {}
        routers = record.get("routers")
        return listed_files(record), routers if isinstance(routers, dict) else {}
    except (ValueError, RecursionError, UpcycleError) as error:
        what = error.message if isinstance(error, UpcycleError) else f"{RECORD_NAME}: {error}."
        raise UpcycleError(
            f"{folder.path} does not say which of its files upcycle wrote, as an earlier version "
            f"did not, so it is left as it is: {what}",
            _HINT,
        ) from error


def _objection(
    folder: Folder, name: str, listed: Mapping[str, ListedFile], record: bytes
) -> str | None:
    """Say why a file is not one that upcycle wrote, if it is not."""
    status, file = folder.status(name), listed.get(name)
    if status is None or not stat.S_ISREG(status.st_mode):
        return "which is no regular file"
    if name == RECORD_NAME:
        return None
    if name == CARD_NAME:
        card = folder.read_small(name, MOST_JSON_BYTES)
        return None if _is_untouched(card) else "which somebody has edited"
    if name == CHECKSUMS_NAME:
        file_is_ours = _are_ours(folder.read_small(name, MOST_JSON_BYTES), listed, record)
    elif name == REPORT_NAME:  # on this very output, whose record it has the digest of
        page = folder.read_small(name, MOST_JSON_BYTES)
        file_is_ours = hashlib.sha256(record).hexdigest().encode() in page
    elif name == SEAL:  # of a run that was killed, in a directory that has another name now
        file_is_ours = "plan_sha256" in read_state(folder, SEAL)
    else:
        with folder.read(name) as opened:
            file_is_ours = file is not None and file.describes(opened)
    if file_is_ours:
        return None
    return _FOREIGN if file is None else "which is not as upcycle wrote it"


def _changed_router(folder: Folder, name: str, routers: Mapping[str, object]) -> str | None:
    """Say that a router was changed, which no training leaves alone; experts are not read."""
    with folder.read(name) as file:
        for entry in parse_header(read_header(file), folder.path / name, name)[0]:
            if entry.name in routers:
                file.seek(entry.offset)
                found = hashlib.sha256(file.read(entry.nbytes)).hexdigest()
                if found != routers[entry.name]:
                    return f"whose router {entry.name} was changed"
    return None


def _is_untouched(card: bytes) -> bool:
    try:
        text = card.decode()
    except ValueError:
        return False
    # A card of metadata only is nobody's on the Hub, but in a directory somebody put it there.
    return "Made by upcycle" in text and not is_edited(text)


def _are_ours(sums: bytes, listed: Mapping[str, ListedFile], record: bytes) -> bool:
    """Whether these are checksums of the listed files, the weights' own unseen."""
    try:
        found = parse_checksums(sums)
    except UpcycleError:
        return False
    wanted = {name: file.sha256 or found.get(name) for name, file in listed.items()}
    return found == wanted | {RECORD_NAME: hashlib.sha256(record).hexdigest()}


def _identity(folder: Folder, name: str) -> _Identity | None:
    status = folder.status(name)
    return status and (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
