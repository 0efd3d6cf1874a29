"""Where option values come from (command line, variable, recipe file), and how they are saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer  # noqa: TC002 - it reads the annotations of a callback

from upcycle_cli.cli.options import read_path

if TYPE_CHECKING:
    from upcycle_cli.plan.plan import Plan
    from upcycle_cli.recipe.recipe_file import Kind, Value

SIZES = ("expansion", "granularity", "top_k")
_NOT_IN_FILE = ("config", "from_mergekit", "save_config", "dry_run", "help")
_NOT_SAVED = (*SIZES, "json", "quiet")
"""The recipe has the first three; the others belong to one run."""


def use_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the values of a recipe file the defaults of the options that are parsed after it."""
    if path is not None and not context.resilient_parsing:
        from upcycle_cli.recipe.recipe_file import load_config

        values = load_config(path, _file_options(context))
        context.default_map = {**(context.default_map or {}), **values}
    return path


def use_mergekit(context: typer.Context, path: Path | None) -> Path | None:
    """Make the values of a mergekit-moe file the defaults of the options parsed after it."""
    if path is not None and not context.resilient_parsing:
        from upcycle_cli.plan.mergekit import read_mergekit

        context.default_map = {**(context.default_map or {}), **read_mergekit(path)}
    return path


def source_of(context: typer.Context, name: str) -> str:
    """Return who set an option: COMMANDLINE, ENVIRONMENT, DEFAULT_MAP (a file) or DEFAULT."""
    source = context.get_parameter_source(name)
    return "DEFAULT" if source is None else source.name


def is_given(context: typer.Context, *names: str) -> bool:
    """Whether one of these options was set."""
    return any(source_of(context, name) != "DEFAULT" for name in names)


def places(context: typer.Context, source: Path | None, output: Path | None) -> tuple[Path, Path]:
    """Return SOURCE and OUTPUT; a single argument is OUTPUT if a recipe file names the source."""
    named = (context.default_map or {}).get("source")
    alone = [source_of(context, name) == "COMMANDLINE" for name in ("source", "output")]
    if named is not None and alone == [True, False]:
        source, output = read_path(named), source
    if source is None or output is None:
        context.fail(f"Missing argument '{'SOURCE' if source is None else 'OUTPUT'}'.")
    context.params |= {"source": source, "output": output}
    return source, output


def save_options(path: Path, context: typer.Context, plan: Plan) -> None:
    """Write a recipe file with every option and what `auto` chose; UpcycleError, OSError."""
    from upcycle_cli.hub.remote_checkpoint import is_repo_id
    from upcycle_cli.recipe.recipe_file import save_config
    from upcycle_cli.write.staging import partial_of

    given, known = context.params, _file_options(context)
    values = {
        name: _saved_value(given[name])
        for name in known
        if name not in _NOT_SAVED and given[name] is not None and given[name] not in ([], ())
    }
    if plan.expansion is None:
        recipe = plan.recipe  # with what `auto` chose, so that a later version does the same
        values |= {"recipe": recipe.name, "target": plan.family.choice}
        values |= {"routing": str(recipe.routing), "scale_split": str(recipe.scale_split)}
        if recipe.router_logit_std is not None:
            values["router_logit_std"] = recipe.router_logit_std
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
    save_config(path, values, known, keep_out_of=keep_out_of)


def _file_options(context: typer.Context) -> dict[str, Kind]:
    """Return the options that a recipe file can set, and the kind of value each takes."""
    from upcycle_cli.recipe.recipe_file import Kind

    kinds: dict[str, Kind] = {}
    for option in context.command.params:
        if option.name and option.name not in _NOT_IN_FILE:
            single = Kind.FLAG if getattr(option, "is_flag", False) else Kind.VALUE
            kinds[option.name] = Kind.LIST if getattr(option, "multiple", False) else single
    return kinds


def _saved_value(value: object) -> Value:
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    return value if isinstance(value, bool | int | float) else str(value)
