"""The command line: parse, call, render."""

from __future__ import annotations

import functools
import io
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from upcycle_cli.errors import UpcycleError
from upcycle_cli.families.target import ExpertLayout
from upcycle_cli.given import (
    FILE_OPTIONS,
    asked_recipe,
    is_given,
    places,
    recipe_by_source,
    save_options,
    use_config,
)
from upcycle_cli.group import Commands
from upcycle_cli.options import (
    FILES,
    HUB,
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
    PrivateOption,
    PullRequestOption,
    QuietOption,
    RecipeOption,
    ReflinkOption,
    RevisionOption,
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
    option,
    path_argument,
    recipe_sizes,
)
from upcycle_cli.printable import counted, printable, shell_line
from upcycle_cli.recipe import Promise, ScaleSplit
from upcycle_cli.terminal import (
    EXIT_BUG,
    EXIT_ERROR,
    EXIT_VERIFICATION_FAILED,
    StoppedError,
    check_current_directory,
    errors_to_exit_codes,
    fail,
    finish,
    in_words,
    prepare,
    print_json,
    raise_signal,
    say_error,
    say_last_words,
    show,
    stderr,
    stdout,
    stopped,
    talk,
    warn,
)

if TYPE_CHECKING:
    from upcycle_cli.conversion import Conversion
    from upcycle_cli.hub.pushing import Destination, Push
    from upcycle_cli.plan import Plan

_VARIABLES = "UPCYCLE"
"""Options can be set by variables: UPCYCLE_CONVERT_RECIPE and so on."""

