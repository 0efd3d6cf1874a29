"""Checks before anything is written: whether OUTPUT may be written, and whether it fits."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.storage import RECORD_NAME, read_json
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.platform import can_share
from upcycle_cli.core.safe_files import is_directory, is_in, locate
from upcycle_cli.core.text import size_text
from upcycle_cli.plan.plan import Plan
from upcycle_cli.write.ownership import check_ownership, take_inventory
from upcycle_cli.write.staging import aside_of, disk_bytes, partial_of

_SPARE_BYTES = 4_000_000  # headers, config, card, record
_LONGEST_NAME = 255  # bytes, on most file systems


def check_name(output: Path) -> None:
    """Raise UpcycleError if OUTPUT.partial and OUTPUT.replaced would have too long names."""
    if len(os.fsencode(aside_of(output).name)) > _LONGEST_NAME:
        raise UpcycleError(f"the name of {output} is too long.", "Choose a shorter one.")


def check_output(output: Path, source: Checkpoint, *, overwrite: bool) -> None:
    """Raise UpcycleError if writing OUTPUT would harm the source or other files."""
    try:
        target, origin = output.resolve(), source.path.resolve()
        places = {(source.path / name).resolve().parent for name in source.files} | {origin}
        occupied = output.is_dir() and any(output.iterdir())
    except (OSError, RuntimeError) as error:  # a long name, a circle of links
        reason = getattr(error, "strerror", None) or str(error)
        raise UpcycleError(f"{output} cannot be made: {reason}.") from error
    elsewhere, other = "Choose another directory.", "Choose another name."
    inside = f"Write to a directory inside it, such as {output / 'moe'}."
    unlinked = f"Write to {target}, or remove the link."
    is_link, is_mount = output.is_symlink(), output.is_mount()
    is_file = output.exists() and not output.is_dir()
    for applies, problem, hint in (
        (is_in(target, origin), "is the source or inside it, which is never modified", elsewhere),
        (any(is_in(place, target) for place in places), "contains the source", elsewhere),
        (is_in(Path.cwd(), target), "is the current directory, or contains it", elsewhere),
        (is_mount, "is a mount point, which cannot be replaced by a rename", inside),
        (is_link, "is a symbolic link, which cannot be replaced by a directory", unlinked),
        (is_file, "exists and is not a directory", other),
    ):
        if applies:
            raise UpcycleError(f"{output} {problem}.", hint)
    if occupied and not overwrite:
        hint = "Choose another name"
        with suppress(UpcycleError):  # what upcycle did not write is never replaced
            check_ownership(output)
            hint += ", or pass `overwrite=True` to replace it"
        raise UpcycleError(f"{output} exists and is not empty.", f"{hint}.")
    if occupied:
        check_ownership(output)


def check_space(plan: Plan, output: Path) -> None:
    """Raise UpcycleError when a file system has too little space for OUTPUT or for a download.

    What a killed run left counts as free. Where files share extents, fewer bytes may do.
    """
    place, partial = _existing_parent(output), partial_of(output)
    spare = _SPARE_BYTES + sum(file.size for file in plan.source.companions)
    reused = disk_bytes(partial) if is_directory(partial) else 0
    needed = {place: plan.nbytes + spare - reused}
    for source in (part for each in plan.sources for part in each.base_and_adapter):
        if nbytes := source.bytes_to_download:
            cache = _existing_parent(source.path)
            cache = place if cache.stat().st_dev == place.stat().st_dev else cache
            needed[cache] = needed.get(cache, 0) + nbytes
    for directory, nbytes in needed.items():
        where, free = output if directory == place else directory, shutil.disk_usage(directory).free
        if nbytes > free and not (directory == place and can_share(place)):
            raise UpcycleError(
                f"not enough disk space for {where}: {size_text(nbytes)} needed, "
                f"{size_text(free)} free.",
                "Free some, or write to another file system."
                if directory == place
                else "Free some, or set HF_HOME to a directory on another file system.",
            )


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def check_before(plan: Plan, output: Path, *, overwrite: bool) -> None:
    """Raise UpcycleError for every problem that shows before a download or the first byte."""
    for source in (part for each in plan.sources for part in each.base_and_adapter):
        check_output(output, source, overwrite=overwrite)
        for file in source.companions if source.storage.is_local else ():
            source.storage.read(file.name, 0, 0)
    check_space(plan, output)


def is_finished(plan: Plan, output: Path) -> bool:
    """Whether `output` is the complete result of this plan, by its record and its headers."""
    try:
        record = read_json(locate(output, RECORD_NAME))
        return record.get("plan_sha256") == plan.digest and not take_inventory(output).failures
    except UpcycleError:
        return False  # it is damaged; check_output decides what happens to it
