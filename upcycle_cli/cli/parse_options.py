"""Option values: from the command line, variables and recipe files to the library's objects."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer  # noqa: TC002 - it reads the annotations of a callback

from upcycle_cli.cli.options import MoeOptions, file_options, read_path, with_flags
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.text import choose_from, shell_line
from upcycle_cli.recipe.recipe import Growth, NeuronOrder, Recipe, RouterInit

if TYPE_CHECKING:
    from upcycle_cli.plan.budget import Budget
    from upcycle_cli.plan.output import Options
    from upcycle_cli.plan.plan import Plan
    from upcycle_cli.recipe.recipe_file import Value

_SIZES = ("expansion", "granularity", "top_k")
_NOT_SAVED = (*_SIZES, "json", "quiet")
"""The recipe has the first three; the others belong to one run."""
_WITH_EXPAND = ("expand", "top_k", "dtype", "expert_layout", "max_shard_size", "untie_embeddings")
_WITH_BUDGET = ("target", "routing", "layers", "shared_experts", "untie_embeddings")
_NEEDS = {
    "dense": ("experts_from",),
    "experts_from": ("rest", "source_experts"),
    "push_to_hub": ("push_revision", "private", "create_pr"),
}
"""The options that make sense with another one only."""

# Each with groups for the prefix of the unit, for binary units, and for a factor.
_COUNT = r"([KMBT]?)()()", "a number of parameters; write 50B or 700M"
_SIZE = r"([KMGT]?)(I?)B?()", "a size; write 5GB or 500MB"
_MEMORY = r"([KMGT]?)(I?)B?\s*(?:[x×*]\s*([1-9]\d{0,5}))?", "a size; write 80GB or 80GB×8"


# Sources ------------------------------------------------------------------------------------------


def _source_of(context: typer.Context, name: str) -> str:
    """Return who set an option: COMMANDLINE, ENVIRONMENT, DEFAULT_MAP (a file) or DEFAULT."""
    source = context.get_parameter_source(name)
    return "DEFAULT" if source is None else source.name


def _given(context: typer.Context, *names: str) -> list[str]:
    """Return which of these options were set."""
    return [name for name in names if _source_of(context, name) != "DEFAULT"]


def places(context: typer.Context, source: Path | None, output: Path | None) -> tuple[Path, Path]:
    """Return SOURCE and OUTPUT; a single argument is OUTPUT if a recipe file names the source."""
    named = (context.default_map or {}).get("source")
    alone = [_source_of(context, name) == "COMMANDLINE" for name in ("source", "output")]
    if named is not None and alone == [True, False]:
        source, output = read_path(named), source
    if source is None or output is None:
        context.fail(f"missing argument '{'SOURCE' if source is None else 'OUTPUT'}'.")
    context.params |= {"source": source, "output": output}
    return source, output


def save_options(path: Path, context: typer.Context, plan: Plan) -> None:
    """Write a recipe file with every option and what `auto` chose; UpcycleError, OSError."""
    from upcycle_cli.recipe.recipe_file import save_config
    from upcycle_cli.write.staging import partial_of

    given, known = context.params, file_options(context)
    values = {
        name: _saved_value(given[name])
        for name in known
        if name not in _NOT_SAVED and given[name] is not None and given[name] not in ([], ())
    }
    if plan.growing is None:
        recipe = plan.recipe  # with what `auto` chose, so that a later version does the same
        values |= {"recipe": recipe.name, "target": plan.family.choice}
        values |= {"routing": str(recipe.routing), "scale_split": str(recipe.scale_split)}
        if recipe.router_logit_std is not None:
            values["router_logit_std"] = recipe.router_logit_std
        if plan.inputs.text is not None and "positive_prompts" not in values:
            values.setdefault("calibration", plan.inputs.text.name)
    else:
        values = {name: values[name] for name in _given(context, *values)}
        values["top_k"] = plan.top_k
    values["expert_layout"] = str(plan.expert_layout)
    if plan.source.repo is not None or plan.source.adapter is not None:
        values["source"] = plan.source.location  # with the commits
        values.pop("revision", None)
    output = given["output"]
    paths = [part.path for part in plan.source.base_and_adapter]
    keep_out_of = (*paths, output, partial_of(output.absolute()))
    save_config(path, values, known, keep_out_of=keep_out_of)


def _saved_value(value: object) -> Value:
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    return value if isinstance(value, bool | int | float) else str(value)


# Values -------------------------------------------------------------------------------------------


def needs_recipe(context: typer.Context) -> bool:
    """Whether a recipe or a growth is given; UpcycleError for options that lack one."""
    if _given(context, "recipe", "expand", *_SIZES):
        return True
    if given := _given(context, *(each.name for each in fields(MoeOptions))):
        words = f"{_flags(given)} cannot be used without --recipe or --expand."
        raise UpcycleError(words, "Add --recipe E8G1T2, or --expand 2 for an MoE.")
    return False


def check_pairs(context: typer.Context) -> None:
    """Raise UpcycleError for an option without the one that it needs."""
    defaults = {each.name: each.default for each in context.command.params}
    for needed, names in _NEEDS.items():
        given = [name for name in names if context.params.get(name) != defaults.get(name)]
        if given and not context.params.get(needed, True):
            words = "need" if len(given) > 1 else "needs"
            raise UpcycleError(f"{_flags(given)} {words} {_flags([needed])}.")


def file_of(value: str, names: type[StrEnum]) -> Path | None:
    """Return the file that an option names, None for one of `names`; raises UpcycleError."""
    if value in {*names} - {"file"}:
        return None
    if not Path(value).is_file():
        choices = [name for name in names if name not in {"file", "prompts"}]
        hint = f"{choose_from(value, choices)} Or give a safetensors file."
        raise UpcycleError(f"there is no file '{value}'.", hint)
    return Path(value)


def to_recipe(moe: MoeOptions, context: typer.Context, *, allow_inexact: bool) -> Recipe | Growth:
    """Return the recipe or the growth; UpcycleError when there is none, or both."""
    if moe.expand is not None:
        _check_conflicts(context, _WITH_EXPAND, "--expand grows an MoE; it takes no")
        return Growth(expand=moe.expand, top_k=moe.top_k, allow_inexact=allow_inexact)
    values: dict[str, Any] = {n.name: getattr(moe, n.name, None) for n in fields(Recipe)}
    values |= _recipe_sizes(context)
    values["routing"] = None if moe.routing == "auto" else moe.routing
    with suppress(ValueError):
        values["scaling"] = float(moe.scaling)
    values["allow_inexact"] = allow_inexact
    for name, known in (("neuron_order", NeuronOrder), ("router_init", RouterInit)):
        if file_of(values[name], known) is not None:
            values[name] = known("file")
    return Recipe(**values)


def to_options(moe: MoeOptions) -> Options:
    """Return the options for the output files; UpcycleError for a bad size."""
    from upcycle_cli.plan.output import Options

    return Options(
        dtype=None if moe.dtype == "auto" else moe.dtype,
        expert_layout=moe.expert_layout,
        max_shard_bytes=_number("max_shard_size", moe.max_shard_size, _SIZE),
        untie_embeddings=moe.untie_embeddings,
    )


def to_budget(
    max_params: str | None, max_active: str | None, memory: str | None, *, every: bool = False
) -> Budget | None:
    """Return the budget, None without one unless all recipes are wanted; UpcycleError."""
    if max_params is None and max_active is None and memory is None and not every:
        return None
    from upcycle_cli.plan.budget import Budget

    return Budget(
        max_params=None if max_params is None else _number("max_params", max_params, _COUNT),
        max_active=None if max_active is None else _number("max_active", max_active, _COUNT),
        gpu_bytes=None if memory is None else _number("gpu_memory", memory, _MEMORY),
    )


def to_shared_choices(moe: MoeOptions, context: typer.Context) -> dict[str, Any]:
    """Return what the recipes in a budget have in common; UpcycleError for a recipe's options."""
    _check_conflicts(context, _WITH_BUDGET, "a list of the recipes that fit takes no")
    return {
        "target": moe.target,
        "options": to_options(moe),
        "routing": None if moe.routing == "auto" else moe.routing,
        "layers": moe.layers,
        "shared_experts": moe.shared_experts,
    }


