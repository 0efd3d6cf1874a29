"""The public function `convert`, and what it has in common with the command.

`convert` is for Python callers. The command line builds the same `Request` and passes it to
`carry_out`, or to `preview` for a dry run. Both read straight down: plan, download, calibrate,
write, verify, publish, push. Under torchrun all ranks take each step together: rank 0 leads, and
the others write their share of the shards.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.storage import CARD_NAME, RECORD_NAME, read_json
from upcycle_cli.core.callbacks import Hooks, Progress
from upcycle_cli.core.display import Result, Row
from upcycle_cli.core.errors import ResumableError, UpcycleError
from upcycle_cli.core.safe_files import CHECKSUMS_NAME, locate
from upcycle_cli.core.text import shell_line
from upcycle_cli.hub.remote_checkpoint import open_source
from upcycle_cli.plan.facts import vanished_weights, warnings
from upcycle_cli.plan.inputs import Inputs
from upcycle_cli.plan.output import Options
from upcycle_cli.plan.plan import Plan
from upcycle_cli.plan.upcycle import bind_recorded, build_plan
from upcycle_cli.recipe.options import check_kind
from upcycle_cli.recipe.recipe import Growth, Promise, Recipe, to_recipe
from upcycle_cli.write.distributed import Team, write_together
from upcycle_cli.write.preflight import check_before, check_name, is_finished
from upcycle_cli.write.staging import Staging, join, locked, publish, recover, transaction
from upcycle_cli.write.writer import WriteOptions

if TYPE_CHECKING:
    from upcycle_cli.plan.merge import MergeRequest
    from upcycle_cli.publish.push import Destination, Push
    from upcycle_cli.verification.result import Report


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to convert, into what, and how."""

    source: Path | str  # a directory, or a repo on the Hub
    output: Path
    recipe: Recipe | Growth  # a Recipe for a dense source, a Growth for an MoE
    target: str = "auto"
    revision: str | None = None  # branch, tag or commit of a repo
    options: Options | None = None
    calibration: Path | str | None = None  # a text that the dense model reads, or "builtin"
    router_rows: Path | str | None = None  # the file of rows for the router_init "file"
    neuron_orders: Path | str | None = None  # the file for the neuron_order "file"
    positive_prompts: Path | str | None = None  # prompts per expert, for the router_init "prompts"
    merge: MergeRequest | None = None  # other models to make experts from
    overwrite: bool = False  # replace OUTPUT once the new one is complete
    verify: bool = False  # verify before publishing; a failed verification publishes nothing
    checksums: bool = False
    writing: WriteOptions = field(default_factory=WriteOptions)
    push: Destination | None = None  # where to push the finished output

    def __post_init__(self) -> None:
        check_kind(self.options, "Options")
        check_kind(self.merge, "MergeRequest")
        check_kind(self.writing, "WriteOptions")
        check_kind(self.push, "Destination")


@dataclass(frozen=True, kw_only=True, repr=False)
class Conversion(Result):
    """What `convert` made."""

    plan: Plan
    output: Path = Path()
    seconds: float = 0.0
    report: Report | None = None  # of the verification, if one was requested
    published: bool = True  # False after a failed verification: OUTPUT is as it was
    already_done: bool = False  # OUTPUT was already the result of this plan
    shared_bytes: int = 0  # bytes of equal tensors that share extents on disk
    reused_bytes: int = 0  # bytes that an earlier, unfinished run had written
    warnings: tuple[str, ...] = ()  # what to know before training or sharing the output
    pushed: Push | None = None

    def tables(self) -> Iterator[Iterable[Row]]:
        """Yield the tables of the plan, of the verification and of the push."""
        from upcycle_cli.plan.facts import plan_rows

        yield plan_rows(self.plan)
        for result in (self.report, self.pushed):
            if result is not None:
                yield from result.tables()


