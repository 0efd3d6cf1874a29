"""The public functions that convert: plan, bring, calibrate, write, verify, publish, push.

`convert` is for Python callers. The command line builds the same `Request` and passes it to
`carry_out`, or to `preview` for a dry run. Both read straight down, and under torchrun all ranks
take each step together: rank 0 leads, the others write their share of the shards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.storage import CARD_NAME, RECORD_NAME, read_json
from upcycle_cli.core.callbacks import Hooks, Progress
from upcycle_cli.core.errors import ResumableError, UpcycleError
from upcycle_cli.core.safe_files import CHECKSUMS_NAME, check_utf8, locate
from upcycle_cli.core.text import shell_line
from upcycle_cli.hub.remote_checkpoint import open_source, split_revision
from upcycle_cli.plan.merge import Merge, Rest
from upcycle_cli.plan.output import Options
from upcycle_cli.plan.plan import Plan
from upcycle_cli.plan.router_inputs import RouterInputs
from upcycle_cli.plan.upcycle import bind_recorded, build_plan
from upcycle_cli.plan.warnings import vanished_weights
from upcycle_cli.recipe.recipe import Promise, Recipe
from upcycle_cli.write.distributed import Team
from upcycle_cli.write.preflight import check_before, check_name, is_finished
from upcycle_cli.write.staging import Staging, partial_of
from upcycle_cli.write.writer import WriteOptions, Written, write_weights

if TYPE_CHECKING:
    from upcycle_cli.publish.push import Destination, Push
    from upcycle_cli.recipe.growth import Growth
    from upcycle_cli.verification.result import Report
    from upcycle_cli.write.transaction import Transaction


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """Other models whose MLPs become experts: directories, or repos as REPO or REPO@REVISION.

    With `source_too` the source makes the first experts; without it, only the named models do, and
    the source can be one of them.
    """

    experts_from: Sequence[Path | str]
    rest: Rest = Rest.FIRST
    source_too: bool = True

    def open(self, source: Checkpoint) -> Merge | None:
        """Open the models; None if all are the source. UpcycleError if one does not fit it."""
        models, cycle = [source], [0] * self.source_too
        for place in self.experts_from:
            model = open_source(*split_revision(str(place)))
            same = (i for i, each in enumerate(models) if each.path.samefile(model.path))
            cycle.append(next(same, len(models)))
            models += [model] * (cycle[-1] == len(models))
        if len(models) == 1:
            return None
        from upcycle_cli.plan.compatibility import check_compatible

        others = check_compatible(source, models[1:])
        return Merge(others=others, cycle=tuple(cycle), rest=Rest(self.rest))


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to convert, into what, and how."""

    source: Path | str  # a directory, or a repo on the Hub
    output: Path
    recipe: Recipe | Growth  # a Recipe for a dense source, a Growth for an MoE
    target: str = "auto"
    revision: str | None = None  # branch, tag or commit of a repo
    options: Options | None = None
    inputs: RouterInputs | None = None  # text, prompts or rows that routers are made from
    overwrite: bool = False  # replace `output` once the new one is complete
    verify: bool = False  # verify before publishing; a failed verification publishes nothing
    checksums: bool = False
    writing: WriteOptions = field(default_factory=WriteOptions)
    push: Destination | None = None  # where to push the finished output
    merge: MergeRequest | None = None


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The result of a conversion."""

    plan: Plan
    output: Path
    seconds: float = 0.0
    report: Report | None = None  # of the verification, if one was requested
    published: bool = True  # False after a failed verification: OUTPUT is as it was
    already_done: bool = False  # OUTPUT was already the result of this plan
    shared_bytes: int = 0  # bytes of equal tensors that share extents on disk
    reused_bytes: int = 0  # bytes that an earlier, unfinished run had written
    warnings: tuple[str, ...] = ()
    pushed: Push | None = None


def convert(  # noqa: PLR0913 - the fields of a Request
    source: Path | str,
    output: Path | str,
    recipe: Recipe | Growth,
    *,
    target: str = "auto",
    revision: str | None = None,
    options: Options | None = None,
    calibration: Path | str | None = None,
    router_rows: Path | str | None = None,
    overwrite: bool = False,
    verify: bool = False,
    checksums: bool = False,
    writing: WriteOptions | None = None,
    push: Destination | None = None,
    merge: MergeRequest | None = None,
    positive_prompts: Path | str | None = None,
) -> Conversion:
    """Convert a checkpoint: upcycle a dense one by a `Recipe`, or grow an MoE by a `Growth`.

    `source` is a directory, or a repo on the Hub at `revision` (a branch, tag or commit).
    `calibration` is a text file that the dense model reads first, or "builtin". `router_rows` is
    the file of rows for the router_init "file", `positive_prompts` the prompts per expert for the
    router_init "prompts". `merge` names other models to make experts from. With `push`, the
    finished output is pushed to the Hub.

    Raises UpcycleError. `output` is then as it was before, or complete if only the push failed.
    """
    return carry_out(
        Request(
            source=source,
            output=Path(output),
            recipe=recipe,
            target=target,
            revision=revision,
            options=options,
            inputs=RouterInputs.read(
                calibration=calibration,
                rows=None if router_rows is None else Path(router_rows),
                prompts=None if positive_prompts is None else Path(positive_prompts),
            ),
            overwrite=overwrite,
            verify=verify,
            checksums=checksums,
            writing=writing or WriteOptions(),
            push=push,
            merge=merge,
        )
    )


def carry_out(
    request: Request,
    *,
    hooks: Hooks[Plan, Conversion] | None = None,
    team: Team | None = None,
) -> Conversion:
    """Convert as requested, together with the other ranks of a team; UpcycleError as `convert`."""
    team = team or Team()
    hooks = hooks if hooks is not None and team.leads else Hooks()
    plan, destination = _make_plan(request, hooks, team), request.push
    if destination is not None:
        from upcycle_cli.publish.push import check_destination

        # Ask the Hub for permission now, not after hours of work.
        team.agree(lambda: check_destination(destination) if team.leads else None)
    done = execute(
        plan,
        request.output,
        overwrite=request.overwrite,
        verify=request.verify,
        checksums=request.checksums,
        repo=None if destination is None else destination.repo,
        writing=request.writing,
        team=team,
        hooks=hooks,
    )
    if destination is None or not done.published or not team.leads:
        return done
    return replace(done, pushed=_push(done, destination, hooks))


def preview(
    request: Request,
    *,
    hooks: Hooks[Plan, Conversion] | None = None,
    team: Team | None = None,
) -> tuple[Plan, list[str]]:
    """Return the plan of a request and warnings about OUTPUT; UpcycleError if there is no plan."""
    team = team or Team()
    plan = _make_plan(request, hooks if hooks is not None and team.leads else Hooks(), team)
    output, overwrite = request.output.absolute(), request.overwrite
    try:
        if not overwrite and is_finished(plan, output):
            return plan, [f"{output} is already what this command makes."]
        check_before(plan, output, overwrite=overwrite, team=Team())
    except UpcycleError as error:
        return plan, [f"without --dry-run this is refused: {' '.join(str(error).split())}"]
    if not partial_of(output).exists():
        return plan, []
    return plan, [f"{partial_of(output)} exists: its finished files of this conversion are used."]


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
    hooks: Hooks[Plan, Conversion] | None = None,
) -> Conversion:
    """Write what the plan says and publish it as `output`; UpcycleError leaves `output` as it was.

    The model card names `repo`, the repo that the output will be pushed to.
    """
    started, output = time.monotonic(), output.absolute()
    writing, team, hooks = writing or WriteOptions(), team or Team(), hooks or Hooks()

    def prepare() -> tuple[str | None, bool]:
        from upcycle_cli.write.transaction import recover

        recovered = recover(output) if team.leads else None
        finished = team.leads and not overwrite and is_finished(plan, output)
        if team.leads and not finished:
            check_before(plan, output, overwrite=overwrite, team=team)
        return recovered, finished

    # Refuse whatever can be refused before gigabytes are downloaded.
    recovered, finished = team.gather(prepare)[0]
    if verify or not finished:
        plan = _bring_sources(plan, hooks, team)
    with hooks.writing(plan.nbytes):
        if not team.leads:
            if not finished:
                _assist(plan, output, writing, team)
            return Conversion(plan=plan, output=output)
        if finished:
            done = _finish_again(plan, output, verify=verify, checksums=checksums, watch=hooks)
        else:
            job = _Job(output, writing, team, hooks, overwrite, verify, checksums, repo)
            done = _make(plan, job)
    told = tuple(filter(None, [recovered, *done.warnings]))
    seconds = 0.0 if finished else time.monotonic() - started
    done = replace(done, warnings=told, seconds=seconds)
    hooks.finished(done)
    return done


@dataclass(frozen=True)
class _Job:
    """The arguments of `execute`, on the rank that leads."""

    output: Path
    writing: WriteOptions
    team: Team
    hooks: Hooks[Plan, Conversion]
    overwrite: bool
    verify: bool
    checksums: bool
    repo: str | None


def _make_plan(request: Request, hooks: Hooks[Plan, Conversion], team: Team) -> Plan:
    """Make the plan on every rank; UpcycleError unless all ranks have made the same one."""
    check_name(request.output)
    for path in (Path(request.source), request.output.absolute()) if request.verify else ():
        check_utf8(path)

    def make() -> Plan:
        source = open_source(request.source, request.revision)
        if not isinstance(request.recipe, Recipe):
            from upcycle_cli.plan.expand import build_growth
            from upcycle_cli.plan.prompts import Prompts

            prompts = request.inputs is not None and isinstance(request.inputs.text, Prompts)
            if request.merge is not None or prompts:
                raise UpcycleError(
                    "--expand copies the experts of an MoE; it cannot add those of other models.",
                    "Leave out --experts-from.",
                )
            return build_growth(request.recipe, source, request.options)
        return build_plan(
            request.recipe,
            source,
            target=request.target,
            options=request.options,
            inputs=request.inputs,
            merge=None if request.merge is None else request.merge.open(source),
        )

    plan = team.agree(make)
    if len(set(team.exchange(plan.digest))) > 1:
        raise UpcycleError(
            "the ranks do not see the same source.",
            "Run them all on one shared file system, with the same arguments.",
        )
    hooks.planned(plan)
    return plan


def _bring_sources(plan: Plan, hooks: Hooks[Plan, Conversion], team: Team) -> Plan:
    """Download what is missing of the sources; return the plan with the local files."""

    def missing() -> int:
        return sum(source.bytes_to_download for source in plan.sources)

    def bring() -> list[Checkpoint]:
        return [source.download() for source in plan.sources]

    if max(team.gather(missing)) > 0:
        hooks.downloading([source.name for source in plan.sources], missing())
        # Rank 0 downloads first, so that the others find the files if they share its cache.
        team.agree(lambda: bring() if team.leads else None)
    return plan.with_sources(team.agree(bring))


def _finish_again(
    plan: Plan, output: Path, *, verify: bool, checksums: bool, watch: Progress
) -> Conversion:
    """Verify an output that this plan has made before, and add SHA256SUMS if it is missing."""
    from upcycle_cli.write.record import write_checksums

    plan = bind_recorded(plan, read_json(locate(output, RECORD_NAME)))
    if checksums and not (output / CHECKSUMS_NAME).exists():
        write_checksums(plan, output)
    # is_finished has compared sizes and config; only verify reads the weights.
    report = _verify(plan, output, watch) if verify else None
    return Conversion(
        plan=plan,
        output=output,
        report=report,
        published=report is None or report.accepted,
        already_done=True,
    )


def _make(plan: Plan, job: _Job) -> Conversion:
    """Calibrate, write, verify and publish."""
    from upcycle_cli.calibrate.cache import with_calibration
    from upcycle_cli.publish.card import model_card
    from upcycle_cli.write.record import write_checksums, write_metadata
    from upcycle_cli.write.transaction import transaction

    output, writing, team, left = job.output, job.writing, job.team, None
    try:
        with transaction(output, plan, overwrite=job.overwrite, durable=writing.fsync) as running:
            team.exchange(None)  # the directory exists: the other ranks join
            staging = running.staging
            plan = with_calibration(plan, staging, team, job.hooks)
            written = _write_shards(plan, lambda: staging, writing, team, job.hooks)
            write_metadata(plan, staging, written)
            report = _verify_staged(plan, running, job.hooks) if job.verify else None
            staging.write(CARD_NAME, model_card(plan, report, job.repo).encode())
            accepted = report is None or report.accepted
            if job.checksums and accepted:
                write_checksums(plan, staging.path)
            for source in plan.sources:
                source.check_unchanged()
            if accepted:
                left = running.publish()
    except OSError as error:
        where = partial_of(output) / str(error.filename) if error.filename else output
        raise ResumableError(
            f"writing {where} failed: {error.strerror}.",
            f"Finished files stay in {partial_of(output)}: the same command resumes from there.",
        ) from error
    team.exchange(None)  # the other ranks may end
    warnings = (vanished_weights(plan, written.vanished), left)
    return Conversion(
        plan=plan,
        output=output,
        report=report,
        published=accepted,
        shared_bytes=written.shared_bytes,
        reused_bytes=written.reused_bytes,
        warnings=tuple(filter(None, warnings)),
    )


def _assist(plan: Plan, output: Path, writing: WriteOptions, team: Team) -> None:
    """Write this rank's share of the shards; rank 0 does everything else."""
    from upcycle_cli.calibrate.cache import with_calibration
    from upcycle_cli.write.transaction import join

    team.exchange(None)
    try:
        plan = with_calibration(plan, None, team, Progress())
        enter = partial(join, output, plan, durable=writing.fsync)
        _write_shards(plan, enter, writing, team, Progress())
    finally:
        # Rank 0 ends first: the launcher stops all ranks as soon as one exits with an error.
        team.exchange(None)


