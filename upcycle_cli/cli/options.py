"""Options are declared in options.toml; a command lists them with their types and defaults."""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import typer

_PATHS = {"FILE", "MODEL"}
"""The metavars of options that take a path."""
_TABLE = tomllib.loads(Path(__file__).with_name("options.toml").read_text(encoding="utf-8"))


def options_of(command: str) -> Callable[..., Any]:
    """Return the function that declares an option of a command, by name and default."""
    rows = _TABLE[command]

    def declare(name: str, default: object, **settings: Any) -> Any:  # noqa: ANN401 - typer's
        row = rows[name] | settings
        row.pop("more", None)
        row["help"] = row["help"].replace("{default}", str(default))
        if metavar := row.pop("argument", None):
            return typer.Argument(default, metavar=metavar, **row)
        flags, panel = row.pop("flags", ()), row.pop("panel", None)
        if row.get("metavar") in _PATHS:
            row.setdefault("parser", read_path)
        return typer.Option(default, *flags, rich_help_panel=panel, **row)

    return declare


def row_of(command: str, name: str) -> dict[str, Any]:
    """Return an option's row, empty for typer's own; `more` says that only --help-all shows it."""
    for table in (command, "common", "moe"):
        if row := _TABLE.get(table, {}).get(name):
            more = row.get("more", False)
            return {**row, "more": more is True or (more and command in more)}
    return {}


_FLAGS = {
    name: row.get("argument")
    or row.get("flags", [f"--{name.replace('_', '-')}"])[0].rpartition("/")[2]
    for table in reversed(_TABLE.values())
    for name, row in table.items()
}


def with_flags(text: str) -> str:
    """Return a message with flags for the arguments that it names: `top_k` becomes --top-k."""
    return re.sub(r"`(\w+)(?:=True)?`", lambda match: _FLAGS.get(match[1], match[0]), text)


def read_path(text: str) -> Path:
    """Read a path; an empty one is an unset shell variable, not the current directory."""
    if not text.strip():
        raise typer.BadParameter("it is empty")
    return Path(text)


_common, _moe = options_of("common"), options_of("moe")

JSON = _common("json", False)
QUIET = _common("quiet", False)
REVISION = _common("revision", None)
PRIVATE = _common("private", False)
CREATE_PR = _common("create_pr", False)


@dataclass(frozen=True, kw_only=True)
class MoeOptions:
    """The options that describe the MoE to make; convert and inspect take them."""

    recipe: str | None = _moe("recipe", None)
    expand: int | None = _moe("expand", None)
    target: str = _moe("target", "auto")
    routing: str = _moe("routing", "auto")
    layers: str | None = _moe("layers", None)
    shared_experts: int = _moe("shared_experts", 0)
    expansion: int | None = _moe("expansion", None)
    granularity: int | None = _moe("granularity", None)
    top_k: int | None = _moe("top_k", None)
    router_init: str = _moe("router_init", "normal")
    calibration: Path | None = _moe("calibration", None)
    seed: int = _moe("seed", 0)
    scaling: str = _moe("scaling", "exact")
    scale_split: str | None = _moe("scale_split", None)
    virtual_groups: bool = _moe("virtual_groups", True)
    router_logit_std: float | None = _moe("router_logit_std", None)
    neuron_order: str = _moe("neuron_order", "sliced")
    noise: float = _moe("noise", 0.0)
    reinit: float = _moe("reinit", 0.0)
    dtype: str = _moe("dtype", "auto")
    max_shard_size: str = _moe("max_shard_size", "5GB")
    expert_layout: str | None = _moe("expert_layout", None)
    untie_embeddings: bool = _moe("untie_embeddings", False)


def takes_moe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter `moe` by the options of MoeOptions, one parameter each."""
    options = inspect.signature(MoeOptions, eval_str=True).parameters

    @wraps(command)
    def run(**values: Any) -> None:  # noqa: ANN401 - as typer has them
        moe = MoeOptions(**{name: values.pop(name) for name in options})
        command(**values, moe=moe)

    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for each in signature.parameters.values():
        parameters += options.values() if each.name == "moe" else [each]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run
