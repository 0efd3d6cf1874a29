"""The command line: parse, call, render, exit code. The only place that prints or exits.

stdout is data, stderr is talk. Exit codes: 0 done, 1 a verification failed, 2 bad usage or input
or a resource that failed, 130 SIGINT, 143 SIGTERM.
"""

from __future__ import annotations

import functools
import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from upcycle_cli.errors import UpcycleError
from upcycle_cli.families.target import ExpertLayout
from upcycle_cli.options import (
    FILES,
    RUN,
    DtypeChoice,
    DtypeOption,
    ExpansionOption,
    FsyncOption,
    GranularityOption,
    GroupsOption,
    InexactOption,
    JsonOption,
    LayoutOption,
    RecipeOption,
    ReflinkOption,
    RoutingChoice,
    RoutingOption,
    ScalingOption,
    SeedOption,
    ShardOption,
    SplitOption,
    StdOption,
    TargetChoice,
    TargetOption,
    TopKOption,
    UntieOption,
    WorkersOption,
    file_options,
    parse_scaling,
    path_argument,
    recipe_sizes,
)
from upcycle_cli.recipe import Recipe, Routing, ScaleSplit, parse_recipe_name
from upcycle_cli.team import launched_rank

if TYPE_CHECKING:
    from upcycle_cli.conversion import Conversion
    from upcycle_cli.plan import Plan

EXIT_VERIFICATION_FAILED = 1
EXIT_ERROR = 2
EXIT_SIGINT = 130
EXIT_SIGTERM = 143

app = typer.Typer(
    name="upcycle",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _on_signal)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup's wish is kept
        signal.signal(signal.SIGHUP, _on_signal)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name or sign that the terminal cannot show must not end a conversion.
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="upcycle")
    finally:
        # The command is over: a signal that comes while Python shuts down has nothing to stop.
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM or SIGHUP came; it unwinds as SIGINT does: files are closed, locks given back."""


_received: list[int] = []


def _on_signal(signum: int, _frame: object) -> None:
    _received.append(signum)
    _raise_signal()


def _raise_signal() -> None:
    """Raise for a signal that came, even when a library swallowed the exception it raised then.

    Some do, while they are being imported: the command would go on as if nothing had been.
    """
    if _received:
        raise KeyboardInterrupt if _received[0] == signal.SIGINT else _TerminatedError


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Turn a dense Hugging Face checkpoint into a Mixture of Experts, and prove it.

    Start with [bold]upcycle demo[/bold], which needs no model and no network.
    """
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"upcycle {installed('upcycle-cli')}")
        raise typer.Exit


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            parser=path_argument,
            help="Directory of the dense checkpoint; never modified.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT",
            parser=path_argument,
            help="Directory to make; appears whole or not at all.",
        ),
    ],
    recipe: RecipeOption = None,
    expansion: ExpansionOption = None,
    granularity: GranularityOption = None,
    top_k: TopKOption = None,
    target: TargetOption = TargetChoice.AUTO,
    routing: RoutingOption = RoutingChoice.AUTO,
    allow_inexact: InexactOption = False,
    scaling: ScalingOption = "exact",
    scale_split: SplitOption = ScaleSplit.BALANCED,
    virtual_groups: GroupsOption = True,
    router_logit_std: StdOption = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = DtypeChoice.AUTO,
    expert_layout: LayoutOption = ExpertLayout.PER_EXPERT,
    max_shard_size: ShardOption = "5GB",
    untie_embeddings: UntieOption = False,
    checksums: Annotated[
        bool,
        typer.Option("--checksums", help="Write SHA256SUMS too.", rich_help_panel=FILES),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace OUTPUT once the new one is complete.",
            rich_help_panel=RUN,
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show the plan and write nothing.", rich_help_panel=RUN),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Verify before OUTPUT appears; on failure it does not, and the exit code is 1.",
            rich_help_panel=RUN,
        ),
    ] = False,
    workers: WorkersOption = 0,
    reflink: ReflinkOption = True,
    fsync: FsyncOption = True,
    as_json: JsonOption = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=RUN),
    ] = False,
) -> None:
    """Convert a dense checkpoint into a mixture of experts.

    Example: upcycle convert Llama-3.1-8B Llama-3.1-8B-E8G1T2 --recipe E8G1T2 --verify
    """
    with _errors_to_exit_codes():
        from upcycle_cli.checkpoint import open_checkpoint
        from upcycle_cli.conversion import execute, plan_together
        from upcycle_cli.plan import build_plan
        from upcycle_cli.publish import check_output
        from upcycle_cli.render import plan_json
        from upcycle_cli.team import Team
        from upcycle_cli.writer import WriteOptions

        sizes = recipe_sizes(recipe, expansion, granularity, top_k)
        wanted = Recipe(
            expansion=sizes[0],
            granularity=sizes[1],
            top_k=sizes[2],
            routing=None if routing is RoutingChoice.AUTO else Routing(routing),
            scaling=parse_scaling(scaling),
            scale_split=scale_split,
            virtual_groups=virtual_groups,
            router_logit_std=router_logit_std,
            seed=seed,
            allow_inexact=allow_inexact,
        )
        options = file_options(dtype, expert_layout, max_shard_size, untie=untie_embeddings)
        writing = WriteOptions(workers=workers, reflink=reflink, fsync=fsync)
        with Team() as team:
            plan = plan_together(
                lambda: build_plan(wanted, open_checkpoint(source), target=target, options=options),
                team,
            )
            if dry_run:
                check_output(output, plan.source, overwrite=overwrite)
            else:
                run = functools.partial(
                    execute,
                    plan,
                    output,
                    overwrite=overwrite,
                    verify=verify,
                    checksums=checksums,
                    writing=writing,
                    team=team,
                )
                _convert(run, plan, as_json=as_json, quiet=quiet or not team.leads)
        if dry_run and as_json:
            _print_json({"status": "planned", "output": str(output), **plan_json(plan)})
        elif dry_run and not quiet and team.leads:
            _print_plan(plan)
            _talk("Nothing was written (--dry-run).")