def convert(  # noqa: PLR0913 - the fields of a Request
    source: Path | str,
    output: Path | str,
    recipe: Recipe | Growth | str,
    *,
    target: str = "auto",
    revision: str | None = None,
    options: Options | None = None,
    calibration: Path | str | None = None,
    router_rows: Path | str | None = None,
    neuron_orders: Path | str | None = None,
    positive_prompts: Path | str | None = None,
    merge: MergeRequest | None = None,
    overwrite: bool = False,
    verify: bool = False,
    checksums: bool = False,
    writing: WriteOptions | None = None,
    push: Destination | str | None = None,
) -> Conversion:
    """Convert a checkpoint into an MoE: `convert("dense", "moe", "E8G1T2", verify=True)`.

    `source` is a directory, a repo on the Hub at `revision` (a branch or commit), or BASE+ADAPTER.
    `recipe` is a `Recipe` or its name for a dense source, and a `Growth` for an MoE. `target` is
    the model type of the output; "auto" takes the type that most software loads. `options` sets
    dtype, layout and shard size of the output.

    `calibration` is a text file that the dense model reads first, or "builtin". `router_rows` is
    the file for the router_init "file", `neuron_orders` the file for the neuron_order "file", and
    `positive_prompts` the file for the router_init "prompts". `merge` names other models to make
    experts from.

    `overwrite` replaces an earlier output. `verify` checks the output before it appears: after a
    failed check, `published` is False and `output` is unchanged. `checksums` adds SHA256SUMS.
    `writing` sets threads and fsync. `push` names a repo on the Hub for the finished output.

    Raises UpcycleError. `output` is then unchanged, or complete if only the push failed.
    """
    values = {**locals(), "output": Path(output), "recipe": to_recipe(recipe)}
    if isinstance(push, str):
        from upcycle_cli.publish.push import Destination

        values["push"] = Destination(repo=push)
    # Request has a default for each argument that is None here.
    given = {name: value for name, value in values.items() if value is not None}
    return carry_out(Request(**given), Hooks(), Team())


def carry_out(request: Request, hooks: Hooks, team: Team) -> Conversion:
    """Convert as requested, together with the other ranks of a team; UpcycleError as `convert`."""
    plan, destination = _make_plan(request, hooks, team), request.push
    if destination is not None:
        from upcycle_cli.publish.push import check_destination

        # Ask the Hub for permission now, not after hours of work.
        team.agree(lambda: check_destination(destination) if team.leads else None)
    done = execute(plan, request, hooks, team)
    if destination is None or not done.published or not team.leads:
        return done
    return replace(done, pushed=_push(done, destination, hooks))


def preview(request: Request, hooks: Hooks, team: Team) -> tuple[Plan, list[str]]:
    """Return the plan of a request and its warnings; UpcycleError if there is no plan."""
    plan = _make_plan(request, hooks, team)
    output, overwrite, notes = request.output.absolute(), request.overwrite, [*warnings(plan)]
    try:
        if not overwrite and is_finished(plan, output):
            notes.append(f"{output} is already what this command makes.")
        else:
            check_before(plan, output, overwrite=overwrite)
            staging = Staging(output=output, plan=plan, durable=False)
            if staging.directory.exists():
                with locked(staging.directory):
                    ours = staging.check_plan(restart=overwrite) == plan.digest
                use = "its finished files are used" if ours else "it is removed"
                notes.append(f"{staging.directory} holds an unfinished conversion: {use}.")
    except UpcycleError as error:
        notes.append(f"converting would be refused: {' '.join(str(error).split())}")
    return plan, notes


def execute(plan: Plan, request: Request, hooks: Hooks, team: Team) -> Conversion:
    """Write what the plan says and publish it as OUTPUT; UpcycleError leaves OUTPUT as it was."""
    started, output, overwrite = time.monotonic(), request.output.absolute(), request.overwrite

    def prepare() -> tuple[str | None, bool]:
        recovered = recover(output) if team.leads else None
        finished = team.leads and not overwrite and is_finished(plan, output)
        if team.leads and not finished:
            check_before(plan, output, overwrite=overwrite)
        return recovered, finished

    # Refuse whatever can be refused before gigabytes are downloaded.
    recovered, finished = team.gather(prepare)[0]
    if request.verify or not finished:
        plan = _bring_sources(plan, hooks, team)
    durable = request.writing.fsync
    if finished:
        done = _finish_again(plan, request, hooks) if team.leads else Conversion(plan=plan)
    elif team.leads:
        with transaction(output, plan, overwrite=overwrite, durable=durable) as staging:
            done = _make(plan, request, staging, hooks, team)
        team.exchange(None)  # the other ranks may end
    else:
        done = _assist(plan, request, team)
    notes = tuple(filter(None, [*warnings(done.plan), recovered, *done.warnings]))
    seconds = 0.0 if finished else time.monotonic() - started
    done = replace(done, output=output, warnings=notes, seconds=seconds)
    hooks.finished(done)
    return done


