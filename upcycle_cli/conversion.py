"""`convert`: from a dense checkpoint to a published mixture of experts."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle_cli.card import model_card
from upcycle_cli.checkpoint import (
    CARD_NAME,
    CONFIG_NAME,
    RECORD_NAME,
    Checkpoint,
    open_checkpoint,
    read_json,
)
from upcycle_cli.errors import ResumableError, UpcycleError
from upcycle_cli.hub.sources import check_space_for, open_source
from upcycle_cli.layout import unique_bytes
from upcycle_cli.outputs import Options
from upcycle_cli.plan import Plan, build_plan
from upcycle_cli.publish import (
    CHECKSUMS_NAME,
    Workspace,
    check_output,
    check_space,
    output_files,
    partial_of,
    replace_text,
    transaction,
)
from upcycle_cli.recipe import Promise, Recipe
from upcycle_cli.team import Team
from upcycle_cli.writer import WriteOptions, Written, write_index, write_json, write_weights

if TYPE_CHECKING:
    from upcycle_cli.verification import Report

_SPARE_BYTES = 4_000_000  # headers, config, card, record


class _Order(Enum):
    """What rank 0 tells the others to do next."""

    WRITE = "write"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Conversion:
    """What a conversion did."""

    plan: Plan
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


def convert(
    source: Path | str,
    output: Path | str,
    recipe: Recipe,
    *,
    target: str = "auto",
    revision: str | None = None,
    options: Options | None = None,
    overwrite: bool = False,
    verify: bool = False,
    checksums: bool = False,
) -> Conversion:
    """Convert the dense checkpoint in `source` into a mixture of experts in `output`.

    `source` is a directory, or a repo on the Hub at `revision`: a branch, tag or commit.

    Raises UpcycleError when that cannot be done; `output` is then as it was before.
    """
    output = Path(output)
    plan = build_plan(recipe, open_source(source, revision), target=target, options=options)
    plan = bring_source(plan, output, overwrite=overwrite, verify=verify)
    return execute(plan, output, overwrite=overwrite, verify=verify, checksums=checksums)


def bring_source(
    plan: Plan,
    output: Path,
    *,
    overwrite: bool = False,
    verify: bool = False,
    writing: WriteOptions | None = None,
    team: Team | None = None,
    on_start: Callable[[int], None] = lambda _: None,
) -> Plan:
    """Return the plan with its source's files here, downloaded if they are on the Hub.

    Whatever can be refused is refused before that. `on_start` hears the bytes to be downloaded.

    Raises UpcycleError, on every rank.
    """
    team = team or Team()
    source = plan.source
    if max(team.gather(lambda: source.missing_bytes)) == 0:
        return _with_files_here(plan, team)

    def check() -> bool:
        if not team.leads:
            return False
        if not overwrite and not verify and is_finished(plan, output.absolute()):
            return True
        _check(
            plan,
            output.absolute(),
            overwrite=overwrite,
            writing=writing or WriteOptions(),
            team=team,
        )
        return False

    if any(team.gather(check)):
        return plan
    on_start(source.missing_bytes)
    # One rank first, so that the others find the files in the cache when it is a shared one.
    team.gather(lambda: source.bring() if team.leads else None)
    return _with_files_here(plan, team)


def _with_files_here(plan: Plan, team: Team) -> Plan:
    own: list[Checkpoint] = []
    team.gather(lambda: own.append(plan.source.bring()))
    return plan.with_source(own[0])


def _check(plan: Plan, output: Path, *, overwrite: bool, writing: WriteOptions, team: Team) -> None:
    """Raise UpcycleError for what can be seen before anything is downloaded or written."""
    check_output(output, plan.source, overwrite=overwrite)
    plan.source.check_readable()
    spare = _SPARE_BYTES + sum(file.size for file in plan.source.companions)
    spare += check_space_for(plan.source, beside=output)
    shared = _shared_bytes(plan, team) + spare if writing.reflink else None
    check_space(output, plan.nbytes + spare, shared=shared)


def execute(
    plan: Plan,
    output: Path,
    *,
    overwrite: bool = False,
    verify: bool = False,
    checksums: bool = False,
    repo: str | None = None,
    writing: WriteOptions | None = None,
    team: Team | None = None,
    progress: Callable[[int], None] = lambda _: None,
    on_check: Callable[[str], None] = lambda _: None,
) -> Conversion:
    """Write what the plan says and publish it as `output`.

    `repo` is where it will be pushed, for the card. `progress` hears the bytes written, `on_check`
    the name of each verification as it starts.

    Raises UpcycleError when that cannot be done; `output` is then as it was before.
    """
    started = time.monotonic()
    output = output.absolute()
    writing = writing or WriteOptions()
    team = team or Team()
    try:
        if not team.leads:
            return _assist(plan, output, writing, team)
        if not overwrite and is_finished(plan, output):
            team.exchange(_Order.NOTHING)
            if checksums and not (output / CHECKSUMS_NAME).exists():
                _write_checksums(output)
            return _already_done(plan, output, on_check if verify else None)
        _check(plan, output, overwrite=overwrite, writing=writing, team=team)
        with transaction(
            output, plan_digest=plan.digest, overwrite=overwrite, durable=writing.fsync
        ) as (workspace, publish):
            team.exchange(_Order.WRITE)
            written = _write(plan, workspace, writing, team, progress)
            _complete(plan, workspace.path, written)
            report = _verify(plan, workspace.path, on_check) if verify else None
            card = model_card(plan, report, repo)
            (workspace.path / CARD_NAME).write_text(card, encoding="utf-8")
            publish[0] = report is None or report.accepted
            if checksums and publish[0]:
                _write_checksums(workspace.path)
            plan.source.check_unchanged()
    except OSError as error:
        where = error.filename or output
        raise ResumableError(
            f"writing {where} failed: {error.strerror}.",
            f"What is complete stays in {partial_of(output)}: the same command goes on from there.",
        ) from error
    team.exchange(_Order.NOTHING)
    return Conversion(
        plan,
        output,
        time.monotonic() - started,
        report,
        published=publish[0],
        shared_bytes=written.shared_bytes,
        reused_bytes=written.reused_bytes,
    )


def plan_together(make: Callable[[], Plan], team: Team) -> Plan:
    """Make the plan on every rank, and see that all have made the same.

    Raises UpcycleError when one cannot make it, or when they differ.
    """
    plans: list[Plan] = []

    def digest() -> str:
        plans.append(make())
        return plans[0].digest

    if len(set(team.gather(digest))) > 1:
        raise UpcycleError(
            "the ranks do not see the same source.",
            "Run them all on one shared file system, with the same arguments.",
        )
    return plans[0]


def _assist(plan: Plan, output: Path, writing: WriteOptions, team: Team) -> Conversion:
    """Write this rank's share of the shards; rank 0 does everything else."""
    order = team.exchange(_Order.NOTHING)[0]
    if order is _Order.WRITE:
        workspace = Workspace(partial_of(output), plan.digest, writing.fsync)
        try:
            _write(plan, workspace, writing, team, lambda _: None)
        except UpcycleError:
            # Rank 0 has the last word: whoever exits first makes the launcher end the others.
            team.exchange(_Order.NOTHING)
            raise
        team.exchange(_Order.NOTHING)
    return Conversion(plan, output, 0.0, None, published=True)


