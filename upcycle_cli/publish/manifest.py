"""What of a directory is published: what its record lists, as the record lists it, and no more.

A directory that people work in holds tokens, drafts and half-trained weights beside the model. So a
file goes to the Hub because `upcycle.json` lists it, and not because of its name; the card, the
report of a verification, the checksums and the licences that somebody put there because a licence
asks for them come along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.storage import (
    CARD_NAME,
    RECORD_NAME,
    REPORT_NAME,
    is_weight_file,
    read_json,
)
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.safe_files import (
    CHECKSUMS_NAME,
    MOST_JSON_BYTES,
    ListedFile,
    listed_files,
    locate,
    open_regular,
    read_checksums,
    read_small,
    sha256_of,
)
from upcycle_cli.old_verification.listing import belongs
from upcycle_cli.write.staging import is_note

# How the names of the files begin that a licence asks for, in capitals or not.
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is published of a directory."""

    files: Mapping[str, Path]  # where each really is, by its name in the repo
    left_out: tuple[str, ...]  # files of the directory that are not part of the model
    failures: tuple[str, ...]  # what is not as the record or the checksums have it


def read_manifest(moe: Checkpoint) -> Manifest:
    """Return what of a checkpoint is published; UpcycleError when its record lists no files."""
    try:
        listed = listed_files(read_json(moe.storage.local(RECORD_NAME)))
    except UpcycleError as error:
        raise UpcycleError(
            f"{moe.path} does not say which files belong to it, as an earlier version did not: "
            f"{error.message}",
            "Make it again with `upcycle convert --overwrite`, or upload it as it is with "
            "`hf upload`.",
        ) from error
    there = moe.storage.names()
    names = [*listed, RECORD_NAME, CARD_NAME, *filter(_is_licence, there)]
    if REPORT_NAME in there and _is_report(moe):
        names.append(REPORT_NAME)
    summed = set(names) - {CARD_NAME}
    if CHECKSUMS_NAME in there:
        names.append(CHECKSUMS_NAME)
    files: dict[str, Path] = {}
    failures = [*_listing_failures(moe, listed)]
    for name in dict.fromkeys(names):
        try:
            files[name] = locate(moe.path, name)
            failures += _failures(files[name], listed[name]) if name in listed else ()
        except UpcycleError as error:
            failures.append(error.message)
    if CHECKSUMS_NAME in files:
        failures += _checksum_failures(files, summed, listed)
    left_out = (name for name in there if name not in files and not is_note(name))
    return Manifest(files=files, left_out=tuple(left_out), failures=tuple(failures))


def _is_report(moe: Checkpoint) -> bool:
    """Whether a page is the report on this very model: it has the digest of its record."""
    try:
        page = read_small(locate(moe.path, REPORT_NAME), MOST_JSON_BYTES)
        return sha256_of(locate(moe.path, RECORD_NAME)).encode() in page
    except (OSError, UpcycleError):
        return False


def _is_licence(name: str) -> bool:
    odd = "/" in name or is_weight_file(name) or name.endswith(".py")
    return name.upper().startswith(_LICENCES) and not odd


def _listing_failures(moe: Checkpoint, listed: Mapping[str, ListedFile]) -> Iterator[str]:
    """Hold the list itself against the checkpoint: a record can be edited as well."""
    shards = {shard.name for shard in moe.shards}
    for name in sorted(shards - listed.keys()):
        yield f"{RECORD_NAME} does not list {name}"
    for name, file in listed.items():
        if not belongs(name, moe):
            yield f"{RECORD_NAME} lists {name}, which is no file of a model"
        elif (name in shards) != (file.sha256 is None):
            yield f"{RECORD_NAME} lists {name} with the digest of another kind of file"


def _failures(path: Path, listed: ListedFile) -> Iterator[str]:
    try:
        with open_regular(path) as file:
            size, same = path.stat().st_size, listed.describes(file)
    except OSError as error:
        yield f"cannot read {path}: {error.strerror}"
        return
    if size != listed.size:
        yield f"{listed.name} has {size:,} bytes, and {RECORD_NAME} lists {listed.size:,}"
    elif not same:
        yield f"{listed.name} is not the file that {RECORD_NAME} lists: it was changed since"


def _checksum_failures(
    files: Mapping[str, Path], summed: set[str], listed: Mapping[str, ListedFile]
) -> Iterator[str]:
    """Hold the checksums against the files: whoever downloads the model will."""
    try:
        sums = read_checksums(files[CHECKSUMS_NAME])
    except UpcycleError as error:
        yield error.message
        return
    for name in sorted({*listed, RECORD_NAME} - sums.keys()):
        yield f"{CHECKSUMS_NAME} does not list {name}"
    for name, digest in sums.items():
        if name == CARD_NAME:
            yield f"{CHECKSUMS_NAME} lists {name}, in which a push names the repo"
        elif name not in summed:
            yield f"{CHECKSUMS_NAME} lists {name}, which is not published"
        elif name in files:
            held = listed[name].sha256 if name in listed else None
            # What is listed with a digest has it, or is said above not to have it.
            if digest != (held or sha256_of(files[name])):
                yield f"{name} is not the file that {CHECKSUMS_NAME} describes"
