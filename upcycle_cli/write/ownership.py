"""Checks that every file of a finished output was written by upcycle, by the list in its record.

`--overwrite` removes these files and no others: a model that was trained further, an edited card,
or a user's own file must survive.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from upcycle_cli.checkpoint.card_metadata import is_edited
from upcycle_cli.checkpoint.header import parse_header
from upcycle_cli.checkpoint.storage import CARD_NAME, RECORD_NAME, REPORT_NAME
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.safe_files import (
    CHECKSUMS_NAME,
    ListedFile,
    listed_files,
    open_regular,
    read_checksums,
    read_header,
    read_small,
)
from upcycle_cli.write.staging import MARKER, is_directory, read_state, remove

_HINT = "Move or remove it yourself if it is not needed."
_FOREIGN = "which upcycle did not write"


def check_ownership(output: Path) -> str:
    """Return the digest of an output's record; UpcycleError for a file upcycle did not write."""
    if not os.path.lexists(output / RECORD_NAME):
        raise UpcycleError(
            f"{output} was not made by upcycle (no {RECORD_NAME}); it is left as it is.", _HINT
        )
    record = read_small(output / RECORD_NAME)
    listed, routers = _listed(output, record)
    parents = {str(parent) for name in listed for parent in PurePosixPath(name).parents}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if is_directory(path):
            reason = "" if name in parents else _FOREIGN
        else:
            reason = _objection(path, name, listed, record)
        if not reason and name.endswith(".safetensors"):
            reason = _changed_router(path, name, routers)
        if reason:
            raise UpcycleError(f"{output} holds {name}, {reason}; it is left as it is.", _HINT)
    return hashlib.sha256(record).hexdigest()


def remove_output(output: Path) -> None:
    """Remove an output, the record last; UpcycleError or OSError if it holds anything else."""
    check_ownership(output)
    for path in output.iterdir():
        if path.name != RECORD_NAME:
            remove(path)
    (output / RECORD_NAME).unlink()
    output.rmdir()


def record_digest(output: Path) -> str | None:
    """Return the digest of an output's record, which identifies the output; None without one."""
    try:
        return hashlib.sha256(read_small(output / RECORD_NAME)).hexdigest()
    except UpcycleError:
        return None


def _listed(output: Path, record: bytes) -> tuple[dict[str, ListedFile], Mapping[str, object]]:
    """Return the files that a record lists, and the digests of the routers."""
    try:
        value = json.loads(record)
        return listed_files(value), dict(value["routers"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UpcycleError) as error:
        raise UpcycleError(
            f"{output / RECORD_NAME} does not say which files upcycle wrote, so {output} is left "
            "as it is.",
            _HINT,
        ) from error


def _objection(path: Path, name: str, listed: Mapping[str, ListedFile], record: bytes) -> str:
    """Return why upcycle did not write a file in this form; empty if it did."""
    if not path.is_file() or path.is_symlink():
        return "which is not a regular file"
    file = listed.get(name)
    if name == RECORD_NAME:
        return ""
    if name == CARD_NAME:
        card = read_small(path).decode(errors="replace")
        # is_edited accepts a card of metadata only, which the Hub makes; here a user made it.
        untouched = "Made by upcycle" in card and not is_edited(card)
        return "" if untouched else "which somebody has edited"
    if name == CHECKSUMS_NAME:
        ours = read_checksums(path).keys() == {*listed, RECORD_NAME}
    elif name == REPORT_NAME:  # a report on this output quotes the digest of its record
        digest = hashlib.sha256(record).hexdigest()
        ours = digest.encode() in read_small(path)
    elif name == MARKER:  # of a killed run, in a directory that was renamed since
        ours = "plan_sha256" in read_state(path)
    else:
        with open_regular(path) as opened:
            ours = file is not None and file.describes(opened)
    return "" if ours else _FOREIGN if file is None else "which is not as upcycle wrote it"


def _changed_router(path: Path, name: str, routers: Mapping[str, object]) -> str:
    """Return a reason if a router was changed, as any training does; experts are not read."""
    with open_regular(path) as file:
        for entry in parse_header(read_header(file), path, name)[0]:
            if entry.name in routers:
                file.seek(entry.offset)
                found = hashlib.sha256(file.read(entry.nbytes)).hexdigest()
                if found != routers[entry.name]:
                    return f"whose router {entry.name} was changed"
    return ""
