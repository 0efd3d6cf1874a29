"""`upcycle convert`: its options, its progress, and what it prints at the end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer  # noqa: TC002 - it reads the annotations of a command

from upcycle_cli.cli import options, render, terminal
from upcycle_cli.cli import parse_options as values
from upcycle_cli.cli.options import MoeOptions
from upcycle_cli.cli.process import raise_signal
from upcycle_cli.cli.progress import Display, progress_bar
from upcycle_cli.core.callbacks import Hooks
from upcycle_cli.core.text import shell_line, size_text
from upcycle_cli.recipe.recipe import NeuronOrder, RouterInit

if TYPE_CHECKING:
    from upcycle_cli.api import Conversion
    from upcycle_cli.plan.plan import Plan
    from upcycle_cli.write.distributed import Team


@options.declared
def convert(
    context: typer.Context,
    source: Path | None = None,
    output: Path | None = None,
    *,
    moe: MoeOptions,
    allow_inexact: bool = False,
    checksums: bool = False,
    experts_from: list[Path],
    from_mergekit: Path | None = None,  # noqa: ARG001 - see options.use_file
    rest: str = "first",
    source_experts: bool = True,
    positive_prompts: Path | None = None,
    revision: str | None = None,
    push_to_hub: str | None = None,
    push_revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    verify: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
    config: Path | None = None,  # noqa: ARG001 - see options.use_file
    save_config: Path | None = None,  # noqa: ARG001 - see _Screen
    workers: int = 0,
    fsync: bool = True,
    json: bool = False,
    quiet: bool = False,  # noqa: ARG001 - see _Screen
) -> None:
    """Convert a dense model into a Mixture of Experts (MoE), or grow an MoE.

    Example:
      upcycle convert Llama-3.1-8B moe --recipe E8G1T2 --verify
    """
    source, output = values.places(context, source, output)  # before the slow imports
    from upcycle_cli.api import Request, carry_out, preview
    from upcycle_cli.plan.merge import MergeRequest
    from upcycle_cli.write.distributed import Team
    from upcycle_cli.write.writer import WriteOptions

    team = Team.launched()
    screen = _Screen(context, team)
    with (
        terminal.errors_to_exit_codes(as_json=json, silent=not team.leads, resumes=not dry_run),
        team,
        progress_bar(screen, silent=screen.silent),
    ):
        values.check_pairs(context)
        if positive_prompts is not None and moe.router_init == RouterInit.NORMAL:
            moe = replace(moe, router_init=RouterInit.PROMPTS)
        destination = None
        if push_to_hub is not None:
            from upcycle_cli.publish.push import Destination

            destination = Destination(
                repo=push_to_hub, revision=push_revision, private=private, create_pr=create_pr
            )
        request = Request(
            source=source,
            output=output,
            recipe=values.to_recipe(moe, context, allow_inexact=allow_inexact),
            target=moe.target,
            revision=revision,
            options=values.to_options(moe),
            calibration=moe.calibration,
            router_rows=values.file_of(moe.router_init, RouterInit),
            neuron_orders=values.file_of(moe.neuron_order, NeuronOrder),
            positive_prompts=positive_prompts,
            overwrite=overwrite,
            verify=verify,
            checksums=checksums,
            writing=WriteOptions(workers=workers, fsync=fsync),
            push=destination,
            merge=MergeRequest(experts_from=experts_from, rest=rest, source_too=source_experts)
            if experts_from
            else None,
        )
        hooks = screen if team.leads else Hooks()
        if dry_run:
            screen.show_forecast(*preview(request, hooks, team))
        else:
            screen.end(carry_out(request, hooks, team))


class _Screen(Display):
    """Saves the options, shows progress, and prints what a conversion did."""

    def __init__(self, context: typer.Context, team: Team) -> None:
        super().__init__()
        self.context, self.given = context, context.params
        self.as_json = team.leads and self.given["json"]
        self.quiet = self.given["quiet"] or not team.leads
        self.silent = self.quiet or self.as_json

    def planned(self, plan: Plan) -> None:
        self.total = plan.nbytes
        if self.given["save_config"] is not None:
            values.save_options(self.given["save_config"], self.context, plan)

    def downloading(self, names: Sequence[str], num_bytes: int) -> None:
        if not self.silent:
            terminal.talk(f"Downloading {size_text(num_bytes)} of {', '.join(names)} …")
        self.begins("downloading")

    def writing(self, plan: Plan) -> None:
        self.ends()
        if not self.silent:
            self._show_plan(plan)

    def finished(self, result: Conversion) -> None:
        self.ends()
        if self.silent:
            return
        if result.report is not None:
            if not result.already_done:  # then the plan is above
                terminal.stdout().print()
            terminal.show(result.report)
        terminal.warn(*result.warnings)
        if result.already_done and result.published:
            terminal.talk(f"{result.output} is already the output of this command; nothing to do.")
        elif result.published:
            said = f"Wrote {result.output} in {result.seconds:.1f} s."
            if result.shared_bytes:
                said += f" Equal tensors share {size_text(result.shared_bytes)} on disk."
            if result.reused_bytes:
                said += f" {size_text(result.reused_bytes)} came from an unfinished run."
            terminal.talk("", said)
            if self.given["push_to_hub"] is None:
                from upcycle_cli.publish.card import repo_name, verify_command

                step = ["upcycle", "push", str(result.output)]
                step.append(f"my-org/{repo_name(result.output.name)}")
                if result.report is None:
                    step = [*verify_command(result.plan, str(result.output), paths=True)]
                terminal.talk(f"Next: {shell_line(step)}")

    def pushing(self, repo: str, num_files: int, num_bytes: int) -> None:
        if not self.silent:
            render.announce_push(repo, num_files, num_bytes)
        self.begins("pushing")

    def show_forecast(self, plan: Plan, notes: list[str]) -> None:
        if self.as_json:
            from upcycle_cli.cli.render_json import plan_json

            status = {"status": "planned", "output": str(self.given["output"])}
            terminal.print_json(status | plan_json(plan, notes))
        elif not self.quiet:
            self._show_plan(plan)
            terminal.warn(*notes)
            terminal.talk("Nothing was written (--dry-run).")

    def _show_plan(self, plan: Plan) -> None:
        from upcycle_cli.plan.facts import plan_rows

        terminal.show(terminal.rows_table(plan_rows(plan)))
        sys.stdout.flush()  # a reader of a pipe sees it before hours of work

    def end(self, done: Conversion) -> None:
        """Print the push or the JSON; typer.Exit if the output was not published."""
        self.ends()
        if done.pushed is not None:
            raise_signal()
            if not self.silent:
                render.show_push(done.pushed)
        if self.as_json:
            from upcycle_cli.cli.render_json import conversion_json

            terminal.print_json(conversion_json(done))
        if done.published:
            return
        if self.quiet and done.report is not None:
            terminal.show(done.report, to=terminal.stderr())
        found = "verification failed; nothing was published."
        if done.already_done:
            found = f"{done.output} is damaged. Convert again with --overwrite."
        terminal.fail(found, terminal.EXIT_VERIFICATION_FAILED)