@app.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            parser=path_argument,
            help="Directory of a dense or an MoE checkpoint.",
        ),
    ],
    recipe: RecipeOption = None,
    target: TargetOption = TargetChoice.AUTO,
    routing: RoutingOption = RoutingChoice.AUTO,
    dtype: DtypeOption = DtypeChoice.AUTO,
    expert_layout: LayoutOption = ExpertLayout.PER_EXPERT,
    max_shard_size: ShardOption = "5GB",
    untie_embeddings: UntieOption = False,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor.", rich_help_panel=RUN)
    ] = False,
    weights: Annotated[
        bool,
        typer.Option(
            "--weights",
            help="Read the experts of an MoE: which are identical, which groups are whole.",
            rich_help_panel=RUN,
        ),
    ] = False,
    dense: Annotated[
        Path | None,
        typer.Option(
            help="With --weights: the dense checkpoint, to measure the scale factors.",
            rich_help_panel=RUN,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a checkpoint is, or what converting it would give; reads headers only.

    Example: upcycle inspect Llama-3.1-8B --recipe E8G8T8
    """
    with _errors_to_exit_codes():
        from upcycle_cli import inspection, render

        if dense is not None and not weights:
            raise UpcycleError("--dense says what to compare weights with.", "Add --weights.")
        options = file_options(dtype, expert_layout, max_shard_size, untie=untie_embeddings)
        chosen = (target, routing) != (TargetChoice.AUTO, RoutingChoice.AUTO)
        if recipe is None and (chosen or options != file_options()):
            raise UpcycleError(
                "these options say how to convert, and no --recipe does.", "Add --recipe E8G1T2."
            )
        wanted = None
        if recipe is not None:
            expansion, granularity, top_k = parse_recipe_name(recipe)
            wanted = Recipe(
                expansion=expansion,
                granularity=granularity,
                top_k=top_k,
                routing=None if routing is RoutingChoice.AUTO else Routing(routing),
                allow_inexact=True,
            )
        found = inspection.inspect(
            path,
            wanted,
            target=target,
            options=options,
            weights=weights,
            dense=dense,
        )
        if as_json:
            listed = {"tensors": render.tensors_json(found)} if tensors else {}
            _print_json(render.inspection_json(found) | listed)
            return
        _stdout().print(render.inspection_table(found))
        if found.plan is not None:
            _stdout().print()
            _print_plan(found.plan)
        if tensors:
            _stdout().print()
            table = render.tensors_table(found)
            # A list is for grep: one line a tensor, however wide the screen is.
            _stdout(width=max(_stdout().width, 400)).print(table)


@app.command()
def verify(
    dense: Annotated[
        Path,
        typer.Argument(
            metavar="DENSE", parser=path_argument, help="Directory of the dense checkpoint."
        ),
    ],
    moe: Annotated[
        Path,
        typer.Argument(
            metavar="MOE", parser=path_argument, help="Directory of the MoE made from it."
        ),
    ],
    checks: Annotated[
        str,
        typer.Option(metavar="NAME,…", help="Which checks to run."),
    ] = "structure,weights,outputs,claims",
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file to run both models on, instead of the built-in text."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove that an MoE computes what its dense model computes; exit code 1 when it does not.

    Example: upcycle verify Llama-3.1-8B Llama-3.1-8B-E8G1T2
    """
    with _errors_to_exit_codes():
        from upcycle_cli import render, verification

        names = [name.strip() for name in checks.split(",") if name.strip()]
        report = verification.verify(
            dense,
            moe,
            checks=names,
            prompts=prompts,
            on_start=None if as_json else _announce_check,
        )
        _raise_signal()
        if as_json:
            _print_json(report.to_json())
        else:
            _stdout().print(render.report_table(report))
        if report.status == "skipped":
            _fail("no check could run, so nothing is proven.", EXIT_ERROR)
        if not report.passed:
            raise typer.Exit(EXIT_VERIFICATION_FAILED)


@app.command()
def clean(
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT", parser=path_argument, help="Directory that was to be made."
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove it, not only show it.")] = False,
) -> None:
    """Show what an unfinished conversion left in OUTPUT.partial; remove it with --yes."""
    with _errors_to_exit_codes():
        from upcycle_cli import publish
        from upcycle_cli.render import size_text

        partial, size = publish.clean(output.absolute(), remove=yes)
        if yes:
            _talk(f"Removed {partial} ({size_text(size)}).")
        else:
            _stdout().print(
                f"{escape(str(partial))}: {size_text(size)} of an unfinished conversion"
            )
            _talk(f"Remove it with: {shlex.join(['upcycle', 'clean', '--yes', str(output)])}")


@app.command()
def demo(
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIR",
            parser=path_argument,
            help="Where to work; a temporary directory unless given.",
        ),
    ] = None,
) -> None:
    """Make a small dense model, convert it to E8G8T8, inspect and verify it; needs no network."""
    with _errors_to_exit_codes():
        from upcycle_cli.demo import run_demo

        run_demo(directory, run=_run_shown, say=_talk)


