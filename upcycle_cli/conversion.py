"""From a plan to a published mixture of experts."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle_cli.calibrate.cache import with_calibration
from upcycle_cli.checkpoint.storage import CARD_NAME, CONFIG_NAME, RECORD_NAME, read_json
from upcycle_cli.core.callbacks import Watch
from upcycle_cli.core.dir_handle import Folder
from upcycle_cli.core.errors import ResumableError, UpcycleError
from upcycle_cli.core.safe_files import CHECKSUMS_NAME, checksums_text, locate, open_regular
from upcycle_cli.models.shipped import CODE_NAME, modeling_code
from upcycle_cli.plan.base import Planned
from upcycle_cli.plan.upcycle import Plan, as_recorded
from upcycle_cli.plan.warnings import vanished_weights
from upcycle_cli.publish.card import model_card
from upcycle_cli.recipe.recipe import Promise
from upcycle_cli.write.distributed import Team
from upcycle_cli.write.preflight import check_before, is_finished
from upcycle_cli.write.staging import Workspace, partial_of
from upcycle_cli.write.transaction import Transaction, joined, recover, transaction
from upcycle_cli.write.writer import WriteOptions, Written, write_weights

if TYPE_CHECKING:
    from upcycle_cli.old_verification import Report
    from upcycle_cli.publish.push import Push

_WRITE, _NOTHING = "write", "nothing"
"""What rank 0 tells the others to do next."""


@dataclass(frozen=True)
class Conversion:
    """What a conversion did."""

    plan: Any
    """What was carried out, a Planned: of an upcycling a Plan."""
    output: Path
    seconds: float
    report: Report | None
    """What verify found, when it was asked for."""
    published: bool
    """False when verify failed: then OUTPUT was left as it was."""
    already_done: bool = False
    """True when OUTPUT was there already, made by this very plan."""
    shared_bytes: int = 0
    """Bytes of equal tensors that share extents on disk."""
    reused_bytes: int = 0
    """Bytes that an earlier, unfinished run had written."""
    warnings: tuple[str, ...] = ()
    """What turned out while it was made: weights that vanished, something that was left over."""
    pushed: Push | None = None
    """What a push did, when one was asked for."""


def execute(
    plan: Planned,
    output: Path,
    *,
    overwrite: bool = False,
    verify: bool = False,
    checksums: bool = False,
    repo: str | None = None,
    writing: WriteOptions | None = None,
    team: Team | None = None,
    progress: Callable[[int], None] = lambda _: None,
    watch: Watch | None = None,
) -> Conversion:
    """Write what the plan says and publish it as `output`.

    `repo` is where it will be pushed, for the card. `progress` hears the bytes written, `watch` how
    far the verification is. Raises UpcycleError, with `output` as it was before.
    """
    started = time.monotonic()
    output = output.absolute()
    writing = writing or WriteOptions()
    team = team or Team()
    try:
        if not team.leads:
            return _assist(plan, output, writing, team)
        recovered = recover(output)
        if not overwrite and is_finished(plan, output):
            team.exchange(_NOTHING)
            plan = as_recorded(plan, read_json(locate(output, RECORD_NAME)))
            if checksums and not (output / CHECKSUMS_NAME).exists():
                with Folder.open(output) as folder:
                    _write_checksums(plan, folder)
            # Sizes and config are right; only verify can say whether its bytes still are.
            report = _verify(plan, output, watch) if verify else None
            sound, told = report is None or report.accepted, tuple(filter(None, [recovered]))
            return Conversion(plan, output, 0.0, report, sound, already_done=True, warnings=told)
        check_before(plan, output, overwrite=overwrite, reflink=writing.reflink, team=team)
        with transaction(output, plan, overwrite=overwrite, durable=writing.fsync) as running:
            team.exchange(_WRITE)
            workspace = running.workspace
            plan = with_calibration(plan, workspace, team, watch or Watch())
            written = _write(plan, nullcontext(workspace), writing, team, progress)
            _complete(plan, workspace.folder, written)
            report = _verify_running(plan, running, watch) if verify else None
            workspace.folder.write(CARD_NAME, model_card(plan, report, repo).encode())
            sound = report is None or report.accepted
            if checksums and sound:
                _write_checksums(plan, workspace.folder)
            for source in plan.sources:
                source.check_unchanged()
            left = running.publish() if sound else None
    except OSError as error:
        where = partial_of(output) / str(error.filename) if error.filename else output
        raise ResumableError(
            f"writing {where} failed: {error.strerror}.",
            f"What is complete stays in {partial_of(output)}: the same command goes on from there.",
        ) from error
    team.exchange(_NOTHING)
    found = (recovered, vanished_weights(plan, written.vanished), left)
    return Conversion(
        plan,
        output,
        time.monotonic() - started,
        report,
        published=sound,
        shared_bytes=written.shared_bytes,
        reused_bytes=written.reused_bytes,
        warnings=tuple(filter(None, found)),
    )


def _assist(plan: Planned, output: Path, writing: WriteOptions, team: Team) -> Conversion:
    """Write this rank's share of the shards; rank 0 does everything else."""
    if team.exchange(_NOTHING)[0] == _WRITE:
        workspace = joined(output, plan, durable=writing.fsync)
        try:
            plan = with_calibration(plan, None, team, Watch())
            _write(plan, workspace, writing, team, lambda _: None)
        except UpcycleError:
            # Rank 0 has the last word: whoever exits first makes the launcher end the others.
            team.exchange(_NOTHING)
            raise
        team.exchange(_NOTHING)
    return Conversion(plan, output, 0.0, None, published=True)


