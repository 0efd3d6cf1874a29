"""The command line's options: their names, help and parsing; each is declared once.

Nothing here imports torch, so `--help` and usage errors do not pay for it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from upcycle_cli.errors import UpcycleError
from upcycle_cli.families.target import ExpertLayout
from upcycle_cli.outputs import Options
from upcycle_cli.recipe import Routing, ScaleSplit, Scaling, parse_recipe_name


class TargetChoice(StrEnum):
    """What --target takes."""

    AUTO = "auto"
    MIXTRAL = "mixtral"
    QWEN2_MOE = "qwen2_moe"
    QWEN3_MOE = "qwen3_moe"


class RoutingChoice(StrEnum):
    """What --routing takes."""

    AUTO = "auto"
    SOFTMAX_TOPK = Routing.SOFTMAX_TOPK
    TOPK_SOFTMAX = Routing.TOPK_SOFTMAX


class DtypeChoice(StrEnum):
    """What --dtype takes."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


def _choices(names: type[StrEnum]) -> str:
    """Say what can be chosen, in words: between them a line of --help may end."""
    *others, last = names
    return f"{', '.join(others)} or {last}"


# Options can be set by variables, too; a line for each would double the length of --help.
option = functools.partial(typer.Option, show_envvar=False)

# The panels that --help groups the options in.
RECIPE = "Recipe"
WEIGHTS = "Routers and scaling"
GROUPS = "Virtual groups"
FILES = "Output files"
HUB = "Hugging Face Hub"
RUN = "Run"

RecipeOption = Annotated[
    str | None,
    option(
        "--recipe",
        "-r",
        metavar="EnGnTn",
        help="Expansion, granularity and top-k in the paper's notation, such as E8G1T2 or E8G8T8.",
        rich_help_panel=RECIPE,
    ),
]
ExpansionOption = Annotated[
    int | None,
    option(
        "--expansion",
        "-E",
        help="Expert parameters / MLP parameters.",
        rich_help_panel=RECIPE,
    ),
]
GranularityOption = Annotated[
    int | None,
    option(
        "--granularity",
        "-G",
        help="Dense intermediate size / expert intermediate size.",
        rich_help_panel=RECIPE,
    ),
]
TopKOption = Annotated[
    int | None,
    option("--top-k", "-T", help="Experts that each token uses.", rich_help_panel=RECIPE),
]
TargetOption = Annotated[
    TargetChoice,
    option(
        metavar="NAME",
        help=f"MoE architecture: {_choices(TargetChoice)}; auto takes the one that most software "
        "loads.",
        rich_help_panel=RECIPE,
    ),
]
RoutingOption = Annotated[
    RoutingChoice,
    option(
        metavar="NAME",
        help=f"How gates come from router logits: {_choices(RoutingChoice)}; auto does as the "
        "target's released models.",
        rich_help_panel=RECIPE,
    ),
]
InexactOption = Annotated[
    bool,
    option(
        "--allow-inexact",
        help="Allow a top-k that is not a multiple of the granularity.",
        rich_help_panel=RECIPE,
    ),
]
ScalingOption = Annotated[
    str,
    option(
        metavar="RULE",
        help="Factors on the experts: exact preserves the function, paper is the cube root on "
        "every matrix, none leaves them as they are, a number sets c itself.",
        rich_help_panel=WEIGHTS,
    ),
]
SplitOption = Annotated[
    ScaleSplit,
    option(
        metavar="NAME",
        help="balanced shares the factor between up and down, down puts it all on down.",
        rich_help_panel=WEIGHTS,
    ),
]
GroupsOption = Annotated[
    bool,
    option(
        "--virtual-groups/--no-virtual-groups",
        help="One router row per group of G experts, which is the default, or one per expert.",
        metavar="",  # its two names leave no room for a type
        show_default=False,
        rich_help_panel=GROUPS,
    ),
]
StdOption = Annotated[
    float | None,
    option(
        help="Standard deviation of the router's logits; 1 for topk-softmax and 0.001 for "
        "softmax-topk unless given.",
        rich_help_panel=WEIGHTS,
    ),
]
SeedOption = Annotated[int, option(help="Seed of the routers.", rich_help_panel=WEIGHTS)]
DtypeOption = Annotated[
    DtypeChoice,
    option(
        metavar="DTYPE",
        help=f"Dtype of every tensor: {_choices(DtypeChoice)}; auto keeps each one's own.",
        rich_help_panel=FILES,
    ),
]
LayoutOption = Annotated[
    ExpertLayout,
    option(
        metavar="NAME",
        help="per-expert writes a tensor per expert, which every engine reads; fused one per "
        "layer, as transformers 5 holds them.",
        rich_help_panel=FILES,
    ),
]
ShardOption = Annotated[
    str,
    option(metavar="SIZE", help="Largest file, such as 5GB or 500MB.", rich_help_panel=FILES),
]
UntieOption = Annotated[
    bool,
    option(
        "--untie-embeddings",
        help="Write the head of a tied model as a tensor of its own (llama.cpp's qwen2moe "
        "needs it).",
        rich_help_panel=FILES,
    ),
]
WorkersOption = Annotated[
    int,
    option(
        help="Threads that read, compute and write; 0 for one more than there are processors, "
        "at most 4.",
        rich_help_panel=RUN,
    ),
]
ReflinkOption = Annotated[
    bool,
    option(
        " /--no-reflink",
        help="Write equal parts each, even where the file system could share their extents.",
        rich_help_panel=RUN,
        show_default=False,
    ),
]
FsyncOption = Annotated[
    bool,
    option(
        " /--no-fsync",
        help="Do not wait for the disk: for scratch work only.",
        rich_help_panel=RUN,
        show_default=False,
    ),
]
JsonOption = Annotated[
    bool, option("--json", help="Print one JSON object on stdout.", rich_help_panel=RUN)
]
QuietOption = Annotated[
    bool, option("--quiet", "-q", help="Print errors only.", rich_help_panel=RUN)
]
RevisionOption = Annotated[
    str | None,
    option(metavar="REV", help="Branch, tag or commit of a repo on the Hub.", rich_help_panel=HUB),
]
PrivateOption = Annotated[
    bool,
    option("--private", help="Make the repo a private one.", rich_help_panel=HUB),
]
PullRequestOption = Annotated[
    bool,
    option(
        "--create-pr",
        help="Open a pull request instead of changing the branch.",
        rich_help_panel=HUB,
    ),
]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)


