"""Options are declared in options.toml; a command lists them with their types and defaults."""

from __future__ import annotations

import inspect
import os
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, get_args, get_origin

import typer

_NOT_IN_FILE = ("config", "from_mergekit", "save_config", "dry_run", "help")
_TABLE = tomllib.loads(Path(__file__).with_name("options.toml").read_text(encoding="utf-8"))
_FLAGS = {
    name: row.get("argument")
    or row.get("flags", [f"--{name.replace('_', '-')}"])[0].rpartition("/")[2]
    for table in reversed(_TABLE.values())
    for name, row in table.items()
}


def with_flags(text: str) -> str:
    """Return a message with flags for the arguments that it names: `top_k` becomes --top-k."""
    pattern = r"`(?:Growth\()?(\w+)(?:=True|=(\d+)\))?`"
    return re.sub(pattern, lambda m: f"{_FLAGS.get(m[1], m[0])} {m[2] or ''}".strip(), text)


def read_path(text: str) -> Path:
    """Read a path; an empty one is an unset shell variable, not the current directory."""
    if not text.strip():
        raise typer.BadParameter("it is empty")
    return Path(text)


@dataclass(frozen=True, kw_only=True)
class MoeOptions:
    """The options that describe the MoE to make; convert and inspect take them."""

    recipe: str | None = None
    expand: int | None = None
    target: str = "auto"
    routing: str = "auto"
    layers: str | None = None
    shared_experts: int = 0
    expansion: int | None = None
    granularity: int | None = None
    top_k: int | None = None
    router_init: str = "normal"
    calibration: Path | None = None
    seed: int = 0
    scaling: str = "exact"
    scale_split: str | None = None
    virtual_groups: bool = True
    router_logit_std: float | None = None
    neuron_order: str = "sliced"
    noise: float = 0.0
    reinit: float = 0.0
    dtype: str = "auto"
    max_shard_size: str = "5GB"
    expert_layout: str | None = None
    untie_embeddings: bool = False


def declared(command: Callable[..., None]) -> Callable[..., None]:
    """Declare a command's parameters as options.toml describes them.

    A parameter of the type MoeOptions is replaced by the fields of that class.
    """
    signature = inspect.signature(command, eval_str=True)
    moe = inspect.signature(MoeOptions, eval_str=True).parameters
    found: list[inspect.Parameter] = []
    for each in signature.parameters.values():
        found += moe.values() if each.annotation is MoeOptions else [each]
    takes_moe = len(found) > len(signature.parameters)
    rows = _TABLE["common"] | _TABLE["moe"] | _TABLE[command.__name__]

    @wraps(command)
    def run(**values: Any) -> None:  # noqa: ANN401 - as typer has them
        if takes_moe:
            values["moe"] = MoeOptions(**{name: values.pop(name) for name in moe})
        command(**values)

    parameters = [
        _described(each, dict(rows[each.name]), command.__name__) if each.name in rows else each
        for each in found
    ]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _described(each: inspect.Parameter, row: dict[str, Any], command: str) -> inspect.Parameter:
    """Return a parameter as typer reads it; `hidden` leaves an option to --help-all."""
    default = ... if each.default is each.empty else each.default
    default = [] if get_origin(each.annotation) is list else default
    row["help"] = row["help"].replace("{default}", str(default))
    if Path in (each.annotation, *get_args(each.annotation)):
        row["parser"] = read_path
    more, panel, flags = (row.pop(key, ()) for key in ("more", "panel", "flags"))
    choices = row.pop("choices", None)
    if metavar := row.pop("argument", None):
        return each.replace(default=typer.Argument(default, metavar=metavar, **row))
    hidden = (more is True or command in more) and "_UPCYCLE_COMPLETE" not in os.environ
    row |= {"hidden": hidden, "rich_help_panel": panel or None}
    row["autocompletion"] = choices and (lambda: choices)
    row["callback"] = use_file if row.get("is_eager") else None
    return each.replace(default=typer.Option(default, *flags, **row))


def use_file(context: typer.Context, option: typer.CallbackParam, path: Path | None) -> Path | None:
    """Make the values of a recipe file or a mergekit file the defaults of the other options."""
    if path is None or context.resilient_parsing:
        return path
    values: dict[str, Any]
    if option.name == "config":
        from upcycle_cli.recipe.recipe_file import load_config

        values = load_config(path, file_options(context))
    else:
        from upcycle_cli.plan.texts import read_mergekit

        values = read_mergekit(path)
    context.default_map = {**(context.default_map or {}), **values}
    return path


def file_options(context: typer.Context) -> dict[str, type]:
    """Return the options that a recipe file can set, and the type that each takes."""
    kinds: dict[str, type] = {}
    for option in context.command.params:
        if option.name and option.name not in _NOT_IN_FILE:
            single = bool if getattr(option, "is_flag", False) else str
            kinds[option.name] = list if getattr(option, "multiple", False) else single
    return kinds