def _write(
    plan: Planned,
    entered: AbstractContextManager[Workspace],
    writing: WriteOptions,
    team: Team,
    progress: Callable[[int], None],
) -> Written:
    """Write all shards together with the other ranks, and return what all have written."""
    own = team.share_of(plan.shards, team.rank)
    total = Written()

    def write_own() -> Written:
        with entered as workspace:
            return write_weights(plan, own, workspace, progress=progress, options=writing)

    for part in team.gather(write_own):
        total.add(part)
    # By layer, not by rank, so that the record does not depend on how many ranks there were.
    names = [tensor.name for tensor in plan.tensors if tensor.name in total.routers]
    return replace(total, routers={name: total.routers[name] for name in names})


def _complete(plan: Planned, folder: Folder, written: Written) -> None:
    """Add everything but the weights and the card."""
    from upcycle_cli.write.record import record, write_index, write_json

    write_index(plan, folder)
    write_json(folder, CONFIG_NAME, plan.config)
    if isinstance(plan, Plan) and plan.target.ships_code:
        row = plan.family.dense.family
        code = modeling_code(row.class_names, wrapped=row.inside is not None)
        folder.write(CODE_NAME, code.encode())
    for file in plan.source.companions:
        with (
            open_regular(locate(plan.source.path, file.name)) as original,
            open(folder.create(file.name), "wb") as copy,  # noqa: PTH123 - a descriptor
        ):
            shutil.copyfileobj(original, copy)
    write_json(folder, RECORD_NAME, record(plan, written.routers, folder, written.moments))


def _verify(plan: Planned, output: Path, watch: Watch | None) -> Report:
    from upcycle_cli.old_verification import verify

    # Who has asked for a recipe that promises nothing can expect no proof.
    inexact = plan.promise is Promise.NONE
    dense, *others = (source.path for source in plan.sources)
    rows = plan.inputs.rows if isinstance(plan, Plan) else None
    return verify(
        dense,
        output,
        experts_from=others,
        router_init=None if rows is None else rows.path,
        watch=watch,
        allow_inexact=inexact,
    )


def _verify_running(plan: Planned, running: Transaction, watch: Watch | None) -> Report:
    try:
        # It goes by the name, and so it must be the directory's before and after.
        running.check_place()
        report = _verify(plan, running.workspace.folder.path, watch)
        running.check_place()
    except UpcycleError as error:
        # Nothing is wrong with what was written: hours of work must not go for want of a library.
        raise ResumableError(
            f"{error.message} The weights are kept: the same command goes on from there.",
            error.hint,
        ) from error
    return report


def _write_checksums(plan: Planned, folder: Folder) -> None:
    """Write SHA256SUMS, without the card: it is edited, and names its repo once it is pushed."""
    digests = {}
    for name in (*plan.file_names, RECORD_NAME):
        with folder.read(name) as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    # OUTPUT may have its name already: the file appears whole there, too.
    folder.write(CHECKSUMS_NAME, checksums_text(digests).encode())
