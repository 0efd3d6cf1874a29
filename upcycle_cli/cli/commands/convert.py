"""`upcycle convert`: what it takes, what it shows on the way, and what it says in the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer  # noqa: TC002 - it reads the annotations of a command

from upcycle_cli.cli import shared_options as shared
from upcycle_cli.cli import terminal
from upcycle_cli.cli.merge_options import (
    ExpertsFromOption,
    FromMergekitOption,
    PositivePromptsOption,
    RestOption,
    SourceExpertsOption,
    to_merge,
)
from upcycle_cli.cli.moe_options import MoeOptions, takes_moe_options
from upcycle_cli.cli.option_sources import places, save_options, use_config
from upcycle_cli.cli.process import raise_signal
from upcycle_cli.cli.shared_options import for_files, for_hub, for_path, for_recipe, for_run
from upcycle_cli.core.callbacks import Hooks, Progress
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.text import shell_line
from upcycle_cli.recipe.recipe import Promise, RouterInit

if TYPE_CHECKING:
    from upcycle_cli.api import Conversion, Request
    from upcycle_cli.plan.base import Planned
    from upcycle_cli.publish.push import Destination


@takes_moe_options
def convert(
    context: typer.Context,
    source: Annotated[
        Path | None,
        for_path(
            metavar="SOURCE",
            help="The dense checkpoint, or with --expand an MoE, never modified: a directory, or a "
            "repo on the Hub.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        for_path(metavar="OUTPUT", help="Directory to make; appears whole or not at all."),
    ] = None,
    *,
    moe: MoeOptions,
    experts_from: ExpertsFromOption = [],  # noqa: B006 - typer copies it
    rest: RestOption = "first",
    source_experts: SourceExpertsOption = True,
    positive_prompts: PositivePromptsOption = None,
    from_mergekit: FromMergekitOption = None,  # noqa: ARG001 - its callback has read it
    allow_inexact: Annotated[
        bool,
        for_recipe(
            "--allow-inexact",
            help="Allow a top-k that is not a multiple of the granularity, or with --expand "
            "another than that which is exact.",
        ),
    ] = False,
    checksums: Annotated[bool, for_files("--checksums", help="Write SHA256SUMS too.")] = False,
    overwrite: Annotated[
        bool, for_run("--overwrite", help="Replace OUTPUT once the new one is complete.")
    ] = False,
    dry_run: Annotated[bool, for_run("--dry-run", help="Show the plan and write nothing.")] = False,
    verify: Annotated[
        bool,
        for_run(
            "--verify",
            help="Verify before OUTPUT appears; on failure it does not, and the exit code is 1.",
        ),
    ] = False,
    workers: Annotated[
        int,
        for_run(
            help="Threads that read, compute and write; 0 for one more than there are processors, "
            "at most 4."
        ),
    ] = 0,
    reflink: Annotated[
        bool,
        for_run(
            " /--no-reflink",
            help="Write equal parts each, even where the file system could share their extents.",
            show_default=False,
        ),
    ] = True,
    fsync: Annotated[
        bool,
        for_run(
            " /--no-fsync",
            help="Do not wait for the disk: for scratch work only.",
            show_default=False,
        ),
    ] = True,
    json: shared.JsonOption = False,
    quiet: shared.QuietOption = False,
    revision: shared.RevisionOption = None,
    push_to_hub: Annotated[
        str | None,
        for_hub(
            metavar="REPO",
            help="Push OUTPUT to this repo once it is complete (see `upcycle push`).",
        ),
    ] = None,
    push_revision: Annotated[str | None, for_hub(metavar="REV", help="Branch to push to.")] = None,
    private: shared.PrivateOption = False,
    create_pr: shared.PullRequestOption = False,
    config: Annotated[  # noqa: ARG001 - its callback has read it
        Path | None,
        for_run(
            metavar="FILE",
            help="Take options from a TOML or JSON file; those given here go first. Where it "
            "names the source, a single argument is OUTPUT.",
            callback=use_config,
            is_eager=True,
        ),
    ] = None,
    save_config: Annotated[
        Path | None,
        for_run(metavar="FILE", help="Write all options, with what auto stood for, for --config."),
    ] = None,
) -> None:
    """Convert a dense checkpoint into a mixture of experts.

    Example: upcycle convert Llama-3.1-8B Llama-3.1-8B-E8G1T2 --recipe E8G1T2 --verify

    Every option can be set by a variable, such as UPCYCLE_CONVERT_RECIPE=E8G1T2.
    """
    with terminal.errors_to_exit_codes(as_json=json):
        source, output = places(context, source, output)  # before what takes time to import
        from upcycle_cli.api import Request, carry_out, preview
        from upcycle_cli.write.distributed import Team
        from upcycle_cli.write.writer import WriteOptions

        joined = Team() if context.obj == shared.DEMO else Team.launched()
        with joined as team, terminal.errors_to_exit_codes(as_json=json, silent=not team.leads):
            as_json, quiet = json and team.leads, quiet or not team.leads
            if positive_prompts is not None and moe.router_init == RouterInit.NORMAL:
                moe = replace(moe, router_init=RouterInit.PROMPTS)
            request = Request(
                source=source,
                output=output,
                recipe=moe.to_recipe(context, allow_inexact=allow_inexact),
                target=moe.target,
                revision=revision,
                options=moe.to_options(),
                inputs=moe.to_inputs(positive_prompts),
                overwrite=overwrite,
                verify=verify,
                checksums=checksums,
                writing=WriteOptions(workers=workers, reflink=reflink, fsync=fsync),
                push=_destination(
                    push_to_hub, revision=push_revision, private=private, create_pr=create_pr
                ),
                merge=to_merge(experts_from, rest, source_too=source_experts),
            )
            read = (source, *experts_from) if dry_run else ()
            shared.quiet_hub(*read, silent=quiet or json)
            screen = _Screen(request, context, save_config, as_json, quiet)
            if dry_run:
                screen.show_forecast(*preview(request, hooks=screen, team=team))
            else:
                screen.end(carry_out(request, hooks=screen, team=team))


def _destination(
    repo: str | None, *, revision: str | None, private: bool, create_pr: bool
) -> Destination | None:
    if repo is not None:
        from upcycle_cli.publish.push import Destination

        return Destination(repo=repo, revision=revision, private=private, create_pr=create_pr)
    if private or create_pr or revision is not None:
        raise UpcycleError(
            "--private, --create-pr and --push-revision say how to push, and nothing is pushed.",
            "Add --push-to-hub REPO.",
        )
    return None


@dataclass
class _Screen(Hooks["Planned", "Conversion"]):
    """Saves the options, and shows how a conversion goes on."""

    request: Request
    context: typer.Context
    save_config: Path | None
    as_json: bool
    quiet: bool
    progress: Progress = field(init=False)

    @property
    def silent(self) -> bool:
        return self.quiet or self.as_json

    def planned(self, plan: Planned) -> None:
        if self.save_config is not None:
            save_options(self.save_config, self.context, plan)

    def downloading(self, names: Sequence[str], num_bytes: int) -> None:
        from upcycle_cli.core.text import size_text

        if not self.silent:
            terminal.talk(f"Downloading {size_text(num_bytes)} of {', '.join(names)} …")

    @contextmanager
    def writing(self, num_bytes: int) -> Iterator[None]:
        from upcycle_cli.cli.progress import progress_bar

        bar = progress_bar(terminal.stderr(), total=num_bytes, silent=self.silent)
        with bar as self.progress:
            yield

    def advance(self, num_bytes: int) -> None:
        raise_signal()
        self.progress.advance(num_bytes)

    def begins(self, what: str) -> None:
        raise_signal()
        self.progress.begins(what)

    def calibrated(self) -> None:
        self.progress.calibrated()

    def checked(self, done: int, total: int, unit: str) -> None:
        raise_signal()
        self.progress.checked(done, total, unit)

    def finished(self, result: Conversion) -> None:
        if not self.silent:
            _print_conversion(result, to_push=self.request.push is not None)

    def pushing(self, num_files: int, num_bytes: int) -> None:
        assert self.request.push is not None
        shared.announce_push(self.request.push.repo, num_files, num_bytes, silent=self.silent)

    def show_forecast(self, plan: Planned, warnings: list[str]) -> None:
        from upcycle_cli.cli.render_plan import plan_json

        if self.as_json:
            status = {"status": "planned", "output": str(self.request.output)}
            terminal.print_json(status | plan_json(plan, warnings))
        elif not self.quiet:
            shared.show_plan(plan)
            terminal.warn(*warnings)
            terminal.talk("Nothing was written (--dry-run).")

    def end(self, done: Conversion) -> None:
        """Say what is still to be said; typer.Exit unless the output is what it should be."""
        from upcycle_cli.cli import render

        if done.pushed is not None:
            raise_signal()
            if not self.silent:
                shared.show_push(done.pushed)
        if self.as_json:
            from upcycle_cli.cli.render_plan import conversion_json

            terminal.print_json(conversion_json(done, done.pushed))
        if done.published:
            return
        if self.quiet and done.report is not None:
            terminal.show(render.report_table(done.report), terminal.stderr())
        found = "verification failed; nothing was published."
        if done.already_done:
            found = f"{done.output} is damaged. Make it again with --overwrite."
        terminal.fail(found, terminal.EXIT_VERIFICATION_FAILED)


def _print_conversion(done: Conversion, *, to_push: bool) -> None:
    from upcycle_cli.cli import render

    if done.already_done:
        terminal.warn(*done.warnings)
        if done.report is not None:
            terminal.show(render.report_table(done.report))
        if done.published:
            terminal.talk(f"{done.output} is already what this command makes; nothing to do.")
        return
    shared.show_plan(done.plan)
    if done.report is not None:
        terminal.stdout().print()
        terminal.show(render.report_table(done.report))
    terminal.warn(*done.warnings)
    if done.published:
        terminal.talk("", f"Wrote {done.output} in {done.seconds:.1f} s.{_savings(done)}")
        if not to_push:
            terminal.talk(f"Next: {shell_line(_next_step(done))}")


def _next_step(done: Conversion) -> list[str]:
    from upcycle_cli.publish.card import repo_name

    if done.report is not None:
        return ["upcycle", "push", str(done.output), f"my-org/{repo_name(done.output.name)}"]
    source, *others = done.plan.sources
    options = ["--dense-revision", source.revision] if source.revision else []
    for other in others:
        options += ["--experts-from", other.place]
    if done.plan.promise is Promise.NONE:
        options.append("--allow-inexact")
    return ["upcycle", "verify", source.repo or str(source.path), str(done.output), *options]


def _savings(done: Conversion) -> str:
    from upcycle_cli.core.text import size_text

    text = ""
    if done.shared_bytes:
        text += f" {size_text(done.shared_bytes)} share extents with equal bytes and take no space."
    if done.reused_bytes:
        text += f" {size_text(done.reused_bytes)} were there from an unfinished run."
    return text