def _write_shards(
    plan: Plan,
    enter: Callable[[], Staging],
    writing: WriteOptions,
    team: Team,
    progress: Progress,
) -> Written:
    """Write this rank's shards; return what all ranks have written."""
    own = team.share_of(plan.shards, team.rank)
    total = Written()

    def write_own() -> Written:
        return write_weights(plan, own, enter(), progress=progress.advance, options=writing)

    for part in team.gather(write_own):
        total.add(part)
    # By layer, so that the record does not depend on the number of ranks.
    names = [tensor.name for tensor in plan.tensors if tensor.name in total.routers]
    return replace(total, routers={name: total.routers[name] for name in names})


def _verify(plan: Plan, output: Path, watch: Progress) -> Report:
    from upcycle_cli.plan.texts import CalibrationText
    from upcycle_cli.verification.verify import verify

    dense, *others = (source.path for source in plan.sources)
    rows, text = plan.inputs.rows, plan.inputs.text
    return verify(
        dense,
        output,
        experts_from=others,
        router_init=None if rows is None else rows.path,
        calibration=text if isinstance(text, CalibrationText) else None,
        watch=watch,
        # A recipe that promises nothing is measured, and no proof is expected.
        allow_inexact=plan.promise is Promise.NONE,
    )


def _verify_staged(plan: Plan, running: Transaction, watch: Progress) -> Report:
    try:
        return _verify(plan, running.staging.path, watch)
    except UpcycleError as error:
        # The weights are good: a missing library must not cost hours of work.
        raise ResumableError(
            f"{error.message} The weights are kept: the same command goes on from there.",
            error.hint,
        ) from error


def _push(done: Conversion, destination: Destination, hooks: Hooks[Plan, Conversion]) -> Push:
    from upcycle_cli.publish.push import push

    try:
        return push(done.output, destination, on_start=hooks.pushing)
    except UpcycleError as error:
        again = shell_line(["upcycle", "push", str(done.output), destination.repo])
        raise UpcycleError(
            f"{done.output} is complete, but was not pushed: {error.message}",
            f"{error.hint or ''}\nGo on with: {again}".strip(),
        ) from error
