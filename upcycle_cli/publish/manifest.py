"""Which files of an output a push publishes: those that its upcycle.json lists, unchanged.

A working directory also holds tokens, drafts and half-trained weights, so no file is published
because of its name. Beside the listed files go upcycle.json itself, the card, SHA256SUMS, and the
report of a verification of this very model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.storage import CARD_NAME, RECORD_NAME, REPORT_NAME, read_json
from upcycle_cli.core import safe_files
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.write.staging import is_note


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a push publishes of a directory."""

    files: Mapping[str, Path]
    """The path of each file, by its name in the repo."""
    left_out: tuple[str, ...]
    """Files of the directory that are not published."""
    failures: tuple[str, ...]
    """How the directory differs from its record and its checksums."""


def read_manifest(moe: Checkpoint) -> Manifest:
    """Return what a push publishes of an output; UpcycleError when its record lists no files."""
    record = read_json(moe.storage.local(RECORD_NAME))
    try:
        listed = safe_files.listed_files(record)
    except UpcycleError as error:
        words = f"{moe.path} does not say which files belong to it: {error.message}"
        hint = "Make it again with `upcycle convert --overwrite`, or upload it with `hf upload`."
        raise UpcycleError(words, hint) from error
    names = [*listed, RECORD_NAME, CARD_NAME]
    present = moe.storage.names()
    if REPORT_NAME in present and _is_report_on(moe):
        names.append(REPORT_NAME)
    if safe_files.CHECKSUMS_NAME in present:
        names.append(safe_files.CHECKSUMS_NAME)
    files: dict[str, Path] = {}
    failures = [
        f"{RECORD_NAME} does not list {shard.name}"
        for shard in moe.shards
        if shard.name not in listed
    ]
    for name in names:
        try:
            files[name] = safe_files.locate(moe.path, name)
            with safe_files.open_regular(files[name]) as file:
                if name in listed and not listed[name].describes(file):
                    failures.append(f"{name} is not the file that {RECORD_NAME} lists")
        except OSError as error:
            failures.append(f"cannot read {moe.path / name}: {error.strerror}")
        except UpcycleError as error:
            failures.append(error.message)
    failures += _router_changes(moe, record.get("routers"))
    if safe_files.CHECKSUMS_NAME in files:
        failures += _checksum_failures(files, listed)
    left_out = (name for name in present if name not in files and not is_note(name))
    return Manifest(files=files, left_out=tuple(left_out), failures=tuple(failures))


def _is_report_on(moe: Checkpoint) -> bool:
    """Whether the report in the directory is about this model: it quotes its record's digest."""
    try:
        page = safe_files.read_small(
            safe_files.locate(moe.path, REPORT_NAME), safe_files.MOST_JSON_BYTES
        )
        return safe_files.sha256_of(safe_files.locate(moe.path, RECORD_NAME)).encode() in page
    except (OSError, UpcycleError):
        return False


def _router_changes(moe: Checkpoint, routers: object) -> Iterator[str]:
    """Compare the routers with the record: training changes them, and no file's size or header."""
    for name, digest in routers.items() if isinstance(routers, dict) else ():
        if name not in moe.tensors:
            yield f"{RECORD_NAME} lists the router {name}, which is missing"
        elif moe.tensor_digest(name) != digest:
            yield f"{name} changed since the conversion: its digest is not in {RECORD_NAME}"


def _checksum_failures(
    files: Mapping[str, Path], listed: Mapping[str, safe_files.ListedFile]
) -> Iterator[str]:
    """Compare SHA256SUMS with the files, since whoever downloads the model will."""
    sums = safe_files.read_checksums(files[safe_files.CHECKSUMS_NAME])
    expected = {*listed, RECORD_NAME}
    for name in sorted(expected ^ sums.keys()):
        # A push changes the card, to name the repo.
        yield f"{safe_files.CHECKSUMS_NAME} {'lists' if name in sums else 'does not list'} {name}"
    for name in expected & sums.keys() & files.keys():
        recorded = listed[name].sha256 if name in listed else None
        # The file has the recorded digest, or that is a failure already.
        if sums[name] != (recorded or safe_files.sha256_of(files[name])):
            yield f"{name} does not match its checksum in {safe_files.CHECKSUMS_NAME}"
