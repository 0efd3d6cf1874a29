"""Whether OUTPUT may be written where it is to be: without harm, and with room for it."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from upcycle_cli.checkpoint.storage import CONFIG_NAME, RECORD_NAME, read_json
from upcycle_cli.core.dir_handle import Folder
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.safe_files import is_in, is_same, locate
from upcycle_cli.write.ownership import take_inventory
from upcycle_cli.write.staging import SUFFIX, partial_of
from upcycle_cli.write.swap import ASIDE

if TYPE_CHECKING:
    from upcycle_cli.plan.plan import Plan
    from upcycle_cli.write.distributed import Team

_SPARE_BYTES = 4_000_000  # headers, config, card, record


def check_name(output: Path) -> None:
    """Raise UpcycleError when OUTPUT's name leaves no room for those that stand beside it."""
    try:
        longest = os.pathconf(_parent(output), "PC_NAME_MAX")
    except (OSError, RuntimeError):
        return  # what is wrong with the place itself is found in a moment
    size = len(os.fsencode(output.name)) + max(map(len, (SUFFIX, ASIDE)))
    if size > longest:
        raise UpcycleError(
            f"the name of {output} is too long: it is made under the name with {SUFFIX} behind "
            f"it, and no name there has more than {longest} bytes.",
            "Choose a shorter one.",
        )


def check_output(output: Path, source: Checkpoint, *, overwrite: bool) -> None:
    """Raise UpcycleError when OUTPUT cannot be written without harm."""
    check_name(output)
    try:
        target, origin = output.resolve(), source.path.resolve()
        places = {(source.path / name).resolve().parent for name in source.files} | {origin}
        occupied = output.is_dir() and any(output.iterdir())
    except (OSError, RuntimeError) as error:  # a name that is too long, links in a circle
        reason = getattr(error, "strerror", None) or str(error)
        raise UpcycleError(f"{output} cannot be made: {reason}.") from error
    problem = None
    if is_same(target, origin):
        problem = "OUTPUT is the source itself."
    elif is_in(target, origin):
        problem = f"{output} is inside the source, which is never modified."
    elif any(is_in(place, target) for place in places):
        problem = f"{output} contains the source."
    elif is_in(Path.cwd(), target):
        problem = f"{output} is the current directory, or contains it."
    if problem is not None:
        raise UpcycleError(problem, "Choose another directory.")
    if output.name in {"", ".."}:
        raise UpcycleError(f"{output} is no name for a directory.", "Write the name itself.")
    check_kind(output)
    if occupied and not overwrite:
        raise UpcycleError(
            f"{output} exists and is not empty.",
            "Choose another name, or pass --overwrite to replace it.",
        )
    if occupied:
        with Folder.open(output) as folder:
            take_inventory(folder)


def check_kind(output: Path) -> None:
    """Raise UpcycleError for what a rename cannot replace."""
    if os.path.ismount(output):
        raise UpcycleError(
            f"{output} is a mount point, which cannot be replaced by a rename.",
            f"Write to a directory inside it, such as {output / 'moe'}.",
        )
    if output.is_symlink():
        raise UpcycleError(
            f"{output} is a symbolic link, which cannot be replaced by a directory.",
            f"Write to {output.resolve()}, or remove the link.",
        )
    if output.exists() and not output.is_dir():
        raise UpcycleError(f"{output} exists and is not a directory.", "Choose another name.")


def check_space(output: Path, needed: int, *, shared: int | None = None) -> None:
    """Raise UpcycleError when the file system of OUTPUT has less than `needed` bytes free.

    `shared` is what is needed where extents can be shared; what a killed run left counts as free.
    """
    parent = _parent(output)
    free = shutil.disk_usage(parent).free
    left = 0
    with Folder.open(parent) as folder, ExitStack() as opened:
        partial = folder.inner(partial_of(output).name, opened)
        if partial is not None and partial.is_mine():
            left = partial.nbytes()
        if shared is not None and needed > free and folder.can_share():
            # The system counts what several files share once for each of them.
            left = left * shared // needed
            needed = shared
    free += left
    if needed > free:
        raise UpcycleError(
            f"not enough disk space for {output}: {needed / 1e6:,.0f} MB needed, "
            f"{free / 1e6:,.0f} MB free.",
            "Free some, or write to another file system.",
        )


def _parent(output: Path) -> Path:
    """Return the directory above OUTPUT that is there."""
    above = output.absolute().parents
    return next((parent for parent in above if parent.exists()), output)


def check_before(plan: Plan, output: Path, *, overwrite: bool, reflink: bool, team: Team) -> None:
    """Raise UpcycleError for what can be seen before anything is downloaded or written."""
    from upcycle_cli.hub.remote_checkpoint import check_download_space
    from upcycle_cli.write.file_layout import unique_bytes

    for source in plan.sources:
        check_output(output, source, overwrite=overwrite)
        source.check_readable()
    spare = _SPARE_BYTES + sum(file.size for file in plan.source.companions)
    spare += check_download_space(plan.sources, beside=output)
    shared = None
    if reflink:  # each rank shares within its files
        ranks = range(team.size)
        shared = spare + sum(unique_bytes(team.share_of(plan.shards, rank)) for rank in ranks)
    check_space(output, plan.nbytes + spare, shared=shared)


def is_finished(plan: Plan, output: Path) -> bool:
    """Whether `output` is the complete result of this very plan."""
    if not (output / RECORD_NAME).is_file() or not (output / CONFIG_NAME).is_file():
        return False
    try:
        if read_json(locate(output, RECORD_NAME)).get("plan_sha256") != plan.digest:
            return False
        found = open_checkpoint(output)
    except UpcycleError:
        # Damaged since: not the result any more, and check_output decides what to do with it.
        return False
    sizes = {name: entry.nbytes for name, entry in found.tensors.items()}
    return found.config == plan.config and sizes == {t.name: t.nbytes for t in plan.tensors}