# How commands talk -------------------------------------------------------------------------------


def _convert(run: Callable[..., Conversion], plan: Plan, *, as_json: bool, quiet: bool) -> None:
    from upcycle_cli import render
    from upcycle_cli.progress import progress_bar

    with progress_bar(_stderr(), total=plan.nbytes, silent=quiet or as_json) as progress:

        def advance(num_bytes: int) -> None:
            _raise_signal()
            progress.advance(num_bytes)

        def checking(name: str) -> None:
            _raise_signal()
            progress.checking(name)

        done = run(progress=advance, on_check=checking)
    if as_json:
        _print_json(render.conversion_json(done))
    elif not quiet:
        _print_conversion(done)
    if not done.published:
        if quiet and done.report is not None:
            _stderr().print(render.report_table(done.report))
        found = "verification failed; nothing was published."
        if done.already_done:
            found = f"{done.output} is damaged. Make it again with --overwrite."
        _fail(found, EXIT_VERIFICATION_FAILED)


def _print_conversion(done: Conversion) -> None:
    from upcycle_cli import render

    if done.already_done:
        if done.report is not None:
            _stdout().print(render.report_table(done.report))
        if done.published:
            _talk(f"{done.output} is already what this command makes; nothing to do.")
        return
    _print_plan(done.plan)
    if done.report is not None:
        _stdout().print()
        _stdout().print(render.report_table(done.report))
    if done.published:
        _talk(f"\nWrote {done.output} in {done.seconds:.1f} s.{_savings(done)}")
        if done.report is None:
            paths = (str(done.plan.source.path), str(done.output))
            _talk(f"Next: {shlex.join(['upcycle', 'verify', *paths])}")


def _savings(done: Conversion) -> str:
    from upcycle_cli.render import size_text

    text = ""
    if done.shared_bytes:
        text += f" {size_text(done.shared_bytes)} share extents with equal bytes and take no space."
    if done.reused_bytes:
        text += f" {size_text(done.reused_bytes)} were there from an unfinished run."
    return text


def _print_plan(plan: Plan) -> None:
    from upcycle_cli import render
    from upcycle_cli.advice import warnings

    _stdout().print(render.plan_table(plan))
    for warning in warnings(plan):
        _stderr().print(f"[yellow]note:[/yellow] {escape(warning)}", highlight=False)


def _run_shown(arguments: list[str]) -> int:
    """Show a command as one would type it, run it here, and return its exit code."""
    command = escape(shlex.join(["upcycle", *arguments]))
    _stderr().print(f"\n[bold]$ {command}[/bold]", soft_wrap=True)
    try:
        app(arguments, standalone_mode=False)
    except typer.Exit as result:
        return result.exit_code
    return 0


def _announce_check(name: str) -> None:
    if sys.stderr.isatty():
        _talk(f"checking {name} …")


class _DataConsole(Console):
    def on_broken_pipe(self) -> None:
        # rich would exit with 1, which means here that a verification failed.
        raise BrokenPipeError


def _stdout(width: int | None = None) -> Console:
    return _DataConsole(width=width, highlight=False)


def _stderr() -> Console:
    return Console(stderr=True, highlight=False)


def _talk(text: str) -> None:
    _stderr().print(escape(text), soft_wrap=True)


def _print_json(value: dict[str, Any]) -> None:
    if launched_rank() > 0:
        return
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _fail(message: str, code: int) -> NoReturn:
    if launched_rank() > 0:  # rank 0 says it, once
        raise typer.Exit(code)
    _stderr().print(f"[bold red]error:[/bold red] {escape(message)}", soft_wrap=True)
    raise typer.Exit(code)


@contextmanager
def _errors_to_exit_codes() -> Iterator[None]:
    try:
        yield
    except UpcycleError as error:
        _fail(str(error), EXIT_ERROR)
    except BrokenPipeError:
        # Whoever read stdout has seen enough; the flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}.", EXIT_ERROR)
    except KeyboardInterrupt as signal_error:
        terminated = isinstance(signal_error, _TerminatedError)
        _fail(
            f"{'terminated' if terminated else 'interrupted'}; nothing was published. "
            "A conversion goes on where it stopped when the same command is run again.",
            EXIT_SIGTERM if terminated else EXIT_SIGINT,
        )
