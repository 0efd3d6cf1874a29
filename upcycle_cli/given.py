"""What was asked for, and where: on the command line, in a variable, or in a recipe file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer  # noqa: TC002 - it reads the annotations of a callback

from upcycle_cli.group import UsageError
from upcycle_cli.options import SIZES, RoutingChoice, parse_scaling, path_argument
from upcycle_cli.recipe import Recipe, Routing

if TYPE_CHECKING:
    from upcycle_cli.plan import Plan


def use_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make what a recipe file says the defaults of all options that are parsed after it."""
    if path is None or context.resilient_parsing:
        return path
    from upcycle_cli.config import load_config

    flags = {
        parameter.name: bool(getattr(parameter, "is_flag", False))
        for parameter in context.command.params
    }
    values = load_config(path, {name: flags[name] for name in _config_names(context)})
    context.default_map = {**(context.default_map or {}), **values}
    return path


_NOT_IN_CONFIG = ("config", "save_config", "dry_run", "help")
_NOT_SAVED = ("expansion", "granularity", "top_k", "json", "quiet")
"""The recipe says the first three; the others are about one run."""


def _config_names(context: typer.Context) -> list[str]:
    names = [parameter.name for parameter in context.command.params if parameter.name]
    return [name for name in names if name not in _NOT_IN_CONFIG]


def _source_of(context: typer.Context, name: str) -> str:
    """Return who has set an option: COMMANDLINE, ENVIRONMENT, DEFAULT_MAP (a file), DEFAULT."""
    source = context.get_parameter_source(name)
    return "DEFAULT" if source is None else source.name


def is_given(context: typer.Context, *names: str) -> bool:
    """Whether somebody has set one of these options."""
    return any(_source_of(context, name) != "DEFAULT" for name in names)


FILE_OPTIONS = ("dtype", "expert_layout", "max_shard_size", "untie_embeddings")


def recipe_by_source(context: typer.Context) -> list[dict[str, Any]]:
    """Return what a file, variables and the command line say of E, G and T, in this order."""
    return [
        {
            name: context.params[name]
            for name in ("recipe", *SIZES)
            if _source_of(context, name) == source
        }
        for source in ("DEFAULT_MAP", "ENVIRONMENT", "COMMANDLINE")
    ]


def asked_recipe(
    sizes: tuple[int, int, int],
    *,
    routing: RoutingChoice,
    scaling: str,
    **others: Any,  # noqa: ANN401 - as Recipe takes them
) -> Recipe:
    """Return what the options ask for."""
    expansion, granularity, top_k = sizes
    return Recipe(
        expansion=expansion,
        granularity=granularity,
        top_k=top_k,
        routing=None if routing is RoutingChoice.AUTO else Routing(routing),
        scaling=parse_scaling(scaling),
        **others,
    )


def places(context: typer.Context, source: Path | None, output: Path | None) -> tuple[Path, Path]:
    """Return SOURCE and OUTPUT, wherever they were given.

    One argument alone is OUTPUT where a recipe file names the source: typer takes it for the first.
    """
    named = (context.default_map or {}).get("source")
    alone = [_source_of(context, name) == "COMMANDLINE" for name in ("source", "output")]
    if named is not None and alone == [True, False]:
        source, output = path_argument(named), source
    if source is None or output is None:
        missing = "SOURCE" if source is None else "OUTPUT"
        raise UsageError(f"Missing argument '{missing}'.", context)
    context.params |= {"source": source, "output": output}
    return source, output


def save_options(path: Path, context: typer.Context, plan: Plan) -> None:
    """Write a recipe file with every option, and what a plan made of it; UpcycleError, OSError."""
    from upcycle_cli.config import as_values, save_config
    from upcycle_cli.hub.sources import is_repo_id
    from upcycle_cli.workspace import partial_of

    given = context.params
    values = as_values(
        {name: given[name] for name in _config_names(context) if name not in _NOT_SAVED}
    )
    # What auto stands for today, so that the file means the same tomorrow.
    values |= {
        "recipe": plan.recipe.name,
        "target": plan.family.target.model_type,
        "routing": str(plan.recipe.routing),
        "router_logit_std": plan.recipe.router_logit_std or 0.0,
    }
    if is_repo_id(given["source"]) and plan.source.revision is not None:
        values["revision"] = plan.source.revision
    output = given["output"]
    keep_out_of = (plan.source.path, output, partial_of(output.absolute()))
    save_config(path, values, _config_names(context), keep_out_of=keep_out_of)