def _shared_bytes(plan: Plan, team: Team) -> int:
    """Return the bytes needed where extents can be shared: each rank shares within its files."""
    return sum(unique_bytes(team.share_of(plan.shards, rank)) for rank in range(team.size))


def _write(
    plan: Plan,
    workspace: Workspace,
    writing: WriteOptions,
    team: Team,
    progress: Callable[[int], None],
) -> Written:
    """Write all shards together with the other ranks, and return what all have written."""
    own = team.share_of(plan.shards, team.rank)
    total = Written()
    for part in team.gather(
        lambda: write_weights(plan, own, workspace, progress=progress, options=writing)
    ):
        total.add(part.routers, part.shared_bytes, part.reused_bytes)
    # By layer, not by rank, so that the record does not depend on how many ranks there were.
    names = [tensor.name for tensor in plan.tensors if tensor.name in total.routers]
    return replace(total, routers={name: total.routers[name] for name in names})


def is_finished(plan: Plan, output: Path) -> bool:
    """Whether `output` is the complete result of this very plan."""
    if not (output / RECORD_NAME).is_file() or not (output / CONFIG_NAME).is_file():
        return False
    try:
        if read_json(output / RECORD_NAME).get("plan_sha256") != plan.digest:
            return False
        found = open_checkpoint(output)
    except UpcycleError:
        # Damaged since: not the result any more, and check_output decides what to do with it.
        return False
    sizes = {name: entry.nbytes for name, entry in found.tensors.items()}
    return found.config == plan.config and sizes == {t.name: t.nbytes for t in plan.tensors}


def _already_done(plan: Plan, output: Path, on_check: Callable[[str], None] | None) -> Conversion:
    """Leave a finished output as it is; verify it when `on_check` is given."""
    report = None
    if on_check is not None:
        # Its sizes and its config are right; only verify can say whether its bytes still are.
        from upcycle_cli.verification import verify

        report = verify(
            plan.source.path, output, on_start=on_check, allow_inexact=_is_inexact(plan)
        )
    sound = report is None or report.accepted
    return Conversion(plan, output, 0.0, report, published=sound, already_done=True)


def _complete(plan: Plan, directory: Path, written: Written) -> None:
    """Add everything but the weights and the card."""
    from upcycle_cli.record import record

    write_index(plan, directory)
    write_json(directory / CONFIG_NAME, plan.config)
    for file in plan.source.companions:
        (directory / file.name).parent.mkdir(exist_ok=True)
        shutil.copyfile(plan.source.path / file.name, directory / file.name)
    write_json(directory / RECORD_NAME, record(plan, written.routers, directory))


def _verify(plan: Plan, directory: Path, on_check: Callable[[str], None]) -> Report:
    from upcycle_cli.verification import verify

    try:
        return verify(
            plan.source.path, directory, on_start=on_check, allow_inexact=_is_inexact(plan)
        )
    except UpcycleError as error:
        # Nothing is wrong with what was written: hours of work must not go for want of a library.
        raise ResumableError(
            f"{error.message} The weights are kept: the same command goes on from there.",
            error.hint,
        ) from error


def _is_inexact(plan: Plan) -> bool:
    """Whether the user asked for a recipe that promises nothing, and can expect no proof."""
    return plan.promise is Promise.NONE


def _write_checksums(directory: Path) -> None:
    """Write SHA256SUMS in the form that `sha256sum --check` reads.

    Without the card, which is there to be edited, and names its repo once it is pushed.
    """
    lines = []
    for path in output_files(directory):
        if path == directory / CARD_NAME:
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{digest}  {path.relative_to(directory).as_posix()}\n")
    # OUTPUT may have its name already: the file appears whole there, too.
    replace_text(directory / CHECKSUMS_NAME, "".join(lines))
