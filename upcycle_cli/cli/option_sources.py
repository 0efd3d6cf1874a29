"""What was asked for, and where: on the command line, in a variable, or in a recipe file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer  # noqa: TC002 - it reads the annotations of a callback

from upcycle_cli.cli.shared_options import path_argument

if TYPE_CHECKING:
    from upcycle_cli.plan.base import Planned
    from upcycle_cli.plan.upcycle import Plan
    from upcycle_cli.recipe.recipe_file import Kind, Value


def use_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make what a recipe file says the defaults of all options that are parsed after it."""
    if path is None or context.resilient_parsing:
        return path
    from upcycle_cli.recipe.recipe_file import load_config

    values = load_config(path, _config_options(context))
    context.default_map = {**(context.default_map or {}), **values}
    return path


def use_mergekit(context: typer.Context, path: Path | None) -> Path | None:
    """Make what mergekit's file says the defaults of all options that are parsed after it."""
    if path is None or context.resilient_parsing:
        return path
    from upcycle_cli.plan.mergekit import read_mergekit

    context.default_map = {**(context.default_map or {}), **read_mergekit(path)}
    return path


SIZES = ("expansion", "granularity", "top_k")
_NOT_IN_CONFIG = ("config", "from_mergekit", "save_config", "dry_run", "help")
_NOT_SAVED = (*SIZES, "json", "quiet")
"""The recipe says the first three; the others are about one run."""


def _config_options(context: typer.Context) -> dict[str, Kind]:
    """Return the options that a recipe file can have, and what each takes."""
    from upcycle_cli.recipe.recipe_file import Kind

    return {
        option.name: Kind.LIST
        if option.multiple
        else Kind.FLAG
        if getattr(option, "is_flag", False)
        else Kind.VALUE
        for option in context.command.params
        if option.name and option.name not in _NOT_IN_CONFIG
    }


def source_of(context: typer.Context, name: str) -> str:
    """Return who has set an option: COMMANDLINE, ENVIRONMENT, DEFAULT_MAP (a file), DEFAULT."""
    source = context.get_parameter_source(name)
    return "DEFAULT" if source is None else source.name


def is_given(context: typer.Context, *names: str) -> bool:
    """Whether somebody has set one of these options."""
    return any(source_of(context, name) != "DEFAULT" for name in names)


def places(context: typer.Context, source: Path | None, output: Path | None) -> tuple[Path, Path]:
    """Return SOURCE and OUTPUT, wherever they were given.

    One argument alone is OUTPUT where a recipe file names the source: typer takes it for the first.
    """
    named = (context.default_map or {}).get("source")
    alone = [source_of(context, name) == "COMMANDLINE" for name in ("source", "output")]
    if named is not None and alone == [True, False]:
        source, output = path_argument(named), source
    if source is None or output is None:
        missing = "SOURCE" if source is None else "OUTPUT"
        context.fail(f"Missing argument '{missing}'.")
    context.params |= {"source": source, "output": output}
    return source, output


def _saved(value: object) -> Value:
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    return value if isinstance(value, bool | int | float) else str(value)


def save_options(path: Path, context: typer.Context, plan: Planned) -> None:
    """Write a recipe file with every option, and what a plan made of it; UpcycleError, OSError."""
    from upcycle_cli.hub.remote_checkpoint import is_repo_id
    from upcycle_cli.plan.upcycle import Plan
    from upcycle_cli.recipe.recipe_file import save_config
    from upcycle_cli.write.staging import partial_of

    given = context.params
    saved = {name: given[name] for name in _config_options(context) if name not in _NOT_SAVED}
    values = {
        name: _saved(value)
        for name, value in saved.items()
        if value is not None and value not in ([], ())
    }
    if isinstance(plan, Plan):
        values |= _resolved(plan)
        if plan.inputs.text is not None and "positive_prompts" not in values:
            values.setdefault("calibration", plan.inputs.text.name)
    else:
        values = {name: value for name, value in values.items() if is_given(context, name)}
        values["top_k"] = plan.top_k
    values["expert_layout"] = str(plan.expert_layout)
    if is_repo_id(given["source"]) and plan.source.revision is not None:
        values["revision"] = plan.source.revision
    output = given["output"]
    keep_out_of = (plan.source.path, output, partial_of(output.absolute()))
    save_config(path, values, _config_options(context), keep_out_of=keep_out_of)


def _resolved(plan: Plan) -> dict[str, Any]:
    """Return what auto stands for today, so that the file means the same tomorrow."""
    values: dict[str, Any] = {
        "recipe": plan.recipe.name,
        "target": plan.family.choice,
        "routing": str(plan.recipe.routing),
        "scale_split": str(plan.recipe.scale_split),
    }
    if plan.recipe.router_logit_std is not None:
        values["router_logit_std"] = plan.recipe.router_logit_std
    return values