def convert_command(context: typer.Context, recipe: str) -> str:
    """Return the command that converts PATH with a recipe and the choices made here."""
    source = context.params["path"]
    output = f"{source.absolute().name}-{recipe}"
    if Path.cwd().is_relative_to(source.resolve()):  # convert refuses an output in its source
        output = os.path.relpath(f"{source.resolve()}-{recipe}")
    words = ["upcycle", "convert", str(source), output, "--recipe", recipe, "--verify"]
    for name in _given(context, *_WITH_BUDGET, "revision"):
        value = context.params[name]
        words += [_flags([name]), *([] if value is True else [str(value)])]
    return shell_line(words)


def _check_conflicts(context: typer.Context, allowed: Sequence[str], words: str) -> None:
    names = [each.name for each in fields(MoeOptions) if each.name not in allowed]
    if given := _given(context, *names):
        able = _flags(name for name in allowed if name != "expand")
        raise UpcycleError(f"{words} {_flags(given)}.", f"It takes {able}.")


def _flags(names: Iterable[str]) -> str:
    return with_flags(", ".join(f"`{name}`" for name in names))


def _recipe_sizes(context: typer.Context) -> dict[str, int]:
    """Return E, G and T: the command line overrides variables, and these override a file."""
    found: dict[str, int] = {}
    for source in ("DEFAULT_MAP", "ENVIRONMENT", "COMMANDLINE"):
        names = [name for name in ("recipe", *_SIZES) if _source_of(context, name) == source]
        given = {name: context.params[name] for name in names}
        if "recipe" in given:
            recipe = Recipe(given.pop("recipe"), **given, allow_inexact=True)
            given = {name: getattr(recipe, name) for name in _SIZES}
        found |= given
    if missing := [name for name in _SIZES if name not in found]:
        raise UpcycleError(
            f"{_flags(missing)} missing." if found else "no recipe is given.",
            "Add --recipe E8G1T2 (8 experts, 2 active), or --expand 2 to grow an MoE.",
        )
    return found


def _number(name: str, text: str, kind: tuple[str, str]) -> int:
    """Read a number with a unit of a thousand, a million and so on, such as 5GB or 80GB×8."""
    unit, wanted = kind
    text = re.sub(r"^\s*(\d+)\s*[x×*]\s*(\S.*)$", r"\2x\1", text) if kind is _MEMORY else text
    pattern = rf"\s*(\d{{1,12}}(?:\.\d{{1,6}})?)\s*{unit}\s*"
    match = re.fullmatch(pattern, text, re.IGNORECASE)
    if match is None:
        raise UpcycleError(f"{_flags([name])} '{text}' is not {wanted}.")
    number, prefix, binary, times = match.groups()
    power = " KMGT".index(prefix.upper().replace("B", "G") or " ")
    if power == 0 and kind is not _COUNT and 1 <= float(number) < 1e6:
        raise UpcycleError(f"{_flags([name])} {text} means {number} bytes; write {number}GB.")
    return int(float(number) * (1024 if binary else 1000) ** power) * int(times or 1)
