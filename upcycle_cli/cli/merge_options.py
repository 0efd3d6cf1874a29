"""The options that say which other models to make experts of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from upcycle_cli.cli.option_sources import use_mergekit
from upcycle_cli.cli.shared_options import for_merge, path_argument
from upcycle_cli.core.errors import UpcycleError

if TYPE_CHECKING:
    from upcycle_cli.api import MergeRequest

ExpertsFromOption = Annotated[
    list[Path],
    for_merge(
        "--experts-from",
        metavar="MODEL",
        parser=path_argument,
        help="Another dense model of the same shapes and tokenizer to make experts of: a "
        "directory, or REPO or REPO@REVISION on the Hub; once for each. Groups take their turns, "
        "SOURCE's first.",
    ),
]
RestOption = Annotated[
    Literal["first", "mean"],
    for_merge(
        "--rest",
        metavar="NAME",
        help="Whose attention, norms and embeddings: first takes SOURCE's, mean averages all.",
    ),
]
SourceExpertsOption = Annotated[
    bool,
    for_merge(
        " /--no-source-experts",
        help="Make experts of none but the models that --experts-from names, of which SOURCE can "
        "be one.",
        show_default=False,
    ),
]
PositivePromptsOption = Annotated[
    Path | None,
    for_merge(
        "--positive-prompts",
        metavar="FILE",
        help="Make router rows of what prompts of each model look like to SOURCE: a file of YAML "
        "or JSON, from each model to its prompts.",
    ),
]
FromMergekitOption = Annotated[
    Path | None,
    for_merge(
        "--from-mergekit",
        metavar="FILE",
        help="Take models, routers and dtype from a file of mergekit-moe's; options given here go "
        "first. A single argument is OUTPUT.",
        callback=use_mergekit,
        is_eager=True,
    ),
]


def to_merge(experts_from: list[Path], rest: str, *, source_too: bool) -> MergeRequest | None:
    """Return what is to be merged, None for SOURCE alone; UpcycleError for a rest of nothing."""
    from upcycle_cli.api import MergeRequest
    from upcycle_cli.plan.merge import Rest

    if experts_from:
        return MergeRequest(experts_from=experts_from, rest=Rest(rest), source_too=source_too)
    if rest != Rest.FIRST or not source_too:
        given = "--no-source-experts" if rest == Rest.FIRST else f"--rest {rest}"
        raise UpcycleError(f"{given} is about several models.", "Add --experts-from MODEL.")
    return None
