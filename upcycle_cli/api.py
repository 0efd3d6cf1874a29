"""`convert`, whoever asks for it: one request, which is planned, downloaded, made and pushed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.core.callbacks import Hooks
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.safe_files import check_utf8
from upcycle_cli.core.text import shell_line
from upcycle_cli.hub.remote_checkpoint import open_source, split_revision
from upcycle_cli.plan.base import Planned
from upcycle_cli.plan.merge import Merge, Rest
from upcycle_cli.plan.router_inputs import RouterInputs
from upcycle_cli.plan.tensors import Options
from upcycle_cli.plan.upcycle import build_plan
from upcycle_cli.recipe.recipe import Recipe
from upcycle_cli.write.distributed import Team
from upcycle_cli.write.preflight import check_before, check_name, is_finished
from upcycle_cli.write.staging import partial_of
from upcycle_cli.write.writer import WriteOptions

if TYPE_CHECKING:
    from upcycle_cli.conversion import Conversion
    from upcycle_cli.plan.expand import Growth
    from upcycle_cli.publish.push import Destination, Push


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """What gives experts beside the source: directories, or repos as REPO or REPO@REVISION.

    With `source_too` the source gives experts before all of these; without, those alone that are
    named, of which it can be one.
    """

    experts_from: Sequence[Path | str]
    rest: Rest = Rest.FIRST
    source_too: bool = True

    def open(self, source: Checkpoint) -> Merge | None:
        """Open the models, None where all are the source; UpcycleError where one does not fit."""
        models, cycle = [source], [0] * self.source_too
        for place in self.experts_from:
            model = open_source(*split_revision(str(place)))
            same = (i for i, each in enumerate(models) if each.path.samefile(model.path))
            cycle.append(next(same, len(models)))
            models += [model] * (cycle[-1] == len(models))
        if len(models) == 1:
            return None
        from upcycle_cli.plan.compatibility import alike

        return Merge(others=alike(source, models[1:]), cycle=tuple(cycle), rest=Rest(self.rest))


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to convert, into what, and how."""

    source: Path | str  # a directory, or a repo on the Hub
    output: Path
    recipe: Recipe | Growth  # of a dense model, or of a mixture of experts
    target: str = "auto"
    revision: str | None = None  # a branch, tag or commit of a repo
    options: Options | None = None
    inputs: RouterInputs | None = None  # what routers are made from, beside the recipe
    overwrite: bool = False  # replace `output` once the new one is complete
    verify: bool = False  # verify before `output` appears; on failure it does not
    checksums: bool = False
    writing: WriteOptions = field(default_factory=WriteOptions)
    push: Destination | None = None  # where to push `output` once it is complete
    merge: MergeRequest | None = None


def convert(  # noqa: PLR0913 - what a Request has
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

    `source` is a directory, or a repo on the Hub at `revision`: a branch, tag or commit.
    `calibration` is a text that the dense model is run on first, or "builtin"; `router_rows` is
    the file of rows that a recipe with the router_init "file" takes. With `push`, `output` is
    pushed once it is complete. `merge` names other models to make experts of, and
    `positive_prompts` a file of what each is for, with the router_init "prompts".

    Raises UpcycleError when that cannot be done; `output` is then as it was before, or complete
    where only the push failed.
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
    request: Request, *, hooks: Hooks | None = None, team: Team | None = None
) -> Conversion:
    """Do what is asked for, with the other ranks of a team; UpcycleError as in `convert`."""
    from upcycle_cli.conversion import execute

    team = team or Team()
    hooks = hooks if hooks is not None and team.leads else Hooks()
    plan, destination = _plan(request, hooks, team), request.push
    if destination is not None:
        from upcycle_cli.publish.push import check_destination

        # Now, and not after hours of work, it is found out that the Hub would refuse.
        team.agree(lambda: check_destination(destination) if team.leads else None)
    plan = _bring_source(plan, request, hooks, team)
    with hooks.writing(plan):
        done = execute(
            plan,
            request.output,
            overwrite=request.overwrite,
            verify=request.verify,
            checksums=request.checksums,
            repo=None if destination is None else destination.repo,
            writing=request.writing,
            team=team,
            progress=hooks.advance,
            watch=hooks,
        )
    hooks.finished(done)
    if destination is None or not done.published or not team.leads:
        return done
    return replace(done, pushed=_push(done, destination, hooks))


def foresee(
    request: Request, *, hooks: Hooks | None = None, team: Team | None = None
) -> tuple[Planned, list[str]]:
    """Return what `carry_out` would make, and find at OUTPUT; UpcycleError if there is no plan."""
    team = team or Team()
    plan = _plan(request, hooks if hooks is not None and team.leads else Hooks(), team)
    output = request.output.absolute()
    try:
        if not request.overwrite and is_finished(plan, output):
            return plan, [f"{output} is already what this command makes."]
        reflink = request.writing.reflink
        check_before(plan, output, overwrite=request.overwrite, reflink=reflink, team=Team())
    except UpcycleError as error:
        return plan, [f"without --dry-run this is refused: {' '.join(str(error).split())}"]
    if not partial_of(output).exists():
        return plan, []
    return plan, [f"{partial_of(output)} is there: what it has of this conversion is used."]


def _plan(request: Request, hooks: Hooks, team: Team) -> Planned:
    """Make the plan on every rank, and see that all have made the same; UpcycleError if not."""
    check_name(request.output)
    for path in (Path(request.source), request.output.absolute()) if request.verify else ():
        check_utf8(path)

    def make() -> Planned:
        source = open_source(request.source, request.revision)
        if not isinstance(request.recipe, Recipe):
            from upcycle_cli.plan.expand import build_growth
            from upcycle_cli.plan.prompts import Prompts

            prompts = request.inputs is not None and isinstance(request.inputs.text, Prompts)
            if request.merge is not None or prompts:
                raise UpcycleError(
                    "--expand copies the experts that an MoE has, and takes no other models'.",
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


def _bring_source(plan: Planned, request: Request, hooks: Hooks, team: Team) -> Planned:
    """Return the plan with its sources here; whatever can be refused is refused before that."""

    def missing() -> int:
        return sum(source.bytes_to_download for source in plan.sources)

    def bring() -> list[Checkpoint]:
        return [source.download() for source in plan.sources]

    if max(team.gather(missing)) > 0:
        if any(team.gather(lambda: team.leads and _is_there(plan, request, team))):
            return plan
        hooks.downloading(plan, missing())
        # One rank first, so that the others find the files in the cache when it is a shared one.
        team.agree(lambda: bring() if team.leads else None)
    return plan.with_sources(team.agree(bring))


def _is_there(plan: Planned, request: Request, team: Team) -> bool:
    """Whether the output is there, and needs no source; UpcycleError when it cannot be made."""
    from upcycle_cli.write.transaction import recover

    output, overwrite = request.output.absolute(), request.overwrite
    recover(output)
    if not overwrite and not request.verify and is_finished(plan, output):
        return True
    reflink = request.writing.reflink
    check_before(plan, output, overwrite=overwrite, reflink=reflink, team=team)
    return False


def _push(done: Conversion, destination: Destination, hooks: Hooks) -> Push:
    from upcycle_cli.publish.push import push

    try:
        return push(done.output, destination, on_start=hooks.pushing)
    except UpcycleError as error:
        again = shell_line(["upcycle", "push", str(done.output), destination.repo])
        raise UpcycleError(
            f"{done.output} is complete, but was not pushed: {error.message}",
            f"{error.hint or ''}\nGo on with: {again}".strip(),
        ) from error
