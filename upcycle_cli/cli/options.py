"""The options that several commands take, each declared once, as the default of its parameter."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import typer

from upcycle_cli.core.text import any_of
from upcycle_cli.recipe.recipe import SHIPPED, ExpertLayout, ScaleSplit

DEMO = "demo"
"""The `obj` of a typer context when the demo runs the command."""

RoutingName = Literal["auto", "softmax-topk", "topk-softmax", "sigmoid-topk"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]

# Every option can also be set by a variable; naming it would double the length of --help.
option = functools.partial(typer.Option, show_envvar=False)

# The panels that group the options in --help.
for_recipe = functools.partial(option, rich_help_panel="Recipe")
for_weights = functools.partial(option, rich_help_panel="Routers and scaling")
for_groups = functools.partial(option, rich_help_panel="Virtual groups")
for_merge = functools.partial(option, rich_help_panel="Several models")
for_budget = functools.partial(option, rich_help_panel="Recipes that fit")
for_files = functools.partial(option, rich_help_panel="Output files")
for_hub = functools.partial(option, rich_help_panel="Hugging Face Hub")
for_run = functools.partial(option, rich_help_panel="Run")


def read_path(text: str) -> Path:
    """Read a path; an empty one is an unset shell variable, not the current directory."""
    if not text.strip():
        raise typer.BadParameter("it is empty")
    return Path(text)


path_argument = functools.partial(typer.Argument, parser=read_path)

JSON = for_run(False, "--json", help="Print one JSON object on stdout.")
QUIET = for_run(False, "--quiet", "-q", help="Print errors only.")
REVISION = for_hub(None, metavar="REV", help="Branch, tag or commit of a repo on the Hub.")
PRIVATE = for_hub(False, "--private", help="Make the repo private.")
CREATE_PR = for_hub(
    False, "--create-pr", help="Open a pull request instead of pushing to the branch."
)


def report_option(content: str) -> Any:  # noqa: ANN401 - typer's
    """Return the option for an HTML page, which shows `content`."""
    return for_run(
        None,
        "--report",
        metavar="FILE",
        help=f"Write {content} to an HTML page that works offline; needs the extra 'report'.",
    )


@dataclass(frozen=True, kw_only=True)
class MoeOptions:
    """The options that describe the MoE to make; convert and inspect take them."""

    recipe: str | None = for_recipe(
        None,
        "--recipe",
        "-r",
        metavar="EnGnTn",
        help="Expansion, granularity and top-k in the paper's notation: E8G1T2, E8G8T8.",
    )
    expansion: int | None = for_recipe(
        None, "--expansion", "-E", help="Expert parameters / MLP parameters."
    )
    granularity: int | None = for_recipe(
        None,
        "--granularity",
        "-G",
        help="Dense intermediate size / expert intermediate size.",
    )
    top_k: int | None = for_recipe(None, "--top-k", "-T", help="Experts per token.")
    expand: int | None = for_recipe(
        None,
        help="Grow an MoE instead of a dense model: duplicate each expert N times and multiply "
        "top-k by N (exact). Takes no recipe.",
        metavar="N",
    )
    target: str = for_recipe(
        "auto",
        metavar="NAME",
        help="MoE architecture, such as mixtral (`upcycle families` lists them), or "
        f"{SHIPPED}, which ships its code with the model; auto takes the one that most engines "
        "load.",
    )
    routing: RoutingName = for_recipe(
        "auto",
        metavar="NAME",
        help=f"How gates come from router logits: {any_of(get_args(RoutingName))}; auto takes "
        "the routing of the target's released models.",
    )
    layers: str | None = for_recipe(
        None,
        metavar="CHOICE",
        help="Layers that become MoE layers, such as 4-31, 0,2,4- or every:2. Default: every "
        "layer with an MLP.",
    )
    scaling: str = for_weights(
        "exact",
        metavar="RULE",
        help="Factors on the experts' weights: exact preserves the function, paper is the cube "
        "root on every matrix, none leaves the weights as they are, measured (softmax-topk only) "
        "makes the mean gain 1 on the calibration text, a number sets c.",
    )
    scale_split: ScaleSplit | None = for_weights(
        None,
        metavar="NAME",
        help="Where the factor goes: config multiplies the gates (default where the target's "
        "config has such a key), balanced splits it between up and down, down puts it all on down.",
    )
    virtual_groups: bool = for_groups(
        True,
        "--virtual-groups/--no-virtual-groups",
        help="One router row per group of G experts (default), or one per expert.",
        metavar="",  # the two names leave no room for a type
        show_default=False,
    )
    shared_experts: int = for_weights(
        0,
        metavar="K",
        help="Make K of the G shards one shared expert that every token uses, if the target has "
        "shared experts. The others form groups of G - K, and --top-k is a multiple of that.",
    )
    neuron_order: str = for_weights(
        "sliced",
        metavar="NAME|FILE",
        help="Which neurons of the dense MLP each expert gets: sliced keeps their order, shuffled "
        "permutes them differently in each virtual group, clustered puts neurons together that "
        "are active together on the calibration text, a safetensors file gives the permutations. "
        "All are exact.",
    )
    noise: float = for_weights(
        0.0,
        metavar="STD",
        help="Add Gaussian noise to every expert, STD times the weights' standard deviation (try "
        "0.01). Not exact.",
        show_default=False,
    )
    reinit: float = for_weights(
        0.0,
        metavar="SHARE",
        help="Reinitialize this share of each expert's neurons from the distribution of the "
        "original ones (Drop-Upcycling uses 0.5). Not exact.",
        show_default=False,
    )
    router_init: str = for_weights(
        "normal",
        metavar="NAME|FILE",
        help="Router rows: normal draws them at random, balanced fits them to the calibration "
        "text so that experts are chosen evenly, centroids takes cluster centres of the hidden "
        "states, a safetensors file gives them.",
    )
    calibration: str | None = for_weights(
        None,
        metavar="TEXT",
        help="Run the dense model on this text first: a file, JSON Lines, or builtin, the default "
        "where balanced, centroids, measured or clustered need one.",
    )
    router_logit_std: float | None = for_weights(
        None,
        help="Standard deviation of the router logits, measured on the calibration text if there "
        "is one. Default: 0.001 for softmax-topk, 1 for the others.",
    )
    seed: int = for_weights(
        0, help="Seed for routers, shuffled neurons, noise and reinitialized neurons."
    )
    dtype: Dtype = for_files(
        "auto",
        metavar="DTYPE",
        help=f"Dtype of every tensor: {any_of(get_args(Dtype))}; auto keeps each tensor's own.",
    )
    expert_layout: ExpertLayout | None = for_files(
        None,
        metavar="NAME",
        help="per-expert stores a tensor per expert, which every engine reads (default where the "
        "target has it); stacked one per matrix and layer, as granitemoe and qwen3_vl_moe; fused "
        "one per layer, as transformers 5 in memory.",
    )
    max_shard_size: str = for_files(
        "5GB", metavar="SIZE", help="Largest file, such as 5GB or 500MB."
    )
    untie_embeddings: bool = for_files(
        False,
        "--untie-embeddings",
        help="Write the head of a model with tied embeddings as its own tensor (llama.cpp needs "
        "it for qwen2moe).",
    )


def takes_moe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter `moe` by the options of MoeOptions, one parameter each."""
    options = inspect.signature(MoeOptions, eval_str=True).parameters

    @functools.wraps(command)
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