def _make_plan(request: Request, hooks: Hooks, team: Team) -> Plan:
    """Make the plan on every rank; UpcycleError unless all ranks have made the same one."""
    check_name(request.output)

    def make() -> Plan:
        inputs = Inputs.read(
            calibration=request.calibration,
            rows=request.router_rows,
            orders=request.neuron_orders,
            prompts=request.positive_prompts,
        )
        source = open_source(request.source, request.revision)
        if isinstance(request.recipe, Recipe):
            return build_plan(
                request.recipe,
                source,
                target=request.target,
                options=request.options,
                inputs=inputs,
                merge=None if request.merge is None else request.merge.open(source),
            )
        if request.merge is not None or request.positive_prompts is not None:
            words = "an MoE grows by copies of its own experts, not by other models' experts."
            raise UpcycleError(words, "Leave out `experts_from`.")
        from upcycle_cli.plan.expand import build_growth

        return build_growth(request.recipe, source, request.options)

    plan = team.agree(make)
    if len(set(team.exchange(plan.digest))) > 1:
        hint = "Run them all on one shared file system, with the same arguments."
        raise UpcycleError("the ranks do not see the same source.", hint)
    hooks.planned(plan)
    return plan


def _bring_sources(plan: Plan, hooks: Hooks, team: Team) -> Plan:
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


def _finish_again(plan: Plan, request: Request, progress: Progress) -> Conversion:
    """Verify an output that this plan has made before, and add SHA256SUMS if it is missing."""
    from upcycle_cli.write.record import write_checksums

    output = request.output
    plan = bind_recorded(plan, read_json(locate(output, RECORD_NAME)))
    if request.checksums and not (output / CHECKSUMS_NAME).exists():
        write_checksums(plan, output)
    # is_finished has compared sizes and config; only verify reads the weights.
    report = _verify(plan, output, progress) if request.verify else None
    accepted = report is None or report.accepted
    return Conversion(plan=plan, report=report, published=accepted, already_done=True)


def _make(plan: Plan, request: Request, staging: Staging, hooks: Hooks, team: Team) -> Conversion:
    """Calibrate, write, verify and publish, on the rank that leads."""
    from upcycle_cli.calibrate.collect import with_calibration
    from upcycle_cli.publish.card import model_card
    from upcycle_cli.write.record import write_checksums, write_metadata

    team.exchange(None)  # the directory exists: the other ranks join
    repo = None if request.push is None else request.push.repo
    plan = with_calibration(plan, staging, team, hooks)
    hooks.writing(plan)
    written = write_together(plan, lambda: staging, request.writing, team, hooks)
    write_metadata(plan, staging, written)
    report = _verify(plan, staging.path, hooks) if request.verify else None
    staging.write(CARD_NAME, model_card(plan, report, repo).encode())
    accepted = report is None or report.accepted
    if request.checksums and accepted:
        write_checksums(plan, staging.path)
    for source in plan.sources:
        source.check_unchanged()
    left = publish(staging, overwrite=request.overwrite) if accepted else None
    return Conversion(
        plan=plan,
        report=report,
        published=accepted,
        shared_bytes=written.shared_bytes,
        reused_bytes=written.reused_bytes,
        warnings=tuple(filter(None, (vanished_weights(written.vanished), left))),
    )


def _assist(plan: Plan, request: Request, team: Team) -> Conversion:
    """Write this rank's share of the shards; rank 0 does everything else."""
    from upcycle_cli.calibrate.collect import with_calibration

    team.exchange(None)
    try:
        plan = with_calibration(plan, None, team, Progress())
        enter = partial(join, request.output.absolute(), plan, durable=request.writing.fsync)
        write_together(plan, enter, request.writing, team, Progress())
    finally:
        # Rank 0 ends first: the launcher stops all ranks as soon as one exits with an error.
        team.exchange(None)
    return Conversion(plan=plan)


def _verify(plan: Plan, output: Path, watch: Progress) -> Report:
    from upcycle_cli.verification.verify import verify

    parts = (source.base_and_adapter for source in plan.sources)
    dense, *others = ("+".join(str(part.path) for part in each) for each in parts)
    rows = plan.inputs.rows
    try:
        return verify(
            dense,
            output,
            experts_from=others,
            router_init=None if rows is None else rows.path,
            watch=watch,
            fitted=plan.calibration,
            # A recipe that promises nothing is measured, and no proof is expected.
            allow_inexact=plan.promise is Promise.NONE,
        )
    except UpcycleError as error:
        # The weights are good: a missing library must not cost hours of work.
        kept = "The weights are kept: converting again resumes from there."
        raise ResumableError(f"{error.message} {kept}", error.hint) from error


def _push(done: Conversion, destination: Destination, hooks: Hooks) -> Push:
    from upcycle_cli.publish.push import push

    try:
        on_start = partial(hooks.pushing, destination.repo)
        return push(done.output, **vars(destination), on_start=on_start)
    except UpcycleError as error:
        again = shell_line(["upcycle", "push", str(done.output), destination.repo])
        raise UpcycleError(
            f"{done.output} is complete, but was not pushed: {error.message}",
            f"{error.hint or ''}\nGo on with: {again}".strip(),
        ) from error