def path_argument(text: str) -> Path:
    """Read a path; an empty one is an unset variable, not the current directory."""
    if not text.strip():
        raise typer.BadParameter("it is empty")
    return Path(text)


SIZES = ("expansion", "granularity", "top_k")


def recipe_sizes(*given: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return E, G and T from what a file, variables and the command line say, each over the former.

    Each can give `recipe` or one or more of SIZES. UpcycleError when one gives both, or when
    something is missing in the end.
    """
    found: dict[str, int] = {}
    for values in given:
        separate = {name: values[name] for name in SIZES if name in values}
        if "recipe" in values:
            if separate:
                raise UpcycleError(
                    "--recipe says expansion, granularity and top-k already.",
                    "Use one or the other.",
                )
            separate = dict(zip(SIZES, parse_recipe_name(values["recipe"]), strict=True))
        found |= separate
    missing = [f"--{name.replace('_', '-')}" for name in SIZES if name not in found]
    if missing:
        raise UpcycleError(
            f"{' and '.join(missing)} missing." if found else "no recipe.",
            "Give --recipe E8G1T2 (8 experts, 2 active), or --expansion, --granularity and "
            "--top-k.",
        )
    return found["expansion"], found["granularity"], found["top_k"]


def parse_scaling(text: str) -> Scaling | float:
    """Read a named scaling, or c itself as a number."""
    if text in set(Scaling):
        return Scaling(text)
    try:
        return float(text)
    except ValueError:
        raise UpcycleError(
            f"--scaling '{text}' is neither exact, paper, none nor a number."
        ) from None


def file_options(
    dtype: DtypeChoice = DtypeChoice.AUTO,
    expert_layout: ExpertLayout = ExpertLayout.PER_EXPERT,
    max_shard_size: str = "5GB",
    *,
    untie: bool = False,
) -> Options:
    """Put together what the user wants of the files."""
    return Options(
        dtype=None if dtype is DtypeChoice.AUTO else dtype.value,
        expert_layout=expert_layout,
        max_shard_bytes=_parse_size(max_shard_size),
        untie_embeddings=untie,
    )


def _parse_size(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UpcycleError(f"--max-shard-size '{text}' is not a size.", "Write 5GB or 500MB.")
    number, unit, binary = match.groups()
    power = " KMGT".index(unit.upper() or " ")
    size = float(number) * (1024 if binary else 1000) ** power
    if not math.isfinite(size):
        raise UpcycleError(f"--max-shard-size '{text[:20]}…' is too large.", "Write 5GB or 500MB.")
    return int(size)
