"""What a conversion may cost, as `inspect` is asked: parameters, and the memory of GPUs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

from upcycle_cli.cli.moe_options import MoeOptions, parse_size, refuse_all_but
from upcycle_cli.cli.shared_options import for_budget
from upcycle_cli.core.errors import UpcycleError

if TYPE_CHECKING:
    import typer

    from upcycle_cli.plan.budget import Budget, Wanted

_HONOURED = ("target", "routing", "layers", "shared_experts", "untie_embeddings")
"""The options for one recipe that say something of all."""
_COUNT = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*([KMBT]?)", re.IGNORECASE)
_TIMES = re.compile(r"\s*[x×*]\s*(\d{1,6})\s*$", re.IGNORECASE)

MaxParamsOption = Annotated[
    str | None,
    for_budget(
        "--max-params",
        metavar="COUNT",
        help="List the recipes with at most so many parameters, such as 50B.",
    ),
]
MaxActiveOption = Annotated[
    str | None,
    for_budget(
        "--max-active",
        metavar="COUNT",
        help="With at most so many active per token, such as 15B.",
    ),
]
GpuMemoryOption = Annotated[
    str | None,
    for_budget(
        "--gpu-memory",
        metavar="SIZE",
        help="With weights that fit this memory in bfloat16, such as 80GB×8 (or 80GBx8).",
    ),
]


def to_budget(max_params: str | None, max_active: str | None, memory: str | None) -> Budget | None:
    """Return what is asked for, None when nothing is; raises UpcycleError for no such numbers."""
    if max_params is None and max_active is None and memory is None:
        return None
    from upcycle_cli.plan.budget import Budget

    return Budget(
        max_params=None if max_params is None else _count("--max-params", max_params),
        max_active=None if max_active is None else _count("--max-active", max_active),
        gpu_bytes=None if memory is None else _memory(memory),
    )


def to_wanted(context: typer.Context, moe: MoeOptions) -> Wanted:
    """Return what is wanted beside a budget; UpcycleError for options that only a recipe has."""
    from upcycle_cli.plan.budget import Wanted

    refuse_all_but(context, _HONOURED, "a budget is for all recipes that fit it, and takes")
    return Wanted(
        target=moe.target,
        options=moe.to_options(),
        recipe={
            "routing": moe.to_routing(),
            "layers": moe.layers,
            "shared_experts": moe.shared_experts,
        },
    )


def _count(name: str, text: str) -> int:
    match = _COUNT.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise UpcycleError(f"{name} '{text}' is not a number of parameters.", "Write 50B or 700M.")
    return int(float(match[1]) * 1000 ** " KMBT".index(match[2].upper() or " "))


def _memory(text: str) -> int:
    times = _TIMES.search(text)
    each = text if times is None else text[: times.start()]
    size = parse_size(each, "--gpu-memory", "80GB or 80GB×8")
    number = 1 if times is None else int(times[1])
    if not size * number:
        raise UpcycleError(f"--gpu-memory '{text}' is none at all.", "Write 80GB or 80GB×8.")
    return size * number