app = typer.Typer(
    name="upcycle",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line."""
    code = EXIT_BUG  # and not 1, which would mean that a verification failed
    try:
        prepare()
        app(prog_name="upcycle")
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else EXIT_BUG
    except StoppedError:  # before a command began, or while another signal was answered
        code, word = stopped()
        say_error(f"{word}.")
    except BaseException as error:  # noqa: BLE001 - whatever it is
        words = in_words(error)  # memory that was lacking for saying so, most likely
        if words is not None:
            code = EXIT_ERROR
            say_last_words(words.message, words.hint or "")
        else:
            talk(*traceback.format_exc().splitlines())
            talk("", "This is a bug in upcycle. Please report it with the lines above.")
    finally:
        finish(code)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, option("--version", help="Print the version.")] = False,
) -> None:
    """Turn a dense Hugging Face checkpoint into a Mixture of Experts, and prove it.

    Start with [bold]upcycle demo[/bold], which needs no model and no network.
    """
    # For the options of the commands only: UPCYCLE_VERSION is likely to be somebody's own.
    context.auto_envvar_prefix = context.auto_envvar_prefix or _VARIABLES
    if version:
        from importlib.metadata import version as installed

        stdout().print(f"upcycle {installed('upcycle-cli')}")
        raise typer.Exit
    if context.invoked_subcommand is not None:
        check_current_directory()


@app.command()
def convert(
    context: typer.Context,
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="SOURCE",
            parser=path_argument,
            help="The dense checkpoint, never modified: a directory, or a repo on the Hub.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUTPUT",
            parser=path_argument,
            help="Directory to make; appears whole or not at all.",
        ),
    ] = None,
    recipe: RecipeOption = None,  # noqa: ARG001 - see recipe_by_source
    expansion: ExpansionOption = None,  # noqa: ARG001
    granularity: GranularityOption = None,  # noqa: ARG001
    top_k: TopKOption = None,  # noqa: ARG001
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
        option("--checksums", help="Write SHA256SUMS too.", rich_help_panel=FILES),
    ] = False,
    overwrite: Annotated[
        bool,
        option(
            "--overwrite",
            help="Replace OUTPUT once the new one is complete.",
            rich_help_panel=RUN,
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        option("--dry-run", help="Show the plan and write nothing.", rich_help_panel=RUN),
    ] = False,
    verify: Annotated[
        bool,
        option(
            "--verify",
            help="Verify before OUTPUT appears; on failure it does not, and the exit code is 1.",
            rich_help_panel=RUN,
        ),
    ] = False,
    workers: WorkersOption = 0,
    reflink: ReflinkOption = True,
    fsync: FsyncOption = True,
    json: JsonOption = False,
    quiet: QuietOption = False,
    revision: RevisionOption = None,
    push_to_hub: Annotated[
        str | None,
        option(
            metavar="REPO",
            help="Push OUTPUT to this repo once it is complete (see `upcycle push`).",
            rich_help_panel=HUB,
        ),
    ] = None,
    push_revision: Annotated[
        str | None,
        option(metavar="REV", help="Branch to push to.", rich_help_panel=HUB),
    ] = None,
    private: PrivateOption = False,
    create_pr: PullRequestOption = False,
    config: Annotated[  # noqa: ARG001 - its callback has read it
        Path | None,
        option(
            metavar="FILE",
            help="Take options from a TOML or JSON file; those given here go first. Where it "
            "names the source, a single argument is OUTPUT.",
            callback=use_config,
            is_eager=True,
            rich_help_panel=RUN,
        ),
    ] = None,
    save_config: Annotated[
        Path | None,
        option(
            metavar="FILE",
            help="Write all options, with what auto stood for, for --config.",
            rich_help_panel=RUN,
        ),
    ] = None,
) -> None:
    """Convert a dense checkpoint into a mixture of experts.

    Example: upcycle convert Llama-3.1-8B Llama-3.1-8B-E8G1T2 --recipe E8G1T2 --verify

    Every option can be set by a variable, such as UPCYCLE_CONVERT_RECIPE=E8G1T2.
    """
    with errors_to_exit_codes(as_json=json):
        source, output = places(context, source, output)
        from upcycle_cli.conversion import bring_source, execute, foresee, plan_together
        from upcycle_cli.files import check_utf8
        from upcycle_cli.hub.requests import be_quiet
        from upcycle_cli.hub.sources import open_source
        from upcycle_cli.place import check_name
        from upcycle_cli.plan import build_plan
        from upcycle_cli.render import plan_json
        from upcycle_cli.team import Team
        from upcycle_cli.writer import WriteOptions

        joined = Team() if context.obj == _DEMO else Team.launched()
        with joined as team, errors_to_exit_codes(as_json=json, silent=not team.leads):
            as_json, quiet = json and team.leads, quiet or not team.leads
            _check_push_options(push_to_hub, push_revision, private=private, create_pr=create_pr)
            check_name(output)
            for path in (source, output.absolute()) if verify else ():
                check_utf8(path)
            wanted = asked_recipe(
                recipe_sizes(*recipe_by_source(context)),
                routing=routing,
                scaling=scaling,
                scale_split=scale_split,
                virtual_groups=virtual_groups,
                router_logit_std=router_logit_std,
                seed=seed,
                allow_inexact=allow_inexact,
            )
            options = file_options(dtype, expert_layout, max_shard_size, untie=untie_embeddings)
            writing = WriteOptions(workers=workers, reflink=reflink, fsync=fsync)
            destination = _destination(
                push_to_hub, revision=push_revision, private=private, create_pr=create_pr
            )
            be_quiet(bars=not quiet and not json and sys.stderr.isatty())
            plan = plan_together(
                lambda: build_plan(
                    wanted, open_source(source, revision), target=target, options=options
                ),
                team,
            )
            if save_config is not None and team.leads:
                save_options(save_config, context, plan)
            foreseen: list[str] = []
            if dry_run:
                foreseen += foresee(plan, output, overwrite=overwrite, writing=writing)
            else:
                if destination is not None and team.leads:
                    _check_destination(destination)
                plan = bring_source(
                    plan,
                    output,
                    overwrite=overwrite,
                    verify=verify,
                    writing=writing,
                    team=team,
                    on_start=functools.partial(_announce_download, plan, silent=quiet or json),
                )
                run = functools.partial(
                    execute,
                    plan,
                    output,
                    overwrite=overwrite,
                    verify=verify,
                    checksums=checksums,
                    repo=push_to_hub,
                    writing=writing,
                    team=team,
                )
                _convert(
                    run,
                    plan,
                    destination if team.leads else None,
                    as_json=as_json,
                    quiet=quiet,
                )
            if dry_run and as_json:
                planned = plan_json(plan)
                planned["warnings"] += foreseen
                print_json({"status": "planned", "output": str(output), **planned})
            elif dry_run and not quiet:
                _print_plan(plan)
                _warn_all(foreseen)
                talk("Nothing was written (--dry-run).")


@app.command()
def inspect(
    context: typer.Context,
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            parser=path_argument,
            help="A dense or an MoE checkpoint: a directory, or a repo on the Hub.",
        ),
    ],
    recipe: RecipeOption = None,  # noqa: ARG001 - see recipe_by_source
    expansion: ExpansionOption = None,  # noqa: ARG001
    granularity: GranularityOption = None,  # noqa: ARG001
    top_k: TopKOption = None,  # noqa: ARG001
    target: TargetOption = TargetChoice.AUTO,
    routing: RoutingOption = RoutingChoice.AUTO,
    scaling: ScalingOption = "exact",
    scale_split: SplitOption = ScaleSplit.BALANCED,
    virtual_groups: GroupsOption = True,
    router_logit_std: StdOption = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = DtypeChoice.AUTO,
    expert_layout: LayoutOption = ExpertLayout.PER_EXPERT,
    max_shard_size: ShardOption = "5GB",
    untie_embeddings: UntieOption = False,
    tensors: Annotated[
        bool, option("--tensors", help="List every tensor.", rich_help_panel=RUN)
    ] = False,
    weights: Annotated[
        bool,
        option(
            "--weights",
            help="Read the experts of an MoE: which are identical, which groups are whole.",
            rich_help_panel=RUN,
        ),
    ] = False,
    dense: Annotated[
        Path | None,
        option(
            help="With --weights: the dense checkpoint, to measure the scale factors.",
            rich_help_panel=RUN,
        ),
    ] = None,
    revision: RevisionOption = None,
    json: JsonOption = False,
) -> None:
    """Show what a checkpoint is, or what converting it would give; reads headers only.

    Example: upcycle inspect Llama-3.1-8B --recipe E8G8T8
    """
    with errors_to_exit_codes(as_json=json):
        from upcycle_cli import inspection, render
        from upcycle_cli.hub.requests import be_quiet

        if dense is not None and not weights:
            raise UpcycleError("--dense says what to compare weights with.", "Add --weights.")
        options = file_options(dtype, expert_layout, max_shard_size, untie=untie_embeddings)
        how: dict[str, Any] = {
            "routing": routing,
            "scaling": scaling,
            "scale_split": scale_split,
            "virtual_groups": virtual_groups,
            "router_logit_std": router_logit_std,
            "seed": seed,
        }
        sizes = recipe_by_source(context)
        wanted = (
            asked_recipe(recipe_sizes(*sizes), allow_inexact=True, **how) if any(sizes) else None
        )
        if wanted is None and is_given(context, "target", *how, *FILE_OPTIONS):
            raise UpcycleError(
                "these options say how to convert, and no --recipe does.", "Add --recipe E8G1T2."
            )
        be_quiet(bars=weights and not json and sys.stderr.isatty())
        found = inspection.inspect(
            path,
            wanted,
            revision=revision,
            target=target,
            options=options,
            weights=weights,
            dense=dense,
        )
        if json:
            listed = {"tensors": render.tensors_json(found)} if tensors else {}
            print_json(render.inspection_json(found) | listed)
            return
        show(render.inspection_table(found))
        if found.plan is not None:
            stdout().print()
            _print_plan(found.plan)
        if tensors:
            # A list is for grep: one line a tensor, however wide the screen is.
            stdout().out("", *render.tensor_lines(found), sep="\n", highlight=False)


_CHECKS = "structure,files,weights,outputs,claims"


@app.command()
def verify(
    dense: Annotated[
        Path,
        typer.Argument(
            metavar="DENSE",
            parser=path_argument,
            help="The dense checkpoint: a directory, or a repo on the Hub.",
        ),
    ],
    moe: Annotated[
        Path,
        typer.Argument(
            metavar="MOE",
            parser=path_argument,
            help="The MoE made from it: a directory, or a repo on the Hub.",
        ),
    ],
    checks: Annotated[
        str,
        option(
            metavar="NAMES",
            help=f"Which checks to run, with commas between: {_CHECKS.replace(',', ', ')}; all "
            "unless given.",
            show_default=False,
        ),
    ] = _CHECKS,
    prompts: Annotated[
        Path | None,
        option(help="Text file to run both models on, instead of the built-in text."),
    ] = None,
    dense_revision: Annotated[
        str | None,
        option(metavar="REV", help="Branch, tag or commit of DENSE's repo.", rich_help_panel=HUB),
    ] = None,
    moe_revision: Annotated[
        str | None,
        option(metavar="REV", help="Branch, tag or commit of MOE's repo.", rich_help_panel=HUB),
    ] = None,
    allow_inexact: Annotated[
        bool,
        option(
            "--allow-inexact",
            help="Accept an MoE that does not promise equality: it is measured, not passed.",
        ),
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Prove that an MoE computes what its dense model computes; exit code 1 when it does not.

    Example: upcycle verify Llama-3.1-8B Llama-3.1-8B-E8G1T2
    """
    with errors_to_exit_codes(as_json=json):
        from upcycle_cli import render, verification
        from upcycle_cli.hub.requests import be_quiet

        be_quiet(bars=not quiet and not json and sys.stderr.isatty())
        names = [name.strip() for name in checks.split(",") if name.strip()]
        report = verification.verify(
            dense,
            moe,
            checks=names,
            prompts=prompts,
            dense_revision=dense_revision,
            moe_revision=moe_revision,
            allow_inexact=allow_inexact,
            on_start=None if quiet or json else _announce_check,
        )
        raise_signal()
        if json:
            print_json(report.to_json())
        elif not quiet:
            show(render.report_table(report))
        elif not report.accepted:
            show(render.report_table(report), stderr())
        if report.status == "skipped":
            fail("no check could run, so nothing is proven.", EXIT_ERROR)
        if report.status == "measured" and not allow_inexact:
            talk(
                "Nothing is proven of an MoE that promises no equality; --allow-inexact accepts it."
            )
        if not report.accepted:
            raise typer.Exit(EXIT_VERIFICATION_FAILED)


@app.command()
def push(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", parser=path_argument, help="What `upcycle convert` has made."
        ),
    ],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="ORG/NAME on the Hub; made if it is not there.")
    ],
    revision: Annotated[
        str | None,
        option(
            metavar="REV",
            help="Branch to push to, made if it is not there; refs/pr/N goes on with a pull "
            "request.",
            rich_help_panel=HUB,
        ),
    ] = None,
    private: PrivateOption = False,
    create_pr: PullRequestOption = False,
    message: Annotated[
        str | None,
        option("--message", "-m", help="First line of the commit.", rich_help_panel=HUB),
    ] = None,
    replace_card: Annotated[
        bool,
        option(
            "--replace-card",
            help="Replace the repo's README.md even where it was edited there.",
            rich_help_panel=HUB,
        ),
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Push a finished conversion to a repo on the Hugging Face Hub.

    Refuses what is not complete. Files that are there already are not sent again.

    Example: upcycle push Llama-3.1-8B-E8G1T2 my-org/Llama-3.1-8B-E8G1T2 --private
    """
    with errors_to_exit_codes(as_json=json):
        from upcycle_cli.hub.pushing import Destination
        from upcycle_cli.hub.requests import be_quiet
        from upcycle_cli.render import push_json

        be_quiet(bars=not quiet and not json and sys.stderr.isatty())
        destination = Destination(
            repo=repo,
            revision=revision,
            private=private,
            create_pr=create_pr,
            message=message,
            replace_card=replace_card,
        )
        done = _push(directory, destination, silent=quiet or json)
        if json:
            print_json(push_json(done))


@app.command()
def clean(
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT", parser=path_argument, help="Directory that was to be made."
        ),
    ],
    yes: Annotated[bool, option("--yes", "-y", help="Remove it, not only show it.")] = False,
    json: JsonOption = False,
) -> None:
    """Show what an unfinished conversion left in OUTPUT.partial; remove it with --yes."""
    with errors_to_exit_codes(as_json=json):
        from upcycle_cli import publish
        from upcycle_cli.render import size_text

        found = publish.clean(output.absolute(), remove=yes)
        size = size_text(found.nbytes)
        if json:
            status = "removed" if yes else "found"
            print_json({"status": status, "partial": str(found.path), "bytes": found.nbytes})
        elif yes:
            talk(f"Removed {found.path} ({size}).")
            _warn_all(filter(None, [found.note]))
        else:
            line = f"{printable(str(found.path))}: {size} of {found.what}"
            stdout().print(line, markup=False, soft_wrap=True)
            talk(f"Remove it with: {shell_line(['upcycle', 'clean', '--yes', str(output)])}")


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
    json: JsonOption = False,
) -> None:
    """Make a small dense model, convert it to E8G8T8, inspect and verify it; needs no network."""
    with errors_to_exit_codes(as_json=json):
        from upcycle_cli.demo import run_demo

        if not json:
            run_demo(directory, run=_run_shown, say=talk)
            return
        steps: list[dict[str, Any]] = []
        found = run_demo(
            directory, run=functools.partial(_run_silently, steps), say=lambda *_: None
        )
        print_json({"status": "passed", "directory": str(found), "steps": steps})


# How commands talk -------------------------------------------------------------------------------


def _check_push_options(
    repo: str | None, revision: str | None, *, private: bool, create_pr: bool
) -> None:
    if repo is None and (private or create_pr or revision is not None):
        raise UpcycleError(
            "--private, --create-pr and --push-revision say how to push, and nothing is pushed.",
            "Add --push-to-hub REPO.",
        )


def _destination(
    repo: str | None, *, revision: str | None, private: bool, create_pr: bool
) -> Destination | None:
    if repo is None:
        return None
    from upcycle_cli.hub.pushing import Destination

    return Destination(repo=repo, revision=revision, private=private, create_pr=create_pr)


def _check_destination(destination: Destination) -> None:
    """Find out now, and not after hours of work, that the Hub would refuse."""
    from upcycle_cli.hub.pushing import check_destination

    check_destination(destination)


def _push(directory: Path, destination: Destination, *, silent: bool) -> Push:
    from upcycle_cli.hub.pushing import push as push_directory
    from upcycle_cli.render import push_table, size_text

    def announce(files: int, nbytes: int) -> None:
        if not silent:
            talk(f"Pushing {counted(files, 'file')}, {size_text(nbytes)}, to {destination.repo} …")

    done = push_directory(directory, destination, on_start=announce)
    raise_signal()
    if not silent:
        # Where no terminal folds lines, an address stays in one piece.
        show(push_table(done), stdout(None if sys.stdout.isatty() else 200))
        for reminder in done.reminders:
            warn(reminder)
    return done


def _announce_download(plan: Plan, nbytes: int, *, silent: bool) -> None:
    if not silent:
        from upcycle_cli.render import size_text

        talk(f"Downloading {size_text(nbytes)} of {plan.source.name} …")


def _convert(
    run: Callable[..., Conversion],
    plan: Plan,
    destination: Destination | None,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    from upcycle_cli import render
    from upcycle_cli.progress import progress_bar

    with progress_bar(stderr(), total=plan.nbytes, silent=quiet or as_json) as progress:

        def advance(num_bytes: int) -> None:
            raise_signal()
            progress.advance(num_bytes)

        def checking(name: str) -> None:
            raise_signal()
            progress.checking(name)

        done = run(progress=advance, on_check=checking)
    if not as_json and not quiet:
        _print_conversion(done, to_push=destination is not None)
    pushed = None
    if destination is not None and done.published:
        pushed = _push_conversion(done, destination, silent=quiet or as_json)
    if as_json:
        print_json(render.conversion_json(done, pushed))
    if not done.published:
        if quiet and done.report is not None:
            show(render.report_table(done.report), stderr())
        found = "verification failed; nothing was published."
        if done.already_done:
            found = f"{done.output} is damaged. Make it again with --overwrite."
        fail(found, EXIT_VERIFICATION_FAILED)


def _push_conversion(done: Conversion, destination: Destination, *, silent: bool) -> Push:
    try:
        return _push(done.output, destination, silent=silent)
    except UpcycleError as error:
        again = shell_line(["upcycle", "push", str(done.output), destination.repo])
        raise UpcycleError(
            f"{done.output} is complete, but was not pushed: {error.message}",
            f"{error.hint or ''}\nGo on with: {again}".strip(),
        ) from error


def _print_conversion(done: Conversion, *, to_push: bool) -> None:
    from upcycle_cli import render

    if done.already_done:
        _warn_all(done.warnings)
        if done.report is not None:
            show(render.report_table(done.report))
        if done.published:
            talk(f"{done.output} is already what this command makes; nothing to do.")
        return
    _print_plan(done.plan)
    if done.report is not None:
        stdout().print()
        show(render.report_table(done.report))
    _warn_all(done.warnings)
    if done.published:
        talk("", f"Wrote {done.output} in {done.seconds:.1f} s.{_savings(done)}")
        if not to_push:
            talk(f"Next: {shell_line(_next_step(done))}")


def _next_step(done: Conversion) -> list[str]:
    from upcycle_cli.card import repo_name

    if done.report is not None:
        return ["upcycle", "push", str(done.output), f"my-org/{repo_name(done.output.name)}"]
    source = done.plan.source
    options = ["--dense-revision", source.revision] if source.revision else []
    if done.plan.promise is Promise.NONE:
        options.append("--allow-inexact")
    return ["upcycle", "verify", source.repo or str(source.path), str(done.output), *options]


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

    show(render.plan_table(plan))
    _warn_all(warnings(plan))


def _warn_all(texts: Iterable[str]) -> None:
    for text in texts:
        warn(text)


_DEMO = "demo"
_IN_DEMO: Mapping[str, Any] = {
    "standalone_mode": False,
    # A demo shows what its commands say, whatever is set for real ones.
    "auto_envvar_prefix": f"{_VARIABLES}_DEMO",
    "obj": _DEMO,
}


def _run_shown(arguments: list[str]) -> int:
    """Show a command as one would type it, run it here, and return its exit code."""
    command = Text(f"\n$ {shell_line(['upcycle', *arguments])}", style="bold")
    stderr().print(command, soft_wrap=True)
    return app(arguments, **_IN_DEMO) or 0


def _run_silently(steps: list[dict[str, Any]], arguments: list[str]) -> int:
    """Run a command here with --json, keep what it prints, and return its exit code."""
    output = io.StringIO()
    with redirect_stdout(output):
        code: int = app([*arguments, "--json"], **_IN_DEMO) or 0
    result_json = loads(output.getvalue()) if output.getvalue() else None
    steps.append({"command": ["upcycle", *arguments], "exit_code": code, "result": result_json})
    return code


def _announce_check(name: str) -> None:
    if sys.stderr.isatty():
        talk(f"checking {name} …")
